"""What a client promises about a body, and whether the body keeps it.

Owns: x-amz-content-sha256 of a signed body, Content-MD5, x-amz-checksum-* in headers and trailers, the length;
computing them on the way. Does not own: signatures (kos.s3.sigv4, kos.s3.aws_chunked), checksums that the origin tells
about stored objects (kos.s3.object_response).

Invariant: finish() returns only when every promise was understood, computed over every byte, and kept. A trailer that
cannot be checked is refused. A checksum header of an algorithm that kos does not know is no promise to kos: it goes on
with the very bytes that it speaks of to the origin, which checks it or says that it cannot.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html, API/API_PutObject.html,
API/API_Checksum.html (the algorithms). CRC-32C and CRC-64/NVME come from awscrt (10 GB/s; Python has neither), XXH64,
XXH3 and XXH128 from xxhash (canonical, so big-endian, form; seed 0), the others from the standard library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

import xxhash
from awscrt import checksums as crt

from kos.errors import S3Error
from kos.s3.aws_chunked import announced_trailers
from kos.s3.head import Headers
from kos.s3.sigv4 import Payload

HEADER_PREFIX: Final = "x-amz-checksum-"
#: Algorithm -> bytes of its value before Base64.
ALGORITHMS: Final[Mapping[str, int]] = {
    "crc32": 4,
    "crc32c": 4,
    "crc64nvme": 8,
    "sha1": 20,
    "sha256": 32,
    "sha512": 64,
    "md5": 16,
    "xxhash64": 8,
    "xxhash3": 8,
    "xxhash128": 16,
}
HEADERS: Final[Mapping[str, str]] = {HEADER_PREFIX + algorithm: algorithm for algorithm in ALGORITHMS}
_TRAILER_FORMS: Final = frozenset({Payload.STREAMING_SIGNED_TRAILER, Payload.STREAMING_UNSIGNED_TRAILER})


class _Digest(Protocol):
    def update(self, data: bytes, /) -> object: ...
    def digest(self) -> bytes: ...


class _Crc:
    """A running CRC with the face of a hashlib object."""

    __slots__ = ("_bytes", "_compute", "_value")

    def __init__(self, compute: Callable[[bytes, int], int], length: int) -> None:
        self._compute = compute
        self._bytes = length
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = self._compute(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._bytes, "big")


_NEW: Final[Mapping[str, Callable[[], _Digest]]] = {
    "crc32": lambda: _Crc(zlib.crc32, 4),
    "crc32c": lambda: _Crc(crt.crc32c, 4),
    "crc64nvme": lambda: _Crc(crt.crc64nvme, 8),
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "xxhash64": xxhash.xxh64,
    "xxhash3": xxhash.xxh3_64,
    "xxhash128": xxhash.xxh3_128,
}


def encoded_length(algorithm: str) -> int:
    """Characters of an algorithm's value in Base64: what aws_chunked.unsigned_trailer_length wants to know."""
    return (ALGORITHMS[algorithm] + 2) // 3 * 4


class BodyCheck:
    """Checks one body while it passes.

    headers: of the request. payload, payload_sha256: from its Identity (payload_sha256 is hex, for Payload.SIGNED).
    length: bytes that the body must have, decoded; None if not known. also: algorithms to compute beyond what was
    promised, for `computed`. object_checksums: the x-amz-checksum-* headers speak of an object and not of this body
    (CompleteMultipartUpload, where they may also be composites like "…-3"), so they are left alone; a trailer speaks of
    the body that it ends, always.

    The constructor raises InvalidRequest (several checksums, an unreadable one, a trailer that is no checksum) and
    InvalidDigest (an unreadable Content-MD5). x-amz-sdk-checksum-algorithm names what is sent anyway: it is ignored.
    """

    def __init__(
        self,
        headers: Headers,
        payload: Payload,
        payload_sha256: str | None,
        length: int | None,
        *,
        also: Iterable[str] = (),
        object_checksums: bool = False,
    ) -> None:
        self._length = length
        self._received = 0
        self._payload_sha256 = payload_sha256.lower() if payload is Payload.SIGNED and payload_sha256 else None
        md5 = headers.get("content-md5")
        self._md5 = None if md5 is None else _decode(md5, 16)
        if md5 is not None and self._md5 is None:
            raise S3Error("InvalidDigest", "The Content-MD5 you specified was invalid.", extra={"Content-MD5": md5})
        #: The algorithm that the client chose, None if it sent no checksum.
        self.algorithm: str | None = None
        self._promised: bytes | None = None
        #: x-amz-checksum-* name -> Base64 value, for what was promised or asked for by `also`; filled by finish().
        self.computed: dict[str, str] = {}
        self._read_promise({} if object_checksums else headers, announced_trailers(headers), payload in _TRAILER_FORMS)
        self._wanted = dict.fromkeys(also)
        if self.algorithm is not None:
            self._wanted[self.algorithm] = None
        names = set(self._wanted)
        if self._md5 is not None:
            names.add("md5")
        if self._payload_sha256 is not None:
            names.add("sha256")
        self._digests = {name: _NEW[name]() for name in sorted(names)}
        self._running = tuple(self._digests.values())

    def _read_promise(self, headers: Headers, trailer_names: frozenset[str], trailers_come: bool) -> None:
        # Trailers announced for a form that has none could never be checked.
        if not trailer_names <= HEADERS.keys() or (trailer_names and not trailers_come):
            raise S3Error("InvalidRequest", "The value specified in the x-amz-trailer header is not supported")
        in_headers = [name for name in HEADERS if name in headers]
        if len(in_headers) + len(trailer_names) > 1:
            raise S3Error(
                "InvalidRequest",
                "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.",
            )
        for name in in_headers:
            self.algorithm = HEADERS[name]
            self._promised = _decode_checksum(name, headers[name])
        for name in trailer_names:
            self.algorithm = HEADERS[name]

    @property
    def computes(self) -> bool:
        """Whether update() has anything to compute; else it only counts."""
        return bool(self._running)

    def update(self, data: bytes) -> None:
        """The next bytes of the body, decoded. Raises IncompleteBody as soon as there are more than `length`."""
        self._received += len(data)
        if self._length is not None and self._received > self._length:
            raise self._wrong_length()
        for digest in self._running:
            digest.update(data)

    def finish(self, trailers: Headers | None = None) -> None:
        """The body has ended; trailers: verified, from aws_chunked.Decoder.

        Raises IncompleteBody, XAmzContentSHA256Mismatch, BadDigest, MalformedTrailerError (an announced checksum did
        not come), InvalidRequest (its value cannot be read).
        """
        if self._length is not None and self._received != self._length:
            raise self._wrong_length()
        values = {name: digest.digest() for name, digest in self._digests.items()}
        if self._payload_sha256 is not None:
            own = values["sha256"].hex()
            if not hmac.compare_digest(own.encode(), self._payload_sha256.encode()):
                raise S3Error(
                    "XAmzContentSHA256Mismatch",
                    extra={"ClientComputedContentSHA256": self._payload_sha256, "S3ComputedContentSHA256": own},
                )
        if self._md5 is not None and values["md5"] != self._md5:
            raise S3Error(
                "BadDigest",
                "The Content-MD5 you specified did not match what we received.",
                extra={"ExpectedDigest": _encode(self._md5), "CalculatedDigest": _encode(values["md5"])},
            )
        if self.algorithm is not None:
            self._check_promise(self.algorithm, values[self.algorithm], trailers or {})
        self.computed = {HEADER_PREFIX + name: _encode(values[name]) for name in self._wanted}

    def _check_promise(self, algorithm: str, value: bytes, trailers: Headers) -> None:
        promised = self._promised
        if promised is None:
            name = HEADER_PREFIX + algorithm
            if name not in trailers:
                raise S3Error("MalformedTrailerError")
            promised = _decode_checksum(name, trailers[name])
        if value != promised:
            raise S3Error("BadDigest", f"The {algorithm.upper()} you specified did not match the calculated checksum.")

    def _wrong_length(self) -> S3Error:
        return S3Error(
            "IncompleteBody",
            extra={"NumberBytesExpected": str(self._length), "NumberBytesProvided": str(self._received)},
        )


def _decode_checksum(name: str, text: str) -> bytes:
    value = _decode(text, ALGORITHMS[HEADERS[name]])
    if value is None:
        raise S3Error("InvalidRequest", f"Value for {name} header is invalid.")
    return value


def _decode(text: str, length: int) -> bytes | None:
    """Exactly `length` bytes from strict Base64, or None."""
    try:
        value = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return None
    return value if len(value) == length else None


def _encode(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
