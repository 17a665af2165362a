"""Moving what a node keeps: which blocks go where and in what order, and owners that are busy, silent, or refuse."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos.clock import Clock
from kos.config import Cluster, Config
from kos.errors import KosError
from kos.tasks import Tasks
from koscache.carrier import peer_wire as wire
from koscache.cluster.draining import Batch, Draining, Rings, batches_of
from koscache.cluster.ring import Ring
from koscache.cluster.view import Member, MemberState, View
from koscache.content import Record
from koscache.disk import StoreFailed
from koscache.inventory import Held
from koscache.keeper import Keeper
from koscache.store import Store
from tests.conditions import until
from tests.fakes.block_store import KIB, Settings, Thing, fill, open_store, small
from tests.fakes.cache_node import settings as node_settings
from tests.fakes.clock import FakeClock
from tests.fakes.peer import SECRET, FakePeer, Question, hangs, head


class HastyClock(Clock):
    """Time passes for those who sleep, and they do not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed_s = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.elapsed_s

    async def sleep(self, seconds: float) -> None:
        self.elapsed_s += seconds
        await asyncio.sleep(0)


@dataclass
class Owner:
    """A member that takes what it is asked to. busy: so many times not at once. slow: so many times it is not there yet."""

    busy: int = 0
    slow: int = 0
    status: int = 204
    taken: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    looked: int = 0

    async def __call__(
        self, peer: FakePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question
    ) -> bool:
        ask = question.headers["x-kos-ask"].encode()
        assert wire.signer(SECRET, question.headers["x-kos-auth"], peer.name, question.path, ask, Clock().now()) == "me"
        status, body = self.status, wire.encode(wire.not_here("no"))
        if question.path == wire.TAKE:
            take = wire.decode(ask, wire.AskTake)
            if self.busy:
                self.busy -= 1
                status = 503
            elif status == 204:
                body = b""
                self.taken.append((take.name, take.numbers, take.source))
        else:
            assert question.path == wire.CHECKSUM
            self.looked += 1
            status, body = (404, body) if self.slow else (200, b"")
            self.slow = max(0, self.slow - 1)
        writer.write(head(len(body), status) + body)
        await writer.drain()
        return True

    @property
    def blocks(self) -> list[tuple[str, int]]:
        return [(name, number) for name, numbers, _ in self.taken for number in numbers]


class Stand:
    """A node called `me` that has a store, and is to drain."""

    def __init__(self, directory: Path, *others: FakePeer, drain_s: float = 600.0) -> None:
        self.clock = HastyClock()
        self.tasks = Tasks("test")
        self.store_settings = Settings(str(directory / "cache"))
        self.store = open_store(self.store_settings, FakeClock())
        self.failures: list[str] = []
        self.keeper = Keeper(
            lambda: self.store, self.tasks, queue_bytes=1 << 20, evicted=lambda _: None,
            failed=lambda failure: self.failures.append(failure.reason), drained=lambda: None,
        )  # fmt: skip
        config = node_settings(directory, "http://127.0.0.1:1", block_bytes=16 * KIB)
        cluster = Cluster(membership="static", secret=SECRET.decode(), connect_timeout_s=5.0, drain_s=drain_s)
        self.config: Config = msgspec.structs.replace(config, cluster=cluster)
        self.others = others
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.deaf = 0
        self.rings = Rings()
        self.draining = Draining(self.config, self.keeper, self.rings, "me", self._ask_daemon, self.clock, self.tasks)

    async def _ask_daemon(self, member: str, topic: str, body: bytes) -> bytes:
        if self.deaf:
            self.deaf -= 1
            raise KosError("there is no line to it")
        self.told.append((member, topic, msgspec.json.decode(body)))
        return b"{}"

    def view(self, state: MemberState = MemberState.DRAINING) -> View:
        me = Member("me", 1, "127.0.0.1:1", "127.0.0.1:1", 1, state)
        return View(1, (me, *(other.member for other in self.others)))

    async def start(self) -> None:
        await self.keeper.open()
        self.keeper.start()

    async def drained(self) -> dict[str, Any]:
        """Have it drain to the end."""
        self.draining.follow(self.view())
        return await self.done()

    async def done(self) -> dict[str, Any]:
        def done() -> bool:
            progress = self.draining.progress()
            return progress is not None and progress["done"]

        await until(done)
        return self.draining.progress() or {}


@contextlib.asynccontextmanager
async def stand(directory: Path, *owners: Owner, **options: Any) -> AsyncIterator[Stand]:
    async with contextlib.AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(FakePeer(f"n{number}", default=owner))
            for number, owner in enumerate(owners)
        ]
        one = Stand(directory, *peers, **options)
        await one.start()
        try:
            yield one
        finally:
            await one.tasks.close()
            await one.keeper.close()


async def test_everything_is_offered_to_its_owner_once_and_what_was_read_first(tmp_path: Path) -> None:
    owners = (Owner(), Owner())
    async with stand(tmp_path, *owners) as one:
        things = [Thing(f"k{number}", 20 * KIB) for number in range(20)]
        for thing in things:
            fill(one.store, thing)
        one.store.put_small([small(one.store, Thing("small", 300))])
        hot = {("k3", 1), ("k7", 0), ("k19", 0)}
        one.store.touched([(things[int(name[1:])].content, number) for name, number in hot])
        progress = await one.drained()
        offered = owners[0].blocks + owners[1].blocks
        assert sorted(offered) == sorted({("small", 0), *((thing.key, n) for thing in things for n in thing.numbers())})
        ring = Ring(one.view().members)
        for at, owner in enumerate(owners):
            hot_here = hot & set(owner.blocks)
            assert set(owner.blocks[: len(hot_here)]) == hot_here
            for name, number in owner.blocks:
                content = Thing("small", 300).content if name == "small" else things[int(name[1:])].content
                assert ring.block_owners("b", name, content, number)[0] == f"n{at}"
        assert {source for owner in owners for _, _, source in owner.taken} == {"me"}
        assert progress | {"since": ""} == {
            "since": "", "moved_blocks": 41, "moved_bytes": 20 * 20 * KIB + 300, "failed_blocks": 0, "left_estimate": 0,
            "stage": "rest", "done": True, "ended": "moved",
        }  # fmt: skip
        assert one.failures == []


async def test_new_homes_are_told_the_records(tmp_path: Path) -> None:
    async with stand(tmp_path, Owner()) as one:
        thing = Thing("k", 40 * KIB)
        fill(one.store, thing)
        one.deaf = 2  # its line is begun anew
        await one.drained()
        ((member, topic, body),) = one.told
        assert (member, topic) == ("n0", "learn")
        ((bucket, name, record),) = body["records"]
        assert (bucket, name, msgspec.convert(record, Record).content) == ("b", "k", thing.content)


async def test_an_owner_that_is_busy_is_asked_again_and_one_that_takes_its_time_is_waited_for(tmp_path: Path) -> None:
    owner = Owner(busy=5, slow=3)
    async with stand(tmp_path, owner) as one:
        fill(one.store, Thing("k", 10 * KIB))
        progress = await one.drained()
        assert owner.blocks == [("k", 0)]
        assert (progress["moved_blocks"], progress["ended"]) == (1, "moved")


@pytest.mark.parametrize("owner", [Owner(busy=10**9), Owner(slow=10**9), Owner(status=400), Owner(status=401)])
async def test_what_an_owner_does_not_take_is_left_and_said(tmp_path: Path, owner: Owner) -> None:
    async with stand(tmp_path, owner) as one:
        for number in range(3):
            fill(one.store, Thing(f"k{number}", 10 * KIB))
        progress = await one.drained()
        assert (progress["moved_blocks"], progress["failed_blocks"]) == (0, 3)
        assert one.clock.elapsed_s < 120


async def test_an_owner_that_is_away_does_not_hold_up_the_others(tmp_path: Path) -> None:
    here = Owner()
    async with stand(tmp_path, here, Owner()) as one:
        await one.others[1].down()
        for number in range(30):
            fill(one.store, Thing(f"k{number}", 10 * KIB))
        progress = await one.drained()
        assert progress["moved_blocks"] == len(here.blocks) > 5
        assert progress["failed_blocks"] == 30 - len(here.blocks)
        assert one.clock.elapsed_s < 60


async def test_it_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async with stand(tmp_path, Owner(busy=10**9), drain_s=2.0) as one:
        for number in range(20):
            fill(one.store, Thing(f"k{number}", 10 * KIB))
        progress = await one.drained()
        assert (progress["ended"], progress["moved_blocks"]) == ("time", 0)
        assert one.clock.elapsed_s < 2.0 + 8 * 2.0


async def test_no_time_at_all(tmp_path: Path) -> None:
    owner = Owner()
    async with stand(tmp_path, owner, drain_s=0.0) as one:
        fill(one.store, Thing("k", 10 * KIB))
        progress = await one.drained()
        assert (progress["ended"], owner.taken, progress["left_estimate"]) == ("time", [], 1)


async def test_a_node_that_rejoins_stops_and_begins_anew_the_next_time(tmp_path: Path) -> None:
    peer_hangs = hangs()
    async with contextlib.AsyncExitStack() as stack:
        peer = await stack.enter_async_context(FakePeer("n0", default=peer_hangs))
        one = Stand(tmp_path, peer)
        await one.start()
        fill(one.store, Thing("k", 10 * KIB))
        one.draining.follow(one.view(MemberState.ACTIVE))
        assert one.draining.progress() is None
        one.draining.follow(one.view())
        await until(lambda: peer.questions)
        one.draining.follow(one.view(MemberState.ACTIVE))
        assert one.draining.progress() is None
        await until(lambda: "test.drain" not in one.tasks.names() and peer.open == 0)
        peer.default = Owner()
        assert (await one.drained())["moved_blocks"] == 1
        await one.tasks.close()
        await one.keeper.close()


async def test_a_view_that_comes_meanwhile_holds_for_what_is_left(tmp_path: Path) -> None:
    first, second = Owner(busy=10**9), Owner()
    async with stand(tmp_path, first, second) as one:
        for number in range(10):
            fill(one.store, Thing(f"k{number}", 10 * KIB))
        joined, one.others = one.others[1], one.others[:1]
        one.draining.follow(one.view())
        await until(lambda: first.busy < 10**9)
        one.others = (joined,)
        one.draining.follow(one.view())
        progress = await one.done()
        assert progress["ended"] == "moved"
        # What was on its way to the one that left is lost; nobody waits for it.
        assert progress["moved_blocks"] + progress["failed_blocks"] == 10


async def test_nobody_is_there_to_take_anything(tmp_path: Path) -> None:
    async with stand(tmp_path) as one:
        fill(one.store, Thing("k", 10 * KIB))
        progress = await one.drained()
        assert (progress["moved_blocks"], progress["failed_blocks"], progress["done"]) == (0, 1, True)


async def test_a_store_that_fails_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    async with stand(tmp_path, owner) as one:
        fill(one.store, Thing("k", 10 * KIB))
        real: Callable[..., Any] = Store.of_segment
        fails = [2]

        def failing(store: Store, *arguments: Any) -> Any:
            if fails[0]:
                fails[0] -= 1
                raise StoreFailed("not now")
            return real(store, *arguments)

        monkeypatch.setattr(Store, "of_segment", failing)
        assert (await one.drained())["moved_blocks"] == 1
        assert one.failures == ["not now", "not now"], "as for any other call to the store"


async def test_what_a_crash_has_left_is_looked_at_before_it_is_given_away(tmp_path: Path) -> None:
    owner = Owner()
    async with stand(tmp_path, owner) as one:
        good, bad = Thing("good", 10 * KIB), Thing("bad", 10 * KIB)
        fill(one.store, good)
        fill(one.store, bad)
        for thing in (good, bad):
            _unverify(one.store, thing)
        place = one.store.locate(bad.content, 0)
        assert place is not None
        segment = next(Path(one.store_settings.dir, "segments").glob(f"{place.segment:016x}*"))
        with segment.open("r+b") as file:
            file.seek(place.offset)
            file.write(b"rotten")
        progress = await one.drained()
        assert owner.blocks == [("good", 0)]
        assert (progress["moved_blocks"], progress["failed_blocks"]) == (1, 1)


def _unverify(store: Store, thing: Thing) -> None:
    from koscache.index import block_key, encode_location

    place = store.locate(thing.content, 0)
    assert place is not None
    key = block_key(thing.content, 0)
    environment = store._environment
    with environment.write() as txn:
        txn.put(key, encode_location(key, place._replace(verified=False)), db=environment.blocks)


def test_batches() -> None:
    members = [Member(name, 1, "", "", 1) for name in ("a", "b", "c")]
    ring = Ring(members)
    record = Record('"e"', 100 << 20, "", (), (), True, b"c" * 16, 1.0, 1)
    blocks = [Held("b", "k", record, number, 1 << 20, True) for number in range(100)]
    batches = batches_of(ring, blocks)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(100))
    for batch in batches:
        assert batch.length <= 8 << 20
        assert {ring.block_owners("b", "k", record.content, number)[0] for number in batch.numbers} == {batch.owner}
    assert batches[0].numbers[0] == 0, "in the order of what was asked"
    huge = batches_of(ring, [each._replace(length=256 << 20) for each in blocks[:3]])
    assert [len(batch.blocks) for batch in huge] == [1, 1, 1]
    tiny = batches_of(Ring(members[:1]), [each._replace(length=1) for each in blocks])
    assert [len(batch.blocks) for batch in tiny] == [64, 36]
    assert batches_of(Ring(()), blocks) == []
    assert Batch("a", "b", "k", record, ((1, 5), (2, 6))).length == 11
