"""How every node of a cluster hears of a write before it is answered: the decisions, without any I/O.

docs/consistency.md tells the protocol, and why a read that begins after a write was answered cannot miss it. Here it is as one
value that takes events and returns commands; koscache.cluster.hub carries them out, and a model drives the same code
through every kind of failure.

Owns: what is told to whom, when a write may be answered, until when this node may trust and vouch for what it knows, and what of
others' writes is marked here. Does not own: lines and their handshake (lines), the fence's file (fence), views (membership).

Invariant: ended(ok) is said of a write only when each member has acknowledged its End, or cannot trust any more (see _excused).
No End is said to anybody before all have acknowledged the Begin. Trust is never given for longer than the leases that this
node holds (see _trust).

    a write here:  begin ─▶ UNDER_WAY ─end─▶ CLOSING ─all have the Begin─▶ ENDING ─all have the End─▶ gone

Times are seconds of one clock that never stops (fence.boot_ns), given by the caller; of others' clocks nothing is assumed but
that they run at most RATE_SLACK faster or slower.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from koscache.cluster import wire
from koscache.cluster.view import LEAP, Member, View
from koscache.ipc import Message

#: A promise to another node is kept for so much longer than it counts on: clocks differ, and so do a promise's two ends.
RATE_SLACK: Final = 0.1
_GRACE_S: Final = 0.05
#: A lease is asked for anew when so much of it is over.
_RENEW_AT: Final = 0.25
#: Renewals that may be on their way on one line; an answer to an older one says nothing that a newer one does not.
_RENEWALS_MAX: Final = 16
#: Slots that are remembered for one member that could not be told; 65 536 x 60 bytes.
SKIPPED_MAX: Final = 65_536
#: Writes that are kept, and slots of all of them together, before those are given up that nobody waits for any more.
_LEFT_MAX: Final = 8192
_LEFT_SLOTS_MAX: Final = 500_000
#: Members that are asked at a time for a view that is known to be newer.
_ASKED_FOR_VIEWS: Final = 3
#: Stands for members that the store has forgotten.
_FORGOTTEN: Final = ""
#: How often a line is begun anew for what was given up.
_RESTART_EVERY_S: Final = 10.0


class Membership(enum.Enum):
    """What ends the wait for a member that does not answer."""

    STATIC = "static"  # its lease of this node runs out
    CONTROL = "control"  # it is expelled; or its long lease runs out, and it knows that this node lives


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """On our line to the member."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class Reply:
    """On the member's line to us."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class Pass:
    """Give these slots of our own fence new values."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unmark:
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Something may have been missed. reason: for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class Restart:
    """End our line to the member, so that a new Hello tells it what it has to know."""

    member: str


@dataclass(frozen=True, slots=True)
class Trust:
    """Until when (seconds; inf: for ever) records may be trusted and vouched for; 0: not at all."""

    until: float


@dataclass(frozen=True, slots=True)
class Ended:
    """How a write ended whose end was waited for."""

    number: int
    ok: bool


Command = Tell | Reply | Pass | Mark | Unmark | NewEpoch | Restart | Trust | Ended


class ProtocolBroken(Exception):
    """A member says what it cannot say: its line must end, and begin anew with a Hello."""


class _State(enum.Enum):
    UNDER_WAY = enum.auto()
    CLOSING = enum.auto()
    ENDING = enum.auto()


@dataclass(slots=True)
class _Write:
    """begun, ended: members that have acknowledged. waited: somebody is to hear how it ends. until: for how long."""

    slots: tuple[int, ...]
    state: _State = _State.UNDER_WAY
    begun: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    waited: bool = False
    until: float = math.inf


@dataclass(slots=True)
class _Out:
    """A member that hears of our writes. up: its line stands (a Hello was sent). met: it has welcomed us since we started.
    promised_at: when it asked last to be waited for. refused_at: when it did not know us, so would not miss our lease.
    resigned: it does not trust until it hears of us again. skipped: slots passed without it; None: too many. unheard: the
    same of writes that were told on the present line and not yet acknowledged. hello_*: what the Hello of it said."""

    promised_at: float
    refused_at: float = -math.inf
    up: bool = False
    met: bool = False
    resigned: bool = False
    skipped: set[int] | None = field(default_factory=set)
    unheard: dict[int, tuple[int, ...]] = field(default_factory=dict)
    hello_skipped: frozenset[int] | None = frozenset()
    hello_begun: frozenset[int] = frozenset()
    hello_ended: frozenset[int] = frozenset()

    def skip(self, slots: Iterable[int]) -> None:
        if self.skipped is not None:
            self.skipped.update(slots)
            if len(self.skipped) > SKIPPED_MAX:
                self.skipped = None


@dataclass(slots=True)
class _In:
    """A member whose writes we hear of. met: its Hello was heard since we started. daemon: the run of its daemon that said the
    last one. renewed_at: when the last lease was asked for that it has granted. lapsed: the
    long one had run out while it was not late, so it may have passed over us. marks: slots of its writes under way."""

    up: bool = False
    met: bool = False
    daemon: int | None = None
    renewed_at: float = -math.inf
    lapsed: bool = False
    asked_at: float = -math.inf
    serial: int = 0
    asked: dict[int, float] = field(default_factory=dict)
    marks: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Left:
    """What a daemon that resigned has left for the next one. heard: the other members, each with its daemon, or 0 if it has heard
    no Hello of it. skipped: for each member what it missed; None: too much to say."""

    heard: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a Hello to a member must say. See wire.Hello."""

    version: int
    skipped: tuple[int, ...] | None
    under_way: tuple[tuple[int, tuple[int, ...]], ...]


class Coherence:
    """One run of a daemon, for as long as it is the same incarnation of its member.

    name: this member's. lease_s: of what members promise each other. member_lease_s: of what the store says (CONTROL); twice
    that is the long lease. trusted_until: as the daemon before this one left it. before: what it left when it resigned; None: it
    did not. after_crash: it died as this same member, and of what it promised nobody knows. forgot: the store is not the one
    that it was, so members that no view names may trust, for as long as their last heartbeat lets them. missed: there are
    more writes than can be told that no member has been told of. first: writes are numbered from here on.
    """

    def __init__(
        self,
        name: str,
        membership: Membership,
        lease_s: float,
        *,
        member_lease_s: float = 0.0,
        trusted_until: float = 0.0,
        before: Left | None = None,
        after_crash: bool = False,
        forgot: bool = False,
        missed: bool = False,
        first: int = 0,
    ) -> None:
        self._name = name
        self._static = membership is Membership.STATIC
        self._lease_s = lease_s
        self._member_lease_s = member_lease_s
        self._long_s = lease_s if self._static else 2 * member_lease_s
        self._trusted_before = trusted_until
        self._before = before or Left()
        self._after_crash = after_crash
        self._forgot = forgot
        self._missed = missed
        self._next = first
        self._view = View(-1, ())
        self._heard_version = 0
        self._announced: dict[str, tuple[Member, int]] = {}
        self._outs: dict[str, _Out] = {}
        self._ins: dict[str, _In] = {}
        self._writes: dict[int, _Write] = {}
        #: members that can be told and have not resigned: before all of these have acknowledged, nothing is decided
        self._well: set[str] = set()
        self._slots = 0
        #: members that have marked what we have given up
        self._misled: set[str] = set()
        self._restarted_at = -math.inf
        self._asked_view_at = -math.inf
        self._least_renewed = -math.inf
        #: who may trust though no view names him, and until when
        self._parting: dict[str, float] = {}
        self._held_until: float | None = None
        self._complete = False
        self._resigned = False
        #: acknowledgements that wait until nobody holds a lease of ours whom the asker does not know
        self._held: list[Reply] = []
        self._member_until = -math.inf
        self._member_since = math.inf
        self._late: frozenset[str] = frozenset()
        self._trusted_until = -1.0

    # --- what others want to know --------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every member knows this node, and this node what was under way at every member."""
        return self._complete

    @property
    def wanted(self) -> dict[str, Member]:
        """The members to which a line is to stand."""
        wanted = {member.name: member for member in self._view.others(self._name)}
        for name, (member, _) in self._announced.items():
            wanted.setdefault(name, member)
        return wanted

    @property
    def outdated(self) -> bool:
        """A member has a newer view than this node."""
        return self._view.version < self._heard_version

    @property
    def waiting(self) -> int:
        """Writes whose end is waited for."""
        return sum(write.waited for write in self._writes.values())

    def trusted_until(self) -> float:
        """As told by the last Trust; 0 before there was one."""
        return max(self._trusted_until, 0.0)

    def in_trouble(self, now: float) -> dict[str, str]:
        """Members that cannot be told or do not tell, and how."""
        trouble: dict[str, str] = {}
        for name, out in self._outs.items():
            inn = self._ins[name]
            if not out.up and not inn.up:
                trouble[name] = "no line"
            elif not out.up:
                trouble[name] = "no line to it"
            elif not inn.up:
                trouble[name] = "no line from it"
            elif inn.renewed_at + self._long_s < now:
                trouble[name] = "does not renew"
        return trouble

    def marked(self) -> list[tuple[int, ...]]:
        """The slots of others' writes under way, as they are marked here."""
        return [slots for inn in self._ins.values() for slots in inn.marks.values()]

    def unfinished(self) -> dict[int, tuple[int, ...]]:
        """Writes that not everybody has heard of, by number."""
        return {number: write.slots for number, write in self._writes.items()}

    def silent(self, name: str) -> bool:
        """Whether there is no line to or from the member, so that it may be expelled."""
        out, inn = self._outs.get(name), self._ins.get(name)
        return (out is None or not out.up) and (inn is None or not inn.up)

    # --- views and own membership ---------------------------------------------------------------------------------------

    def viewed(self, view: View, now: float, since: float = -math.inf) -> list[Command]:
        """The members are these. Older ones than known are not listened to.

        since: who is new in this view joined after that; he cannot have passed over us yet, for he waits for a long lease.
        """
        if view.version <= self._view.version:
            return []
        came_back = [
            member.name for member in view.others(self._name)
            if (known := self._view.find(member.name)) is not None and known.incarnation != member.incarnation
        ]  # fmt: skip
        commands: list[Command] = []
        if 0 <= self._view.version <= view.version - LEAP:
            # The next heartbeat will find it as well; this has come from another member, or before.
            commands += self._hold_for_the_forgotten(now)
        for name in came_back:
            commands += self._forget_what_it_knew(name, self._ins[name], now)
            self._ins[name].lapsed = False
            self._ins[name].renewed_at = max(self._ins[name].renewed_at, since)
        if self._view.version < 0:
            # Of the daemon before: promises to members that are gone since.
            gone = [name for name in self._before.heard if view.find(name) is None]
            gone += ["?"] if self._after_crash else []  # whoever that was
            self._parting.update(dict.fromkeys(gone, self._kept_until(now, self._lease_s)))
            if self._forgot:
                self._hold_for_the_forgotten(now)
            if gone and self._trusted_before <= now:
                commands.append(NewEpoch("who is gone may have passed over the daemon that was here before"))
        self._view = view
        self._heard_version = max(self._heard_version, view.version)
        for name, (_, version) in list(self._announced.items()):
            if version <= view.version:
                del self._announced[name]
        commands += self._follow_wanted(now, since)
        return commands + self._advance_all(now) + self._trust(now)

    def _hold_for_the_forgotten(self, now: float) -> list[Command]:
        """Members may trust, and pass over us, that no view names: for as long as their last heartbeat lets them."""
        self._held_until = self._kept_until(now, max(self._lease_s, self._member_lease_s))
        self._parting[_FORGOTTEN] = self._held_until
        self._trusted_until = 0.0
        return [Trust(0.0)]

    def _follow_wanted(self, now: float, since: float) -> list[Command]:
        wanted = self.wanted
        for name in wanted:
            if name not in self._outs:
                # Who joins when we know of all others has nothing under way that we have not heard of, and knows us.
                # The daemon that ran here before may have made promises until now.
                out = self._outs[name] = _Out(now, met=self._complete)
                missed = self._before.skipped.get(name, ())
                out.skipped = None if missed is None or self._missed else set(missed)
                inn = _In(met=self._complete, daemon=self._before.heard.get(name), renewed_at=since)
                # Of who was there before us we do not know what he did: until he tells us, or is gone.
                inn.lapsed = not self._continuous(inn, now)
                self._ins[name] = inn
        commands: list[Command] = []
        for name in [name for name in self._outs if name not in wanted]:
            self._parting[name] = self._kept_until(self._outs.pop(name).promised_at, self._lease_s)
            self._well.discard(name)
            inn = self._ins.pop(name)
            self._held = [held for held in self._held if held.member != name]
            commands += self._forget_what_it_knew(name, inn, now)
            commands += self._drop_marks(inn)
        return commands

    def _forget_what_it_knew(self, name: str, inn: _In, now: float) -> list[Command]:
        """The member is out, and what it passed without us it will never tell."""
        # Of one whose time had run out when it was put out, and that lived no longer than its lease of us, there is nothing.
        late = name in self._late and not inn.lapsed and now <= self._member_until
        if self._static or late or self._continuous(inn, now):
            return []
        return [NewEpoch(f"{name} is gone, and may have passed over this node before")]

    def _drop_marks(self, inn: _In) -> list[Command]:
        slots = tuple({slot for marked in inn.marks.values() for slot in marked})
        commands: list[Command] = [Pass(slots)] if slots else []
        commands += [Unmark(marked) for marked in inn.marks.values()]
        inn.marks = {}
        return commands

    def stood(self, until: float, late: Iterable[str], now: float) -> list[Command]:
        """A heartbeat succeeded (CONTROL): own membership holds until then, a little less than a lease after it was sent. late:
        members whose time had run out by then."""
        for name, inn in self._ins.items():
            # Late at the last heartbeat and at this one it has not lived between; if there was a last one in time.
            was_late = name in self._late and now <= self._member_until
            inn.lapsed = inn.lapsed or (not was_late and inn.renewed_at + self._long_s <= now)
        if now > self._member_until:
            self._member_since = now
        self._member_until = max(self._member_until, until)
        self._late = frozenset(late)
        return self._advance_all(now) + self._trust(now)

    def _heard(self, version: int) -> bool:
        """True: a member's view is newer than ours, and that is news."""
        if version <= self._heard_version:
            return False
        self._heard_version = version
        return version > self._view.version

    # --- trust ----------------------------------------------------------------------------------------------------------

    def _trust(self, now: float) -> list[Command]:
        """Trust holds (1) while every member has granted a lease; or (2) while own membership holds, and every member has
        granted a long lease or was late at the last heartbeat: such a one does not pass over us, see _excused."""
        commands: list[Command] = []
        if self._resigned:
            return []
        if self._held_until is not None:
            # Who is forgotten goes by his own row still, so he may pass over us all that time.
            if now < self._held_until:
                return []
            self._held_until = None
            commands.append(NewEpoch("members that the control store had forgotten may have passed over this node"))
        if not self._complete:
            if not all(self._outs[name].met and self._ins[name].met for name in self._outs) or self._view.version < 0:
                return commands
            self._complete = True
        self._least_renewed = min((inn.renewed_at for inn in self._ins.values()), default=math.inf)
        until = self._least_renewed + self._lease_s
        if not self._static:
            for name, inn in self._ins.items():
                inn.lapsed = inn.lapsed or (name not in self._late and inn.renewed_at + self._long_s <= now)
            covered = min((self._covered(name, inn) for name, inn in self._ins.items()), default=math.inf)
            # Who has nobody to renew him has the store alone: somebody may have joined of whom he does not know.
            until = max(until if self._ins else -math.inf, min(self._member_until, covered))
        if until != self._trusted_until:
            self._trusted_until = until
            commands.append(Trust(until))
        return commands

    def _covered(self, name: str, inn: _In) -> float:
        """Until when the member does not pass over us. One that is late does not, unless it could before it was."""
        late = name in self._late and not inn.lapsed
        return max(inn.renewed_at + self._long_s, self._member_until if late else -math.inf)

    def _continuous(self, inn: _In, now: float) -> bool:
        """Whether the member cannot have passed over us so far: a lease of it has held all the time, or our trust of before."""
        return (not inn.lapsed and inn.renewed_at + self._long_s > now) or self._trusted_before > now

    def _excused(self, name: str, out: _Out, now: float) -> bool:
        """Whether the member cannot trust, so that nobody need wait for it.

        It said so; or no lease that we granted can hold any more, neither a short one for (1) nor a long one for (2), and it
        does not take us for late: our own row in the store has been good for longer than what it knows of us can be old.
        """
        if out.resigned:
            # Unless it may be back, and we are the one who is cut off.
            return self._static or now < self._member_until
        if not self._run_out(max(out.promised_at, out.refused_at), self._long_s, now):
            return False
        return self._static or (
            now < self._member_until and self._run_out(self._member_since, self._member_lease_s, now)
        )

    def _kept_until(self, at: float, lease_s: float) -> float:
        """When a lease is over for whoever counts it by another clock."""
        return at + lease_s * (1 + RATE_SLACK) + _GRACE_S

    def _run_out(self, at: float, lease_s: float, now: float) -> bool:
        return now >= self._kept_until(at, lease_s)

    def _parted(self, now: float) -> bool:
        """Whether who is in no view any more holds no lease of ours. Its membership has run out, or it could not have been
        expelled; but for a store that has forgotten it."""
        for name, until in list(self._parting.items()):
            if now >= until:
                del self._parting[name]
        return not self._parting

    # --- our own writes -------------------------------------------------------------------------------------------------

    def begin(self, slots: tuple[int, ...], now: float) -> tuple[int, list[Command]]:
        """A write of these slots is about to be asked of the origin. Returns its number."""
        self._next += 1
        number = self._next
        self._writes[number] = _Write(slots)
        self._slots += len(slots)
        return number, [Tell(name, wire.Begin(number, slots)) for name, out in self._outs.items() if out.up]

    def end(self, number: int, now: float, wait_s: float | None) -> list[Command]:
        """The origin has answered. wait_s: Ended is to be said, at the latest after so long; None: nobody waits."""
        write = self._writes[number]
        assert write.state is _State.UNDER_WAY, "a write ends once"
        write.state = _State.CLOSING
        if wait_s is not None:
            write.waited, write.until = True, now + wait_s
        commands = self._advance(number, write, now)
        while (len(self._writes) > _LEFT_MAX or self._slots > _LEFT_SLOTS_MAX) and self._give_up_oldest():
            pass
        return commands

    def _give_up_oldest(self) -> bool:
        """Nobody was promised anything of it: who has not heard of it is told of its slots when its line begins anew."""
        for number, write in self._writes.items():
            if not write.waited and write.state is not _State.UNDER_WAY:
                del self._writes[number]
                self._slots -= len(write.slots)
                self._misled |= write.begun - write.ended
                for name, out in self._outs.items():
                    if name not in write.ended:
                        out.skip(write.slots)
                return True
        return False

    def _advance_all(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for number, write in list(self._writes.items()):
            commands += self._advance(number, write, now)
        return commands

    def _advance(self, number: int, write: _Write, now: float) -> list[Command]:
        commands: list[Command] = []
        if self.outdated or not self._parted(now):
            return []  # somebody may trust, and vouch, of whom we do not know, or not any more
        if write.state is _State.CLOSING and self._have(write.begun, now):
            # Our own slots first: nobody who asks us after he has heard of the End gets what was before it.
            write.state = _State.ENDING
            commands.append(Pass(write.slots))
            commands += [Tell(name, wire.End(number)) for name, out in self._outs.items() if out.up]
        if write.state is _State.ENDING and self._have(write.ended, now):
            del self._writes[number]
            self._slots -= len(write.slots)
            for name, out in self._outs.items():
                if name not in write.ended:
                    if out.up:
                        out.unheard[number] = write.slots
                    else:
                        out.skip(write.slots)
            if write.waited:
                commands.append(Ended(number, True))
        return commands

    def _have(self, acknowledged: set[str], now: float) -> bool:
        if not self._static and not self._outs and now >= self._member_until:
            return False  # nobody is left that we know of; there may be others
        return all(name in acknowledged or self._excused(name, out, now) for name, out in self._outs.items())

    # --- our lines ------------------------------------------------------------------------------------------------------

    def greet(self, name: str) -> Greeting:
        """What the Hello on a new line to the member says; it is sent at once, and the line counts as standing."""
        out = self._outs[name]
        ending = {number: write for number, write in self._writes.items() if write.state is _State.ENDING}
        missed = {number: write for number, write in ending.items() if name not in write.ended}
        for write in missed.values():
            out.skip(write.slots)
        under_way = tuple((n, write.slots) for n, write in self._writes.items() if n not in ending)
        out.up, out.resigned = True, False
        self._well.add(name)
        out.hello_skipped = None if out.skipped is None else frozenset(out.skipped)
        out.hello_begun = frozenset(number for number, _ in under_way)
        out.hello_ended = frozenset(missed)
        return Greeting(self._view.version, None if out.skipped is None else tuple(sorted(out.skipped)), under_way)

    def welcomed(self, name: str, version: int, now: float) -> list[Command]:
        """The member has done what the Hello said."""
        out = self._outs[name]
        if not out.up:
            raise ProtocolBroken("a welcome without a hello")
        out.met = True
        if out.skipped is None and out.hello_skipped is None:
            out.skipped = set()
        elif out.skipped is not None and out.hello_skipped is not None:
            out.skipped -= out.hello_skipped
        out.hello_skipped = frozenset()
        for number in out.hello_begun:
            if number in self._writes:
                self._writes[number].begun.add(name)
        for number in out.hello_ended:
            if number in self._writes:
                self._writes[number].ended.add(name)
        return self._ask_view(name, version, now) + self._advance_all(now) + self._trust(now)

    def refused(self, name: str, now: float) -> None:
        """The member does not let us in, so it hears nothing of our writes, and does not know that it should."""
        out = self._outs.get(name)
        if out is not None:
            out.refused_at = now

    def lost(self, name: str) -> None:
        """Our line to the member broke."""
        out = self._outs.get(name)
        if out is None or not out.up:
            return
        out.up = False
        self._well.discard(name)
        for slots in out.unheard.values():
            out.skip(slots)
        out.unheard = {}
        for write in self._writes.values():
            if write.state is not _State.ENDING:
                # Its daemon may be another one when we come back, which has no marks: the Hello repeats the Begin.
                write.begun.discard(name)

    def acknowledged(self, name: str, message: wire.Ack, now: float) -> list[Command]:
        out = self._outs[name]
        commands = self._ask_view(name, message.version, now)
        if message.ended:
            out.unheard.pop(message.number, None)
        write = self._writes.get(message.number)
        if write is None:
            return commands
        acknowledged = write.ended if message.ended else write.begun
        acknowledged.add(name)
        if len(acknowledged) < len(self._well):
            return commands
        return commands + self._advance(message.number, write, now)

    def renew(self, name: str, serial: int, now: float) -> list[Command]:
        """The member asks to be waited for."""
        self._outs[name].promised_at = now
        return [Tell(name, wire.Renewed(serial, self._view.version))]

    def _ask_view(self, name: str, version: int, now: float) -> list[Command]:
        return [Tell(name, wire.AskView())] if self._heard(version) else []

    # --- others' lines --------------------------------------------------------------------------------------------------

    def known(self, name: str) -> bool:
        """Whether a Hello of that name is to be heard out: of a member, or of one that joins."""
        return name != self._name and (name in self._ins or not self._static)

    def hello(self, hello: wire.Hello, now: float, since: float = -math.inf) -> list[Command]:
        """A member's line begins; when the commands are done the shell calls listening(). since: as in viewed()."""
        name = hello.member.name
        if name not in self._ins:
            if hello.version <= self._view.version:
                raise ProtocolBroken("no member any more")
            self._announced[name] = (hello.member, hello.version)
        commands = self._follow_wanted(now, since)
        inn = self._ins[name]
        if hello.daemon != inn.daemon and not self._continuous(inn, now):
            commands.append(NewEpoch(f"{name} was started anew, and may have passed over this node before"))
        elif hello.skipped is None:
            commands.append(NewEpoch(f"{name} has passed over this node more often than it can tell"))
        before, inn.marks = inn.marks, dict(hello.under_way)
        touched = set(hello.skipped or ())
        touched.update(slot for marks in (before, inn.marks) for slots in marks.values() for slot in slots)
        # Marked first and unmarked last: at no moment is something under way and not marked.
        commands += [Mark(slots) for slots in inn.marks.values()]
        if touched:
            commands.append(Pass(tuple(sorted(touched))))
        commands += [Unmark(slots) for slots in before.values()]
        inn.up = inn.met = True
        inn.daemon = hello.daemon
        inn.asked, inn.asked_at = {}, -math.inf
        self._heard(hello.version)
        # What was to be acknowledged on an earlier line is in this Hello.
        self._held = [held for held in self._held if held.member != name]
        self._held.append(Reply(name, wire.Welcome(self._view.version)))
        return commands + self._let_go() + self._trust(now)

    def listening(self, name: str, now: float) -> list[Command]:
        """From now on the member hears what we reply."""
        commands: list[Command] = [Reply(name, wire.AskView())] if self.outdated else []
        return commands + self._renew(name, self._ins[name], now)

    def begun(self, name: str, message: wire.Begin) -> list[Command]:
        inn = self._ins[name]
        if message.number in inn.marks:
            raise ProtocolBroken(f"write {message.number} begins twice")
        inn.marks[message.number] = message.slots
        return [Mark(message.slots), Pass(message.slots), *self._ack(name, message.number, ended=False)]

    def ended(self, name: str, message: wire.End) -> list[Command]:
        slots = self._ins[name].marks.pop(message.number, None)
        if slots is None:
            raise ProtocolBroken(f"write {message.number} ends and has not begun")
        return [Pass(slots), Unmark(slots), *self._ack(name, message.number, ended=True)]

    def _ack(self, name: str, number: int, *, ended: bool) -> list[Command]:
        """Held back while somebody trusts by a lease of ours who is in no view any more: the writer need not know of him, and
        he not of the writer."""
        self._held.append(Reply(name, wire.Ack(number, ended, self._view.version)))
        return self._let_go()

    def _let_go(self) -> list[Command]:
        if not self._held or self._parting:
            return []
        held, self._held = self._held, []
        return list(held)

    def renewed(self, name: str, message: wire.Renewed, now: float) -> list[Command]:
        """The lease counts from when it was asked for."""
        inn = self._ins[name]
        if message.serial > inn.serial:
            raise ProtocolBroken(f"renewal {message.serial} was not asked for")
        # One that is not remembered any more was asked for so long ago that it says nothing.
        asked_at = inn.asked.get(message.serial, -math.inf)
        inn.asked = {serial: at for serial, at in inn.asked.items() if serial > message.serial}
        before, inn.renewed_at = inn.renewed_at, max(inn.renewed_at, asked_at)
        inn.lapsed = inn.lapsed and asked_at + self._long_s <= now
        commands: list[Command] = [Reply(name, wire.AskView())] if self._heard(message.version) else []
        if self._complete and before > self._least_renewed:
            return commands  # another member's lease is the one that ends first
        return commands + self._trust(now)

    def resigned(self, name: str, now: float) -> list[Command]:
        """The member has ceased to trust."""
        self._outs[name].resigned = True
        self._well.discard(name)
        return self._advance_all(now)

    def resign(self) -> tuple[Left, list[Command]]:
        """This daemon stops: from now on nobody need wait for it. Returns what the next one wants to know as `before`."""
        for out in self._outs.values():
            for slots in out.unheard.values():
                out.skip(slots)
        for write in self._writes.values():
            for name, out in self._outs.items():
                if name not in write.ended:
                    out.skip(write.slots)
        skipped = {
            name: None if out.skipped is None else tuple(sorted(out.skipped))
            for name, out in self._outs.items()
            if out.skipped is None or out.skipped
        }
        self._resigned = True
        self._trusted_until = 0.0
        heard = {name: inn.daemon or 0 for name, inn in self._ins.items()}
        told: list[Command] = [Reply(name, wire.Resigned()) for name, inn in self._ins.items() if inn.up]
        return Left(heard, skipped), [Trust(0.0), *told]

    def left(self, name: str) -> None:
        """The member's line to us broke. What is marked stays so until it, or the view, says more."""
        inn = self._ins.get(name)
        self._held = [held for held in self._held if held.member != name]
        if inn is not None:
            inn.up = False

    def view_for_asker(self) -> wire.Viewed:
        return wire.Viewed(self._view)

    # --- time -----------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Command]:
        """Several times a lease."""
        commands: list[Command] = []
        self._parted(now)
        commands += self._let_go()
        if self._misled and now - self._restarted_at >= _RESTART_EVERY_S:
            self._restarted_at = now
            commands += [Restart(name) for name in sorted(self._misled & self._outs.keys())]
            self._misled.clear()
        if self.outdated and now - self._asked_view_at >= self._lease_s:
            # The first question, or its answer, may have been lost with a line.
            self._asked_view_at = now
            commands += [Tell(name, wire.AskView()) for name in islice(sorted(self._well), _ASKED_FOR_VIEWS)]
        for name, inn in self._ins.items():
            commands += self._renew(name, inn, now)
        for number, write in list(self._writes.items()):
            if write.waited and write.until <= now:
                write.waited = False
                commands.append(Ended(number, False))
            commands += self._advance(number, write, now)
        return commands

    def _renew(self, name: str, inn: _In, now: float) -> list[Command]:
        # With the control store late the short leases must hold.
        store_late = self._static or self._member_until - now < self._member_lease_s / 2
        pause_s = _RENEW_AT * (self._lease_s if store_late else self._long_s)
        if not inn.up or now - inn.asked_at < pause_s:
            return []
        inn.asked_at = now
        inn.serial += 1
        inn.asked[inn.serial] = now
        if len(inn.asked) > _RENEWALS_MAX:
            del inn.asked[min(inn.asked)]
        return [Reply(name, wire.Renew(inn.serial))]
