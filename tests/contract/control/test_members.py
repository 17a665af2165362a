"""What a MemberStore promises, whatever the database."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, update
from sqlalchemy.ext.asyncio import AsyncConnection

from kos.control import migrations
from kos.control.database import Database
from kos.control.errors import ControlUnavailable, Expelled, LastActive, SchemaMissing, Superseded, WentBack
from kos.control.members import (
    REPORT_MAX_BYTES,
    Beat,
    Joined,
    MemberRow,
    Members,
    MemberState,
    MemberStore,
    Rows,
    new_holder,
)
from kos.control.tables import CLUSTER, MEMBERS
from tests.conditions import until

Stores = tuple[Members, Members]

LONG_S = 600.0
#: For members whose time is to run out.
SHORT_S = 0.05


def candidate(name: str = "a", **changes: Any) -> MemberRow:
    row = MemberRow(name=name, incarnation=0, peer=f"{name}:9002", cluster=f"{name}:9003", weight=100)
    return msgspec.structs.replace(row, **changes)


def identity(row: MemberRow) -> tuple[Any, ...]:
    """What makes a view."""
    return row.name, row.incarnation, row.peer, row.cluster, row.weight, row.state


async def run_out(store: MemberStore, name: str) -> None:
    """Wait until the store itself counts a member as late."""

    async def late() -> bool:
        return any(row.name == name and row.expires_in_s < 0 for row in (await store.read()).rows)

    await until(late, what=f"the time of {name} runs out")


async def test_nobody(stores: Stores) -> None:
    assert await stores[0].read() == Rows((), 0)


async def test_a_member_as_it_joined(stores: Stores) -> None:
    one, other = stores
    me = candidate(weight=7, report='{"used_bytes": 1}', state=MemberState.DRAINING)
    joined = await one.join(me, new_holder(), LONG_S)
    assert (joined.incarnation, joined.resumed, joined.version) == (1, False, 1)
    seen = await other.read()
    assert seen.version == 1
    (row,) = seen.rows
    assert identity(row) == ("a", 1, "a:9002", "a:9003", 7, "draining")
    assert row.report == '{"used_bytes": 1}'
    assert LONG_S - 60 < row.expires_in_s <= LONG_S
    # The clock of this machine is the store's here, in both databases.
    assert abs(row.joined_at - time.time()) < 60
    assert [identity(row) for row in joined.rows] == [identity(row) for row in seen.rows]


async def test_a_store_that_is_behind_what_a_node_has_seen_of_it_is_lifted_beyond(stores: Stores) -> None:
    """It was restored from a backup: no version or incarnation that it has given out since may come again."""
    one, other = stores
    first = await one.join(candidate("a"), new_holder(), LONG_S)
    known = first.version + 7
    joined = await other.join(candidate("b"), new_holder(), LONG_S, known)
    assert joined.version > known + 100
    assert joined.incarnation > first.incarnation + 100
    assert [row.name for row in joined.rows] == ["a", "b"]
    again = await one.join(candidate("a", incarnation=first.incarnation), new_holder(), LONG_S, known)
    assert (again.incarnation, again.resumed, again.version) == (first.incarnation, True, joined.version)


async def test_heartbeats_are_counted_over_all_processes_of_a_node(stores: Stores) -> None:
    """So that one who gets a number again knows that the store has lost what came after it."""
    one, other = stores
    joined = await one.join(candidate("a"), 1, LONG_S)
    counted = [joined.beats]
    for _ in range(3):
        counted.append((await one.heartbeat("a", joined.incarnation, 1, LONG_S, "{}")).beats)
    counted.append((await other.join(candidate("a"), 2, LONG_S)).beats)
    counted.append((await other.heartbeat("a", joined.incarnation, 2, LONG_S, "{}", joined.version)).beats)
    assert counted == sorted(set(counted))


async def test_a_store_that_has_lost_a_heartbeat_takes_no_further_one(stores: Stores) -> None:
    """Be the answer to that one lost or not: the next would find as many as it should."""
    one, other = stores
    joined = await one.join(candidate("a"), 1, LONG_S)
    beat = await one.heartbeat("a", joined.incarnation, 1, LONG_S, "{}", joined.version, joined.beats)
    before = (await other.read()).rows
    for _ in range(2):
        with pytest.raises(WentBack):
            await one.heartbeat("a", joined.incarnation, 1, 2 * LONG_S, "{}", joined.version, beat.beats + 1)
    (row,), (found,) = before, (await other.read()).rows
    assert found.expires_in_s <= row.expires_in_s
    # Nor is the process another one that held the row then: who takes a row over counts on.
    with pytest.raises(WentBack):
        await one.heartbeat("a", joined.incarnation, 2, LONG_S, "{}", joined.version, beat.beats + 1)
    with pytest.raises(Superseded):
        await one.heartbeat("a", joined.incarnation, 2, LONG_S, "{}", joined.version, beat.beats)
    await one.leave("a", joined.incarnation, 1)
    with pytest.raises(Expelled):
        await one.heartbeat("a", joined.incarnation, 1, LONG_S, "{}", joined.version, beat.beats)


async def test_incarnations_of_a_store_that_was_set_up_anew_twice_are_new_ones(stores: Stores) -> None:
    one, other = stores
    first = await one.join(candidate("a"), 1, LONG_S, 10)
    await one.leave("a", first.incarnation, 1)
    again = await other.join(candidate("a", incarnation=first.incarnation), new_holder(), LONG_S, first.version + 1)
    assert again.incarnation > first.incarnation


async def test_tables_that_are_empty_are_told_as_such(stores: Stores) -> None:
    one, other = stores
    joined = await one.join(candidate("a"), 1, LONG_S)

    async def empty(connection: AsyncConnection) -> None:
        await connection.execute(delete(MEMBERS))
        await connection.execute(delete(CLUSTER))

    await other._database.transaction(empty)
    with pytest.raises(Expelled):
        await one.heartbeat("a", joined.incarnation, 1, LONG_S, "{}")
    for ask in (one.read, lambda: one.join(candidate("a"), 1, LONG_S, joined.version)):
        with pytest.raises(SchemaMissing):
            await ask()
    await migrations.upgrade(other._database)
    again = await one.join(candidate("a"), 1, LONG_S, joined.version)
    assert again.version > joined.version
    assert not again.resumed


async def test_one_member_stays_active(stores: Stores) -> None:
    """However many are drained at once."""
    one, other = stores
    for name in "abc":
        await one.join(candidate(name), 1, LONG_S)
    asked = (store.set_state(name, MemberState.DRAINING) for store, name in zip((one, other, one), "abc", strict=True))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(outcome) for outcome in sorted(outcomes, key=repr)] == [LastActive, bool, bool]
    assert sorted(row.state for row in (await other.read()).rows) == ["active", "draining", "draining"]
    await one.set_state("a", MemberState.ACTIVE)
    await one.set_state("b", MemberState.ACTIVE)
    assert await one.set_state("a", MemberState.DRAINING)


async def test_nothing_is_lifted_for_who_has_seen_no_more_than_there_is(stores: Stores) -> None:
    one, other = stores
    first = await one.join(candidate("a"), new_holder(), LONG_S)
    second = await other.join(candidate("b"), new_holder(), LONG_S, first.version)
    assert (second.incarnation, second.version) == (first.incarnation + 1, first.version + 1)


async def test_rows_are_in_order_of_their_names(stores: Stores) -> None:
    """Of bytes, not of a language: "B" before "a"."""
    for name in ("b", "a-1", "B", "a.0", "a"):
        await stores[0].join(candidate(name), new_holder(), LONG_S)
    assert [row.name for row in (await stores[1].read()).rows] == sorted(["b", "a-1", "B", "a.0", "a"])


async def test_all_who_join_at_once_are_seen_by_the_last(databases: Callable[[], Database]) -> None:
    stores = [Members(databases()) for _ in range(8)]
    await migrations.upgrade(databases())
    joined = await asyncio.gather(
        *(store.join(candidate(f"n{number}"), new_holder(), LONG_S) for number, store in enumerate(stores))
    )
    assert sorted(one.version for one in joined) == list(range(1, 9))
    assert sorted(one.incarnation for one in joined) == list(range(1, 9))
    for one in joined:
        # Each sees itself and all who were before it: of any two, the later sees the earlier.
        assert len(one.rows) == one.version
        assert one.incarnation in {row.incarnation for row in one.rows}


async def test_two_of_one_name_at_once_share_one_row(stores: Stores) -> None:
    first, second = await asyncio.gather(
        *(store.join(candidate(), holder, LONG_S) for store, holder in zip(stores, (1, 2), strict=True))
    )
    assert first.incarnation == second.incarnation == 1
    held = []
    for holder in (1, 2):
        try:
            await stores[0].heartbeat("a", 1, holder, LONG_S, "{}")
            held.append(holder)
        except Superseded:
            pass
    assert len(held) == 1


async def test_a_restart_takes_the_row_over(stores: Stores) -> None:
    one, other = stores
    first = await one.join(candidate(), 1, LONG_S)
    again = await other.join(candidate(incarnation=first.incarnation), 2, LONG_S)
    assert (again.incarnation, again.resumed) == (first.incarnation, True)
    # Nothing that others go by has changed, so there is no new view.
    assert again.version == first.version
    with pytest.raises(Superseded):
        await one.heartbeat("a", first.incarnation, 1, LONG_S, "{}")
    await other.heartbeat("a", first.incarnation, 2, LONG_S, "{}")


@pytest.mark.parametrize(
    "changed", [{"peer": "x:1"}, {"cluster": "x:2"}, {"weight": 3}], ids=lambda change: next(iter(change))
)
async def test_a_restart_with_other_settings_is_a_new_view(stores: Stores, changed: dict[str, Any]) -> None:
    first = await stores[0].join(candidate(), 1, LONG_S)
    again = await stores[1].join(candidate(incarnation=1, **changed), 2, LONG_S)
    assert again.resumed
    assert again.version == first.version + 1
    assert [identity(row) for row in again.rows] == [identity(candidate(incarnation=1, **changed))]


async def test_who_is_late_but_was_not_expelled_resumes(stores: Stores) -> None:
    await stores[0].join(candidate(), 1, SHORT_S)
    await run_out(stores[1], "a")
    again = await stores[1].join(candidate(incarnation=1), 2, LONG_S)
    assert (again.incarnation, again.resumed) == (1, True)
    assert again.rows[0].expires_in_s > 0


async def test_a_row_that_is_not_the_remembered_one_is_no_resumption(stores: Stores) -> None:
    """A node was expelled, made a new row, and died before it did away with what it trusted: the next process must hear of
    it, though it finds a row."""
    await stores[0].join(candidate(), 1, SHORT_S)
    await run_out(stores[1], "a")
    assert await stores[1].expel("a", 1)
    lost = await stores[0].join(candidate(incarnation=1), 2, LONG_S)
    assert (lost.incarnation, lost.resumed) == (2, False)
    again = await stores[0].join(candidate(incarnation=1), 3, LONG_S)
    assert (again.incarnation, again.resumed) == (2, False)
    again = await stores[0].join(candidate(incarnation=2), 4, LONG_S)
    assert (again.incarnation, again.resumed) == (2, True)


async def test_joining_twice_because_the_answer_was_lost(stores: Stores) -> None:
    first = await stores[0].join(candidate(), 1, LONG_S)
    again = await stores[0].join(candidate(), 1, LONG_S)
    assert (again.incarnation, again.resumed, again.version) == (first.incarnation, False, first.version)


async def test_incarnations_are_never_the_same_twice(stores: Stores) -> None:
    seen: set[int] = set()
    for _ in range(3):
        for name in ("a", "b"):
            joined = await stores[0].join(candidate(name), 1, LONG_S)
            assert joined.incarnation not in seen
            seen.add(joined.incarnation)
            await stores[1].leave(name, joined.incarnation, 1)
    assert (await stores[0].read()).rows == ()


async def test_a_heartbeat_moves_the_time_and_no_view(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate(), 1, SHORT_S)
    await run_out(other, "a")
    beat = await one.heartbeat("a", 1, 1, LONG_S, '{"used_bytes": 2}', known_version=1)
    assert (beat.version, beat.rows, beat.expired) == (1, None, ())
    (row,) = (await other.read()).rows
    assert LONG_S - 60 < row.expires_in_s <= LONG_S
    assert row.report == '{"used_bytes": 2}'


async def test_a_heartbeat_tells_of_a_new_view(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate("a"), 1, LONG_S)
    await other.join(candidate("b"), 2, LONG_S)
    beat = await one.heartbeat("a", 1, 1, LONG_S, "{}", known_version=1)
    assert beat.version == 2
    assert beat.rows is not None
    assert [row.name for row in beat.rows] == ["a", "b"]
    assert (await one.heartbeat("a", 1, 1, LONG_S, "{}", known_version=2)).rows is None
    assert (await one.heartbeat("a", 1, 1, LONG_S, "{}")).rows is not None


async def test_a_heartbeat_tells_who_is_late_but_not_of_itself(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate("a"), 1, SHORT_S)
    await other.join(candidate("b"), 2, SHORT_S)
    await other.join(candidate("c"), 3, LONG_S)
    await run_out(one, "a")
    await run_out(one, "b")
    for known_version in (-1, 3):
        beat = await one.heartbeat("a", 1, 1, SHORT_S / 1000, "{}", known_version=known_version)
        assert beat.expired == (("b", 2),)
        assert (beat.rows is None) == (known_version == 3)


async def test_expelled_only_when_late(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate("a"), 1, LONG_S)
    version = (await other.join(candidate("b"), 2, LONG_S)).version
    assert not await other.expel("a", 1)
    assert (await other.read()).version == version
    await one.heartbeat("a", 1, 1, SHORT_S, "{}")
    await run_out(other, "a")
    assert not await other.expel("a", 2)
    assert await other.expel("a", 1)
    assert not await other.expel("a", 1)
    seen = await other.read()
    assert [row.name for row in seen.rows] == ["b"]
    assert seen.version == version + 1
    with pytest.raises(Expelled):
        await one.heartbeat("a", 1, 1, LONG_S, "{}")


async def test_who_comes_back_under_a_new_incarnation_does_not_revive_the_old(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate(), 1, SHORT_S)
    await run_out(other, "a")
    await other.expel("a", 1)
    await other.join(candidate(), 2, SHORT_S)
    # Even with the number of the present holder: the incarnation is what it was asked for.
    for holder in (1, 2):
        with pytest.raises(Expelled):
            await one.heartbeat("a", 1, holder, LONG_S, "{}")
    await run_out(other, "a")
    assert not await one.expel("a", 1)


async def test_of_a_late_heartbeat_and_an_expulsion_one_succeeds(stores: Stores) -> None:
    one, other = stores
    outcomes = set()
    for _ in range(20):
        incarnation = (await one.join(candidate(), 1, SHORT_S / 1000)).incarnation
        await run_out(other, "a")
        kept, expelled = await asyncio.gather(
            one.heartbeat("a", incarnation, 1, LONG_S, "{}"), other.expel("a", incarnation), return_exceptions=True
        )
        assert isinstance(kept, Expelled) == (expelled is True), (kept, expelled)
        outcomes.add(expelled)
        await one.leave("a", incarnation, 1)
    assert outcomes <= {True, False}


async def test_leaving(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate("a"), 1, LONG_S)
    version = (await other.join(candidate("b"), 2, LONG_S)).version
    await one.leave("a", 1, 99)
    await one.leave("a", 99, 1)
    assert (await other.read()).version == version
    await one.leave("a", 1, 1)
    beat = await other.heartbeat("b", 2, 2, LONG_S, "{}", known_version=version)
    assert beat.version == version + 1
    assert beat.rows is not None
    assert [row.name for row in beat.rows] == ["b"]
    await one.leave("a", 1, 1)
    with pytest.raises(Expelled):
        await one.heartbeat("a", 1, 1, LONG_S, "{}")


async def test_states(stores: Stores) -> None:
    one, other = stores
    await one.join(candidate(), 1, LONG_S)
    await other.join(candidate("z"), 2, LONG_S)
    assert await other.set_state("a", MemberState.DRAINING)
    assert not await other.set_state("b", MemberState.DRAINING)
    seen = await one.read()
    assert (seen.version, seen.rows[0].state) == (3, MemberState.DRAINING)
    assert await other.set_state("a", MemberState.DRAINING)
    assert (await one.read()).version == 3
    # A restart does not end a drain.
    again = await one.join(candidate(incarnation=1), 2, LONG_S)
    assert (again.rows[0].state, again.version) == (MemberState.DRAINING, 3)
    assert await other.set_state("a", MemberState.ACTIVE)
    assert (await one.read()).rows[0].state == MemberState.ACTIVE


async def test_reports_are_bounded_and_any_text(stores: Stores) -> None:
    report = "é" * (REPORT_MAX_BYTES // 2)
    await stores[0].join(candidate(report=report), 1, LONG_S)
    assert (await stores[1].read()).rows[0].report == report
    with pytest.raises(AssertionError):
        await stores[0].heartbeat("a", 1, 1, LONG_S, report + "x")


async def test_holders_of_all_sizes(stores: Stores) -> None:
    for holder in (0, 2**63 - 1):
        await stores[0].join(candidate(), holder, LONG_S)
        await stores[0].heartbeat("a", 1, holder, LONG_S, "{}")
    assert all(0 <= new_holder() < 2**63 for _ in range(1000))


async def test_late_goes_by_the_row_and_the_clock_of_the_store(databases: Callable[[], Database]) -> None:
    database = databases()
    await migrations.upgrade(database)
    store = Members(database)
    await store.join(candidate(), 1, SHORT_S)

    async def move(seconds: float) -> None:
        await database.transaction(
            lambda connection: connection.execute(update(MEMBERS).values(expires_at=MEMBERS.c.expires_at + seconds))
        )

    await move(1e6)
    assert not await store.expel("a", 1)
    await move(-2e6)
    assert await store.expel("a", 1)


async def test_any_interleaving_keeps_views_and_incarnations(databases: Callable[[], Database]) -> None:
    """Six nodes of four names do whatever comes to their minds, all at once: a version stands for one view, goes back for
    nobody, and an incarnation belongs to one name."""
    seed = random.randrange(2**32)
    await migrations.upgrade(databases())
    views: dict[int, tuple[Any, ...]] = {}
    owners: dict[int, str] = {}

    def note(version: int, rows: tuple[MemberRow, ...]) -> None:
        view = tuple(identity(row) for row in rows)
        assert views.setdefault(version, view) == view, f"seed {seed}: version {version} twice"
        for row in rows:
            assert owners.setdefault(row.incarnation, row.name) == row.name, f"seed {seed}: {row.incarnation} twice"

    async def node(number: int) -> None:
        rng = random.Random(seed + number)
        store = Members(databases())
        name, incarnation, version = f"n{number % 4}", 0, 0
        for turn in range(40):
            ttl_s = rng.choice([0.0001, LONG_S])
            seen: Joined | Rows | Beat | None = None
            match rng.choice(["join", "beat", "beat", "beat", "expel", "expel", "leave", "state", "read"]):
                case "join":
                    seen = await store.join(candidate(name, weight=rng.randint(1, 2)), number, ttl_s)
                    incarnation = seen.incarnation
                case "beat" if incarnation:
                    try:
                        seen = await store.heartbeat(name, incarnation, number, ttl_s, str(turn), version)
                    except (Expelled, Superseded):
                        incarnation = 0
                case "expel":
                    seen = await store.read()
                    for row in seen.rows:
                        await store.expel(row.name, row.incarnation)
                case "leave" if incarnation:
                    await store.leave(name, incarnation, number)
                    incarnation = 0
                case "state":
                    with suppress(LastActive):
                        await store.set_state(f"n{rng.randrange(4)}", rng.choice(list(MemberState)))
                case "read":
                    seen = await store.read()
            if seen is not None:
                assert seen.version >= version, f"seed {seed}: from {version} to {seen.version}"
                version = seen.version
                if seen.rows is not None:
                    note(seen.version, seen.rows)

    await asyncio.gather(*(node(number) for number in range(6)))
    assert len(views) > 20, f"seed {seed}"


async def test_without_the_schema_it_is_unavailable(databases: Callable[[], Database]) -> None:
    database = databases()
    await database.prepare()
    with pytest.raises(ControlUnavailable, match=r"members|cluster"):
        await Members(database).read()
