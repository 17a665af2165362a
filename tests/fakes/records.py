"""A TLS 1.3 client that makes its records by hand, for what no TLS library would send (RFC 8446 sections 4.6.3, 5.2, 7).

Only what it sends: what arrives is for the socket's owner to take or to leave.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.fakes import certificates

_HANDSHAKE: Final = 22
_HTTP: Final = 23
#: The suite that OpenSSL on both sides agrees on has this hash, and keys of 32 bytes.
_HASH: Final = hashes.SHA384()


class RecordClient:
    """Connects and shakes hands; then record() and change_keys() make the bytes to send on `socket`, in their order."""

    def __init__(self, port: int) -> None:
        context = certificates.client_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with tempfile.NamedTemporaryFile("r") as log:
            context.keylog_filename = log.name
            plain = socket.create_connection(("127.0.0.1", port), timeout=10)
            secured = context.wrap_socket(plain, server_hostname="127.0.0.1")
            suite = secured.cipher()
            assert suite is not None and suite[0] == "TLS_AES_256_GCM_SHA384"
            lines = [line.split() for line in log]
        (secret,) = (words[2] for words in lines if words[0] == "CLIENT_TRAFFIC_SECRET_0")
        self._take(bytes.fromhex(secret))
        self.socket = socket.socket(fileno=secured.detach())
        self.socket.settimeout(10)

    def record(self, content: bytes, kind: int = _HTTP) -> bytes:
        inner = content + bytes((kind,))
        head = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return head + self._cipher.encrypt(nonce, inner, head)

    def change_keys(self) -> bytes:
        """A KeyUpdate that asks the peer to change its own as well."""
        record = self.record(b"\x18\0\0\1\1", _HANDSHAKE)
        self._take(_expand(self._secret, b"traffic upd", 48))
        return record

    def _take(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(_expand(secret, b"key", 32))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self._number = 0


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    label = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes((len(label),)) + label + b"\0"
    return HKDFExpand(_HASH, length, info).derive(secret)
