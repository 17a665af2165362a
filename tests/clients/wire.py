"""Requests as SDKs of other languages send them, byte by byte, signed here.

Owns: a small HTTP/1.1 client that sends the headers it is given and no others, in their order; Signature Version 4 over
whichever headers an SDK signs; signed chunks. It shares no code with kos, so that a misreading of the protocol shows as a
failing test and not as an agreement.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import socket
import ssl
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote
from xml.etree import ElementTree

from tests.clients.conftest import Endpoint
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

UNSIGNED = "UNSIGNED-PAYLOAD"
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_CHUNKS_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
UNSIGNED_CHUNKS_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
#: What both SDKs for Java cut bodies into.
CHUNK_BYTES = 128 * 1024
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
#: Never signed: what proxies change, and the signature itself.
NEVER_SIGNED = frozenset({"authorization", "connection", "expect", "transfer-encoding"})
REGION = "us-east-1"

Query = Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def cache(self) -> str:
        """hit, miss … as x-kos-cache says."""
        return self.headers.get("x-kos-cache", "").partition(";")[0]

    def texts(self, name: str) -> list[str]:
        """The texts of all elements of that name in the XML body, in order."""
        found = ElementTree.fromstring(self.body).iter()
        return [each.text or "" for each in found if each.tag.rpartition("}")[2] == name]

    def text(self, name: str) -> str:
        (only,) = self.texts(name)
        return only


class Connection:
    """One connection that stays open between requests, as SDKs keep theirs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        host, _, port = endpoint.host.partition(":")
        plain = socket.create_connection((host, int(port)), timeout=30)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trust = ssl.create_default_context(cafile=endpoint.verify) if endpoint.secure else None
        self._socket = trust.wrap_socket(plain, server_hostname=host) if trust else plain

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(
        self,
        method: str,
        path: str,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        payload: str | None = None,
        not_signed: Iterable[str] = (),
        trailer: tuple[str, str] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Answer:
        """Sends one request and reads its answer.

        path: decoded. query: decoded pairs in the order to be sent; None is a name without "=". headers: in the order to
        be sent, all signed but those in not_signed. payload: x-amz-content-sha256, default the body's hash; with one of
        the chunked forms the body is encoded, with its trailer. With Expect the body follows after "100 Continue".
        """
        raw_path = quote(path, safe="/~")
        raw_query = "&".join(_pair(name, value) for name, value in query)
        target = f"{raw_path}?{raw_query}" if raw_query else raw_path
        payload = payload or hashlib.sha256(body).hexdigest()
        amz_date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        fields = {
            "Host": self.endpoint.host,
            **(headers or {}),
            "x-amz-date": amz_date,
            "x-amz-content-sha256": payload,
        }
        encoded = body
        if payload.startswith("STREAMING-"):
            fields["x-amz-decoded-content-length"] = str(len(body))
            if trailer is not None:
                fields["x-amz-trailer"] = trailer[0]
            blank = _Signer(amz_date, "0" * 64)
            encoded = _encode(body, payload, trailer, chunk_bytes, blank)
        if not encoded:
            fields.pop("Expect", None)  # HTTP clients ask only for what there is
        if encoded or method in ("PUT", "POST"):
            fields["Content-Length"] = str(len(encoded))
        unsigned = NEVER_SIGNED | {name.lower() for name in not_signed}
        seed, fields["Authorization"] = _authorization(method, raw_path, query, fields, unsigned, amz_date, payload)
        if payload.startswith("STREAMING-"):
            encoded = _encode(body, payload, trailer, chunk_bytes, _Signer(amz_date, seed))
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        if "Expect" in fields:
            assert self._head().startswith(b"HTTP/1.1 100 "), "told to go on before the body is sent"
        self._socket.sendall(encoded)
        answer = http.client.HTTPResponse(self._socket, method=method)
        answer.begin()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def _head(self) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self._socket.recv(1)
            assert byte, head
            head += byte
        return head


def crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body).digest()).decode()


class _Signer:
    """The chain of signatures that starts with the request's own."""

    def __init__(self, amz_date: str, seed: str) -> None:
        self._date, self._previous = amz_date, seed

    def chunk(self, piece: bytes) -> str:
        return self._next("AWS4-HMAC-SHA256-PAYLOAD", f"{EMPTY_SHA256}\n{hashlib.sha256(piece).hexdigest()}")

    def trailer(self, line: str) -> str:
        return self._next("AWS4-HMAC-SHA256-TRAILER", hashlib.sha256(f"{line}\n".encode()).hexdigest())

    def _next(self, kind: str, digests: str) -> str:
        text = f"{kind}\n{self._date}\n{_scope(self._date)}\n{self._previous}\n{digests}"
        self._previous = hmac.digest(_key(self._date), text.encode(), "sha256").hex()
        return self._previous


def _encode(body: bytes, payload: str, trailer: tuple[str, str] | None, chunk_bytes: int, signer: _Signer) -> bytes:
    signed = payload != UNSIGNED_CHUNKS_TRAILER
    pieces = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    encoded = b""
    for piece in [*pieces, b""]:
        signature = f";chunk-signature={signer.chunk(piece)}" if signed else ""
        encoded += f"{len(piece):x}{signature}\r\n".encode() + piece
        if piece:
            encoded += b"\r\n"
    if trailer is not None:
        name, value = trailer
        line = f"{name}:{value}"
        encoded += f"{line}\r\n".encode()
        if signed:
            encoded += f"x-amz-trailer-signature:{signer.trailer(line)}\r\n".encode()
    return encoded + b"\r\n"


def _authorization(
    method: str,
    raw_path: str,
    query: Query,
    fields: Mapping[str, str],
    unsigned: frozenset[str],
    amz_date: str,
    payload: str,
) -> tuple[str, str]:
    """The signature, and the header with it."""
    signed = {name.lower(): " ".join(value.split()) for name, value in fields.items() if name.lower() not in unsigned}
    names = sorted(signed)
    pairs = sorted((quote(name, safe="~"), quote(value or "", safe="~")) for name, value in query)
    canonical = "\n".join(
        [
            method,
            raw_path,
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{signed[name]}" for name in names),
            "",
            ";".join(names),
            payload,
        ]
    )
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{amz_date}\n{_scope(amz_date)}\n{digest}"
    signature = hmac.digest(_key(amz_date), text.encode(), "sha256").hex()
    credential = f"{ACCESS_KEY}/{_scope(amz_date)}"
    claims = f"Credential={credential}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return signature, f"AWS4-HMAC-SHA256 {claims}"


def _scope(amz_date: str) -> str:
    return f"{amz_date[:8]}/{REGION}/s3/aws4_request"


def _key(amz_date: str) -> bytes:
    key = f"AWS4{SECRET_KEY}".encode()
    for part in _scope(amz_date).split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _pair(name: str, value: str | None) -> str:
    return quote(name, safe="~") + ("" if value is None else "=" + quote(value, safe="~"))
