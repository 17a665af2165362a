"""A node in the control store: joining, staying, what it makes of others, by a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos import config
from kos.config import Cluster, Config, Listen
from kos.control.errors import ControlUnavailable, SchemaMissing, Superseded
from kos.control.members import RESTORED_LIFT, MemberRow
from kos.control.members import MemberState as StoredState
from kos.errors import ConfigError
from kos.tasks import Tasks
from koscache.cluster.membership import ControlMembership, own_member, static_view, view_of
from koscache.cluster.view import LEAP, Member, MemberState, View
from tests.fakes.cache_node import settings
from tests.fakes.clock import FakeClock, settle
from tests.fakes.members import MemberTable

LEASE_S = 15.0
HEARTBEAT_S = 3.0


class Heard:
    """A Standing that writes down what it is told."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.events: list[tuple[Any, ...]] = []
        self.view: View | None = None
        self.speaking: set[str] = set()
        self.reports = 0
        self.told_version = 0
        self.forgot: list[bool] = []

    @property
    def version(self) -> int:
        return max(self.told_version, 0 if self.view is None else self.view.version)

    def joined(self, me: Member, view: View, *, resumed: bool, forgot: bool) -> None:
        self.view = view
        self.forgot.append(forgot)
        self.events.append(("joined", me.incarnation, resumed))

    def seen(self, view: View, since: float) -> None:
        self.view = view
        self.events.append(("seen", [member.name for member in view.members], since))

    def stood(self, until: float, late: Iterable[str]) -> None:
        self.events.append(("stood", until, list(late)))

    def expelled(self) -> None:
        self.events.append(("expelled",))

    def silent(self, name: str) -> bool:
        return name not in self.speaking

    def removed(self, name: str) -> None:
        self.events.append(("removed", name))

    def report(self) -> str:
        self.reports += 1
        return f'{{"n": {self.reports}}}'

    def kinds(self) -> list[str]:
        return [event[0] for event in self.events]

    def last(self, kind: str) -> tuple[Any, ...]:
        return [event for event in self.events if event[0] == kind][-1]


def of_node(directory: Path, **cluster: Any) -> Config:
    options = {"membership": "control", "name": "me", "secret": "s" * 16, "member_lease_s": LEASE_S} | cluster
    return msgspec.structs.replace(
        settings(directory, "http://127.0.0.1:9"),
        cluster=Cluster(heartbeat_s=HEARTBEAT_S, **options),
        listen=Listen(peer="10.0.0.7:9002", cluster="10.0.0.7:9003"),
    )


class Node:
    """One ControlMembership that runs against a table, both by one clock."""

    def __init__(self, directory: Path, clock: FakeClock, **cluster: Any) -> None:
        self.clock = clock
        self.store = MemberTable(clock)
        self.heard = Heard(clock)
        self.tasks = Tasks("test")
        self.prepared = 0
        self.unprepared = ""
        self.membership = ControlMembership(
            of_node(directory, **cluster), self.store, self.heard, 77, clock, clock.monotonic, self.prepare
        )
        self.task: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        self.prepared += 1
        if self.unprepared:
            raise ControlUnavailable(self.unprepared)

    async def start(self, incarnation: int = 0) -> None:
        self.task = self.tasks.spawn(self.membership.run(incarnation), "membership")
        await settle()

    def beats(self) -> int:
        return self.store.calls.count(("heartbeat", "me"))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path, FakeClock())
    yield made
    await made.tasks.close()


# --- joining ----------------------------------------------------------------------------------------------------------


async def test_it_joins_as_it_is_reached_and_learns_who_it_is(node: Node) -> None:
    node.store.put("other", 60)
    sent = node.clock.monotonic()
    await node.start()
    assert node.heard.events == [("joined", 2, False), ("stood", sent + 0.9 * LEASE_S, [])]
    assert node.heard.view == View(
        node.store.version,
        (Member("me", 2, "10.0.0.7:9002", "10.0.0.7:9003", 1), Member("other", 1, "127.0.0.1:1", "127.0.0.1:1", 1)),
    )
    assert node.membership.me.incarnation == 2
    assert node.store.expires_in("me") == LEASE_S
    assert node.prepared == 1


async def test_a_return_in_time_is_a_resumption_only_if_it_is_remembered(node: Node) -> None:
    node.store.put("me", 60)
    await node.start(incarnation=1)
    assert node.heard.events[0] == ("joined", 1, True)


async def test_a_row_that_is_found_and_not_remembered_is_none(node: Node) -> None:
    node.store.put("me", 60)
    await node.start(incarnation=0)
    assert node.heard.events[0] == ("joined", 1, False)


async def test_while_the_store_is_away_it_tries_again_and_again(node: Node) -> None:
    node.store.away = "down"
    await node.start()
    await node.clock.advance(10)
    assert node.membership.away == "down"
    assert 10 <= len(node.store.calls) <= 25
    assert node.heard.events == []
    node.store.away = ""
    await node.clock.advance(1)
    assert node.heard.kinds() == ["joined", "stood"]
    assert node.membership.away == ""


async def test_so_it_does_while_the_store_cannot_be_made_ready(node: Node) -> None:
    node.unprepared = "no schema"
    await node.start()
    await node.clock.advance(5)
    assert node.store.calls == []
    assert node.membership.away == "no schema"
    node.unprepared = ""
    await node.clock.advance(1)
    assert node.heard.kinds() == ["joined", "stood"]


async def test_joining_whose_answer_was_lost_is_asked_for_again(node: Node) -> None:
    node.store.lose_answers = True
    await node.start()
    assert node.store.names == ["me"]
    node.store.lose_answers = False
    await node.clock.advance(1)
    # The row of the lost answer is not what this node remembers, so nothing is resumed.
    assert node.heard.events[0] == ("joined", 1, False)


async def test_membership_counts_from_before_the_question(node: Node) -> None:
    sent = node.clock.monotonic()
    node.store.hold_answers = asyncio.Event()
    await node.start()
    node.clock.move(4)
    node.store.hold_answers.set()
    await settle()
    assert node.heard.last("stood") == ("stood", sent + 0.9 * LEASE_S, [])
    assert node.membership.looked_at == sent
    assert sent + 0.9 * LEASE_S < node.clock.monotonic() + node.store.expires_in("me")


# --- staying ----------------------------------------------------------------------------------------------------------


async def test_it_stays_by_heartbeats(node: Node) -> None:
    await node.start()
    await node.clock.advance(60)
    assert 60 / HEARTBEAT_S <= node.beats() <= 60 / (0.8 * HEARTBEAT_S) + 1
    assert node.store.expires_in("me") >= LEASE_S - HEARTBEAT_S
    assert set(node.heard.kinds()[2:]) == {"stood"}  # nothing has changed, so nothing was seen


async def test_a_heartbeat_counts_from_before_the_question_too(node: Node) -> None:
    await node.start()
    node.store.hold = asyncio.Event()
    await node.clock.advance(HEARTBEAT_S)
    sent = node.clock.monotonic()
    assert node.beats() == 1
    first = node.heard.last("stood")
    before = node.membership.looked_at
    node.clock.move(5)
    assert node.heard.last("stood") == first
    assert node.membership.looked_at == before  # what is not answered yet says nothing
    node.store.hold.set()
    await settle()
    asked = node.heard.last("stood")[1] - 0.9 * LEASE_S
    assert sent - 0.2 * HEARTBEAT_S <= asked <= sent
    assert node.membership.looked_at == asked


async def test_what_changes_is_seen_since_the_look_before(node: Node) -> None:
    await node.start()
    joined_at = node.membership.looked_at
    await node.clock.advance(0.5 * HEARTBEAT_S)
    node.store.put("other", 60)
    await node.clock.advance(0.5 * HEARTBEAT_S)
    assert node.heard.events[2][:2] == ("seen", ["me", "other"])
    assert node.heard.events[2][2] == joined_at  # before which "other" cannot have joined
    assert node.heard.events[3][0] == "stood"
    assert node.membership.looked_at > joined_at
    before = node.membership.looked_at
    node.store.put("third", 60)
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.last("seen") == ("seen", ["me", "other", "third"], before)


async def test_while_the_store_is_away_it_asks_more_often_and_stands_on_what_it_has(node: Node) -> None:
    await node.start()
    stood = node.heard.last("stood")
    node.store.away = "down"
    await node.clock.advance(HEARTBEAT_S)
    assert node.membership.away == "down"
    before = node.beats()
    await node.clock.advance(20)
    assert node.beats() - before >= 20
    assert node.heard.last("stood") == stood
    node.store.away = ""
    await node.clock.advance(1)
    assert node.membership.away == ""
    assert node.heard.last("stood")[1] > stood[1]
    assert "expelled" not in node.heard.kinds()  # it was late, and nobody has put it out


async def test_a_heartbeat_whose_answer_was_lost_says_nothing(node: Node) -> None:
    await node.start()
    stood = node.heard.last("stood")
    node.store.lose_answers = True
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.last("stood") == stood


async def test_put_out_it_says_so_and_joins_again(node: Node) -> None:
    await node.start()
    node.store.remove("me")
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds() == ["joined", "stood", "expelled", "joined", "stood"]
    assert node.heard.events[3] == ("joined", 2, False)
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds()[-1] == "stood"


async def test_another_incarnation_under_its_name_puts_it_out_too(node: Node) -> None:
    await node.start()
    node.store.remove("me")
    node.store.put("me", 60)
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.events[3] == ("joined", 2, False)


async def test_another_process_under_its_name_ends_it(node: Node) -> None:
    await node.start()
    node.store.take_over("me")
    await node.clock.advance(HEARTBEAT_S)
    assert node.task is not None
    with pytest.raises(Superseded):
        await node.task


async def test_a_store_that_has_gone_back_is_joined_anew(node: Node) -> None:
    """A backup was put back: what has happened since is unknown to it, and perhaps to others."""
    node.store.version = 10
    await node.start()
    node.store.version = 5
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds() == ["joined", "stood", "expelled", "joined", "stood"]
    assert node.heard.view is not None
    # Others have seen versions that it has given out and forgotten: none of those comes again.
    assert node.heard.view.version > 1000
    assert node.heard.forgot == [False, True]
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds()[5:] == ["stood"]


async def test_a_store_that_is_behind_what_another_member_has_seen_of_it_has_gone_back(node: Node) -> None:
    await node.start()
    assert node.heard.view is not None
    node.heard.told_version = node.heard.view.version + 1
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds() == ["joined", "stood", "expelled", "joined", "stood"]
    assert node.heard.view.version > node.heard.told_version


async def test_a_store_that_was_set_up_anew_is_joined_anew(node: Node) -> None:
    await node.start()
    assert node.heard.view is not None
    known = node.heard.view.version
    heartbeat = node.store.heartbeat

    async def missing(*args: Any, **options: Any) -> Any:
        node.store.heartbeat = heartbeat  # type: ignore[method-assign]
        node.store.remove("me")
        node.store.version = 0
        raise SchemaMissing("no such table: members")

    node.store.heartbeat = missing  # type: ignore[method-assign]
    prepared = node.prepared
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds() == ["joined", "stood", "expelled", "joined", "stood"]
    assert node.prepared == prepared + 1
    assert node.heard.view.version > known
    assert node.heard.forgot == [False, True]


async def test_a_store_that_has_lost_heartbeats_has_forgotten_how_long_others_may_trust(node: Node) -> None:
    """Its view is the same, and yet it might have somebody expelled too early."""
    node.store.put("late", HEARTBEAT_S)
    await node.start()
    await node.clock.advance(LEASE_S)
    before = node.store.beats["me"]
    node.heard.speaking.add("late")
    await node.clock.advance(2 * HEARTBEAT_S)
    assert node.store.beats["me"] > before + 1
    node.store.beats["me"] -= 1
    node.heard.speaking.clear()
    node.store.lose_answers = True  # of the first one as well, as in a failover
    await node.clock.advance(HEARTBEAT_S)
    node.store.lose_answers = False
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds().count("joined") == 2
    assert node.heard.forgot == [False, True]
    assert "late" in node.store.names
    await node.clock.advance(LEASE_S + 2 * HEARTBEAT_S)
    assert "late" not in node.store.names


@pytest.mark.parametrize("told_by", ["another member", "its own look"])
async def test_a_leap_is_noticed_also_if_something_else_has_told_of_it_first(node: Node, told_by: str) -> None:
    node.store.put("other", 60)
    await node.start()
    node.store.version += RESTORED_LIFT
    if told_by == "another member":
        node.heard.told_version = node.store.version
    else:
        await node.membership.set_state("me", MemberState.DRAINING)
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.forgot == [False, True]
    await node.clock.advance(LEASE_S)
    assert node.heard.kinds().count("joined") == 2


def test_what_counts_as_a_leap_is_no_more_than_what_a_store_is_lifted_by() -> None:
    """Whoever lifts it need not have seen as much of it as others."""
    assert LEAP <= RESTORED_LIFT // 2


@pytest.mark.parametrize("expelled", [False, True])
async def test_a_store_that_another_member_has_lifted_has_forgotten_members(node: Node, expelled: bool) -> None:
    await node.start()
    node.store.version += RESTORED_LIFT - 3
    if expelled:
        node.store.remove("me")
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds() == ["joined", "stood", "expelled", "joined", "stood"]
    assert node.heard.forgot == [False, True]
    await node.clock.advance(HEARTBEAT_S)
    assert node.heard.kinds()[5:] == ["stood"]


async def test_what_another_member_has_told_first_is_no_store_that_went_back(node: Node) -> None:
    await node.start()
    node.store.put("other", 60)
    node.heard.told_version = node.store.version
    await node.clock.advance(HEARTBEAT_S)
    node.store.hold_answers = held = asyncio.Event()
    await node.clock.advance(HEARTBEAT_S)
    node.store.put("third", 60)
    node.heard.told_version = node.store.version
    node.store.hold_answers = None
    held.set()
    await settle()
    await node.clock.advance(2 * HEARTBEAT_S)
    assert "expelled" not in node.heard.kinds()


async def test_a_new_report_goes_with_each_heartbeat(node: Node) -> None:
    await node.start()
    before = node.heard.reports
    await node.clock.advance(3 * HEARTBEAT_S)
    assert node.heard.reports - before == node.beats()


# --- others that are late ---------------------------------------------------------------------------------------------


async def test_who_is_late_and_silent_is_put_out_after_a_member_lease_of_our_own(node: Node) -> None:
    node.store.put("dead", -1)
    await node.start()
    joined_at = node.clock.monotonic()
    while "removed" not in node.heard.kinds():
        assert node.clock.monotonic() - joined_at < LEASE_S + 2
        await node.clock.advance(0.5)
    assert node.clock.monotonic() - joined_at >= LEASE_S
    assert node.heard.events[-2:] == [("removed", "dead"), ("seen", ["me"], node.membership.looked_at)]
    assert ("stood", node.membership.looked_at + 0.9 * LEASE_S, ["dead"]) in node.heard.events
    assert node.store.names == ["me"]


async def test_who_is_late_and_speaks_has_only_lost_the_store(node: Node) -> None:
    node.store.put("dead", -1)
    node.heard.speaking.add("dead")
    await node.start()
    await node.clock.advance(3 * LEASE_S)
    assert ("expel", "dead") not in node.store.calls
    assert node.heard.last("stood")[2] == ["dead"]
    node.heard.speaking.clear()
    await node.clock.advance(1)
    assert node.store.names == ["me"]


async def test_while_somebody_is_late_it_looks_more_often(node: Node) -> None:
    node.store.put("dead", -1)
    node.heard.speaking.add("dead")
    await node.start()
    await node.clock.advance(HEARTBEAT_S)
    before = node.beats()
    await node.clock.advance(10)
    assert node.beats() - before >= 10


async def test_who_is_silent_and_in_time_is_left_alone(node: Node) -> None:
    node.store.put("quiet", 10 * LEASE_S)
    await node.start()
    await node.clock.advance(3 * LEASE_S)
    assert "quiet" in node.store.names
    assert ("expel", "quiet") not in node.store.calls


async def test_one_that_is_back_in_time_is_not_removed(node: Node) -> None:
    node.store.put("slow", -1)
    await node.start()
    await node.clock.advance(LEASE_S - 1)
    answered = node.store.expel

    async def expel(name: str, incarnation: int) -> bool:
        node.store.put("slow", 60)
        return await answered(name, incarnation)

    node.store.expel = expel  # type: ignore[method-assign]
    await node.clock.advance(HEARTBEAT_S)
    assert ("expel", "slow") in node.store.calls
    assert "slow" in node.store.names
    assert "removed" not in node.heard.kinds()


async def test_what_another_did_first_is_seen_and_not_counted_as_ours(node: Node) -> None:
    node.store.put("dead", -1)
    await node.start()
    await node.clock.advance(LEASE_S - 1)

    async def expel(name: str, incarnation: int) -> bool:
        node.store.remove(name)
        return False

    node.store.expel = expel  # type: ignore[method-assign]
    await node.clock.advance(HEARTBEAT_S)
    assert "removed" not in node.heard.kinds()
    assert node.heard.last("seen")[1] == ["me"]


async def test_a_store_that_goes_away_while_somebody_is_put_out_is_asked_again(node: Node) -> None:
    node.store.put("dead", -1)
    node.store.put("gone", -1)
    await node.start()
    await node.clock.advance(LEASE_S - 1)
    answered = node.store.expel

    async def expel(name: str, incarnation: int) -> bool:
        await answered(name, incarnation)
        node.store.expel = answered  # type: ignore[method-assign]
        raise ControlUnavailable("cut")

    node.store.expel = expel  # type: ignore[method-assign]
    while node.membership.away != "cut":
        await node.clock.advance(0.5)
    await node.clock.advance(2)
    assert node.store.names == ["me"]
    assert node.heard.last("seen")[1] == ["me"]


# --- its own state ----------------------------------------------------------------------------------------------------


async def test_its_state_is_kept_in_the_store(node: Node) -> None:
    node.store.put("other", 60)
    await node.start()
    assert await node.membership.set_state("me", MemberState.DRAINING)
    assert node.heard.view is not None
    assert node.heard.view.members[0].state is MemberState.DRAINING
    assert not await node.membership.set_state("nobody", MemberState.DRAINING)
    node.store.away = "down"
    with pytest.raises(ControlUnavailable):
        await node.membership.set_state("me", MemberState.ACTIVE)


async def test_a_change_of_its_own_while_a_heartbeat_is_answered_is_no_store_that_went_back(node: Node) -> None:
    node.store.put("other", 60)
    await node.start()
    node.store.hold_answers = held = asyncio.Event()
    await node.clock.advance(HEARTBEAT_S)
    assert node.beats() == 1
    node.store.hold_answers = None
    assert await node.membership.set_state("me", MemberState.DRAINING)
    version = node.store.version
    held.set()
    await settle()
    await node.clock.advance(2 * HEARTBEAT_S)
    assert "expelled" not in node.heard.kinds()
    assert node.heard.last("stood")
    assert node.heard.view is not None
    assert (node.heard.view.version, node.heard.view.members[0].state) == (version, MemberState.DRAINING)


async def test_it_leaves_for_good_and_does_not_mind_a_store_that_is_away(node: Node) -> None:
    node.store.put("other", 60)
    await node.start()
    node.store.away = "down"
    await node.membership.leave()
    assert node.store.names == ["me", "other"]
    node.store.away = ""
    await node.membership.leave()
    assert node.store.names == ["other"]


# --- who this node is -------------------------------------------------------------------------------------------------


def test_others_reach_it_at_what_is_advertised(tmp_path: Path) -> None:
    member = own_member(of_node(tmp_path, advertise="node7.example", weight=3))
    assert (member.peer, member.cluster, member.weight) == ("node7.example:9002", "node7.example:9003", 3)
    member = own_member(of_node(tmp_path, advertise="fd00::7"))
    assert member.peer == "[fd00::7]:9002"


def test_its_weight_is_what_it_can_keep(tmp_path: Path) -> None:
    node = of_node(tmp_path)
    large = msgspec.structs.replace(node, cache=msgspec.structs.replace(node.cache, size_bytes=3 << 30))
    assert own_member(large).weight == 3
    assert own_member(node).weight == 1  # 64 MiB


def test_a_static_list_must_name_this_node(tmp_path: Path) -> None:
    listed = (
        config.Member(name="z", peer="z:1", cluster="z:2", weight=5),
        config.Member(name="me", peer="me:1", cluster="me:2"),
    )
    node = msgspec.structs.replace(of_node(tmp_path, membership="static"), members=listed)
    assert own_member(node) == Member("me", 0, "me:1", "me:2", 100)
    assert static_view(node) == View(0, (Member("me", 0, "me:1", "me:2", 100), Member("z", 0, "z:1", "z:2", 5)))
    with pytest.raises(ConfigError, match="no 'me'"):
        own_member(msgspec.structs.replace(node, members=listed[:1]))


def test_rows_become_members_in_the_order_of_their_names() -> None:
    rows = [
        MemberRow(name=name, incarnation=3, peer="p", cluster="c", weight=2, state=StoredState.DRAINING)
        for name in ("b", "a")
    ]
    view = view_of(tuple(rows), 9)
    assert view == View(9, tuple(Member(name, 3, "p", "c", 2, MemberState.DRAINING) for name in ("a", "b")))
