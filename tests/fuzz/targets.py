"""What is fuzzed: one function for each parser of what strangers send, from any bytes to a checked outcome.

Owns: how bytes become the parser's arguments, and what must hold of every outcome. Does not own: where the bytes come
from (tests.fuzz.seeds has samples, tests.fuzz.run lets coverage guide them, tests/fuzz/test_fuzz.py replays and mutates).

Invariant: a target raises nothing for any bytes, unless there is a bug: what a parser refuses, it refuses by S3Error (or
by its own documented exception), which the target takes for an answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final, cast
from unittest.mock import Mock

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.web_request import BaseRequest

from kos.config import Limits
from kos.errors import S3Error
from kos.s3 import authentication, aws_chunked, checksums, completion, conditions, listing, ranges, xml
from kos.s3 import operation as operations
from kos.s3.head import RequestHead, headers_from_raw, parse_head
from kos.s3.object_response import ObjectMeta, answer, meta_from_headers, render_head
from kos.s3.operation import Handling, Op
from kos.s3.sigv4 import Identity, Payload
from kosproxy.server import Connection, Edge, Sent

NOW: Final = 1369353600.0  # 2013-05-24T00:00:00Z, the day of the published examples
SECRETS: Final = {"AKIAIOSFODNN7EXAMPLE": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "k": "s"}
META: Final = ObjectMeta('"0123"', 1000, "Fri, 24 May 2013 00:00:00 GMT", (("Content-Type", "a/b"),), (), True)


def server_head(raw: bytes) -> RequestHead | None:
    """What the server's full parser makes of one head; None if it refuses it or wants more."""
    parser = HttpRequestParser(Mock(), Mock(), 2**16, max_line_size=2**16, max_field_size=2**16)
    try:
        messages, upgraded, rest = parser.feed_data(raw)
    except HttpProcessingError:
        return None
    if len(messages) != 1 or upgraded or rest:
        return None
    message, _ = messages[0]
    path, _, query = message.path.partition("?")
    return RequestHead(message.method, path, query, headers_from_raw(message.raw_headers))


def head(data: bytes) -> None:
    """The fast parser takes nothing that the full one would have read in another way."""
    parsed = parse_head(data)
    if parsed is not None:
        assert parsed == server_head(data)


def operation(data: bytes) -> None:
    """A request is one operation or an S3 error, and what the cache may answer is plain."""
    for request in _heads(data):
        for domain in (None, "s3.test"):
            try:
                found = operations.parse(request, domain)
            except S3Error:
                continue
            if found.handling is Handling.READ:
                assert found.op in (Op.GetObject, Op.HeadObject)
                assert found.bucket and found.key and not found.bypass_reason
                assert request.method in ("GET", "HEAD")
            if found.handling is Handling.WRITE and found.op is not Op.DeleteObjects:
                assert found.bucket is not None
                assert found.key is None or found.key in found.forgets


def signature(data: bytes) -> None:
    """Nobody guesses a signature."""
    for request in _heads(data):
        for domain in (None, "s3.test"):
            try:
                claimed = authentication.claim_of(request, domain, version_2=True)
                assert not claimed.holds(SECRETS, NOW), f"{claimed} for a request that nobody signed"
                authentication.unpresigned(request, claimed)
                claimed.check(SECRETS, NOW)
            except S3Error:
                continue
            raise AssertionError("a signature that does not hold was not refused")


def chunks(data: bytes) -> None:
    """aws-chunked: the outcome does not depend on how the bytes were cut, and no more comes out than went in."""
    if len(data) < 4:
        return
    form = sorted(aws_chunked.FORMS, key=lambda each: each.value)[data[0] % len(aws_chunked.FORMS)]
    length, step, wire = (None if data[1] == 255 else data[1]), data[2] % 64 + 1, data[3:]
    names = frozenset() if form is Payload.STREAMING_SIGNED else frozenset({"x-amz-checksum-crc32"})

    def outcome(pieces: list[bytes]) -> bytes | str:
        decoder = aws_chunked.Decoder(form, _IDENTITY, length, names)
        body = b""
        try:
            for piece in pieces:
                body += b"".join(decoder.feed(piece))
            decoder.finish()
        except S3Error as error:
            return error.code
        assert length is None or len(body) == length
        return body

    whole = outcome([wire])
    edges = sorted({0, len(wire), *range(0, len(wire), step)})
    assert outcome([wire[start:stop] for start, stop in pairwise(edges)]) == whole
    assert isinstance(whole, str) or len(whole) <= len(wire)


def promises(data: bytes) -> None:
    """Whatever headers say of a body is understood and checked, or refused."""
    for request in _heads(data):
        for payload in Payload:
            try:
                aws_chunked.stored_content_encoding(request.headers.get("content-encoding"))
                check = checksums.BodyCheck(request.headers, payload, "00" * 32, 3)
                check.update(b"abc")
                check.finish({name: value for name, value in request.headers.items() if name in checksums.HEADERS})
            except S3Error:
                continue
            assert payload is not Payload.SIGNED, "no body has that hash"


def read(data: bytes) -> None:
    """Ranges, conditions and response-* parameters: one proper answer, whose head cannot be broken open."""
    for request in _heads(data):
        spec = ranges.parse(request.headers.get("range"))
        if spec is not None:
            for size in (0, 1, 1000, 2**63):
                try:
                    start, stop = ranges.resolve(spec, size)
                except S3Error:
                    continue
                assert 0 <= start < stop <= size
                assert ranges.parse(str(spec)) == spec
        conditions.evaluate(request.headers, META.etag, META.last_modified)
        try:
            params = operations.parse(RequestHead("GET", "/b/k", request.raw_query, request.headers)).params
            said = answer(request, params, META, cache_note="hit", age_s=1, request_id="i", date="d")
        except S3Error:
            continue
        text = render_head(said.status, said.headers)
        assert text.count(b"\r\n\r\n") == 1 and text.endswith(b"\r\n\r\n")
        assert 0 <= said.start <= said.stop <= META.size


def question(data: bytes) -> None:
    """A listing is a question that asks the origin for the same, or is refused, or is not for the cache."""
    for request in _heads(data):
        for path in ("/b", "/b/"):
            found = operations.parse(RequestHead("GET", path, request.raw_query, request.headers))
            if found.bucket is None or found.op not in (Op.ListObjects, Op.ListObjectsV2):
                continue
            if listing.bypass_reason(found.params, request.headers) is not None:
                continue
            try:
                asked = listing.parse(found.bucket, found.params, request.headers)
            except S3Error as refusal:
                assert refusal.code == "InvalidArgument"
                continue
            again = listing.parse(found.bucket, dict(asked.query()), dict(asked.headers()))
            assert again == asked and again.key == asked.key


def origin_head(data: bytes) -> None:
    """What an origin says of an object is a record or none; and what is shown of it is a proper head."""
    for request in _heads(data):
        for status in (200, 206):
            meta = meta_from_headers(status, request.headers)
            if meta is None:
                continue
            assert meta.etag and meta.size >= 0
            try:
                said = answer(
                    RequestHead("GET", "/b/k", "", {}), {}, meta, cache_note="hit", age_s=1, request_id="i", date="d"
                )
                text = render_head(said.status, said.headers)
            except ValueError:
                continue
            assert text.count(b"\r\n\r\n") == 1


def document(data: bytes) -> None:
    """XML from strangers: a bounded tree or a refusal."""
    try:
        root = xml.read(data, 1 << 20)
    except xml.UnreadableXML:
        pass
    else:
        assert _depth(root) <= 64
    etag = completion.multipart_etag(data)
    assert etag is None or re.fullmatch(r'"[0-9a-f]{32}-[0-9]{1,5}"', etag)
    try:
        request = xml.parse_delete_request(data)
    except S3Error:
        return
    assert 0 < len(request.items) <= xml.KEYS_MAX


def connection(data: bytes) -> None:
    """Any bytes on a connection are answered or end it: no exception is left over, no answer is torn."""
    _CONNECTIONS.feed(data)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    each.__name__: each
    for each in (head, operation, signature, chunks, promises, read, question, origin_head, document, connection)
}

_IDENTITY: Final = Identity(
    access_key="k",
    payload=Payload.STREAMING_SIGNED,
    payload_sha256=None,
    seed_signature="0" * 64,
    scope="20130524/us-east-1/s3/aws4_request",
    amz_date="20130524T000000Z",
    signing_key=bytes(32),
    presigned=False,
)


def _heads(data: bytes) -> Iterator[RequestHead]:
    """The request that the bytes are, or one made of their lines: most mutations of a sample are no HTTP any more."""
    parsed = server_head(data)
    if parsed is not None:
        yield parsed
        return
    first, *lines = data.split(b"\n")
    words = [*(word.decode("utf-8", "surrogateescape") for word in first.strip(b"\r").split(b" ")), "", ""]
    fields = [(name.strip(), value.strip(b"\r")) for name, _, value in (line.partition(b":") for line in lines)]
    path, _, query = words[1].partition("?")
    yield RequestHead(words[0] or "GET", "/" + path.removeprefix("/"), query, headers_from_raw(fields))


def _depth(element: xml.Element) -> int:
    return 1 + max((_depth(child) for child in element.children), default=0)


class _Lanes:
    """Lanes that take whatever they are given: the edge is what is looked at."""

    def fast(self, connection: Connection, data: bytes) -> bool:
        parsed = parse_head(data)
        if parsed is None or parsed.raw_path != "/fast":
            return False
        assert connection.transport is not None
        connection.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        connection.answered_fast()
        return True

    async def slow(self, request: BaseRequest, connection: Connection) -> Sent:
        while await request.content.readany():
            pass
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")
        return Sent(keep_alive=not request._message.should_close)

    async def malformed(self, connection: Connection, error: S3Error) -> None:
        await connection.send(b"HTTP/1.1 %d no\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % error.status)


class _Wire(asyncio.Transport):
    """A transport that takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        if not self.closed:
            self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Connections:
    """A loop and an edge that are kept from one input to the next; each input is a connection of its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._edge: Edge | None = None
        self._failures: list[str] = []

    def feed(self, data: bytes) -> None:
        if self._loop is None:
            # What aiohttp says of every malformed request would be most of the work.
            logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
            self._loop = asyncio.new_event_loop()
            self._loop.set_exception_handler(lambda _, context: self._failures.append(str(context)))
            self._edge = self._loop.run_until_complete(self._make())
        self._failures.clear()
        self._loop.run_until_complete(self._one(data))
        assert not self._failures, self._failures

    async def _make(self) -> Edge:
        return Edge(_Lanes(), Limits(), ThreadPoolExecutor(1), b"HTTP/1.1 503 Slow Down\r\n\r\n")

    async def _one(self, data: bytes) -> None:
        assert self._edge is not None
        wire = _Wire()
        one = self._edge()
        one.connection_made(cast(asyncio.Transport, wire))
        await asyncio.sleep(0)
        step = max(1, data[0] if data else 1)
        for start in range(1, len(data), step):
            if wire.closed:
                break
            one.data_received(data[start : start + step])
            await asyncio.sleep(0)
        for _ in range(6):
            await asyncio.sleep(0)
        if not wire.closed:
            one.eof_received()
        one.connection_lost(None)
        for _ in range(6):
            await asyncio.sleep(0)
        _check_answers(bytes(wire.sent))


def _check_answers(sent: bytes) -> None:
    """Whole answers, one after the other."""
    while sent:
        status, separator, rest = sent.partition(b"\r\n\r\n")
        assert separator and status.startswith(b"HTTP/1.1 "), sent
        length = int(status.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        assert len(rest) >= length, sent
        sent = rest[length:]


_CONNECTIONS: Final = _Connections()

if __name__ == "__main__":
    print(*TARGETS)
