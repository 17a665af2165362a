"""Several daemons' hubs on one loop, over real lines and fences, by a clock that stands still: what workers would see."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos import config, metrics
from kos.config import Cluster, Config, Listen
from kos.control import database, members, migrations
from kos.control.errors import ControlUnavailable, SchemaTooNew
from kos.control.members import MemberState as StoredState
from kos.tasks import Tasks
from koscache import ipc
from koscache.cluster import hub as hub_module
from koscache.cluster import wire
from koscache.cluster.coherence import ProtocolBroken
from koscache.cluster.hub import Away, Hub
from koscache.cluster.view import MemberState, View
from koscache.fence import FOREVER_NS, Fence, _random_slots
from tests.conditions import until
from tests.fakes.cache_node import settings
from tests.fakes.clock import FakeClock
from tests.fakes.members import MemberTable

LEASE_S = 2.0
MEMBER_LEASE_S = 15.0
HEARTBEAT_S = 3.0
WRITE_WAIT_S = 40.0
SLOT, OTHER = 5, 6


class InFlight:
    """What has been sent on connections of both of whose ends are here, and not been received yet: time stands still for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open: dict[tuple[Any, Any], ipc.Connection] = {}
        self._sent: dict[tuple[Any, Any], int] = {}
        self._received: dict[tuple[Any, Any], int] = {}
        made, send = ipc.Connection.connection_made, ipc.Connection.send
        received, lost = ipc.Connection.data_received, ipc.Connection.connection_lost

        def ends(connection: ipc.Connection) -> tuple[Any, Any]:
            return self._ends[id(connection)]

        self._ends: dict[int, tuple[Any, Any]] = {}

        def connection_made(connection: ipc.Connection, transport: asyncio.BaseTransport) -> None:
            own = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
            self._ends[id(connection)] = own
            self._open[own] = connection
            self._sent[own] = self._received[own] = 0
            made(connection, transport)

        def sent(connection: ipc.Connection, message: ipc.Message) -> bool:
            done = send(connection, message)
            if done:
                self._sent[ends(connection)] += len(ipc.frame(message))
            return done

        def data_received(connection: ipc.Connection, data: bytes) -> None:
            self._received[ends(connection)] += len(data)
            received(connection, data)

        def connection_lost(connection: ipc.Connection, error: Exception | None) -> None:
            self._open.pop(self._ends.pop(id(connection)), None)
            lost(connection, error)

        monkeypatch.setattr(ipc.Connection, "connection_made", connection_made)
        monkeypatch.setattr(ipc.Connection, "send", sent)
        monkeypatch.setattr(ipc.Connection, "data_received", data_received)
        monkeypatch.setattr(ipc.Connection, "connection_lost", connection_lost)

    def nothing(self) -> bool:
        return all(
            connection.open and (here, there) in self._open and self._sent[there, here] == self._received[here, there]
            for (there, here), connection in self._open.items()
        )


class Node:
    """One daemon after the other in one directory, as it lives and dies."""

    def __init__(self, cluster: Them, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.directory = cluster.directory / name
        self.directory.mkdir()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listening.getsockname()[1]}"
        self._fence: Fence | None = None
        self.views: list[View] = []
        self.failures: list[str] = []
        self._hub: Hub | None = None
        self._tasks = Tasks(name)

    def open_fence(self) -> Fence:
        return Fence.open(str(self.directory), alone=False)

    @property
    def fence(self) -> Fence:
        """What its workers look at."""
        if self._fence is None or not self._fence.current():
            self.close_fence()
            self._fence = self.open_fence()
        return self._fence

    def close_fence(self) -> None:
        if self._fence is not None:
            self._fence.close()
            self._fence = None

    @property
    def hub(self) -> Hub:
        assert self._hub is not None
        return self._hub

    @property
    def settings(self) -> Config:
        return msgspec.structs.replace(
            settings(self.directory, "http://127.0.0.1:9"),
            listen=Listen(peer="127.0.0.1:9", cluster=self.address),
            cluster=Cluster(
                membership=self.cluster.membership, name=self.name, secret="s" * 16, lease_s=LEASE_S,
                member_lease_s=MEMBER_LEASE_S, heartbeat_s=HEARTBEAT_S, write_wait_s=WRITE_WAIT_S,
            ),
            members=tuple(
                config.Member(name=each.name, peer="127.0.0.1:9", cluster=each.address)
                for each in self.cluster.nodes.values()
            ),
        )  # fmt: skip

    async def start(self) -> None:
        if self.listening.fileno() < 0:
            host, port = self.address.split(":")
            self.listening = socket.create_server((host, int(port)))
        self._tasks = Tasks(self.name)
        self._hub = Hub(
            self.settings, self.cluster.clock, self._tasks, view_changed=self.views.append, answers=self.answer,
            failed=self.failures.append, now=self.cluster.clock.monotonic,
        )  # fmt: skip
        await self._hub.start(self.open_fence(), self.listening)

    async def answer(self, topic: str, body: bytes) -> bytes:
        if topic == "silence":
            await asyncio.Event().wait()
        return json.dumps([self.name, topic, body.decode()]).encode()

    async def stop(self) -> None:
        """As it is told to."""
        hub, self._hub = self._hub, None
        if hub is not None:
            await hub.close()
            await self._tasks.close()
            self.listening.close()

    async def die(self) -> None:
        """kill -9: nothing is said or written, and its sockets close."""
        hub, self._hub = self._hub, None
        if hub is None:
            return
        lines = hub._lines
        hub._coherence = None
        await self._tasks.close()
        every: list[Any] = [*lines._outs.values(), *lines.ins.values(), *lines._unproven]
        for line in every:
            if line.connection is not None:
                line.connection.abort("killed")
        if lines._server is not None:
            lines._server.close()
        self.listening.close()

    def value(self, slot: int = SLOT) -> int:
        return self.fence.value(slot)

    @property
    def trusts(self) -> bool:
        return self.fence.trusted()

    def vouches(self, slot: int = SLOT) -> bool:
        return self.fence.vouching(slot)


class Them:
    """The nodes of a test, their clock, and their store if they have one."""

    def __init__(self, directory: Path, clock: FakeClock, membership: Any, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self.directory = directory
        self.clock = clock
        self.membership = membership
        self.store = MemberTable(clock)
        self.prepare_error: Exception | None = None
        self.nodes: dict[str, Node] = {}

    def add(self, *names: str) -> list[Node]:
        for name in names:
            self.nodes[name] = Node(self, name)
        return [self.nodes[name] for name in names]

    async def start(self, *names: str) -> list[Node]:
        """These, which come to trust each other."""
        added = self.add(*names)
        for node in added:
            await node.start()
        await self.until(lambda: all(node.trusts for node in self.nodes.values() if node._hub is not None))
        return added

    async def turn(self) -> None:
        """Whatever is on its way on a socket arrives, and an end that was cut is seen by the other."""
        for _ in range(5):
            await asyncio.sleep(0)
        await until(self._in_flight.nothing)

    async def pass_time(self, seconds: float) -> None:
        step_s = LEASE_S / 10
        for _ in range(math.ceil(seconds / step_s)):
            await self.clock.advance(step_s)
            await self.turn()

    async def until(self, condition: Callable[[], object], seconds: float = 60.0) -> float:
        """Lets time pass until then; how much did."""
        began = self.clock.monotonic()
        while True:
            await self.turn()
            if condition():
                return self.clock.monotonic() - began
            assert self.clock.monotonic() - began < seconds, f"not within {seconds} s"
            await self.clock.advance(LEASE_S / 10)


@pytest.fixture
async def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[str], Them]]:
    clock = FakeClock()
    # The clock of leases as well, for what workers would see.
    monkeypatch.setattr("koscache.fence.boot_ns", lambda: int(clock.monotonic() * 1e9))
    made: list[Them] = []
    in_flight = InFlight(monkeypatch)
    slots = _random_slots()
    monkeypatch.setattr("koscache.fence._random_slots", lambda: slots)  # they take a while, and the first ones do

    def make(membership: str) -> Them:
        cluster = Them(tmp_path, clock, membership, in_flight)
        made.append(cluster)

        class Opened:
            def __init__(self, control: object) -> None: ...

            async def close(self) -> None: ...

        async def upgrade(opened: object) -> None:
            if cluster.prepare_error is not None:
                raise cluster.prepare_error

        monkeypatch.setattr(database, "Database", Opened)
        monkeypatch.setattr(members, "Members", lambda opened: cluster.store)
        monkeypatch.setattr(migrations, "upgrade", upgrade)
        return cluster

    yield make
    for cluster in made:
        for node in cluster.nodes.values():
            await node.die()
            node.listening.close()
            node.close_fence()


@pytest.fixture
def static(clusters: Callable[[str], Them]) -> Them:
    return clusters("static")


@pytest.fixture
def control(clusters: Callable[[str], Them]) -> Them:
    return clusters("control")


# --- a write --------------------------------------------------------------------------------------------------------------


async def test_a_write_passes_the_slots_of_all_others_before_it_is_done(static: Them) -> None:
    w, a, h = await static.start("w", "a", "h")
    before = {node: (node.value(SLOT), node.value(OTHER)) for node in (a, h)}
    handle = w.hub.writes.begin([SLOT])
    await until(lambda: not a.vouches() and not h.vouches())
    begun = {node: node.value() for node in (a, h)}
    assert all(begun[node] != before[node][0] for node in (a, h))
    assert a.trusts
    assert a.vouches(OTHER)
    ending = w.hub.writes.end(handle)
    seen: list[bool] = []
    ending.add_done_callback(
        lambda _: seen.append(all(node.value() not in (begun[node], before[node][0]) for node in (a, h)))
    )
    assert await ending is True
    await until(lambda: seen)
    assert seen == [True]
    assert all(node.vouches() for node in (a, h))
    assert all(node.value(OTHER) == before[node][1] for node in (a, h))
    assert w.hub.writes.waiting == 0


async def test_its_own_slots_pass_before_anybody_hears_the_end(static: Them) -> None:
    w, a = await static.start("w", "a")
    handle = w.hub.writes.begin([SLOT])
    await until(lambda: not a.vouches())
    own, others = w.value(), a.value()
    ending = w.hub.writes.end(handle)
    await until(lambda: a.value() != others)
    assert w.value() != own
    assert await ending


async def test_alone_a_write_is_done_at_once_and_trust_lasts_for_ever(static: Them) -> None:
    (w,) = await static.start("w")
    assert w.fence.trusted_until_ns == FOREVER_NS
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert ending.done()
    assert ending.result() is True


async def test_writes_of_all_at_once(static: Them) -> None:
    nodes = await static.start("a", "b", "c")
    endings = [
        node.hub.writes.end(node.hub.writes.begin([SLOT + each]))
        for each in range(50)
        for node in nodes
    ]  # fmt: skip
    assert all(await asyncio.gather(*endings))
    await until(lambda: all(node.vouches(SLOT + each) for node in nodes for each in range(50)))


async def test_who_forgets_a_write_still_tells_of_its_end(static: Them) -> None:
    w, a = await static.start("w", "a")
    handle = w.hub.writes.begin([SLOT])
    await until(lambda: not a.vouches())
    begun = a.value()
    w.hub.writes.forget(handle)
    w.hub.writes.forget(handle)  # once is enough
    await until(a.vouches)
    assert a.value() != begun


async def test_after_write_wait_it_is_refused_and_goes_on_to_be_told(static: Them) -> None:
    """A renews, and acknowledges nothing."""
    w, a = await static.start("w", "a")
    a.hub._lines.reply = lambda name, message: True  # type: ignore[method-assign]
    handle = w.hub.writes.begin([SLOT])
    ending = w.hub.writes.end(handle)
    coherence = w.hub._coherence
    assert coherence is not None

    def renewed() -> bool:
        coherence.renew("a", 1, static.clock.monotonic())
        return ending.done()

    took = await static.until(renewed, WRITE_WAIT_S + 1)
    assert WRITE_WAIT_S - 0.5 <= took <= WRITE_WAIT_S + 0.5
    assert await ending is False
    assert w.hub.writes.waiting == 0


async def test_who_stops_answers_what_waits_with_no(static: Them) -> None:
    w, a = await static.start("w", "a")
    await a.die()
    waiting = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    under_way = w.hub.writes.begin([OTHER])
    hub = w.hub
    await w.stop()
    assert await waiting is False
    assert await hub.writes.end(under_way) is False


# --- who is away, static ---------------------------------------------------------------------------------------------------


async def test_a_dead_node_is_waited_for_as_long_as_its_lease_and_then_told_what_it_missed(static: Them) -> None:
    w, a = await static.start("w", "a")
    await a.die()
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    took = await static.until(ending.done, 5.0)
    assert took >= 0.5 * LEASE_S
    assert await ending is True
    assert not a.trusts
    assert w.hub.in_trouble() == {"a": "no line"}
    epoch, value = a.fence.epoch, a.value()
    await a.start()
    await static.until(lambda: a.trusts)
    assert a.value() != value
    assert a.fence.epoch != epoch  # it does not know whom it had heard
    await static.until(lambda: w.hub.in_trouble() == {})


async def test_one_that_stops_says_so_and_its_next_daemon_misses_nothing(static: Them) -> None:
    w, a, h = await static.start("w", "a", "h")
    epoch, kept = a.fence.epoch, a.value(OTHER)
    number = a.hub.daemon
    await a.stop()
    assert not a.trusts
    resigned = json.loads((a.directory / "resigned.json").read_text())
    assert resigned["daemon"] == number
    assert resigned["left"]["heard"] == {"w": w.hub.daemon, "h": h.hub.daemon}
    await until(lambda: w.hub._coherence is not None and w.hub._coherence._outs["a"].resigned)
    before = static.clock.monotonic()
    value = a.value()
    assert await w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert static.clock.monotonic() == before  # nobody waited for it
    await a.start()
    assert not (a.directory / "resigned.json").exists()
    assert a.hub.daemon == number
    await static.until(lambda: a.trusts)
    assert a.fence.epoch == epoch
    assert a.value() != value
    assert a.value(OTHER) == kept


async def test_what_it_had_not_told_is_told_by_its_next_daemon(static: Them) -> None:
    w, a = await static.start("w", "a")
    epoch, value = a.fence.epoch, a.value()
    await a.stop()
    await until(lambda: w.hub.in_trouble() == {"a": "no line"})
    assert await w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await w.stop()
    assert json.loads((w.directory / "resigned.json").read_text())["left"]["skipped"] == {"a": [SLOT]}
    await w.start()
    await a.start()
    await static.until(lambda: a.trusts and w.trusts)
    assert a.fence.epoch == epoch
    assert a.value() != value


async def test_one_that_cannot_leave_word_is_waited_for(static: Them) -> None:
    w, a = await static.start("w", "a")
    (a.directory / "resigned.new").mkdir()
    await a.stop()
    assert not a.trusts
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert await static.until(ending.done, 5.0) > 0.4 * LEASE_S
    assert await ending is True


@pytest.mark.parametrize("left", [b"{", b"{}", b'{"daemon": 7}', b"\xff"])
async def test_what_cannot_be_read_is_as_if_nothing_was_left(static: Them, left: bytes) -> None:
    _, a = await static.start("w", "a")
    epoch = a.fence.epoch
    await a.stop()
    (a.directory / "resigned.json").write_bytes(left)
    await static.pass_time(2 * LEASE_S)
    await a.start()
    await static.until(lambda: a.trusts)
    assert a.hub.daemon != 7
    assert a.fence.epoch != epoch
    assert not (a.directory / "resigned.json").exists()


async def test_what_was_left_at_another_boot_is_not_believed(static: Them, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be there again after a loss of power, though a daemon has taken it up."""
    _, a = await static.start("w", "a")
    number, epoch = a.hub.daemon, a.fence.epoch
    await a.stop()
    monkeypatch.setattr(hub_module, "read_boot_id", lambda: "another boot")
    await static.pass_time(2 * LEASE_S)
    await a.start()
    assert a.hub.daemon != number
    assert a.fence.epoch != epoch


async def test_a_new_daemon_vouches_for_nothing_before_it_knows_what_is_under_way(static: Them) -> None:
    w, a = await static.start("w", "a")
    handle = w.hub.writes.begin([SLOT])
    await until(lambda: not a.vouches())
    await a.die()
    assert a.trusts  # as before: no write has been answered without it
    await w.die()
    await a.start()
    assert a.trusts
    assert not a.vouches(OTHER)
    assert not a.vouches(SLOT)
    await static.pass_time(LEASE_S)
    assert not a.trusts
    assert not a.vouches(OTHER)
    assert handle
    await w.start()
    await static.until(lambda: a.trusts and a.vouches(OTHER))


async def test_trust_that_an_earlier_daemon_was_given_for_ever_is_no_more_than_a_lease(static: Them) -> None:
    """The list had one member then."""
    (w,) = await static.start("w")
    await w.stop()
    w.fence.trust(FOREVER_NS, FOREVER_NS)
    (a,) = static.add("a")
    a.listening.close()
    await w.start()
    assert w.trusts
    assert not w.vouches()
    await static.pass_time(LEASE_S)
    assert not w.trusts


async def test_a_fence_whose_file_was_taken_away_is_followed_and_nothing_of_it_trusted(static: Them) -> None:
    w, a = await static.start("w", "a")
    handle = w.hub.writes.begin([SLOT])
    await until(lambda: not a.vouches())
    old = a.open_fence()
    os.unlink(a.directory / "fence")
    fresh = a.fence  # a worker was faster
    fresh_epoch = fresh.epoch
    assert not fresh.trusted()
    await static.until(fresh.trusted)
    assert fresh.epoch != fresh_epoch
    assert not old.trusted()
    assert not fresh.vouching(SLOT)  # a write is under way
    assert fresh.vouching(OTHER)
    before = fresh.value(SLOT)
    assert await w.hub.writes.end(handle)
    assert fresh.value(SLOT) != before
    assert fresh.vouching(SLOT)
    old.close()


# --- with the control store --------------------------------------------------------------------------------------------------


async def test_members_find_each_other_in_the_store(control: Them) -> None:
    w, a = await control.start("w", "a")
    await control.until(lambda: w.views[-1].version == a.views[-1].version == control.store.version)
    assert [member.name for member in w.views[-1].members] == ["a", "w"]
    assert w.views[-1].members[0].cluster == a.address
    assert (w.fence.incarnation, a.fence.incarnation) == (1, 2)
    assert w.hub.view == w.views[-1]
    assert await w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert json.loads(w.hub.report()) == {"capacity_bytes": w.settings.cache.size_bytes}


async def test_who_was_no_member_for_a_while_doubts_all_it_knows(control: Them) -> None:
    (w,) = await control.start("w")
    epoch = w.fence.epoch
    assert epoch != 0
    control.store.remove("w")
    await control.until(lambda: w.fence.incarnation == 2)
    assert w.fence.epoch not in (0, epoch)
    await control.until(lambda: w.trusts)


async def test_what_ended_while_it_was_no_member_is_told_when_it_is_one(control: Them) -> None:
    (a,) = await control.start("a")
    control.store.away = "down"
    (w,) = control.add("w")
    await w.start()
    w.hub.writes.forget(w.hub.writes.begin([SLOT]))
    value, other = a.value(SLOT), a.value(OTHER)
    assert (value, other) == (a.value(SLOT), a.value(OTHER))
    control.store.away = ""
    epoch = a.fence.epoch
    await control.until(lambda: w.trusts and a.trusts)
    await control.until(lambda: a.value(SLOT) ^ a.fence.epoch != value ^ epoch)
    assert a.value(OTHER) ^ a.fence.epoch == other ^ epoch


async def test_one_that_stops_has_no_more_to_do_with_the_store(control: Them) -> None:
    """A heartbeat that is answered when it has resigned would have it trusted again."""
    w, _ = await control.start("w", "a")
    hub = w.hub
    await hub.close()
    assert hub._membership is not None
    assert hub._membership.cancelled()
    assert not w.trusts


async def test_a_return_in_time_keeps_what_is_known(control: Them) -> None:
    _, a = await control.start("w", "a")
    epoch, incarnation = a.fence.epoch, a.fence.incarnation
    await a.stop()
    await a.start()
    await control.until(lambda: a.trusts)
    assert (a.fence.epoch, a.fence.incarnation) == (epoch, incarnation)


async def test_without_the_store_there_is_no_member_and_writes_wait(control: Them) -> None:
    control.store.away = "down"
    (w,) = control.add("w")
    await w.start()
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    forgotten = w.hub.writes.begin([OTHER])
    w.hub.writes.forget(forgotten)
    await control.pass_time(5.0)
    assert not w.trusts
    assert w.hub.control_away == "down"
    assert not ending.done()
    assert w.views == []
    with pytest.raises(ProtocolBroken):
        w.hub.greet("a")
    with pytest.raises(ProtocolBroken):
        w.hub.known("a")
    control.store.away = ""
    await control.until(ending.done, 3.0)
    assert await ending is True
    assert w.trusts
    assert w.hub.control_away == ""


@pytest.mark.parametrize("count", [3, 20_000, 70_000])
async def test_of_what_ended_meanwhile_all_others_hear_however_much_it_is(control: Them, count: int) -> None:
    """More than can be told has them confirm everything."""
    w, a = await control.start("w", "a")
    await a.stop()
    control.store.remove("a")
    await control.until(lambda: w.views[-1].find("a") is None and w.trusts)
    control.store.hold = held = asyncio.Event()
    await a.start()
    for number in range(count // 1000 + 1):
        a.hub.writes.forget(a.hub.writes.begin(range(number * 1000, min(count, number * 1000 + 1000))))
    epoch, before = w.fence.epoch, [w.fence.value(slot) for slot in (0, 2, count - 1)]
    control.store.hold = None
    held.set()
    await control.until(lambda: a.trusts and w.trusts, 2 * MEMBER_LEASE_S)
    assert all(w.fence.value(slot) != value for slot, value in zip((0, 2, count - 1), before, strict=True))
    assert w.fence.epoch == epoch or count > 65_536


async def test_and_for_no_longer_than_write_wait(control: Them) -> None:
    control.store.away = "down"
    (w,) = control.add("w")
    await w.start()
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert WRITE_WAIT_S - 1 <= await control.until(ending.done, WRITE_WAIT_S + 1) <= WRITE_WAIT_S + 1
    assert await ending is False


async def test_with_the_store_away_for_all_they_go_on_by_each_others_leases(control: Them) -> None:
    w, a = await control.start("w", "a")
    control.store.away = "down"
    await control.pass_time(3 * MEMBER_LEASE_S)
    assert w.trusts
    assert a.trusts
    assert await w.hub.writes.end(w.hub.writes.begin([SLOT]))
    assert a.fence.trusted_until_ns <= (control.clock.monotonic() + LEASE_S) * 1e9


async def test_one_that_dies_is_put_out_and_a_write_waits_for_that_alone(control: Them) -> None:
    w, a, h = await control.start("w", "a", "h")
    await control.pass_time(MEMBER_LEASE_S)
    await a.die()
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await control.pass_time(0.6 * MEMBER_LEASE_S)
    assert not ending.done()
    await control.until(ending.done, MEMBER_LEASE_S)
    assert await ending is True
    assert control.store.names == ["h", "w"]
    assert not a.trusts
    assert h.trusts
    await control.until(lambda: [member.name for member in h.views[-1].members] == ["h", "w"])
    epoch = a.fence.epoch
    await a.start()
    await control.until(lambda: a.trusts)
    assert a.fence.epoch != epoch
    assert a.fence.incarnation == 4


async def test_one_that_finds_itself_put_out_doubts_all_and_tells_its_writes_again(control: Them) -> None:
    w, a = await control.start("w", "a")
    await control.pass_time(MEMBER_LEASE_S)
    epoch, daemon, incarnation = w.fence.epoch, w.hub.daemon, w.fence.incarnation
    other = a.hub.writes.begin([OTHER])
    under_way, forgotten = w.hub.writes.begin([SLOT]), w.hub.writes.begin([SLOT + 10])
    await until(lambda: not a.vouches(SLOT) and not w.vouches(OTHER))
    a.hub._lines.reply = lambda name, message: True  # type: ignore[method-assign]  # what a acknowledges is lost
    waiting = w.hub.writes.end(w.hub.writes.begin([SLOT + 11]))
    w.hub.writes.forget(forgotten)
    await control.turn()
    del a.hub._lines.reply
    control.store.remove("w")
    await control.until(lambda: w.fence.incarnation != incarnation, HEARTBEAT_S + 1)
    assert w.fence.epoch != epoch
    assert w.hub.daemon != daemon
    await control.until(lambda: waiting.done() and w.trusts and a.trusts, 3 * MEMBER_LEASE_S)
    assert await waiting is True
    await control.until(lambda: a.vouches(SLOT + 10) and a.vouches(SLOT + 11))
    assert not a.vouches(SLOT)  # it is still under way
    assert not w.vouches(OTHER)
    endings = w.hub.writes.end(under_way), a.hub.writes.end(other)
    await control.until(lambda: all(ending.done() for ending in endings), 5.0)
    assert all([await ending for ending in endings])
    await control.until(lambda: a.vouches(SLOT) and w.vouches(OTHER))


async def test_a_restart_after_it_was_put_out_goes_on_as_nobody(control: Them) -> None:
    """What it had passed over whom it has left to itself; but as another incarnation it does not know it any more."""
    w, _ = await control.start("w", "a")
    number = w.hub.daemon
    await w.stop()
    control.store.remove("w")
    await w.start()
    await control.until(lambda: w.trusts)
    assert w.hub.daemon != number


async def test_a_store_that_has_gone_back_is_gone_by_from_then_on(control: Them) -> None:
    (w,) = await control.start("w")
    control.store.version += 10
    await control.until(lambda: w.views[-1].version == control.store.version)
    control.store.version -= 8
    await control.until(lambda: w.views[-1].version == control.store.version, 2 * HEARTBEAT_S)
    (a,) = await control.start("a")
    assert w.views[-1].version == a.views[-1].version == control.store.version
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await control.until(ending.done, 5.0)
    assert await ending is True


async def test_members_of_a_store_that_has_gone_back_are_one_cluster_again(control: Them) -> None:
    """Each may have the view that was forgotten from another, who has not noticed yet."""
    w, a, h = await control.start("w", "a", "h")
    control.store.version += 10
    await control.until(lambda: all(each.views[-1].version == control.store.version for each in (w, a, h)))
    control.store.version -= 9
    control.store.put("b", 2 * HEARTBEAT_S)  # one that only the backup knows
    lifted = control.store.version + 100
    await control.until(lambda: all(each.views[-1].version > lifted for each in (w, a, h)), 3 * HEARTBEAT_S)
    await control.until(lambda: "b" not in control.store.names, 3 * MEMBER_LEASE_S)
    await control.until(lambda: w.trusts and a.trusts and h.trusts, 2 * MEMBER_LEASE_S)
    for each in (w, a, h):
        ending = each.hub.writes.end(each.hub.writes.begin([SLOT]))
        await control.until(ending.done, 2 * MEMBER_LEASE_S)
        assert await ending is True
    assert len({each.views[-1] for each in (w, a, h)}) == 1


async def test_no_write_is_done_while_a_member_that_the_store_has_forgotten_trusts(control: Them) -> None:
    """Nobody is told of it any more; it has only not asked the store yet."""
    w, a = await control.start("w", "a")
    beat = control.store.heartbeat

    async def heartbeat(name: str, *args: Any, **options: Any) -> Any:
        if name == "a":
            raise ControlUnavailable("for a alone")
        return await beat(name, *args, **options)

    control.store.heartbeat = heartbeat  # type: ignore[method-assign]
    control.store.remove("w")
    control.store.remove("a")
    control.store.version = 0
    await control.until(lambda: w.views[-1].version > 1000, 2 * HEARTBEAT_S)
    assert [member.name for member in w.views[-1].members] == ["w"]
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await control.until(lambda: ending.done() or not a.trusts, 2 * MEMBER_LEASE_S)
    assert not a.trusts
    await control.until(ending.done, 2 * MEMBER_LEASE_S)
    assert await ending is True


async def test_another_process_of_its_name_ends_it(control: Them) -> None:
    w, a = await control.start("w", "a")
    control.store.take_over("w")
    await control.until(lambda: w.failures, HEARTBEAT_S + 1)
    assert "w" in w.failures[0]
    assert not w.trusts
    assert a.failures == []


async def test_a_schema_of_a_later_kos_ends_it(control: Them) -> None:
    control.prepare_error = SchemaTooNew("revision 99")
    (w,) = control.add("w")
    await w.start()
    await control.until(lambda: w.failures)
    assert w.failures == ["revision 99"]


async def test_a_fault_of_its_own_does_not_end_its_membership(control: Them) -> None:
    w, a = await control.start("w", "a")
    control.prepare_error = None
    answered = control.store.heartbeat

    async def heartbeat(*args: Any, **options: Any) -> Any:
        control.store.heartbeat = answered  # type: ignore[method-assign]
        raise ZeroDivisionError("our own")

    control.store.heartbeat = heartbeat  # type: ignore[method-assign]
    await control.until(lambda: control.store.heartbeat == answered, HEARTBEAT_S + 1)
    await control.until(lambda: w.trusts and a.trusts)
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await control.until(ending.done, 5.0)
    assert await ending is True


async def test_one_that_drains_and_stops_leaves(control: Them) -> None:
    w, a = await control.start("w", "a")
    await a.hub.set_state(MemberState.DRAINING)
    assert a.hub._me.state is MemberState.DRAINING
    await control.until(lambda: w.views[-1].members[0].state is MemberState.DRAINING)
    await a.stop()
    assert control.store.names == ["w"]
    assert not a.trusts
    await control.until(lambda: [member.name for member in w.views[-1].members] == ["w"], 2 * HEARTBEAT_S)
    await control.pass_time(2 * HEARTBEAT_S)
    assert control.store.names == ["w"]
    await a.start()
    await control.until(lambda: a.trusts)
    assert a.hub.state is MemberState.DRAINING  # as it left
    assert control.store._rows["a"][0].state is StoredState.DRAINING


async def test_one_that_only_stops_stays_a_member(control: Them) -> None:
    _, a = await control.start("w", "a")
    await a.stop()
    assert control.store.names == ["a", "w"]
    beats = control.store.calls.count(("heartbeat", "a"))
    await control.pass_time(2 * HEARTBEAT_S)
    assert control.store.calls.count(("heartbeat", "a")) == beats


async def test_who_is_no_member_cannot_drain(control: Them) -> None:
    (w,) = await control.start("w")
    control.store.remove("w")
    with pytest.raises(Away):
        await w.hub.set_state(MemberState.DRAINING)


# --- views and states ----------------------------------------------------------------------------------------------------


async def test_static_a_node_that_drains_tells_all_and_remembers(static: Them) -> None:
    w, a = await static.start("w", "a")
    followed: list[View] = []
    w.hub.followers.append(followed.append)
    await a.hub.set_state(MemberState.DRAINING)
    await a.hub.set_state(MemberState.DRAINING)  # of no effect
    await static.until(lambda: w.views[-1].members[0].state is MemberState.DRAINING)
    assert followed == [w.views[-1]]
    assert a.views[-1].members[0].state is MemberState.DRAINING
    await a.stop()
    await a.start()
    assert a.hub.state is MemberState.DRAINING
    await a.hub.set_state(MemberState.ACTIVE)
    await static.until(lambda: w.views[-1].members[0].state is MemberState.ACTIVE)
    await a.stop()
    await a.start()
    assert a.hub.state is MemberState.ACTIVE


async def test_views_come_to_workers_in_order_and_each_once(control: Them) -> None:
    (w,) = await control.start("w")
    await control.start("a")
    await control.start("b")
    await control.until(lambda: len(w.views[-1].members) == 3)
    versions = [view.version for view in w.views]
    assert versions == sorted(versions)
    assert [member.name for member in w.views[-1].members] == ["a", "b", "w"]


async def test_a_newer_view_is_asked_of_who_has_it(control: Them) -> None:
    """Its own heartbeats would tell, but not soon."""
    w, a = await control.start("w", "a")
    await control.pass_time(HEARTBEAT_S)
    (b,) = control.add("b")
    await b.start()
    before = control.clock.monotonic()
    await control.until(lambda: len(w.views[-1].members) == len(a.views[-1].members) == 3, 1.0)
    assert control.clock.monotonic() - before < 1.0


# --- questions -------------------------------------------------------------------------------------------------------------


async def test_a_member_answers_questions(static: Them) -> None:
    w, _ = await static.start("w", "a")
    assert json.loads(await w.hub.ask("a", "status", b"{}")) == ["a", "status", "{}"]
    assert json.loads(await w.hub.ask("w", "status", b"")) == ["w", "status", ""]
    answers = await asyncio.gather(*(w.hub.ask("a", f"t{each}", b"") for each in range(100)))
    assert [json.loads(answer)[1] for answer in answers] == [f"t{each}" for each in range(100)]


async def test_who_cannot_be_asked_is_away(static: Them, monkeypatch: pytest.MonkeyPatch) -> None:
    w, a = await static.start("w", "a")
    with pytest.raises(Away, match="no line"):
        await w.hub.ask("nobody", "status", b"")
    asking = asyncio.create_task(w.hub.ask("a", "silence", b""))
    await static.turn()
    await a.die()
    with pytest.raises(Away) as away:
        await asking
    assert "no answer within" not in str(away.value)
    assert w.hub._asks == {}


async def test_who_does_not_answer_in_time_is_away(static: Them, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = await static.start("w", "a")
    monkeypatch.setattr(hub_module, "_ASK_S", 0.02)
    with pytest.raises(Away, match="no answer within"):
        await w.hub.ask("a", "silence", b"")
    assert w.hub._asks == {}


async def test_questions_are_bounded(static: Them, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = await static.start("w", "a")
    monkeypatch.setattr(hub_module, "_ASKS_MAX", 2)
    asking = [asyncio.create_task(w.hub.ask("a", "silence", b"")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Away, match="too many"):
        await w.hub.ask("a", "status", b"")
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert json.loads(await w.hub.ask("a", "status", b""))[0] == "a"


async def test_what_only_the_other_end_may_say_breaks_a_line(static: Them) -> None:
    w, _ = await static.start("w", "a")
    for said in (wire.Begin(1, (5,)), wire.Ping(), wire.Challenge(b"")):
        with pytest.raises(ProtocolBroken, match="from a listener"):
            w.hub.told("a", said)
    for replied in (wire.Ack(1, False, 0), wire.Resigned(), wire.Welcome(0)):
        with pytest.raises(ProtocolBroken, match="from a writer"):
            w.hub.heard("a", replied)
    w.hub.told("a", wire.Said(99, b""))  # to a question that nobody waits for any more


async def test_metrics_say_how_it_stands(static: Them) -> None:
    w, a = await static.start("w", "a")
    await static.pass_time(LEASE_S)
    assert metrics.CLUSTER_MEMBERS._value.get() == 2
    assert metrics.CLUSTER_TRUSTED._value.get() == 1
    await a.die()
    ending = w.hub.writes.end(w.hub.writes.begin([SLOT]))
    await static.pass_time(0.25)
    assert metrics.CLUSTER_TROUBLED._value.get() == 1
    assert metrics.CLUSTER_WRITES_WAITING._value.get() == 1
    await static.until(ending.done)
    assert w.hub.epoch == f"{w.fence.epoch:016x}"
