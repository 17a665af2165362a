"""Nodes of a cluster without their processes: carriers over real daemons and stores, real peer ports, all on one loop.

    async with PeerCluster(tmp_path, 3) as them:
        them.origin.put("b", "k", body)
        home, next_one, other = them.order("b", "k")         # by the ring
        assert (await other.read("b", "k")).body == body      # as a GET does: opened again when it changed too early
        home.fault(status=404); home.fault(cut=1000); home.fault(stall=0); home.fault(garble=7)   # of its peer port
        home.cut_off = True                                   # the origin is down, for this node alone
        await home.gone(); await home.back()                  # its peer port, connections included

Views are pushed by hand (them.tell(node, view)), unless hub=True: then the daemons are members of a static cluster, and
view and trust are theirs. By hand every node trusts and vouches until node.trust(...) says otherwise.

Faults of a peer port: node.fault(times=1, path=None, <what>) -> Fault; the first that matches a question applies, alone.
  path     wire.OBJECT, BLOCK, CHECKSUM, AHEAD, TAKE; None: any
  status   answers that, with `failed`
  stall=n  sends the head and n bytes of the body and stops there (-1: before the head) until fault.end()
  cut=n    sends the head and n bytes of the body, and closes (-1: before the head)
  late=True works out the answer, and keeps it until fault.end()
  garble=n flips the bits of byte n of the body; the checksum that it says is the right one
What was asked: node.questions, a list of (path, question); node.asked: its own requests to the origin.

Invariant, checked when the block is left: nobody holds a buffer, a descriptor, a lease, a connection or a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import msgspec
import psutil

from kos import config
from kos.config import Config, Rule
from kos.errors import OriginBroken, OriginUnavailable
from kos.origin.credentials import from_config
from kos.origin.lane import OriginLane
from kos.origin.response import OriginResponse
from kos.rules import Rules
from kos.s3 import ranges
from kos.tasks import Tasks
from koscache import fence, ipc
from koscache.carrier import Carrier, Changed, FilePiece, Opened, Peers, Piece, StreamPiece, TouchMap, Want
from koscache.carrier import peer_wire as wire
from koscache.cluster.ring import Ring
from koscache.cluster.view import Member, View
from koscache.content import Record
from koscache.daemon import Daemon
from koscache.fence import FOREVER_NS
from koscache.index import block_key
from koscache.reader import Reader
from koscache.store import Store
from kosproxy.exchange import Exchange
from kosproxy.parts import Parts
from kosproxy.peering import Peering, edge_of
from kosproxy.server import Connection, Edge
from tests.conditions import until
from tests.fakes import cache_node
from tests.fakes.cache_node import KIB, ShiftedClock
from tests.fakes.origin import FakeOrigin
from tests.fakes.proxy import Lines

SECRET: Final = "a secret of the whole cluster"
BLOCK: Final = 64 * KIB
#: as kosproxy.handlers.get: how often an object is opened that changed before anything was sent
OPENS_MAX: Final = 5
#: tasks of a worker that has nothing to do
_AT_REST: Final = frozenset({"link", "link-watch", "touches"})
_KINDS: Final[dict[str, Any]] = {
    wire.OBJECT: wire.AskObject,
    wire.BLOCK: wire.AskBlock,
    wire.CHECKSUM: wire.AskBlock,
    wire.AHEAD: wire.AskAhead,
    wire.TAKE: wire.AskTake,
}


#: Of the loopback network, where no other process looks for free ports; each is used once.
_PID: Final = os.getpid()
_HOST: Final = f"127.{64 + (_PID >> 16) % 64}.{_PID >> 8 & 0xFF}.{_PID & 0xFF}"
_PORTS: Final = itertools.count(20_000)


@functools.lru_cache(maxsize=64)
def _ring(view: View) -> Ring:
    return Ring(view.members)


@functools.cache
def _slots() -> Iterator[bytes]:
    """What the slots of a new fence begin with, made once for several: to draw 9 MB at random for each node of each test
    takes longer than the test. No two of one cluster get the same."""
    return itertools.cycle([fence._random_slots() for _ in range(6)])


class Asked(NamedTuple):
    """A request of one node to the origin."""

    method: str
    key: str
    headers: dict[str, str]


class Got(NamedTuple):
    """What a read brought. opens: how often it was opened."""

    opened: Opened
    body: bytes
    opens: int

    @property
    def phase(self) -> str:
        return self.opened.phase


class NodeOrigin:
    """The origin as one worker of a node reaches it."""

    def __init__(self, lane: OriginLane, node: PeerNode) -> None:
        self.lane = lane
        self._node = node

    async def request(
        self,
        method: str,
        bucket: str | None,
        key: str | None,
        *,
        headers: Sequence[tuple[str, str]] = (),
        **options: Any,
    ) -> OriginResponse:
        self._node.asked.append(Asked(method, key or "", {name.lower(): value for name, value in headers}))
        if self._node.cut_off:
            raise OriginUnavailable("cut off", retry_after_s=1.0)
        return await self.lane.request(method, bucket, key, headers=headers, **options)


@dataclass(slots=True, eq=False)
class Fault:
    """See the module."""

    times: int | None = 1
    path: str | None = None
    status: int | None = None
    failed: wire.Failed = field(default_factory=lambda: wire.not_here("a fault"))
    stall: int | None = None
    cut: int | None = None
    garble: int | None = None
    late: bool = False
    used: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _met: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, path: str) -> bool:
        return not self._ended.is_set() and (self.times is None or self.used < self.times) and self.path in (None, path)

    def end(self) -> None:
        """Applies no more; who is stalled by it goes on."""
        self._ended.set()

    async def met(self) -> None:
        """Until somebody is stalled by it."""
        await self._met.wait()

    async def apply(self, exchange: Exchange) -> bool:
        """Does it to this answer. False: the answer is still to be given."""
        if self.status is not None:
            body = wire.encode(self.failed)
            await exchange.respond(self.status, [("Content-Length", str(len(body)))], body)
            return True
        if self.stall == -1:
            await self._stand()
        elif self.cut == -1:
            raise ConnectionResetError("cut")
        elif self.late:
            self._keep(exchange)
        else:
            self._spoil(exchange)
        return False

    async def _stand(self) -> None:
        self._met.set()
        await self._ended.wait()

    def _keep(self, exchange: Exchange) -> None:
        write, relay, finish = exchange.write, exchange.relay, exchange.finish

        async def late_write(data: bytes) -> None:
            await self._stand()
            await write(data)

        async def late_relay(piece: FilePiece) -> None:
            await self._stand()
            await relay(piece)

        async def late_finish() -> None:
            await self._stand()
            await finish()

        exchange.write = late_write  # type: ignore[method-assign]
        exchange.relay = late_relay  # type: ignore[method-assign, assignment]
        exchange.finish = late_finish  # type: ignore[method-assign]

    def _spoil(self, exchange: Exchange) -> None:
        """The body goes through here from now on."""
        sent, write = 0, exchange.write
        end = self.stall if self.stall is not None else self.cut

        async def limited(data: bytes) -> None:
            nonlocal sent
            if self.garble is not None and sent <= self.garble < sent + len(data):
                spoiled = bytearray(data)
                spoiled[self.garble - sent] ^= 0xFF
                data = bytes(spoiled)
            if end is not None and sent <= end < sent + len(data):
                before, data = data[: end - sent], data[end - sent :]
                exchange.leave()
                await write(before)
                sent += len(before)
                if self.cut is not None:
                    raise ConnectionResetError("cut")
                await self._stand()
            await write(data)
            sent += len(data)

        async def relay(piece: FilePiece) -> None:
            await limited(os.pread(piece.fd, piece.length, piece.offset))

        exchange.write = limited  # type: ignore[method-assign]
        exchange.relay = relay  # type: ignore[method-assign, assignment]


@dataclass(slots=True)
class Worker:
    carrier: Carrier
    reader: Reader
    peers: Peers
    touches: TouchMap
    origin: NodeOrigin
    tasks: Tasks


class PeerNode:
    """One node. All of it runs on the test's loop."""

    def __init__(self, name: str, settings: Config, daemon_settings: Config, clock: ShiftedClock) -> None:
        self.name = name
        self.config = settings
        self.clock = clock
        self.questions: list[tuple[str, Any]] = []
        self._daemon_config = daemon_settings
        self._faults: list[Fault] = []
        self._server: asyncio.Server | None = None
        self._host, port = config.split_address(settings.listen.peer)
        self.port = int(port)
        #: connections to its peer port so far
        self.accepted = 0
        #: requests of its workers to the origin, in order
        self.asked: list[Asked] = []
        #: whether the origin is down for this node
        self.cut_off = False
        self.workers: list[Worker] = []
        self.view = View(0, ())
        self.ring = Ring(())

    @property
    def listens(self) -> bool:
        """Whether its peer port is open."""
        return self._server is not None

    @property
    def member(self) -> Member:
        return Member(self.name, 1, f"{self._host}:{self.port}", self.config.listen.cluster, 100)

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, workers: int) -> None:
        await self.start_daemon()
        for _ in range(workers):
            await self._start_worker()
        first = self.workers[0]
        self._threads = ThreadPoolExecutor(2)
        parts = Parts(
            self.config, {}, first.carrier, first.origin.lane, self.clock, first.tasks, Lines(), self._threads,  # type: ignore[arg-type]
            self._threads,
        )  # fmt: skip
        self.edge: Edge = edge_of(parts)
        self._script(self.edge.lanes)  # type: ignore[arg-type]
        await self.back()
        await until(lambda: all(worker.carrier.caching for worker in self.workers))

    async def _start_worker(self) -> None:
        settings, clock = self.config, self.clock
        tasks = Tasks(self.name)
        lane = OriginLane(settings.origin, from_config(settings.origin, clock), clock)
        await lane.start()
        origin, touches = NodeOrigin(lane, self), TouchMap(settings.cache.dir)
        assert settings.cluster.secret is not None
        peers = Peers(settings.cluster, self.name, settings.cluster.secret.encode(), clock, tasks, None)
        reader = Reader(settings.cache.dir, alone=False)
        carrier = Carrier(settings, reader, origin, Rules(settings.rules), clock, tasks, peers, touches)
        self.workers.append(Worker(carrier, reader, peers, touches, origin, tasks))
        await carrier.start()

    async def stop(self) -> None:
        for fault in self._faults:
            fault.end()
        if self._server is not None:
            self._server.close()
        await self.edge.drain(1.0)
        self._threads.shutdown()
        for worker in self.workers:
            await worker.tasks.close()
            await worker.carrier.close()
            await worker.origin.lane.close()
            worker.reader.close()
            worker.reader.fence.close()
            worker.touches.close()
        await self.stop_daemon()

    # --- its first worker, which has the peer port

    @property
    def carrier(self) -> Carrier:
        return self.workers[0].carrier

    @property
    def reader(self) -> Reader:
        return self.workers[0].reader

    @property
    def peers(self) -> Peers:
        return self.workers[0].peers

    @property
    def tasks(self) -> Tasks:
        return self.workers[0].tasks

    async def start_daemon(self) -> None:
        settings, clock = self._daemon_config, self.clock
        self.daemon = Daemon(settings, lambda: Store.open(settings.cache, clock), clock, Tasks(f"{self.name} daemon"))
        await self.daemon.start()

    async def stop_daemon(self) -> None:
        await self.daemon.close()

    async def gone(self) -> None:
        """Nobody listens on its peer port, and what was open is cut. The node itself lives."""
        assert self._server is not None
        self._server.close()
        self._server = None
        for connection in list(self.edge.connections):
            assert isinstance(connection, Connection)
            connection.drop()
        await until(lambda: not self.edge.connections)

    async def back(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(self._accepted, self._host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accepted(self) -> Connection:
        self.accepted += 1
        return self.edge()

    def trust(self, trusted: bool = True, *, vouches: bool | None = None) -> None:
        vouches = trusted if vouches is None else vouches
        self.reader.fence.trust(FOREVER_NS if trusted else 0, FOREVER_NS if vouches else 0)

    # --- faults -----------------------------------------------------------------------------------------------------

    def fault(self, times: int | None = 1, **what: Any) -> Fault:
        fault = Fault(times, **what)
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Ends all faults of the peer port and of the way to the origin."""
        self.cut_off = False
        for fault in self._faults:
            fault.end()
        self._faults.clear()

    def _script(self, lanes: Peering) -> None:
        fast, answer = lanes.fast, lanes._answer

        def scripted_fast(connection: Connection, data: bytes) -> bool:
            path = data[4 : data.index(b" ", 4)].decode()
            if any(fault.takes(path) for fault in self._faults) or not fast(connection, data):
                return False
            ask = data.partition(b"x-kos-ask: ")[2].partition(b"\r\n")[0]
            self.questions.append((path, wire.decode(ask, _KINDS[path])))
            return True

        async def scripted(exchange: Exchange, path: str) -> None:
            ask = exchange.head.headers.get(wire.ASK_HEADER, "").encode()
            self.questions.append((path, wire.decode(ask, _KINDS[path])))
            fault = next((each for each in self._faults if each.takes(path)), None)
            if fault is not None:
                fault.used += 1
                if await fault.apply(exchange):
                    return
            await answer(exchange, path)

        lanes.fast = scripted_fast
        lanes._answer = scripted  # type: ignore[method-assign]

    def corrupt(self, record: Record, number: int, at: int = 0) -> None:
        """Flips the bits of a byte of a block in this node's store: its checksum stays what it was."""
        location = self.reader.locate(record.content, number)
        assert location is not None
        with open(self.reader.segment_path(location.segment), "r+b") as file:
            file.seek(location.offset + at)
            byte = file.read(1)[0]
            file.seek(location.offset + at)
            file.write(bytes([byte ^ 0xFF]))

    def stored(self, record: Record, number: int) -> bytes | None:
        """The block as this node's store has it; None if it has not."""
        location = self.reader.locate(record.content, number)
        if location is None:
            return None
        with open(self.reader.segment_path(location.segment), "rb") as file:
            return os.pread(file.fileno(), location.length, location.offset)

    def forgive(self) -> None:
        """It backs off from nobody any more."""
        for worker in self.workers:
            for peer in worker.peers._peers.values():
                peer.answered()

    def count(self, path: str) -> int:
        """How often it was asked that."""
        return sum(each == path for each, _ in self.questions)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def read(
        self, bucket: str, key: str, header: str | None = None, *, want: Want | None = None, worker: int = 0
    ) -> Got:
        """As a GET does. header: Range. Raises what open() and a body raise."""
        want = want or Want(range=ranges.parse(header))
        for opens in range(1, OPENS_MAX + 1):
            got: list[bytes] = []
            try:
                opened = await _once(self.workers[worker].carrier, bucket, key, want, got)
                return Got(opened, b"".join(got), opens)
            except Changed:
                if got:
                    raise
        raise AssertionError(f"{self.name}: {key} was another one each time that it was opened")

    def record(self, key: str, bucket: str = "b") -> Record | None:
        return self.reader.record(bucket, key)

    def has(self, record: Record, number: int) -> bool:
        """Whether the block is in this node's store."""
        return self.reader.locate(record.content, number) is not None

    def blocks(self, record: Record) -> list[int]:
        """The blocks of the version that are in this node's store."""
        return sorted(number for number, _ in self.reader.blocks(record.content))

    def touched(self, record: Record, number: int) -> bool:
        return self.workers[0].touches.seen(block_key(record.content, number))

    # --- what is left over ------------------------------------------------------------------------------------------

    @property
    def at_rest(self) -> bool:
        """Nothing of a read, a fill, a question or an answer is under way."""
        leases = self.daemon._leases
        return (
            all(_at_rest(worker) for worker in self.workers)
            and not leases.fills
            and not leases.opens
            and not any(connection._messages or connection.in_fast for connection in self.edge.connections)
        )

    def left_over(self) -> list[str]:
        """What was not given back, in words."""
        found: list[str] = []
        for worker in self.workers:
            context = worker.carrier._context
            for pool in (context.buffers, context.peer_buffers):
                out = pool.made - len(pool._free)
                if out or pool._waiting:
                    found.append(f"{out} buffers")
            reader = worker.reader
            lent = {segment: reader._held[segment].borrows for segment in reader.held()}
            found += [f"segment {segment} borrowed {count} times" for segment, count in lent.items() if count]
            for name, peer in worker.peers._peers.items():
                if peer._open != len(peer._idle) or peer._waiting:
                    found.append(f"{peer._open - len(peer._idle)} connections to {name}")
        if self.daemon._leases.granted_bytes:
            found.append(f"{self.daemon._leases.granted_bytes} bytes granted")
        return found


def _at_rest(worker: Worker) -> bool:
    stats, blocks = worker.carrier.stats(), worker.carrier._blocks
    return (
        stats.fills == stats.flights == stats.asking == 0
        and not blocks._growing
        and not blocks._asking
        and not worker.peers._asker.running
        and {name.rpartition(".")[2] for name in worker.tasks.names()} <= _AT_REST
    )


async def _once(carrier: Carrier, bucket: str, key: str, want: Want, got: list[bytes]) -> Opened:
    opened = await carrier.open(bucket, key, want)
    try:
        if want.head_only:
            return opened
        start, stop = 0, opened.record.size
        if want.range is not None:
            start, stop = ranges.resolve(want.range, opened.record.size)
        body = carrier.body(opened, start, stop)
        try:
            async for piece in body:
                await take_into(got, piece)
        finally:
            await body.aclose()
            opened.origin_requests += body.origin_requests
        return opened
    finally:
        opened.close()


async def take_into(got: list[bytes], piece: Piece) -> None:
    """What a server does with a piece: a stream that breaks off is left to the body."""
    if not isinstance(piece, StreamPiece):
        got.append(cache_node.take(piece))
        return
    while piece.taken < piece.length:
        try:
            data = await piece.stream.receive(min(piece.length - piece.taken, 16 * KIB))
        except OriginBroken as broken:
            piece.failure = broken
            return
        piece.taken += len(data)
        got.append(data)


class PeerCluster:
    """The nodes n1, n2 ... and their origin.

    workers: of each node; the first has the peer port. hub: the nodes are members of a static cluster by their daemons.
    patience_s: for so long a peer can still tell a failure; then its head has left. cluster: more options of config.Cluster.
    cache: as tests.fakes.cache_node.settings has them; each: of node number `index`.
    """

    def __init__(
        self,
        directory: Path,
        count: int = 3,
        *,
        rules: tuple[Rule, ...] = (),
        hub: bool = False,
        patience_s: float = 10.0,
        cluster: dict[str, Any] | None = None,
        workers: int = 1,
        each: Callable[[int], dict[str, Any]] = lambda index: {},
        **cache: Any,
    ) -> None:
        self._directory = directory
        self._count = count
        self._rules = rules
        self._hub = hub
        self._workers = workers
        self._each = each
        self._cluster: dict[str, Any] = {
            "membership": "static",
            "secret": SECRET,
            "hedges": 0,
            "hedge_least_s": 2 * patience_s,
            "read_timeout_s": 5.0,
            "lease_s": 0.5,
            "write_wait_s": 5.0,
        } | (cluster or {})
        self._cache = cache
        self.clock = ShiftedClock()
        self.origin = FakeOrigin()
        self.nodes: list[PeerNode] = []
        self._fds_before = 0
        self._tasks_before: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> PeerCluster:
        with contextlib.closing(await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)):
            pass  # what the loop opens for itself when it first listens
        self._fds_before = psutil.Process().num_fds()
        self._tasks_before = asyncio.all_tasks()
        await self.origin.start()
        self.origin.create_bucket("b")
        names = [f"n{index + 1}" for index in range(self._count)]
        members = tuple(config.Member(name=name, peer=self._address(), cluster=self._address()) for name in names)
        for at, name in enumerate(names):
            settings = msgspec.structs.replace(
                cache_node.settings(
                    self._directory / name, self.origin.endpoint, rules=self._rules, **(self._cache | self._each(at))
                ),
                cluster=config.Cluster(name=name, **self._cluster),
                listen=config.Listen(peer=members[at].peer, cluster=members[at].cluster),
                members=members if self._hub else (),
            )
            alone = settings if self._hub else msgspec.structs.replace(settings, cluster=config.Cluster())
            self.nodes.append(PeerNode(name, settings, alone, self.clock))
        with patch.object(fence, "_random_slots", _slots().__next__):
            await asyncio.gather(*(node.start(self._workers) for node in self.nodes))
        if self._hub:
            self._learn(self.view)
            await until(self._agree)
        else:
            for node in self.nodes:
                node.trust()
                await self.tell(node, self.view)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        left: list[str] = []
        try:
            if kind is None:
                for node in self.nodes:
                    node.heal()
                await self.settled()
                with contextlib.suppress(AssertionError):  # told below, in words
                    await until(lambda: not self._left_over(), timeout_s=5.0)
                left = self._left_over()
        finally:
            await asyncio.gather(*(node.stop() for node in self.nodes))
            await self.origin.stop()
        assert not left, left
        if kind is None:
            await until(lambda: asyncio.all_tasks() <= self._tasks_before, what="all tasks have ended")
            await until(lambda: psutil.Process().num_fds() <= self._fds_before, what="all descriptors are closed")
            for node in self.nodes:
                # 25 MB each; pytest keeps the directories of the last runs.
                shutil.rmtree(self._directory / node.name)

    def _address(self) -> str:
        """Members of a static cluster know each other's ports beforehand."""
        return f"{_HOST}:{next(_PORTS)}" if self._hub else "127.0.0.1:0"

    def _left_over(self) -> list[str]:
        return [f"{node.name}: {what}" for node in self.nodes for what in node.left_over()]

    # --- members ----------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """All nodes."""
        return View(0, tuple(node.member for node in self.nodes))

    def _learn(self, view: View) -> None:
        for node in self.nodes:
            node.view, node.ring = view, _ring(view)

    def _agree(self) -> bool:
        return all(
            node.reader.fence.trusted() and len(worker.carrier._upstream._ring.members) == len(self.nodes)
            for node in self.nodes
            for worker in node.workers
        )

    async def tell(self, node: PeerNode, view: View) -> None:
        """From now on the node goes by this view."""
        node.view, node.ring = view, _ring(view)
        for worker in node.workers:
            worker.carrier.pushed(ipc.ClusterView(node.name, view))
        upstreams = [worker.carrier._upstream for worker in node.workers]
        await until(lambda: all(each._view is view and each._ring.members == node.ring.members for each in upstreams))

    def __getitem__(self, name: str) -> PeerNode:
        return next(node for node in self.nodes if node.name == name)

    def order(self, bucket: str, key: str) -> list[PeerNode]:
        """All nodes, the key's home first, then as the ring has them."""
        return [self[name] for name in self.nodes[0].ring.owners(bucket, key, len(self.nodes))]

    def block_order(self, bucket: str, key: str, record: Record, number: int) -> list[PeerNode]:
        """As order(), of a block."""
        ring = self.nodes[0].ring
        return [self[name] for name in ring.block_owners(bucket, key, record.content, number, len(self.nodes))]

    def key_at(self, node: PeerNode, prefix: str = "k") -> str:
        """A key whose home the node is."""
        keys = (f"{prefix}{each}" for each in range(10_000))
        return next(key for key in keys if self.nodes[0].ring.owners("b", key, 1) == (node.name,))

    # --- all together -----------------------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Nothing is under way anywhere."""
        await until(lambda: all(node.at_rest for node in self.nodes), what="nothing is under way")

    async def read_all(self, bucket: str, key: str, header: str | None = None, *, times: int = 1) -> list[Got]:
        """Every worker of every node reads it at once."""
        workers = [(node, at) for node in self.nodes for at in range(len(node.workers))]
        reads = (node.read(bucket, key, header, worker=at) for node, at in workers for _ in range(times))
        return list(await asyncio.gather(*reads))

    def gets(self, key: str) -> list[tuple[int, int]]:
        """Which slices of the object the origin was asked for the bytes of, in order: [first, last]; all of it: (0, -1)."""
        found = []
        for each in self.origin.requests:
            if each.method == "GET" and each.key == key:
                first, _, last = each.headers.get("range", "bytes=0--1").removeprefix("bytes=").partition("-")
                found.append((int(first), int(last)))
        return found


__all__ = ["BLOCK", "Asked", "Fault", "Got", "PeerCluster", "PeerNode"]
