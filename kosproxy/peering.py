"""The peer port of a worker: what other nodes ask, answered from this node's store or its origin.

Owns: both lanes of that port, the check of signatures, what a question means to the carrier, how failures are told. Does not
own: the protocol (koscache.carrier.peer_wire), connections and their clocks (kosproxy.server), the carrier's decisions.

Fast lane: a slice that is here, of a version that is named or (an object) that may be vouched for; hints. All else is slow:
the carrier opens it or fills the block from the origin, and never asks a third node.

Invariant: nothing is looked up for a question that is not signed. An answer of 200 is followed by exactly the announced bytes
of the version that it names, or by the end of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

import msgspec
from aiohttp.web_request import BaseRequest

from kos import config, metrics
from kos.errors import KosError, OriginError, OriginRefused, OriginUnavailable, S3Error
from kos.log import Seldom
from kos.s3.object_response import render_head
from kos.s3.ranges import RangeSpec
from koscache.carrier import Body, BytesPiece, Changed, FilePiece, Freshness, Phase, Reason, Record, Want
from koscache.carrier import peer_wire as wire
from koscache.carrier.peer_pool import IDLE_S
from koscache.carrier.peer_wire import AskAhead, AskBlock, AskObject, AskTake, Failed, PeerBroken, Said
from kosproxy.exchange import Exchange, Header
from kosproxy.parts import Parts
from kosproxy.server import Connection, Edge, Sent

_log: Final = logging.getLogger("kosproxy.peering")

#: As our own client writes it; whatever else goes the slow way.
_QUESTION: Final = re.compile(
    rb"GET (/kos/1/[a-z]{1,20}) HTTP/1\.1\r\nHost: [!-~]{1,255}\r\n"
    rb"x-kos-auth: ([ -~]{1,400})\r\nx-kos-ask: ([A-Za-z0-9_=-]{1,%d})\r\n\r\n" % wire.ASK_BYTES_MAX
)
_BLOCK: Final = wire.BLOCK.encode()
_OBJECT: Final = wire.OBJECT.encode()
_AHEAD: Final = wire.AHEAD.encode()
_PEER_OUT: Final = ("peer_out",)
#: Up to here one copy through this process costs less than setting up a sendfile.
_COPY_BYTES: Final = 32 * 1024
#: A block whose last byte was just sent is in the store a moment later: its checksum is waited for.
_CHECKSUM_WAIT_S: Final = 0.5
_CHECKSUM_EVERY_S: Final = 0.01
#: Blocks in one AskAhead or AskTake that are looked at.
_AHEAD_MAX: Final = 256


B = TypeVar("B", AskBlock, AskAhead, AskTake)


class _Refused(KosError):
    """An answer other than 200. status: other than what the Failed stands for."""

    def __init__(self, failed: Failed, status: int | None = None) -> None:
        super().__init__(failed.reason)
        self.failed = failed
        self.status = wire.status_of(failed) if status is None else status


class _Answer(NamedTuple):
    """What the fast lane found: all of the head, and where the body is."""

    head: bytes
    pieces: Sequence[FilePiece]
    length: int
    path: str
    status: int = 200


def edge_of(parts: Parts) -> Edge:
    """The listening side of the peer port. Its connections are counted by themselves against limits.connections."""
    limits = parts.config.limits
    peer_limits = msgspec.structs.replace(
        limits, header_bytes=wire.HEAD_BYTES_MAX, keepalive_s=max(limits.keepalive_s, 2 * IDLE_S)
    )
    full = wire.encode(wire.not_here("at limits.connections"))
    turned_away = render_head(503, [("Content-Length", str(len(full))), ("Connection", "close")]) + full
    return Edge(Peering(parts), peer_limits, parts.threads, turned_away, field_bytes=wire.HEAD_BYTES_MAX)


class Peering:
    """Both lanes of one worker's peer port; see kosproxy.server.Lanes."""

    def __init__(self, parts: Parts) -> None:
        cluster = parts.config.cluster
        assert cluster.secret is not None, "checked with the configuration"
        self._parts = parts
        self._carrier = parts.carrier
        self._secret = cluster.secret.encode()
        self._name = config.own_name(parts.config)
        self._refusals = Seldom(parts.clock)
        self._block_bytes = parts.config.cache.block_bytes
        # The asker's hedge is not to be due before it has a head.
        self._patience_s = cluster.hedge_least_s / 2
        # Nothing else runs between filling and sending it: one buffer does for all connections.
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self.fast: Callable[[Connection, bytes], bool] = self._answer_fast

    # --- fast lane ------------------------------------------------------------------------------------------------

    def _answer_fast(self, connection: Connection, data: bytes) -> bool:
        """Answer one complete head if that can be done at once. False: nothing was done."""
        match = _QUESTION.fullmatch(data)
        if match is None or not connection.quiet:
            return False
        path, auth, ask = match.groups()
        now = self._parts.clock.now()
        try:
            wire.signer(self._secret, auth.decode(), self._name, path.decode(), ask, now)
            if path == _BLOCK:
                answer = self._find_block(wire.decode(ask, AskBlock))
            elif path == _OBJECT:
                answer = self._find_object(wire.decode(ask, AskObject), now)
            elif path == _AHEAD:
                answer = self._take_hint(wire.decode(ask, AskAhead))
            else:
                return False
        except PeerBroken:
            return False  # the slow lane says what is wrong
        if answer is None:
            return False
        if answer.length > _COPY_BYTES:
            self._relay(connection, answer)
            return True
        return self._copy(connection, answer)

    def _find_block(self, ask: AskBlock) -> _Answer | None:
        if ask.block_bytes not in (0, self._block_bytes):
            return None
        start, stop = wire.block_slice(ask, self._block_bytes)
        pieces = self._carrier.cached(ask.record, ask.bucket, ask.name, start, stop)
        if pieces is None:
            return None
        checksum = self._carrier.block_checksum(ask.record, ask.number)
        if checksum is None:
            self._carrier.give_back(pieces)
            return None
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx-kos-checksum: %016x\r\n\r\n" % (stop - start, checksum)
        return _Answer(head, pieces, stop - start, "block")

    def _find_object(self, ask: AskObject, now: float) -> _Answer | None:
        carrier = self._carrier
        record, freshness, age_s, *_ = carrier.peek(ask.bucket, ask.name, now)
        if record is None or freshness is not Freshness.FRESH or (ask.gone and record.etag == ask.gone):
            return None
        if (ask.checksum_mode and not record.checksums_known) or not carrier.vouches(ask.bucket, ask.name, record):
            return None
        start, stop = wire.object_slice(ask, record.size, self._block_bytes)
        pieces: list[FilePiece] = []
        if start < stop:
            cached = carrier.cached(record, ask.bucket, ask.name, start, stop)
            if cached is None:
                return None
            pieces = cached
        said = wire.encode(Said(record, age_s, True, start, stop, Phase.HIT, Reason.FRESH))
        checksum = carrier.block_checksum(record, 0) if start < stop else None
        more = b"" if checksum is None else b"x-kos-checksum: %016x\r\n" % checksum
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx-kos-said: %b\r\n%b\r\n" % (stop - start, said, more)
        return _Answer(head, pieces, stop - start, "object")

    def _take_hint(self, ask: AskAhead) -> _Answer | None:
        if ask.block_bytes not in (0, self._block_bytes):
            return None
        self._carrier.ahead(ask.bucket, ask.name, ask.record, ask.numbers[:_AHEAD_MAX])
        return _Answer(b"HTTP/1.1 204 No Content\r\n\r\n", (), 0, "ahead", 204)

    def _copy(self, connection: Connection, answer: _Answer) -> bool:
        """Send a small body, or none, by one write; not if it would have to come from the disk."""
        body, at = self._buffer[: answer.length], 0
        try:
            for piece in answer.pieces:
                if os.preadv(piece.fd, (body[at : at + piece.length],), piece.offset, os.RWF_NOWAIT) != piece.length:
                    return False
                at += piece.length
        except OSError:
            return False
        finally:
            self._carrier.give_back(answer.pieces)
        assert connection.transport is not None
        connection.transport.write(answer.head + body)
        connection.answered_fast()
        _count(answer.path, answer.status, "fast", answer.length)
        return True

    def _relay(self, connection: Connection, answer: _Answer) -> None:
        relay = connection.relay()
        connection.in_fast = True

        def done(failure: BaseException | None) -> None:
            self._carrier.give_back(answer.pieces)
            _count(answer.path, 200, "fast", max(0, relay.sent_bytes - len(answer.head)))
            if failure is None:
                connection.answered_fast()
            else:
                connection.drop()

        relay.start(answer.head, answer.pieces, done)

    # --- slow lane ------------------------------------------------------------------------------------------------

    async def slow(self, request: BaseRequest, connection: Connection) -> Sent:
        """See kosproxy.server.Lanes."""
        exchange = Exchange(self._parts, connection, request)
        path = exchange.head.raw_path
        try:
            try:
                await self._answer(exchange, path)
            except ConnectionError:
                raise
            except Exception as failure:
                await self._fail(exchange, _told(failure), failure)
        except ConnectionError:
            exchange.break_off()
        except asyncio.CancelledError:
            exchange.break_off()
            raise
        finally:
            _count(wire.NAMES.get(path, "none"), exchange.status, "slow", exchange.sent_bytes)
        return Sent(keep_alive=exchange.keep_alive)

    async def malformed(self, connection: Connection, error: S3Error) -> None:
        """See kosproxy.server.Lanes."""
        body = wire.encode(wire.not_here(f"not a question: {error.message}"))
        headers = [("Content-Length", str(len(body))), ("Connection", "close")]
        _count("none", wire.NOT_PROTOCOL, "slow", 0)
        try:
            await connection.send(render_head(wire.NOT_PROTOCOL, headers) + body)
        except ConnectionError:
            connection.drop()

    async def _fail(self, exchange: Exchange, refused: _Refused, failure: Exception) -> None:
        """Tell a failure, or break off when the answer has begun."""
        if exchange.begun:
            _log.warning("answer to a peer broken off", extra={"reason": str(failure)})
            exchange.break_off()
            return
        body = wire.encode(refused.failed)
        await exchange.respond(refused.status, [("Content-Length", str(len(body)))], body)
        exchange.sent_bytes = 0  # not an object's

    async def _answer(self, exchange: Exchange, path: str) -> None:
        head = exchange.head
        ask = head.headers.get(wire.ASK_HEADER, "").encode("utf-8", "surrogateescape")
        try:
            auth = head.headers.get(wire.AUTH_HEADER, "")
            wire.signer(self._secret, auth, self._name, path, ask, self._parts.clock.now())
        except PeerBroken as broken:
            if (left_out := self._refusals.left_out()) is not None:
                _log.warning("a question on the peer port was refused", extra={"reason": str(broken), "more": left_out})
            raise _Refused(wire.not_here(str(broken)), wire.UNSIGNED) from broken
        try:
            if head.method != "GET" or len(ask) > wire.ASK_BYTES_MAX:
                raise PeerBroken("not a question")
            if path == wire.OBJECT:
                await self._object(exchange, wire.decode(ask, AskObject))
            elif path == wire.BLOCK:
                await self._block(exchange, self._same_blocks(wire.decode(ask, AskBlock)))
            elif path == wire.CHECKSUM:
                await self._checksum(exchange, self._same_blocks(wire.decode(ask, AskBlock)))
            elif path == wire.AHEAD:
                await self._ahead(exchange, self._same_blocks(wire.decode(ask, AskAhead)))
            elif path == wire.TAKE:
                await self._take(exchange, self._same_blocks(wire.decode(ask, AskTake)))
            else:
                raise PeerBroken("no such question")
        except PeerBroken as broken:
            raise _Refused(wire.not_here(str(broken)), wire.NOT_PROTOCOL) from broken

    def _same_blocks(self, ask: B) -> B:
        if ask.block_bytes not in (0, self._block_bytes):
            own, theirs = self._block_bytes, ask.block_bytes
            raise _Refused(wire.not_stored(f"cache.block_size is {own} bytes here and {theirs} there"))
        return ask

    async def _object(self, exchange: Exchange, ask: AskObject) -> None:
        carrier = self._carrier
        if ask.cached:
            raise _Refused(wire.not_here("not at hand"))  # else the fast lane had answered
        arrived = self._parts.clock.now()
        wanted = RangeSpec(ask.first, ask.last) if ask.ranged else None
        # Blocks behind the first have other homes: not worth asking the origin for here. And who keeps the first keeps it whole.
        behind = ask.first is not None and ask.first >= self._block_bytes
        if ask.whole_block and ask.first is not None and not behind:
            wanted = None
        want = Want(
            head_only=ask.head_only or behind,
            range=wanted,
            checksum_mode=ask.checksum_mode,
            conditional=ask.conditional,
            document=ask.document,
        )
        opened = await carrier.open(ask.bucket, ask.name, want, direct=True, gone=ask.gone)
        try:
            if not opened.stored:
                raise _Refused(wire.not_stored(opened.reason))
            stale = opened.phase is Phase.STALE
            if stale and not ask.stale:
                raise _Refused(wire.unavailable("the origin is down", 1.0))
            record = opened.record
            start, stop = wire.object_slice(ask, record.size, self._block_bytes)
            body = carrier.body(opened, start, stop, direct=True) if start < stop else None
            # No await between the look whether it may be kept and the head's being made.
            said = Said(
                record,
                max(0.0, arrived - record.validated_at),
                not stale and carrier.vouches(ask.bucket, ask.name, record),
                start,
                stop,
                opened.phase,
                opened.reason,
                opened.origin_requests,
            )
            headers = [(wire.SAID_HEADER, wire.encode(said).decode())]
            await self._send(exchange, headers, record, 0, body, stop - start)
        finally:
            opened.close()

    async def _block(self, exchange: Exchange, ask: AskBlock) -> None:
        carrier, record = self._carrier, ask.record
        start, stop = wire.block_slice(ask, self._block_bytes)
        if carrier.block_checksum(record, ask.number) is None:
            if ask.cached:
                raise _Refused(wire.not_here("not in the store"))
            if ask.fill:
                # However short the slice: who keeps it keeps the whole block, and so does its home.
                carrier.ahead(ask.bucket, ask.name, record, (ask.number,))
        opened = carrier.version(ask.bucket, ask.name, record)
        try:
            body = carrier.body(opened, start, stop, direct=True)
            await self._send(exchange, [], record, ask.number, body, stop - start)
        finally:
            opened.close()

    async def _checksum(self, exchange: Exchange, ask: AskBlock) -> None:
        clock = self._parts.clock
        until = clock.monotonic() + _CHECKSUM_WAIT_S
        while (checksum := self._carrier.block_checksum(ask.record, ask.number)) is None:
            if clock.monotonic() >= until:
                raise _Refused(wire.not_here("not in the store"))
            await clock.sleep(_CHECKSUM_EVERY_S)
        await exchange.respond(200, [("Content-Length", "0"), (wire.CHECKSUM_HEADER, f"{checksum:016x}")])

    async def _ahead(self, exchange: Exchange, ask: AskAhead) -> None:
        self._carrier.ahead(ask.bucket, ask.name, ask.record, ask.numbers[:_AHEAD_MAX])
        await exchange.respond(204, [])

    async def _take(self, exchange: Exchange, ask: AskTake) -> None:
        if not self._carrier.take(ask.bucket, ask.name, ask.record, ask.numbers[:_AHEAD_MAX], ask.source):
            raise _Refused(wire.unavailable("no room for more at the moment", 1.0))
        await exchange.respond(204, [])

    async def _send(
        self, exchange: Exchange, headers: list[Header], record: Record, number: int, body: Body | None, length: int
    ) -> None:
        """A head, and a body that may be long in coming: then the head goes ahead of it."""
        checksum = self._carrier.block_checksum(record, number) if body is not None else None
        if checksum is not None:
            headers.append((wire.CHECKSUM_HEADER, f"{checksum:016x}"))
        headers.append(("Content-Length", str(length)))
        if body is None:
            await exchange.respond(200, headers)
            return
        exchange.begin(200, headers, length)
        # A failure that shows within that time can still be told; a body that comes within it goes with its head.
        leaving = asyncio.get_running_loop().call_later(self._patience_s, exchange.leave)
        try:
            async for piece in body:
                leaving.cancel()
                if isinstance(piece, FilePiece):
                    await exchange.relay(piece)
                elif isinstance(piece, BytesPiece):
                    await exchange.write(piece.data)
                else:
                    await exchange.stream(piece)
            await exchange.finish()
        finally:
            leaving.cancel()
            await body.aclose()


def _told(failure: Exception) -> _Refused:
    """What the asker is told of it."""
    if isinstance(failure, _Refused):
        return failure
    if isinstance(failure, Changed):
        return _Refused(wire.changed(str(failure)))
    if isinstance(failure, OriginRefused):
        return _Refused(wire.refused(failure.status, failure.headers, failure.body))
    if isinstance(failure, S3Error) and failure.status < 500:
        # A refusal that came without a document, for which we made one; so will the asker, who knows for whom.
        return _Refused(wire.refused(failure.status, failure.headers.items(), b""))
    if isinstance(failure, S3Error):
        return _Refused(wire.unavailable(failure.message, _seconds(failure.headers.get("Retry-After"))))
    if isinstance(failure, OriginUnavailable):
        return _Refused(wire.unavailable(failure.reason, failure.retry_after_s))
    if isinstance(failure, OriginError):
        return _Refused(wire.unavailable(str(failure), 1.0))
    _log.error("a question of a peer failed", exc_info=failure)
    return _Refused(wire.not_here("failed unexpectedly"), 500)


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0


def _count(path: str, status: int, lane: str, sent_bytes: int) -> None:
    metrics.PEER_ANSWER_COUNTS.add((path, str(status), lane))
    if sent_bytes:
        metrics.BYTE_COUNTS.add(_PEER_OUT, sent_bytes)
