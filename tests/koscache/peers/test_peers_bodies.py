"""What comes of a peer's answer: whole or broken, held back, given up; heads that are none."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable

import pytest

from kos import metrics
from kos.errors import OriginBroken
from koscache.carrier import peer_wire as wire
from koscache.carrier.peer_connection import parse_head
from koscache.carrier.peer_response import PeerResponse
from koscache.carrier.peer_wire import PeerBroken
from koscache.carrier.peers import Peers, PeerUnavailable
from koscache.content import Record
from tests.conditions import until
from tests.fakes.peer import FakePeer, block, hangs, head, peers_of, says, sends

MIB = 1 << 20
BODY = random.Random(5).randbytes(3 * MIB + 17)


async def answer(peers: Peers, length: int = len(BODY)) -> PeerResponse:
    return await peers.ask(["a"], wire.BLOCK, block(length))


class Sink:
    """Takes the bytes; full after so many pieces, until emptied."""

    def __init__(self, room: int = 100_000, full_every: int = 0) -> None:
        self.got = bytearray()
        self.full_every = full_every
        self.pieces = 0
        self.full = asyncio.Event()
        self.error: Exception | None = None
        self._buffer = bytearray(room)
        self._paused = False

    def get_buffer(self) -> memoryview:
        assert not self._paused, "not asked for room while it has none"
        if self.error is not None:
            raise self.error
        return memoryview(self._buffer)

    def received(self, n: int) -> bool:
        assert not self._paused
        self.got += self._buffer[:n]
        self.pieces += 1
        if self.full_every and self.pieces % self.full_every == 0:
            self._paused = True
            self.full.set()
            return False
        return True

    def empty(self) -> None:
        self.full.clear()
        self._paused = False


async def read(response: PeerResponse) -> bytes:
    return await response.read(len(BODY))


async def pieces(response: PeerResponse) -> bytes:
    return b"".join([piece async for piece in response.pieces()])


async def into(response: PeerResponse) -> bytes:
    sink = Sink()
    await response.into(sink, response.content_length)
    return bytes(sink.got)


async def stream(response: PeerResponse) -> bytes:
    """As a taker that has to see the bytes."""
    piece, got = response.stream(response.content_length), bytearray()
    while len(got) < piece.length:
        got += await piece.stream.receive(piece.length - len(got))
    return bytes(got)


WAYS = [read, pieces, into, stream]
Way = Callable[[PeerResponse], "asyncio.Future[bytes]"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 4096, 64 * 1024, 64 * 1024 + 1, len(BODY)])
async def test_a_body_comes_whole_and_its_connection_is_kept(way: Way, length: int) -> None:
    async with FakePeer("a", default=says(BODY[:length])) as a, peers_of(a) as peers:
        for _ in range(3):
            response = await answer(peers, length)
            assert (response.status, response.content_length, response.attempts) == (200, length, 1)
            assert await way(response) == BODY[:length]
            response.release()
        assert a.connections == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_in_dribs_and_drabs(way: Way) -> None:
    parts: list[bytes | asyncio.Event] = [head(50)]
    events = [asyncio.Event() for _ in range(50)]
    for number, event in enumerate(events):
        parts += [event, BODY[number : number + 1]]
    async with FakePeer("a", sends(*parts)) as a, peers_of(a) as peers:
        response = await answer(peers, 100_000)
        taking = asyncio.ensure_future(way(response))
        for event in events:
            event.set()
            await asyncio.sleep(0)
        assert await taking == BODY[:50]
        response.release()


@pytest.mark.parametrize("way", WAYS)
async def test_a_head_byte_by_byte(way: Way) -> None:
    """Cut anywhere: the end of the head is found, and what follows it is the body."""
    whole = head(5, 200, "X-Odd: 1") + b"hello"
    for cut in range(1, len(whole)):
        middle = asyncio.Event()
        async with FakePeer("a", sends(whole[:cut], middle, whole[cut:], close=False)) as a, peers_of(a) as peers:
            asking = asyncio.ensure_future(answer(peers))
            await asyncio.sleep(0.002)
            middle.set()
            response = await asking
            assert response.headers["x-odd"] == "1"
            assert await way(response) == b"hello"
            response.release()


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_that_breaks_off(way: Way) -> None:
    async with FakePeer("a", sends(head(100) + b"x" * 60)) as a, peers_of(a) as peers:
        response = await answer(peers)
        broken = metrics.PEER_REQUEST_COUNTS._counts.get(("block", "broken"), 0)
        with pytest.raises(OriginBroken, match=r"^a: .* \(after 60 of 100 bytes\)$"):
            await way(response)
        assert metrics.PEER_REQUEST_COUNTS._counts["block", "broken"] == broken + 1
        response.release()
        assert peers.well("a"), "it answered"


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_that_stalls(way: Way) -> None:
    async with FakePeer("a", hangs(head(100) + b"x" * 60)) as a, peers_of(a, read_timeout_s=0.1) as peers:
        response = await answer(peers)
        with pytest.raises(OriginBroken, match=r"nothing for 0.1 s \(after 60 of 100 bytes\)"):
            await way(response)
        await until(lambda: a.open == 0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_is_cancelled(way: Way) -> None:
    async with FakePeer("a", hangs(head(100) + b"x" * 60)) as a, peers_of(a) as peers:
        response = await answer(peers)
        taking = asyncio.ensure_future(way(response))
        await asyncio.sleep(0.01)
        taking.cancel()
        await asyncio.wait([taking])
        assert taking.cancelled() and (way is into or a.open == 1)
        response.release()
        await until(lambda: a.open == 0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_body_is_closed_under_its_reader(way: Way) -> None:
    async with FakePeer("a", hangs(head(100) + b"x" * 60)) as a, peers_of(a) as peers:
        response = await answer(peers)
        taking = asyncio.ensure_future(way(response))
        await asyncio.sleep(0.01)
        response.close()
        with pytest.raises(OriginBroken, match="given up"):
            await taking
        await until(lambda: a.open == 0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_reset(way: Way) -> None:
    async def resets(peer: object, reader: object, writer: asyncio.StreamWriter, question: object) -> bool:
        writer.write(head(100) + b"x" * 60)
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False

    async with FakePeer("a", resets) as a, peers_of(a) as peers:
        try:
            response = await answer(peers)
        except PeerUnavailable:
            return  # the reset took the head with it
        with pytest.raises(OriginBroken):
            await way(response)
        response.release()


async def test_read_is_bounded() -> None:
    async with FakePeer("a", says(b"x" * 100)) as a, peers_of(a) as peers:
        response = await answer(peers)
        with pytest.raises(OriginBroken, match="longer than 99"):
            await response.read(99)
        await until(lambda: a.open == 0)


async def test_what_is_not_read_is_not_kept() -> None:
    async with FakePeer("a", default=says(BODY)) as a, peers_of(a) as peers:
        response = await answer(peers)
        response.release()
        await until(lambda: a.open == 0)
        response = await answer(peers)
        async for _ in response.pieces():
            break
        response.close()
        response.close()
        await until(lambda: a.open == 0)


async def test_nobody_who_reads_holds_the_sender_back() -> None:
    """The kernel holds so much of it; more is not sent, and the loop is not woken for what nobody takes."""
    sent = 0

    async def endless(peer: object, reader: object, writer: asyncio.StreamWriter, question: object) -> bool:
        nonlocal sent
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(head(1 << 40))
        while True:
            writer.write(bytes(MIB))
            await writer.drain()
            sent += 1

    async with FakePeer("a", endless) as a, peers_of(a) as peers:
        response = await answer(peers)
        held = -1
        while held != sent:
            held = sent
            await asyncio.sleep(0.1)
        assert not response._connection._watching
        response.release()


# --- into a sink ------------------------------------------------------------------------------------------------------


async def test_a_full_sink_holds_the_sender_back_and_its_silence_is_not_the_peers() -> None:
    async with FakePeer("a", says(BODY)) as a, peers_of(a, read_timeout_s=0.1) as peers:
        response = await answer(peers)
        sink = Sink(full_every=7)
        taking = asyncio.ensure_future(response.into(sink, len(BODY)))
        await sink.full.wait()
        await asyncio.sleep(0.25)
        while not taking.done():
            if sink.full.is_set():
                sink.empty()
                response.resume()
            await asyncio.sleep(0)
        await taking
        assert sink.got == BODY and a.open == 1


async def test_a_sink_that_fails_is_heard() -> None:
    async with FakePeer("a", default=says(BODY)) as a, peers_of(a) as peers:
        for error in (OSError(28, "no space"), ValueError("no")):
            sink = Sink()
            sink.error = error
            with pytest.raises(type(error)):
                await (await answer(peers)).into(sink, len(BODY))
        await until(lambda: a.open == 0)
        assert peers.well("a")


async def test_part_of_a_body_into_a_sink_costs_the_connection() -> None:
    async with FakePeer("a", default=says(BODY)) as a, peers_of(a) as peers:
        sink = Sink()
        await (await answer(peers)).into(sink, MIB)
        assert sink.got == BODY[:MIB]
        await until(lambda: a.open == 0)
        with pytest.raises(OriginBroken, match="announced"):
            await (await answer(peers)).into(sink, len(BODY) + 1)


# --- heads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\nX: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: \0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: \xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 999 No\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 2000 No\r\nContent-Length: 1\r\n\r\n",
        b"GET /kos/1/block HTTP/1.1\r\nHost: kos\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_a_head_that_is_none_is_no_answer(garbage: bytes) -> None:
    async with FakePeer("a", sends(garbage, close=False)) as a, peers_of(a) as peers:
        with pytest.raises(PeerUnavailable):
            await answer(peers)
        await until(lambda: a.open == 0)
        assert not peers.well("a")


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
async def test_a_head_without_end(end: bytes) -> None:
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: " + b"x" * 70_000 + end
    async with FakePeer("a", sends(long, close=False)) as a, peers_of(a) as peers:
        with pytest.raises(PeerUnavailable, match="65536"):
            await answer(peers)
        await until(lambda: a.open == 0)


async def test_a_long_head_is_read() -> None:
    said = "x" * wire.ASK_BYTES_MAX
    async with FakePeer("a", says(BODY, 200, f"x-kos-said: {said}")) as a, peers_of(a) as peers:
        response = await answer(peers)
        assert response.headers["X-Kos-Said"] == said
        assert await response.read(len(BODY)) == BODY
        response.release()


async def test_a_long_question_is_sent_whole() -> None:
    """More than a socket's buffer takes at once."""
    record = Record('"e"', 1, "", (("X-Amz-Meta-Long", "v" * 40_000),), (), True, b"c" * 16, 1.0, 1)
    ask = wire.AskBlock("b", "k", record, 0, 0, 1)
    async with FakePeer("a", default=says(b"x")) as a, peers_of(a) as peers:
        response = await answer(peers)
        await response.read(1)
        response.release()
        peers._peers["a"]._idle[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        response = await peers.ask(["a"], wire.BLOCK, ask)
        assert await response.read(1) == b"x"
        response.release()
        assert a.questions[1].headers["x-kos-ask"].encode() == wire.encode(ask)
        too_long = Record('"e"', 1, "", (("X", "v" * 60_000),), (), True, b"c" * 16, 1.0, 1)
        with pytest.raises(PeerUnavailable, match="bytes"):
            await peers.ask(["a"], wire.BLOCK, wire.AskBlock("b", "k", too_long, 0, 0, 1))


def test_random_bytes_are_no_head_and_nothing_worse() -> None:
    chance = random.Random(11)
    right = bytearray(head(5, 200, "x-kos-checksum: 0123456789abcdef"))
    for _ in range(20_000):
        data = bytearray(right)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 2))
        try:
            parsed = parse_head(bytes(data))
        except PeerBroken:
            continue
        assert parsed.length >= 0
