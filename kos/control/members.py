"""Who belongs to the cluster, as the control store knows it.

Owns: joining, staying, leaving and being expelled; the order of all changes. Does not own: what a node may trust (the
cluster protocol, docs/consistency.md), how often it asks.

Invariant: with every change of who is a member, of addresses, weights or states the version of the view goes up, in the
same transaction; every answer with rows carries the version that is theirs. Heartbeats change no view.

A row lives until it is removed, whether or not its time has run out: its time only says from when on others may remove it.
So a member may be late with its heartbeats, as long as nobody has expelled it, and of a late heartbeat and an expulsion
exactly one succeeds:

    A: heartbeat ── moves expires_at ──▶ done              A: heartbeat ──────── waits for the row ─────▶ no row: Expelled
    B: expel ........ waits for the row, looks again: False    B: expel ── removes it ──▶ True

Changes of the view lock the row of `cluster` first, and only then look at members: of two who join at once, the second
sees the first. A heartbeat locks nothing but its own row. So there is no circle of waiting.
"""

from __future__ import annotations

import enum
import secrets
from typing import Any, Final, Protocol

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Row,
    Text,
    bindparam,
    delete,
    exists,
    insert,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from kos.control.database import Database
from kos.control.errors import Expelled, LastActive, SchemaMissing, Superseded, WentBack
from kos.control.tables import CLUSTER, MEMBERS, now_s

#: A store that is behind what a node has seen of it was restored from a backup. Its numbers are lifted so far beyond that none
#: that it gave out before, and that another node may have seen, is given out again.
RESTORED_LIFT: Final = 1_000_000
#: Each heartbeat carries one, and a look at the cluster all of them.
REPORT_MAX_BYTES: Final = 4096


class MemberState(enum.StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """One member. incarnation: of its membership, never the same twice in one store, rising; peer, cluster: HOST:PORT of its
    workers and of its daemon; report: JSON, what the node says of itself, at most REPORT_MAX_BYTES; not looked into.

    joined_at: seconds since the epoch, of this incarnation. expires_in_s: what is left of its time, below 0 if that has
    run out. Both by the store's clock, when it was read, and left out by whoever joins.
    """

    name: str
    incarnation: int
    peer: str
    cluster: str
    weight: int
    state: MemberState = MemberState.ACTIVE
    report: str = "{}"
    joined_at: float = 0.0
    expires_in_s: float = 0.0


class Rows(msgspec.Struct, frozen=True):
    """All members, by name, at the moment of the view's version."""

    rows: tuple[MemberRow, ...]
    version: int


class Joined(msgspec.Struct, frozen=True):
    """incarnation: the joiner's from now on. resumed: it is the one that the joiner remembered, so it was not out in the
    meantime. rows: all members, itself included. beats: the number of this heartbeat, as it were."""

    incarnation: int
    resumed: bool
    rows: tuple[MemberRow, ...]
    version: int
    beats: int


class Beat(msgspec.Struct, frozen=True):
    """rows: None if the view is still the one that was known. expired: (name, incarnation) of others whose time has run
    out. beats: the number of this heartbeat, higher than of those before."""

    version: int
    rows: tuple[MemberRow, ...] | None
    expired: tuple[tuple[str, int], ...]
    beats: int


def new_holder() -> int:
    """A number by which a process is told from all others that ever held its row; positive, of 63 bits."""
    return secrets.randbits(63)


class MemberStore(Protocol):
    """All of it raises ControlUnavailable within control.timeout_s: what was asked for may have been done then, and can be
    asked for again. Or SchemaMissing, when there is nothing to ask."""

    async def join(self, me: MemberRow, holder: int, ttl_s: float, known_version: int = -1) -> Joined:
        """Become a member for ttl_s from now, or take over the row of that name, whoever holds it.

        known_version: the highest version of a view of this store that the node has seen. The joined one is higher, or equal.

        me.incarnation: the last one under which this node was a member, as it remembers it together with what it trusts;
        0 for none. Not that a row was found makes a return a resumption: an earlier process of the node may have made the
        row and died before it did away with what it must no longer trust.
        me.state: of a new row; one that is taken over keeps its own, so that a restart does not end a drain.
        """

    async def heartbeat(
        self,
        name: str,
        incarnation: int,
        holder: int,
        ttl_s: float,
        report: str,
        known_version: int = -1,
        known_beats: int = -1,
    ) -> Beat:
        """Stay a member for ttl_s from now, even if the time had run out.

        known_beats: of the last heartbeat, or join, that was answered. Raises Expelled, Superseded, WentBack.
        """

    async def expel(self, name: str, incarnation: int) -> bool:
        """Remove a member whose time has run out; whether this call did it."""

    async def leave(self, name: str, incarnation: int, holder: int) -> None:
        """Remove oneself; of no effect on a row that is no longer one's own."""

    async def set_state(self, name: str, state: MemberState) -> bool:
        """False if there is no such member. Raises LastActive: one has to be active."""

    async def read(self) -> Rows: ...


_LOCKED: Final = select(CLUSTER.c.view_version, CLUSTER.c.last_incarnation).with_for_update()

#: One statement, so one moment. The version comes even if there is no member.
_ALL: Final = select(
    CLUSTER.c.view_version, MEMBERS, (MEMBERS.c.expires_at - now_s()).label("expires_in_s")
).select_from(CLUSTER.outerjoin(MEMBERS, true()))

#: A heartbeat is this one statement and no more, as long as nothing has happened: it says whether there is more to ask for.
#: PostgreSQL looks for late ones as things were before the update: so the own row is left out.
_OTHERS: Final = MEMBERS.alias("others")
_LATE: Final = (_OTHERS.c.name != bindparam("me", type_=Text)) & (_OTHERS.c.expires_at < now_s())
_ALL_LATE: Final = select(_OTHERS.c.name, _OTHERS.c.incarnation).where(_LATE)
_BEAT: Final = (
    update(MEMBERS)
    .where(
        MEMBERS.c.name == bindparam("me", type_=Text),
        MEMBERS.c.incarnation == bindparam("my_incarnation", type_=BigInteger),
        MEMBERS.c.holder == bindparam("my_holder", type_=BigInteger),
        # Of a store that has lost some nothing is changed: neither this one's answer nor the next may hide that.
        MEMBERS.c.beats >= bindparam("known_beats", type_=BigInteger),
    )
    .values(
        expires_at=now_s() + bindparam("ttl_s", type_=Double),
        report=bindparam("my_report", type_=Text),
        beats=MEMBERS.c.beats + 1,
    )
    .returning(
        MEMBERS.c.beats,
        select(CLUSTER.c.view_version).scalar_subquery().label("version"),
        exists(select(_OTHERS.c.name).where(_LATE)).label("any_late"),
    )
)


class Members:
    """A MemberStore in the database, whose schema kos.control.migrations has brought up to date."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def join(self, me: MemberRow, holder: int, ttl_s: float, known_version: int = -1) -> Joined:
        _check_report(me.report)

        async def work(connection: AsyncConnection) -> Joined:
            last = await _lock(connection)
            last_incarnation = last.last_incarnation
            if last.view_version < known_version:
                last_incarnation = max(last_incarnation, me.incarnation) + RESTORED_LIFT
                lifted = {"view_version": known_version + RESTORED_LIFT, "last_incarnation": last_incarnation}
                await connection.execute(update(CLUSTER).values(lifted))
            named = MEMBERS.c.name == me.name
            found = (await connection.execute(select(MEMBERS).where(named))).mappings().one_or_none()
            seen = {"peer": me.peer, "cluster": me.cluster, "weight": me.weight}
            values = seen | {"holder": holder, "report": me.report, "expires_at": now_s() + ttl_s}
            beats = 0 if found is None else found["beats"] + 1
            values["beats"] = beats
            if found is None:
                incarnation = last_incarnation + 1
                new = {"name": me.name, "incarnation": incarnation, "state": me.state.value, "joined_at": now_s()}
                await connection.execute(insert(MEMBERS).values(new | values))
                await connection.execute(update(CLUSTER).values(last_incarnation=incarnation))
                await _change_view(connection)
            else:
                incarnation = found["incarnation"]
                await connection.execute(update(MEMBERS).where(named).values(values))
                if any(found[column] != value for column, value in seen.items()):
                    await _change_view(connection)
            view = await _all(connection)
            resumed = found is not None and incarnation == me.incarnation
            return Joined(incarnation, resumed, view.rows, view.version, beats)

        return await self._database.transaction(work)

    async def heartbeat(
        self,
        name: str,
        incarnation: int,
        holder: int,
        ttl_s: float,
        report: str,
        known_version: int = -1,
        known_beats: int = -1,
    ) -> Beat:
        _check_report(report)
        values = {
            "me": name,
            "my_incarnation": incarnation,
            "my_holder": holder,
            "ttl_s": ttl_s,
            "my_report": report,
            "known_beats": known_beats,
        }

        async def work(connection: AsyncConnection) -> Beat | Expelled | Superseded | WentBack:
            moved = (await connection.execute(_BEAT, values)).one_or_none()
            if moved is None:
                return await _not_mine(connection, name, incarnation, known_beats)
            late: tuple[tuple[str, int], ...] = ()
            if moved.any_late:
                late = tuple((row.name, row.incarnation) for row in await connection.execute(_ALL_LATE, {"me": name}))
            if moved.version == known_version:
                return Beat(moved.version, None, late, moved.beats)
            view = await _all(connection)
            return Beat(view.version, view.rows, late, moved.beats)

        outcome = await self._database.single(work)
        if not isinstance(outcome, Beat):
            raise outcome
        return outcome

    async def expel(self, name: str, incarnation: int) -> bool:
        return await self._remove(name, incarnation, MEMBERS.c.expires_at < now_s())

    async def leave(self, name: str, incarnation: int, holder: int) -> None:
        await self._remove(name, incarnation, MEMBERS.c.holder == holder)

    async def set_state(self, name: str, state: MemberState) -> bool:
        async def work(connection: AsyncConnection) -> bool | LastActive:
            await _lock(connection)
            named = MEMBERS.c.name == name
            found = (await connection.execute(select(MEMBERS.c.state).where(named))).scalar_one_or_none()
            if found is not None and found != state.value:
                active = exists().where(MEMBERS.c.name != name, MEMBERS.c.state == MemberState.ACTIVE.value)
                if state is MemberState.DRAINING and not (await connection.execute(select(active))).scalar_one():
                    return LastActive(f"no other member than {name!r} is active")
                await connection.execute(update(MEMBERS).where(named).values(state=state.value))
                await _change_view(connection)
            return found is not None

        outcome = await self._database.transaction(work)
        if isinstance(outcome, LastActive):
            raise outcome
        return outcome

    async def read(self) -> Rows:
        return await self._database.single(_all)

    async def _remove(self, name: str, incarnation: int, condition: ColumnElement[bool]) -> bool:
        statement = delete(MEMBERS).where(MEMBERS.c.name == name, MEMBERS.c.incarnation == incarnation, condition)

        async def work(connection: AsyncConnection) -> bool:
            await _lock(connection)
            removed = (await connection.execute(statement)).rowcount > 0
            if removed:
                await _change_view(connection)
            return removed

        return await self._database.transaction(work)


async def _lock(connection: AsyncConnection) -> Any:
    """The row of `cluster`, nobody else's until the transaction ends."""
    locked = (await connection.execute(_LOCKED)).one_or_none()
    if locked is None:
        raise SchemaMissing("the row of `cluster` is gone")
    return locked


async def _change_view(connection: AsyncConnection) -> None:
    await connection.execute(update(CLUSTER).values(view_version=CLUSTER.c.view_version + 1))


async def _all(connection: AsyncConnection) -> Rows:
    found = (await connection.execute(_ALL)).all()
    if not found:
        raise SchemaMissing("the row of `cluster` is gone")
    # Sorted here: databases differ in how they order texts.
    rows = sorted((_row(row) for row in found if row.name is not None), key=lambda row: row.name)
    return Rows(tuple(rows), found[0].view_version)


def _row(row: Row[Any]) -> MemberRow:
    return MemberRow(
        name=row.name,
        incarnation=row.incarnation,
        peer=row.peer,
        cluster=row.cluster,
        weight=row.weight,
        state=MemberState(row.state),
        report=row.report,
        joined_at=row.joined_at,
        expires_in_s=row.expires_in_s,
    )


async def _not_mine(
    connection: AsyncConnection, name: str, incarnation: int, known_beats: int
) -> Expelled | Superseded | WentBack:
    """Why a heartbeat found no row."""
    found = (
        await connection.execute(select(MEMBERS.c.incarnation, MEMBERS.c.beats).where(MEMBERS.c.name == name))
    ).one_or_none()
    if found is None:
        return Expelled(f"member {name!r}, incarnation {incarnation}, has been removed")
    if found.incarnation != incarnation:
        other = found.incarnation
        return Expelled(f"member {name!r}, incarnation {incarnation}, has been removed; another is incarnation {other}")
    if found.beats < known_beats:
        # Whoever takes a row over counts on: so this is an older state of it, held by whoever held it then.
        return WentBack(f"heartbeats of member {name!r}, incarnation {incarnation}, are lost")
    return Superseded(f"another process holds the row of member {name!r}, incarnation {incarnation}")


def _check_report(report: str) -> None:
    assert len(report.encode()) <= REPORT_MAX_BYTES, f"a report of {len(report)} characters"
