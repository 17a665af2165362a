"""A client's request as kos asks it of the origin: the same question under kos' own signature.

Owns: which headers and query parameters go on, and how the body is framed and announced to the origin. Does not own:
signing and sending (kos.origin.lane), checking the body (kosproxy.inbound).

Invariant: nothing of the client's authentication reaches the origin, and nothing of what the client asks is lost.

Sources: RFC 9110 section 7.6.1 (hop-by-hop); https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from kos.s3 import aws_chunked, checksums
from kos.s3.head import RequestHead
from kos.s3.names import parse_query
from kos.s3.operation import Op, Operation
from kos.s3.sigv4 import Identity, Payload
from kosproxy.inbound import DOCUMENT_MAX_BYTES, DOCUMENTS, Inbound

HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# The client's authentication and framing; both are made anew for the origin. What a client can unpack is between it and
# kos, which hands on what the origin stored: an origin that packed an answer for it would answer something else.
_OWN: Final = frozenset(
    {
        "accept-encoding", "authorization", "content-encoding", "content-length", "date", "expect", "host",
        "x-amz-content-sha256", "x-amz-date", "x-amz-decoded-content-length", "x-amz-security-token", "x-amz-trailer",
    }
)  # fmt: skip
_PRESIGN: Final = frozenset(
    {
        "x-amz-algorithm", "x-amz-content-sha256", "x-amz-credential", "x-amz-date", "x-amz-expires",
        "x-amz-security-token", "x-amz-signature", "x-amz-signedheaders",
    }
)  # fmt: skip

_ALGORITHM: Final = "x-amz-sdk-checksum-algorithm"


@dataclass(frozen=True, slots=True)
class Outbound:
    """query: decoded pairs. body: None or pieces of exactly content_length bytes together. payload_hash: for signing."""

    query: list[tuple[str, str]]
    headers: list[tuple[str, str]]
    body: AsyncIterator[bytes | memoryview] | bytes | None
    content_length: int | None
    payload_hash: str


def question(head: RequestHead) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(query, headers) for the origin, without what announces the body. head: as if signed in its headers.

    What Connection names beyond the fields that RFC 9110 calls hop-by-hop goes on: Connection is not signed, and it
    would take away headers that are, such as the encryption that a presigned URL demands.
    """
    headers = [(name, value) for name, value in head.headers.items() if name not in _OWN and name not in HOP_BY_HOP]
    encoding = aws_chunked.stored_content_encoding(head.headers.get("content-encoding"))
    if encoding is not None:
        headers.append(("content-encoding", encoding))
    query = [(name, value) for name, value in parse_query(head.raw_query) if name.lower() not in _PRESIGN]
    return query, headers


async def outbound(
    head: RequestHead,
    operation: Operation,
    identity: Identity,
    inbound: Inbound,
    *,
    whole_bytes: int,
    trailing_checksums: bool,
) -> Outbound:
    """The request with its body. Raises what checking the body raises: of a body up to whole_bytes, and of a document,
    before anything is sent, of any other while it is on its way.

    A body of the first kind is all here when the origin is asked, so that no slow client holds a connection to it, and
    it can be sent twice. Of the others at least the beginning is here.
    """
    if inbound.length <= whole_bytes:
        return whole(head, operation, identity, inbound, await inbound.read(whole_bytes))
    if operation.op in DOCUMENTS or operation.op is Op.CompleteMultipartUpload:
        return whole(head, operation, identity, inbound, await inbound.read(DOCUMENT_MAX_BYTES))
    query, headers = question(head)
    length = inbound.length
    algorithm = inbound.check.algorithm
    body = await _begun(aiter(inbound))
    if not _trailers_come(head, identity):
        return Outbound(query, headers, body, length, _hash(identity))
    if algorithm is None or not trailing_checksums:
        # With nothing behind the body, nothing may be announced.
        return Outbound(query, _without(headers, _ALGORITHM), body, length, _hash(identity))
    name = checksums.HEADER_PREFIX + algorithm
    encoded = aws_chunked.unsigned_trailer_length(length, name, checksums.encoded_length(algorithm))
    stored = next((value for header, value in headers if header == "content-encoding"), None)
    headers = _without(headers, "content-encoding")
    headers += [
        ("content-encoding", "aws-chunked" if stored is None else f"aws-chunked,{stored}"),
        ("x-amz-decoded-content-length", str(length)),
        ("x-amz-trailer", name),
    ]
    payload_hash = Payload.STREAMING_UNSIGNED_TRAILER.value
    return Outbound(query, headers, _with_trailer(body, inbound, length, name), encoded, payload_hash)


def whole(head: RequestHead, operation: Operation, identity: Identity, inbound: Inbound, body: bytes) -> Outbound:
    """The request with a body that was read, and so verified, already; a trailer's checksum becomes a header, which every
    store takes that knows checksums at all."""
    query, headers = question(head)
    if operation.op is not Op.CompleteMultipartUpload:
        headers += inbound.trailers.items()
    elif inbound.trailers:
        # As a header it would speak of the object, not of this list of its parts.
        headers = _without(headers, _ALGORITHM)
    if operation.op in DOCUMENTS and body and "content-md5" not in head.headers and inbound.content_md5 is not None:
        headers.append(("content-md5", inbound.content_md5))
    has_body = bool(body) or head.method in ("PUT", "POST") or "content-length" in head.headers
    return Outbound(query, headers, body if has_body else None, len(body) if has_body else None, _hash(identity))


def _trailers_come(head: RequestHead, identity: Identity) -> bool:
    return identity.payload in aws_chunked.FORMS and bool(aws_chunked.announced_trailers(head.headers))


def _without(headers: list[tuple[str, str]], dropped: str) -> list[tuple[str, str]]:
    return [pair for pair in headers if pair[0] != dropped]


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, the first of which is here already."""
    first = await anext(pieces)

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_pieces()


def _hash(identity: Identity) -> str:
    """A hash that the client gave is passed on: so the origin checks the same bytes once more."""
    if identity.payload is Payload.SIGNED and identity.payload_sha256 is not None:
        return identity.payload_sha256
    return Payload.UNSIGNED.value


async def _with_trailer(
    pieces: AsyncIterator[bytes], inbound: Inbound, length: int, name: str
) -> AsyncIterator[bytes | memoryview]:
    """The body aws-chunked with its checksum behind it. That, and the last piece, come only when all was verified."""
    encoder = aws_chunked.Encoder(length, name)
    async for piece in pieces:
        for encoded in encoder.encode(piece):
            yield encoded
    yield encoder.finish(inbound.trailers[name])
