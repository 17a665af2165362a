"""Where a node learns who the members are: the configuration, or the control store.

Owns: this node's own Member, joining and heartbeats, expelling whoever is silent and late, conversion of the store's rows. Does
not own: the store (kos.control), what follows from a view (coherence, hub).

Invariant: `until` is never later than what the store has of this member: it counts from before the question was sent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

from kos import config
from kos.clock import Clock
from kos.config import Config
from kos.config_values import GIB, join_address
from kos.control.errors import ControlUnavailable, Expelled, SchemaMissing, WentBack
from kos.control.members import MemberRow, MemberStore
from kos.control.members import MemberState as StoredState
from kos.errors import ConfigError
from koscache.cluster.coherence import RATE_SLACK
from koscache.cluster.view import LEAP, Member, MemberState, View

_log: Final = logging.getLogger("koscache.cluster")

#: While somebody is in trouble, or the store is away, it is asked so often.
_HURRY_S: Final = 1.0


def own_member(settings: Config) -> Member:
    """This node as others are to see it, not yet of any incarnation. Raises ConfigError."""
    cluster, listen = settings.cluster, settings.listen
    name = config.own_name(settings)
    if cluster.membership == "static":
        found = static_view(settings).find(name)
        if found is None:
            raise ConfigError(f"members: found no {name!r}, allowed: this node's own cluster.name among them")
        return found

    def advertised(address: str) -> str:
        host, port = config.split_address(address)
        return join_address(cluster.advertise or host, port)

    weight = cluster.weight or max(1, settings.cache.size_bytes // GIB)
    return Member(name, 0, advertised(listen.peer), advertised(listen.cluster), weight)


def static_view(settings: Config) -> View:
    members = (Member(each.name, 0, each.peer, each.cluster, each.weight) for each in settings.members)
    return View(0, tuple(sorted(members, key=lambda member: member.name)))


class Standing(Protocol):
    """What the hub makes of this node's standing in the store. version: of the view that it goes by, be it from the store or
    from another member."""

    @property
    def version(self) -> int: ...
    def joined(self, me: Member, view: View, *, resumed: bool, forgot: bool) -> None: ...
    def seen(self, view: View, since: float) -> None: ...
    def stood(self, until: float, late: Iterable[str]) -> None: ...
    def expelled(self) -> None: ...
    def silent(self, name: str) -> bool: ...
    def removed(self, name: str) -> None: ...
    def report(self) -> str: ...


class ControlMembership:
    """One run of a daemon in the control store. now: seconds of the clock that leases are measured by."""

    def __init__(
        self,
        settings: Config,
        store: MemberStore,
        standing: Standing,
        holder: int,
        clock: Clock,
        now: Callable[[], float],
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        """prepare: makes the store ready; may raise ControlUnavailable, then it is tried again."""
        self._prepare = prepare
        self._cluster = settings.cluster
        self._store = store
        self._standing = standing
        self._holder = holder
        self._clock = clock
        self._now = now
        self.me = own_member(settings)
        self.away = ""
        #: when the last answer of the store was asked for: who is in no view by then has not joined before
        self.looked_at = now()
        self._joined_at = self.looked_at
        self._version = -1
        self._beats = -1
        #: Until then members may trust that the store has forgotten: for all joins of this time.
        self._forgot_until = -math.inf

    async def run(self, incarnation: int) -> None:
        """Joins, and stays until cancelled. incarnation: the one that is remembered, 0 for none. Raises Superseded when
        another process runs under the same name."""
        while True:
            incarnation = await self._join(incarnation)
            await self._stay(incarnation)

    async def _join(self, incarnation: int) -> int:
        ttl_s = self._cluster.member_lease_s
        while True:
            row = self._row(incarnation)
            try:
                await self._prepare()
                sent = self._now()
                joined = await self._store.join(row, self._holder, ttl_s, self._version)
            except ControlUnavailable as error:
                self._store_away(str(error))
                await self._clock.sleep(self._clock.jitter(_HURRY_S / 2, _HURRY_S))
                continue
            self._store_back()
            view = view_of(joined.rows, joined.version)
            me = view.find(self.me.name)
            assert me is not None, "who joins is a member"
            self.me = me
            if self._lifted(joined.version, self._version):
                self._wait_for_the_forgotten()
            self._version, self._beats = joined.version, joined.beats
            self._joined_at = self.looked_at = sent
            forgot = sent < self._forgot_until
            self._standing.joined(me, view, resumed=joined.resumed, forgot=forgot)
            self._standing.stood(sent + ttl_s * (1 - RATE_SLACK), ())
            return joined.incarnation

    async def _stay(self, incarnation: int) -> None:
        """Until expelled."""
        ttl_s = self._cluster.member_lease_s
        pause_s = self._cluster.heartbeat_s
        while True:
            await self._clock.sleep(self._clock.jitter(0.8 * pause_s, pause_s))
            pause_s = self._cluster.heartbeat_s
            sent, known = self._now(), max(self._version, self._standing.version)
            try:
                beat = await self._store.heartbeat(
                    self.me.name, incarnation, self._holder, ttl_s, self._standing.report(), known, self._beats
                )
            except (SchemaMissing, WentBack) as error:
                self._lost(known, str(error))
                return
            except ControlUnavailable as error:
                self._store_away(str(error))
                pause_s = min(pause_s, _HURRY_S)
                continue
            except Expelled:
                _log.error("this node was expelled: it joins again", extra={"member": self.me.name})
                self._standing.expelled()
                return
            self._store_back()
            if beat.version < known or self._lifted(beat.version, self._version):
                self._lost(known, f"its view is {beat.version}, this node has seen {known}")
                return
            self._version, self._beats = beat.version, beat.beats
            if beat.rows is not None:
                self._see(beat.rows, beat.version)
            self.looked_at = sent
            self._standing.stood(sent + ttl_s * (1 - RATE_SLACK), [name for name, _ in beat.expired])
            if beat.expired:
                pause_s = min(pause_s, _HURRY_S)
                # Who has just joined is not known to all yet, and may be the one who is cut off.
                if sent - self._joined_at >= ttl_s:
                    await self._expel(beat.expired)

    def _lost(self, known: int, reason: str) -> None:
        """The store is a new one, or has gone back to an earlier state. Of members that it does not name it knows nothing."""
        _log.error("the control store has forgotten members: this node joins again", extra={"reason": reason})
        self._version = known
        self._wait_for_the_forgotten()
        self._standing.expelled()

    def _wait_for_the_forgotten(self) -> None:
        ttl_s = self._cluster.member_lease_s
        self._forgot_until = self._now() + ttl_s * (1 + RATE_SLACK)

    @staticmethod
    def _lifted(version: int, known: int) -> bool:
        """Whether somebody found that the store had gone back: he need not have seen as much of it as we."""
        return known >= 0 and version >= known + LEAP

    def _see(self, rows: tuple[MemberRow, ...], version: int) -> None:
        if not self._lifted(version, self._version):
            self._version = version  # else the next heartbeat notices
        self._standing.seen(view_of(rows, version), self.looked_at)

    async def _expel(self, late: tuple[tuple[str, int], ...]) -> None:
        """Those who are late and silent. Who is late and speaks has lost the store, not us."""
        for name, incarnation in late:
            if not self._standing.silent(name):
                continue
            try:
                if await self._store.expel(name, incarnation):
                    _log.warning("member expelled", extra={"member": name, "incarnation": incarnation})
                    self._standing.removed(name)
                rows = await self._store.read()
            except ControlUnavailable as error:
                self._store_away(str(error))
                return
            self._see(rows.rows, rows.version)

    async def set_state(self, name: str, state: MemberState) -> bool:
        """Raises ControlUnavailable."""
        found = await self._store.set_state(name, StoredState(state.value))
        rows = await self._store.read()
        self._see(rows.rows, rows.version)
        return found

    async def leave(self) -> None:
        """For good: nobody need wait for this node any more. Tries once."""
        try:
            await self._store.leave(self.me.name, self.me.incarnation, self._holder)
        except ControlUnavailable as error:
            _log.warning("left without telling the control store", extra={"reason": str(error)})

    def _row(self, incarnation: int) -> MemberRow:
        me = self.me
        return MemberRow(
            name=me.name, incarnation=incarnation, peer=me.peer, cluster=me.cluster, weight=me.weight,
            state=StoredState(me.state.value), report=self._standing.report(),
        )  # fmt: skip

    def _store_away(self, reason: str) -> None:
        if not self.away:
            _log.warning("control store away", extra={"reason": reason})
        self.away = reason

    def _store_back(self) -> None:
        if self.away:
            _log.warning("control store back")
        self.away = ""


def view_of(rows: tuple[MemberRow, ...], version: int) -> View:
    return View(
        version,
        tuple(
            Member(row.name, row.incarnation, row.peer, row.cluster, row.weight, MemberState(row.state.value))
            for row in sorted(rows, key=lambda row: row.name)
        ),
    )
