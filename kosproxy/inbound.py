"""The body of a request, checked while it passes.

Owns: how long a body will be, undoing aws-chunked, checking every promise about it, the idle time-out of a client that
stops sending, holding back its end, and the memory of bodies that are held whole. Does not own: the checks themselves
(kos.s3.aws_chunked, kos.s3.checksums) or where the bytes go.

Invariant: the last byte of a body is given out only after the whole body was found to be what the client had promised.
The receiver was told the length beforehand, so a body that fails is one byte short at least, and never an object.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

from aiohttp.http_exceptions import PayloadEncodingError
from aiohttp.web_protocol import RequestPayloadError

from kos import metrics
from kos.errors import S3Error
from kos.s3 import aws_chunked, completion, xml
from kos.s3.checksums import HEADER_PREFIX, BodyCheck
from kos.s3.head import RequestHead
from kos.s3.operation import Op, Operation
from kos.s3.sigv4 import Identity, Payload
from kosproxy.exchange import Exchange

T = TypeVar("T")

#: Operations whose body is a document, in XML or JSON: held whole, and sent with a Content-MD5, which older stores demand
#: of them and which clients have stopped sending since they send other checksums.
DOCUMENTS: Final = frozenset(
    {
        Op.BucketSubresourceWrite,
        Op.CreateBucket,
        Op.DeleteObjects,
        Op.PutObjectAcl,
        Op.PutObjectLegalHold,
        Op.PutObjectRetention,
        Op.PutObjectTagging,
        Op.RestoreObject,
        Op.UpdateObjectEncryption,
    }
)
#: The largest documents that S3 takes: a DeleteObjects or a CompleteMultipartUpload of 8 MB. Others have 2 MB and less.
DOCUMENT_MAX_BYTES: Final = max(xml.DELETE_REQUEST_MAX_BYTES, completion.REQUEST_MAX_BYTES)
#: Operations that are nothing without a body: a request without a length may not pass for one with an empty body.
_NEED_LENGTH: Final = frozenset({Op.PutObject, Op.UploadPart})
#: SHA-256 takes up to 3 ms a MiB. From this size on a piece is hashed beside the loop: handing it over costs 0.1 ms.
_THREAD_BYTES: Final = 64 * 1024
#: Chunks of a few bytes are legal: from so many at once on they are unpacked beside the loop.
_PIECES_MAX: Final = 16
_SIGNED_CHUNKS: Final = frozenset({Payload.STREAMING_SIGNED, Payload.STREAMING_SIGNED_TRAILER})
_LENGTH: Final = re.compile(r"[0-9]{1,20}", re.ASCII)


def body_length(head: RequestHead, operation: Operation, identity: Identity) -> int:
    """Bytes of the decoded body. Raises MissingContentLength, EntityTooLarge, InvalidArgument."""
    headers = head.headers
    if identity.payload in aws_chunked.FORMS:
        return aws_chunked.decoded_length(headers)
    text = headers.get("content-length")
    if text is None:
        if "transfer-encoding" in headers or operation.op in _NEED_LENGTH:
            raise S3Error("MissingContentLength")
        return 0
    if not _LENGTH.fullmatch(text):
        raise S3Error("InvalidArgument", extra={"ArgumentName": "Content-Length", "ArgumentValue": text})
    if int(text) > aws_chunked.BODY_MAX_BYTES:
        raise S3Error("EntityTooLarge", extra={"ProposedSize": text, "MaxSizeAllowed": str(aws_chunked.BODY_MAX_BYTES)})
    return int(text)


class Inbound:
    """One body. Made after authentication; raises S3Error for promises that cannot be kept or understood.

    Iterate it once, or read() it. trailers and the check's results are there afterwards. close() it when the request has
    been answered: until then what was read counts as held.
    """

    def __init__(self, exchange: Exchange, operation: Operation, identity: Identity) -> None:
        head = exchange.head
        self._exchange = exchange
        self._limits = exchange.parts.config.limits
        self._held_bytes = 0
        self.length = body_length(head, operation, identity)
        self._decoder: aws_chunked.Decoder | None = None
        if identity.payload in aws_chunked.FORMS:
            names = aws_chunked.announced_trailers(head.headers)
            self._decoder = aws_chunked.Decoder(identity.payload, identity, self.length, names)
        # Whether undoing the chunks is much work: signatures, or very small chunks.
        self._laborious = identity.payload in _SIGNED_CHUNKS
        self.check = BodyCheck(
            head.headers,
            identity.payload,
            identity.payload_sha256,
            self.length,
            also=("md5",) if operation.op in DOCUMENTS and self.length else (),
            object_checksums=operation.op is Op.CompleteMultipartUpload,
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The decoded body in pieces, the last one only after everything was verified."""
        held = b""
        left = self.length
        hashing: asyncio.Future[None] | None = None
        async for piece in self._decoded():
            if hashing is not None:
                await hashing
                hashing = None
            left -= len(piece)
            if left >= 0 and len(piece) >= _THREAD_BYTES and self.check.computes:
                hashing = self._in_thread(self.check.update, piece)
            else:
                self.check.update(piece)  # raises for a body that is longer than announced
            if left:
                yield piece
            else:
                held = piece
        if hashing is not None:
            await hashing
        if self._decoder is not None:
            self._decoder.finish()
        self.check.finish(self.trailers)
        if held:
            yield held

    def _in_thread(self, compute: Callable[[bytes], T], data: bytes) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._exchange.parts.hashers, compute, data)

    @property
    def trailers(self) -> dict[str, str]:
        """Verified trailers of an aws-chunked body that has ended."""
        return {} if self._decoder is None else self._decoder.trailers

    @property
    def content_md5(self) -> str | None:
        """Content-MD5 of a document that was read."""
        return self.check.computed.get(HEADER_PREFIX + "md5")

    async def read(self, max_bytes: int) -> bytes:
        """A whole small body. Raises, before reading it, MaxMessageLengthExceeded beyond max_bytes, and SlowDown when it
        is longer than limits.relay_buffer and the worker holds too many such already."""
        if self.length > max_bytes:
            raise S3Error("MaxMessageLengthExceeded", extra={"MaxMessageLengthBytes": str(max_bytes)})
        if self.length > self._limits.relay_buffer_bytes:
            self._exchange.parts.held.take(self.length, self._limits.held_bodies_bytes)
            self._held_bytes = self.length
        whole = bytearray()  # pieces of two bytes, kept one by one, would take twenty times their length
        async for piece in self:
            whole += piece
        return bytes(whole)

    def close(self) -> None:
        """The body is not needed any more."""
        self._exchange.parts.held.give_back(self._held_bytes)
        self._held_bytes = 0

    async def _decoded(self) -> AsyncIterator[bytes]:
        exchange, decoder = self._exchange, self._decoder
        # For an empty body too: aws-cli 1 takes an answer without it for that to its next request as well.
        await exchange.continue_body()
        async for data in self._received():
            if decoder is None:
                yield data
            elif not self._laborious or len(data) < _THREAD_BYTES:
                if piece := self._unpack(data):
                    yield piece
            else:
                async for piece in self._unpacked_in_thread(data):
                    yield piece

    async def _unpacked_in_thread(self, data: bytes) -> AsyncIterator[bytes]:
        """Unpack data beside the loop, and go on with what has come meanwhile while the piece is on its way."""
        coming: asyncio.Future[bytes] | None = self._in_thread(self._unpack, data)
        try:
            while coming is not None:
                piece, coming = await coming, None
                more = self._here()
                if more:
                    coming = self._in_thread(self._unpack, more)
                if piece:
                    yield piece
        finally:
            if coming is not None:
                coming.cancel()

    def _unpack(self, data: bytes) -> bytes:
        """The decoded bytes of data in one piece: each costs some 50 µs on its way, copying them together less."""
        assert self._decoder is not None
        pieces = self._decoder.feed(data)
        if len(pieces) > _PIECES_MAX:
            self._laborious = True
        only = pieces[0] if len(pieces) == 1 else None
        return only if isinstance(only, bytes) else b"".join(pieces)

    def _here(self) -> bytes:
        """What has been received and not been read yet; b"" also when that has failed, which reading will show."""
        content = self._exchange.request.content
        if content.exception() is not None:
            return b""
        data = content.read_nowait()
        metrics.BYTE_COUNTS.add(("client",), len(data))
        return data

    async def _received(self) -> AsyncIterator[bytes]:
        content = self._exchange.request.content
        while True:
            try:
                async with asyncio.timeout(self._limits.body_timeout_s):
                    data = await content.readany()
            except TimeoutError:
                self._exchange.keep_alive = False
                self._exchange.connection.close_after_answer()
                raise S3Error("RequestTimeout") from None
            except (RequestPayloadError, PayloadEncodingError) as error:
                # HTTP's own framing is broken: where the next request would begin nobody knows.
                self._exchange.keep_alive = False
                raise S3Error("IncompleteBody") from error
            except ConnectionError as gone:
                # The reader keeps this one: raised through here, it would keep the frames, and the body in them, until the
                # collector comes.
                gone.__traceback__ = None
                raise ConnectionResetError("the client is gone") from None
            if not data:
                return
            metrics.BYTE_COUNTS.add(("client",), len(data))
            yield data
