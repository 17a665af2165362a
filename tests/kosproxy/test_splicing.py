"""Another node's bytes on the way to a client: every byte, in order, with backpressure both ways, and both ends may break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from kos import config
from kos.errors import OriginBroken, S3Error
from kos.s3.object_response import ObjectMeta
from kos.s3.sigv4 import sign_headers
from kos.tasks import Tasks
from koscache.carrier import FilePiece, Opened, Piece, StreamPiece
from koscache.carrier import peer_wire as wire
from koscache.carrier.peer_response import PeerResponse
from koscache.carrier.peers import Peers, PeerUnavailable
from kosproxy import splicing
from kosproxy.parts import Parts
from kosproxy.pipeline import Pipeline
from kosproxy.relay import RelayFailed
from kosproxy.render import not_tls, turned_away
from kosproxy.server import Edge
from kosproxy.splicing import Pipe, Pipes, Splicer
from kosproxy.tls import TlsEdge
from tests.conditions import until
from tests.fakes import certificates
from tests.fakes.carrier import NOW, FakeCarrier
from tests.fakes.peer import Behaviour, FakePeer, block, hangs, head, peers_of, says, sends
from tests.fakes.proxy import ACCESS_KEY, SECRET_KEY, Lines, StandingClock

KIB = 1024
MIB = 1024 * KIB
BODY = random.Random(21).randbytes(5 * MIB + 33)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"


@pytest.fixture(autouse=True)
async def no_descriptor_is_left_open() -> AsyncIterator[None]:
    here = psutil.Process(os.getpid())
    with contextlib.closing(await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)):
        pass  # what the loop opens for itself when it first listens
    before = here.num_fds()
    yield
    await until(lambda: here.num_fds() <= before)


# --- the splicer by itself --------------------------------------------------------------------------------------------


class Way:
    """From a peer that answers as it is told, through a splicer, to a client of which this is the other end."""

    def __init__(self, peers: Peers, ours: socket.socket, theirs: socket.socket, pipes: Pipes) -> None:
        self.peers = peers
        self.ours = ours
        self.theirs = theirs
        self.pipes = pipes
        self.splicer = Splicer(asyncio.get_running_loop(), ours, pipes)
        self.left = 0

    async def answer(self) -> PeerResponse:
        return await self.peers.ask(["a"], wire.BLOCK, block(len(BODY)))

    def send(self, piece: StreamPiece, first: bytes = HEAD) -> asyncio.Future[None]:
        def leaving() -> None:
            self.left += 1

        return asyncio.ensure_future(self.splicer.send(first, piece, leaving))

    async def read(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            data = await asyncio.get_running_loop().sock_recv(self.theirs, 100_000)
            if not data:
                break
            received += data
        return bytes(received)


@contextlib.asynccontextmanager
async def way_of(*behaviours: Behaviour, pipes: int = 4, kernel: int = 0, **settings: Any) -> AsyncIterator[Way]:
    """kernel: bytes that the client's socket holds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    if kernel:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kernel)
    pool = Pipes(pipes)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        async with FakePeer("a", *behaviours) as a, peers_of(a, **settings) as peers:
            way = Way(peers, ours, theirs, pool)
            yield way
            way.splicer.close()
    pool.close()


@pytest.mark.parametrize("pipes", [4, 0])
@pytest.mark.parametrize("length", [1, 1000, 64 * KIB, 100 * KIB, len(BODY)])
async def test_head_and_body_arrive_in_order(length: int, pipes: int) -> None:
    async with way_of(says(BODY[:length]), pipes=pipes) as way:
        response = await way.answer()
        piece = response.stream(length)
        sending = way.send(piece)
        assert await way.read(len(HEAD) + length) == HEAD + BODY[:length]
        await sending
        assert (piece.taken, piece.failure, way.splicer.busy, way.splicer.head_left, way.left) == (
            length,
            None,
            False,
            0,
            1,
        )
        response.release()
        assert await_idle(way.peers), "taken whole: its connection is kept"


def await_idle(peers: Peers) -> bool:
    return bool(peers._peers["a"]._idle)


async def test_pieces_of_one_answer_follow_each_other() -> None:
    async with way_of(says(BODY)) as way:
        response = await way.answer()
        reading = asyncio.ensure_future(way.read(len(BODY)))
        at = 0
        for length in (1, 999, 70_000, 2 * MIB, len(BODY) - 2 * MIB - 71_000):
            piece = response.stream(length)
            await way.send(piece, b"")
            assert piece.taken == length
            at += length
        assert await reading == BODY
        response.release()


@pytest.mark.parametrize("pipes", [4, 0])
async def test_what_comes_slowly_goes_on_at_once(pipes: int) -> None:
    """Nothing waits for more of it: neither in the pipe nor, with a checksum as of a block in the store, in the socket."""
    for more in ((), ("x-kos-checksum: 0123456789abcdef",)):
        events = [asyncio.Event() for _ in range(20)]
        parts: list[bytes | asyncio.Event] = [head(20 * 1000, 200, *more)]
        for number, event in enumerate(events):
            parts += [event, BODY[number * 1000 : (number + 1) * 1000]]
        async with way_of(sends(*parts), pipes=pipes) as way:
            response = await way.answer()
            piece = response.stream(20_000)
            sending = way.send(piece)
            for number, event in enumerate(events):
                event.set()
                if not more:
                    begin = HEAD if not number else b""
                    wanted = begin + BODY[number * 1000 : (number + 1) * 1000]
                    assert await way.read(len(wanted)) == wanted
            if more:
                assert await way.read(len(HEAD) + 20_000) == HEAD + BODY[:20_000]
            await sending
            response.release()


@pytest.mark.parametrize("pipes", [4, 0])
async def test_a_slow_client_holds_the_peer_back(pipes: int) -> None:
    sent = 0

    async def counts(peer: Any, reader: Any, writer: asyncio.StreamWriter, question: Any) -> bool:
        nonlocal sent
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(head(64 * MIB))
        for _ in range(64):
            writer.write(bytes(MIB))
            await writer.drain()
            sent += 1
        return True

    async with way_of(counts, pipes=pipes, kernel=64 * KIB, read_timeout_s=0.2) as way:
        response = await way.answer()
        piece = response.stream(64 * MIB)
        sending = way.send(piece)
        loop = asyncio.get_running_loop()
        # Longer than the peer's silence may last: it is the client's.
        await until(lambda: way.splicer.silent_s(loop.time()) >= 0.3)
        assert sent < 40 and not sending.done()
        taken = piece.taken
        assert taken < MIB, "what was delivered, not what was taken from the peer"
        got = await way.read(len(HEAD) + 64 * MIB)
        await sending
        assert len(got) == len(HEAD) + 64 * MIB and piece.failure is None
        assert way.splicer.silent_s(loop.time() + 100) == 0
        response.release()


async def test_the_peers_silence_is_not_the_clients() -> None:
    now = asyncio.Event()
    async with way_of(sends(head(10) + b"12345", now, b"67890", close=False)) as way:
        response = await way.answer()
        sending = way.send(response.stream(10), b"")
        assert await way.read(5) == b"12345"
        assert way.splicer.silent_s(asyncio.get_running_loop().time() + 100) == 0
        now.set()
        assert await way.read(5) == b"67890"
        await sending
        response.release()


@pytest.mark.parametrize("pipes", [4, 0])
async def test_the_client_goes(pipes: int) -> None:
    async with way_of(says(BODY), pipes=pipes, kernel=64 * KIB) as way:
        response = await way.answer()
        piece = response.stream(len(BODY))
        sending = way.send(piece)
        await way.read(100_000)
        way.theirs.close()
        with pytest.raises(RelayFailed):
            await sending
        assert piece.failure is None and 0 < piece.taken < len(BODY)
        response.release()
        assert not await_idle(way.peers)
        assert len(way.pipes._free) <= 1 and way.pipes._left + len(way.pipes._free) == pipes


async def test_the_connection_is_lost_while_the_peer_is_waited_for() -> None:
    async with way_of(hangs(head(100) + b"x")) as way:
        response = await way.answer()
        sending = way.send(response.stream(100))
        await until(lambda: way.left)
        way.splicer.close()
        with pytest.raises(RelayFailed):
            await sending
        with pytest.raises(RelayFailed):
            await way.send(response.stream(10))
        response.release()


@pytest.mark.parametrize("pipes", [4, 0])
async def test_the_peer_goes_with_bytes_in_the_pipe(pipes: int) -> None:
    """The client takes nothing until the peer is long gone; what the peer had sent is delivered all the same."""
    part = BODY[: 2 * MIB]
    async with way_of(sends(head(len(BODY)) + part), pipes=pipes, kernel=16 * KIB) as way:
        response = await way.answer()
        piece = response.stream(len(BODY))
        sending = way.send(piece)
        await until(lambda: way.left)
        await asyncio.sleep(0.05)
        got = await way.read(len(HEAD) + len(part))
        await sending
        assert got == HEAD + part
        assert piece.taken == len(part) and isinstance(piece.failure, OriginBroken)
        assert f"after {len(part)} of {len(BODY)}" in str(piece.failure)
        response.release()
        assert way.pipes._left + len(way.pipes._free) == pipes, "all pipes are empty or gone"
        await way.send(BytesOf(b"more"), b"")
        assert await way.read(4) == b"more", "the connection goes on, from another source"


class BytesOf(StreamPiece):
    """A piece of which everything is here."""

    def __init__(self, data: bytes) -> None:
        super().__init__(self, len(data))  # type: ignore[arg-type]
        self.data = data
        self.timeout_s = 1.0

    def early(self, limit: int) -> memoryview:
        return memoryview(self.data)[:limit]

    def watch(self, readable: Any) -> None:
        pass

    def expect(self, count: int) -> None:
        pass


@pytest.mark.parametrize("pipes", [4, 0])
@pytest.mark.parametrize("came", [0, 1, 300_000])
async def test_the_peer_stalls(pipes: int, came: int) -> None:
    async with way_of(hangs(head(len(BODY)) + BODY[:came]), pipes=pipes, read_timeout_s=0.1) as way:
        response = await way.answer()
        piece = response.stream(len(BODY))
        sending = way.send(piece)
        if came:
            assert await way.read(len(HEAD) + came) == HEAD + BODY[:came]
        await sending
        assert piece.taken == came and "nothing for 0.1 s" in str(piece.failure)
        assert way.splicer.head_left == (0 if came else len(HEAD)), (
            "a head without a byte behind it can still be another"
        )
        assert way.left == (1 if came else 0)
        response.release()


@pytest.mark.parametrize("pipes", [4, 0])
async def test_a_peer_that_resets(pipes: int) -> None:
    async def resets(peer: Any, reader: Any, writer: asyncio.StreamWriter, question: Any) -> bool:
        writer.write(head(len(BODY)) + BODY[:MIB])
        await writer.drain()
        await gone.wait()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False

    gone = asyncio.Event()
    async with way_of(resets, pipes=pipes) as way:
        response = await way.answer()
        piece = response.stream(len(BODY))
        sending = way.send(piece, b"")
        got = await way.read(MIB // 2)
        gone.set()
        await sending
        got += await way.read(piece.taken - len(got))
        assert got == BODY[: piece.taken] and piece.failure is not None
        response.release()


@pytest.mark.parametrize("slow", [False, True])
async def test_it_is_cancelled(slow: bool) -> None:
    """While the peer is waited for, and while the client is."""
    behaviour = says(BODY) if slow else hangs(head(len(BODY)) + b"x")
    async with way_of(behaviour, kernel=64 * KIB) as way:
        response = await way.answer()
        piece = response.stream(len(BODY))
        sending = way.send(piece)
        await until(lambda: way.splicer._watching if slow else way.left)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled() and not way.splicer.busy and piece.failure is None
        assert way.pipes._left + len(way.pipes._free) == 4
        assert not way.pipes._free or not slow, "a pipe that holds something is not used again"
        response.release()


async def test_the_answer_is_closed_meanwhile() -> None:
    async with way_of(hangs(head(100) + b"x")) as way:
        response = await way.answer()
        piece = response.stream(100)
        sending = way.send(piece)
        await until(lambda: way.left)
        response.close()
        await sending
        assert piece.taken == 1 and "given up" in str(piece.failure)


async def test_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splicing, "TURN_BYTES", 256 * KIB)
    monkeypatch.setattr(splicing, "WINDOW_BYTES", 64 * KIB)
    async with way_of(says(BODY)) as way:
        response = await way.answer()
        sending = way.send(response.stream(len(BODY)))
        reading = asyncio.ensure_future(way.read(len(HEAD) + len(BODY)))
        turns = 0
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        await sending
        assert turns >= len(BODY) // (256 * KIB)
        assert reading.result() == HEAD + BODY
        response.release()


async def test_pipes_are_few_and_used_again() -> None:
    pipes = Pipes(2)
    one, two, three = pipes.take(), pipes.take(), pipes.take()
    assert isinstance(one, Pipe) and isinstance(two, Pipe) and not isinstance(three, Pipe)
    for vessel in (one, three):
        pipes.give(vessel)
    assert pipes.take() is one
    two.held = 1  # as if something was left in it
    pipes.give(two)
    other = pipes.take()
    assert isinstance(other, Pipe) and other is not two
    pipes.give(one)
    pipes.close()
    pipes.give(other)
    assert pipes._left == 2


async def test_a_pipe_may_be_smaller_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(splicing.fcntl, "fcntl", refused)
    async with way_of(says(BODY)) as way:
        response = await way.answer()
        sending = way.send(response.stream(len(BODY)))
        assert await way.read(len(HEAD) + len(BODY)) == HEAD + BODY
        await sending
        response.release()


# --- through a worker's edge ------------------------------------------------------------------------------------------


class FarCarrier(FakeCarrier):
    """Objects whose bytes another node has. fallback: whether what that node does not send is in this one's store."""

    peers: Peers
    fallback = True

    def body(self, opened: Opened, start: int, stop: int) -> Any:
        return FarBody(self, opened, start, stop)


class FarBody:
    origin_requests = 0

    def __init__(self, carrier: FarCarrier, opened: Opened, start: int, stop: int) -> None:
        self._carrier = carrier
        self._opened = opened
        self._pieces = self._walk(start, stop)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    async def aclose(self) -> None:
        await self._pieces.aclose()  # type: ignore[attr-defined]

    async def _walk(self, start: int, stop: int) -> AsyncIterator[Piece]:
        opened, carrier = self._opened, self._carrier
        failure: Exception | None = None
        try:
            response = await carrier.peers.ask(["a"], wire.BLOCK, block(stop - start))
        except PeerUnavailable as nobody:
            failure = nobody
        else:
            try:
                piece = response.stream(stop - start)
                yield piece
            finally:
                response.release()
            start += piece.taken
            failure = piece.failure
        if start < stop:
            assert failure is not None
            if not carrier.fallback:
                raise S3Error("ServiceUnavailable", str(failure), headers={"Retry-After": "1"})
            stored = carrier.objects[opened.bucket, opened.key]
            yield FilePiece(carrier.fd, stored.offset + start, stop - start, 0)


class Node:
    def __init__(self, carrier: FarCarrier, edge: Edge, port: int, secure: bool, log: Lines) -> None:
        self.carrier = carrier
        self.edge = edge
        self.log = log
        self._port = port
        self._secure = secure

    async def ask(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = certificates.client_context() if self._secure else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=context)
        headers = sign_headers(
            "GET", "/b/k", "", {"host": "kos.test"}, session_token=None, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
            region="us-east-1", now=NOW,
        ) | {"host": "kos.test"}  # fmt: skip
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"GET /b/k HTTP/1.1\r\n{lines}\r\n".encode())
        return reader, writer

    async def get(self) -> tuple[int, bytes]:
        """Status, and what came of the body."""
        reader, writer = await self.ask()
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
            length = int(raw.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            try:
                return int(raw.split()[1]), await reader.readexactly(length)
            except asyncio.IncompleteReadError as short:
                return int(raw.split()[1]), short.partial
        finally:
            writer.close()


@pytest.fixture(params=["http", "https"])
def secure(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "https")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@contextlib.asynccontextmanager
async def node_of(
    path: Path, secure: bool, threads: ThreadPoolExecutor, *behaviours: Behaviour, kernel: int = 0, **options: Any
) -> AsyncIterator[Node]:
    """A worker's edge whose objects are at a peer. options: of the limits, and of the cluster."""
    limits = {name: options.pop(name) for name in list(options) if name.startswith("send_")}
    settings = config.Config(
        region="test",
        origin=config.Origin(endpoint="http://127.0.0.1:9"),
        cache=config.Cache(dir="/nonexistent", size_bytes=1 << 30),
        credentials=(config.Credential(access_key=ACCESS_KEY, secret_key=SECRET_KEY),),
        limits=config.Limits(**limits),
    )
    carrier = FarCarrier(path / "store")
    carrier.put("b", "k", BODY, ObjectMeta('"e"', len(BODY), "", ())).hidden = True
    tasks, log = Tasks("node"), Lines()
    parts = Parts(settings, {ACCESS_KEY: SECRET_KEY}, carrier, None, StandingClock(), tasks, log, threads, threads)  # type: ignore[arg-type]
    async with FakePeer("a", *behaviours) as a, peers_of(a, **options) as peers:
        carrier.peers = peers
        edge = Edge(Pipeline(parts), settings.limits, threads, turned_away())
        context = certificates.server().context()
        factory = TlsEdge(edge, lambda: context, not_tls()) if secure else edge
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        if kernel:
            server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel)
        try:
            yield Node(carrier, edge, server.sockets[0].getsockname()[1], secure, log)
        finally:
            server.close()
            await edge.drain(0.1)
            await tasks.close()
    assert carrier.open_opened == 0 and carrier.borrowed == 0
    carrier.close_file()


async def test_a_client_gets_what_a_peer_has(tmp_path: Path, secure: bool, threads: ThreadPoolExecutor) -> None:
    async with node_of(tmp_path, secure, threads, *[says(BODY)] * 3) as node:
        for _ in range(3):
            assert await node.get() == (200, BODY)
        await until(lambda: len(node.log.lines) == 3)
        assert [(line.status, line.bytes, line.error) for line in node.log.lines] == [(200, len(BODY), None)] * 3
        assert all(line.first_byte_ms <= line.total_ms for line in node.log.lines)


@pytest.mark.parametrize("came", [0, 1, 70_000, 3 * MIB])
async def test_the_rest_comes_from_elsewhere(
    tmp_path: Path, secure: bool, threads: ThreadPoolExecutor, came: int
) -> None:
    async with node_of(tmp_path, secure, threads, sends(head(len(BODY)) + BODY[:came])) as node:
        assert await node.get() == (200, BODY)


async def test_a_peer_that_says_nothing_leaves_room_for_an_error(
    tmp_path: Path, secure: bool, threads: ThreadPoolExecutor
) -> None:
    async with node_of(tmp_path, secure, threads, hangs(head(len(BODY))), read_timeout_s=0.1) as node:
        node.carrier.fallback = False
        status, document = await node.get()
        assert status == 503 and b"ServiceUnavailable" in document


async def test_a_body_that_cannot_be_completed_is_broken_off(
    tmp_path: Path, secure: bool, threads: ThreadPoolExecutor
) -> None:
    async with node_of(tmp_path, secure, threads, sends(head(len(BODY)) + BODY[:MIB])) as node:
        node.carrier.fallback = False
        status, got = await node.get()
        assert status == 200 and len(got) < len(BODY) and got == BODY[: len(got)]


async def test_a_client_that_takes_nothing_is_ended(tmp_path: Path, secure: bool, threads: ThreadPoolExecutor) -> None:
    async with node_of(tmp_path, secure, threads, says(BODY), kernel=64 * KIB, send_timeout_s=0.3) as node:
        _, writer = await node.ask()
        transport: Any = writer.transport
        transport.pause_reading()
        await until(lambda: node.log.lines)
        assert node.log.lines[0].error and node.log.lines[0].bytes < len(BODY)
        writer.close()


async def test_a_client_that_goes_lets_go_of_the_peer(
    tmp_path: Path, secure: bool, threads: ThreadPoolExecutor
) -> None:
    async with node_of(tmp_path, secure, threads, hangs(head(len(BODY)) + BODY[:MIB])) as node:
        reader, writer = await node.ask()
        await reader.readexactly(MIB // 2)
        writer.transport.abort()
        await until(lambda: node.log.lines)
        await until(lambda: not node.carrier.peers._peers["a"]._open)


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_either_end_does(tmp_path: Path, secure: bool, threads: ThreadPoolExecutor, seed: int) -> None:
    """A client that stays gets all bytes, and right ones, whatever the peer does; one that goes leaves nothing behind."""
    print("seed", seed)
    chance = random.Random(seed)
    whims: list[Behaviour] = []
    for _ in range(60):
        cut = chance.randrange(len(BODY))
        some = head(len(BODY)) + BODY[:cut]
        whims.append(
            chance.choice([says(BODY), says(BODY), sends(some), hangs(some), sends(b""), sends(b"no\r\n\r\n")])
        )
    options = {"read_timeout_s": 0.2, "connections": 8, "kernel": chance.choice([0, 64 * KIB])}
    async with node_of(tmp_path, secure, threads, *whims, **options) as node:

        async def stays() -> None:
            assert await node.get() == (200, BODY)

        async def goes() -> None:
            reader, writer = await node.ask()
            for _ in range(chance.randrange(20)):
                if not await reader.read(chance.randint(1, 200_000)):
                    break
            writer.transport.abort()

        for _ in range(8):
            await asyncio.gather(*[stays() if chance.random() < 0.7 else goes() for _ in range(6)])
        await until(lambda: len(node.log.lines) == 48)
        await until(lambda: not node.edge.connections)
        assert node.edge.pipes._left + len(node.edge.pipes._free) == splicing.PIPES_MAX
