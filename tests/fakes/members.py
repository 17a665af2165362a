"""A control store's members in memory, whose clock, answers and failures a test owns.

store = MemberTable(clock)
store.away = "down"            # every call raises ControlUnavailable
store.lose_answers = True      # calls are carried out and then raise it
store.hold = asyncio.Event()   # calls wait for it before they are carried out, or after: store.hold_answers
"""

from __future__ import annotations

import asyncio

import msgspec

from kos.clock import Clock
from kos.control.errors import ControlUnavailable, Expelled, LastActive, Superseded, WentBack
from kos.control.members import RESTORED_LIFT, Beat, Joined, MemberRow, MemberState, Rows


class MemberTable:
    """A MemberStore. calls: what was asked for, in order."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.away = ""
        self.lose_answers = False
        self.hold: asyncio.Event | None = None
        self.hold_answers: asyncio.Event | None = None
        self.calls: list[tuple[str, str]] = []
        self.version = 1
        self.last_incarnation = 0
        self.beats: dict[str, int] = {}
        self._rows: dict[str, tuple[MemberRow, int, float]] = {}

    # --- what a test does

    def put(
        self, name: str, ttl_s: float, *, cluster: str = "127.0.0.1:1", state: MemberState = MemberState.ACTIVE
    ) -> int:
        """Another node joins, or stays. Its incarnation."""
        row, holder, _ = self._rows.get(name, (None, 0, 0.0))
        if row is None:
            self.last_incarnation += 1
            self.version += 1
            row = MemberRow(
                name=name, incarnation=self.last_incarnation, peer="127.0.0.1:1", cluster=cluster, weight=1, state=state
            )
        self._rows[name] = row, holder, self.clock.monotonic() + ttl_s
        self.beats.setdefault(name, 0)
        return row.incarnation

    def remove(self, name: str) -> None:
        del self._rows[name], self.beats[name]
        self.version += 1

    def take_over(self, name: str) -> None:
        """Another process of that name."""
        row, holder, until = self._rows[name]
        self._rows[name] = row, holder + 1, until

    def expires_in(self, name: str) -> float:
        return self._rows[name][2] - self.clock.monotonic()

    @property
    def names(self) -> list[str]:
        return sorted(self._rows)

    # --- MemberStore

    async def join(self, me: MemberRow, holder: int, ttl_s: float, known_version: int = -1) -> Joined:
        await self._before("join", me.name)
        if self.version < known_version:
            self.version = known_version + RESTORED_LIFT
            self.last_incarnation = max(self.last_incarnation, me.incarnation) + RESTORED_LIFT
        row = self._rows[me.name][0] if me.name in self._rows else None
        resumed = row is not None and row.incarnation == me.incarnation
        if row is None:
            self.last_incarnation += 1
            self.version += 1
            row = msgspec.structs.replace(me, incarnation=self.last_incarnation)
        self._rows[me.name] = row, holder, self.clock.monotonic() + ttl_s
        self.beats[me.name] = self.beats.get(me.name, -1) + 1
        joined = Joined(row.incarnation, resumed, self._all(), self.version, self.beats[me.name])
        await self._after()
        return joined

    async def heartbeat(
        self, name: str, incarnation: int, holder: int, ttl_s: float, report: str, known_version: int = -1,
        known_beats: int = -1,
    ) -> Beat:  # fmt: skip
        await self._before("heartbeat", name)
        if name not in self._rows or self._rows[name][0].incarnation != incarnation:
            raise Expelled(name)
        row, held, _ = self._rows[name]
        if self.beats[name] < known_beats:
            raise WentBack(name)
        if held != holder:
            raise Superseded(name)
        now = self.clock.monotonic()
        self._rows[name] = row, holder, now + ttl_s
        late = tuple(
            (each, row.incarnation) for each, (row, _, until) in self._rows.items() if until < now and each != name
        )
        self.beats[name] += 1
        rows = None if known_version == self.version else self._all()
        beat = Beat(self.version, rows, late, self.beats[name])
        await self._after()
        return beat

    async def expel(self, name: str, incarnation: int) -> bool:
        await self._before("expel", name)
        row, _, until = self._rows.get(name, (None, 0, 0.0))
        found = row is not None and row.incarnation == incarnation and until < self.clock.monotonic()
        if found:
            self.remove(name)
        await self._after()
        return found

    async def leave(self, name: str, incarnation: int, holder: int) -> None:
        await self._before("leave", name)
        row, held, _ = self._rows.get(name, (None, 0, 0.0))
        if row is not None and (row.incarnation, held) == (incarnation, holder):
            self.remove(name)
        await self._after()

    async def set_state(self, name: str, state: MemberState) -> bool:
        await self._before("set_state", name)
        found = name in self._rows
        if found:
            row, holder, until = self._rows[name]
            others = (each for other, (each, _, _) in self._rows.items() if other != name)
            if state is MemberState.DRAINING and all(each.state is MemberState.DRAINING for each in others):
                raise LastActive(name)
            if row.state is not state:
                self._rows[name] = msgspec.structs.replace(row, state=state), holder, until
                self.version += 1
        await self._after()
        return found

    async def read(self) -> Rows:
        await self._before("read", "")
        rows = Rows(self._all(), self.version)
        await self._after()
        return rows

    def _all(self) -> tuple[MemberRow, ...]:
        # In no order: whoever wants one has to make it.
        return tuple(row for row, _, _ in reversed(self._rows.values()))

    async def _before(self, what: str, name: str) -> None:
        self.calls.append((what, name))
        if self.hold is not None:
            await self.hold.wait()
        if self.away:
            raise ControlUnavailable(self.away)

    async def _after(self) -> None:
        if self.hold_answers is not None:
            await self.hold_answers.wait()
        if self.lose_answers:
            raise ControlUnavailable("the answer was lost")
