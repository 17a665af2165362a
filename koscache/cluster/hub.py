"""The daemon among the daemons: carries out what coherence decides, for the writes of this node's workers and for others'.

Owns: this node's Coherence for as long as it is one incarnation, its lines, its standing in the control store, questions
between daemons. Does not own: any decision (coherence), which writes there are (writes), the fence's slots (fence), workers
(koscache.daemon).

Invariant: what coherence decides is carried out before it is asked again, in the order in which it was decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from kos import metrics
from kos.clock import Clock
from kos.config import Config, split_address
from kos.errors import ConfigError, KosError
from kos.tasks import Tasks, TasksClosed
from koscache.cluster import coherence as co
from koscache.cluster import wire
from koscache.cluster.coherence import Coherence, Greeting, ProtocolBroken
from koscache.cluster.lines import Lines
from koscache.cluster.membership import ControlMembership, own_member, static_view
from koscache.cluster.view import NOBODY, Member, MemberState, View
from koscache.cluster.writes import Writes
from koscache.fence import FOREVER_NS, Fence, boot_ns, read_boot_id

_log: Final = logging.getLogger("koscache.cluster")

#: Of a lease, how often time is looked at.
_TICKS_A_LEASE: Final = 10
#: What a member may take to answer an operator's question.
_ASK_S: Final = 5.0
#: Questions of operators that wait at a time.
_ASKS_MAX: Final = 4096
#: How long after a fault of its own the membership is begun anew.
_AGAIN_S: Final = 1.0
#: What is left to those who hear of a stop to say so.
_RESIGN_S: Final = 1.0
#: In cache.dir: which daemons the one before had heard of when it resigned; that this node is to stay out of the ring.
_RESIGNED: Final = "resigned.json"
_DRAINING: Final = "draining"

#: topic, body -> body; both JSON
Answers = Callable[[str, bytes], Awaitable[bytes]]


class _Resigned(msgspec.Struct, frozen=True):
    """What a daemon leaves in cache.dir when it stops. boot_id: of the machine, for after a loss of power the file may be there
    again though it was used."""

    boot_id: str
    daemon: int
    left: co.Left


class Away(KosError):
    """The member cannot be asked just now."""


class Hub:
    """start() with the fence open; close() in the end. All calls on the daemon's loop.

    view_changed: called with each view that this node goes by. answers: of this node to operators' questions. failed: this
    node can be no member as it is configured; why.
    """

    def __init__(
        self,
        settings: Config,
        clock: Clock,
        tasks: Tasks,
        *,
        view_changed: Callable[[View], None],
        answers: Answers,
        failed: Callable[[str], None],
        now: Callable[[], float] = lambda: boot_ns() / 1e9,
    ) -> None:
        self._settings = settings
        self._cluster = settings.cluster
        self.clock = clock
        self.tasks = tasks
        #: told of each view as well, after view_changed
        self.followers: list[Callable[[View], None]] = []
        self._view_changed = view_changed
        self._answers = answers
        self._failed = failed
        self._now = now
        self._me = own_member(settings)
        self._daemon = secrets.randbits(63)
        self._fence: Fence | None = None
        self._coherence: Coherence | None = None
        self._view = NOBODY
        self._before: co.Left | None = None
        #: of this node
        self.writes = Writes(self._cluster.write_wait_s, now, self._do)
        self._control: ControlMembership | None = None
        self._membership: asyncio.Task[None] | None = None
        self._close_store: Callable[[], Awaitable[None]] | None = None
        self._asks: dict[int, tuple[str, asyncio.Future[bytes]]] = {}
        self._ask_numbers = itertools.count(1)
        host, _ = split_address(settings.listen.peer)
        assert self._cluster.secret is not None, "checked with the configuration"
        self._lines = Lines(
            self,
            self._cluster.secret.encode(),
            block_bytes=settings.cache.block_bytes,
            ping_s=max(0.2, self._cluster.lease_s),
            connect_timeout_s=self._cluster.connect_timeout_s,
            local_host=None if host in ("0.0.0.0", "::") else host,
            clock=clock,
            tasks=tasks,
        )

    # --- life -----------------------------------------------------------------------------------------------------------

    async def start(self, fence: Fence, listening: socket.socket) -> None:
        """Raises ConfigError."""
        self._fence = fence
        # What the daemon before left holds no longer than a lease of it could, whatever it was a member of.
        fence.trust(min(fence.trusted_until_ns, int(self._trusted_before() * 1e9)), 0)
        fence.stop_vouching()
        self._before = self._read_resigned()
        await self._lines.start(listening)
        self.tasks.spawn(self._tick(), "cluster")
        if self._cluster.membership == "static":
            if self._draining_path.exists():
                self._me = msgspec.structs.replace(self._me, state=MemberState.DRAINING)
            self._begin_coherence(after_crash=not fence.created and self._before is None)
            self.seen(self._with_own_state(static_view(self._settings)), -math.inf)
            return
        from kos.control.database import Database
        from kos.control.members import Members, new_holder
        from kos.control.migrations import upgrade

        database = Database(self._settings.control)
        self._close_store = database.close
        self._control = ControlMembership(
            self._settings, Members(database), self, new_holder(), self.clock, self._now, lambda: upgrade(database)
        )
        self._take_state(MemberState.DRAINING if self._draining_path.exists() else MemberState.ACTIVE)
        self._membership = self.tasks.spawn(self._stay(self._control, fence.incarnation), "membership")

    async def _stay(self, control: ControlMembership, incarnation: int) -> None:
        from kos.control.errors import SchemaTooNew, Superseded

        while True:
            try:
                await control.run(incarnation)
            except (Superseded, SchemaTooNew, ConfigError) as error:
                self.expelled()
                self._failed(str(error))
                return
            except Exception:
                # Without heartbeats this node would be no member before long, and nobody would know why.
                _log.exception("membership failed unexpectedly: it begins anew")
                self.expelled()
                await self.clock.sleep(_AGAIN_S)
                incarnation = 0 if self._fence is None else self._fence.incarnation

    async def close(self) -> None:
        """Ceases to trust, says so, and ends the lines. Writes that are waited for count as not heard of."""
        self.writes.stop()
        if self._membership is not None:
            # A heartbeat or a view that came after this would make the node trusted, or a member, again.
            self._membership.cancel()
            await asyncio.wait((self._membership,), timeout=_RESIGN_S)
        c = self._coherence
        if c is not None:
            before, commands = c.resign()
            trust, *told = commands
            self._do([trust])
            if self._write_resigned(before):
                self._do(told)
        if self._control is not None and self.state is MemberState.DRAINING:
            await self._control.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RESIGN_S):
                await self._lines.close()
        if self._close_store is not None:
            await self._close_store()

    def _begin_coherence(self, *, after_crash: bool, forgot: bool = False) -> None:
        assert self._fence is not None
        cluster = self._cluster
        self._coherence = Coherence(
            self._me.name, co.Membership(cluster.membership), cluster.lease_s,
            member_lease_s=cluster.member_lease_s, trusted_until=self._trusted_before(),
            before=self._before, after_crash=after_crash, forgot=forgot,
            missed=self.writes.too_many, first=self.writes.numbers,
        )  # fmt: skip
        self._before = None
        self.writes.under(self._coherence)

    def _trusted_before(self) -> float:
        """As the daemon before this one left it; a node that had nobody beside it trusted for ever."""
        assert self._fence is not None
        cluster = self._cluster
        lease_s = cluster.lease_s if cluster.membership == "static" else cluster.member_lease_s
        return min(self._fence.trusted_until_ns / 1e9, self._now() + lease_s)

    # --- the node's standing ----------------------------------------------------------------------------------------------

    def joined(self, me: Member, view: View, *, resumed: bool, forgot: bool) -> None:
        """See membership.Standing."""
        assert self._fence is not None
        self._me = me
        self._take_state(me.state)
        if not resumed:
            self._distrust()
            self._new_epoch("this node was no member for a while")
            self._fence.incarnation = me.incarnation
            self._before = None
            self._daemon = secrets.randbits(63)
        self._begin_coherence(after_crash=resumed and self._before is None, forgot=forgot)
        self.seen(view, -math.inf)

    def seen(self, view: View, since: float) -> None:
        """See membership.Standing."""
        c = self._coherence
        if c is None:
            return
        self._do(c.viewed(view, self._now(), since))
        if view.version >= self._view.version:
            me = view.find(self._me.name)
            if me is not None and self._control is not None:
                self._take_state(me.state)
            self._go_by(view)
        self._lines.follow(c.wanted)

    def stood(self, until: float, late: Iterable[str]) -> None:
        """See membership.Standing."""
        if self._coherence is not None:
            self._do(self._coherence.stood(until, late, self._now()))

    def expelled(self) -> None:
        """What this node knows may be wrong from now on."""
        self._distrust()
        if self._fence is not None:
            self._fence.stop_vouching()  # and nothing is marked: who writes says so again when we are back
        self.writes.under_none()
        self._coherence = None
        self._view = NOBODY
        # What was passed over whom is forgotten with it: for the others it is another daemon that comes back.
        self._daemon = secrets.randbits(63)
        self._lines.follow({})
        for name in list(self._lines.ins):
            self._lines.cut(name, "expelled")

    def silent(self, name: str) -> bool:
        return self._coherence is None or self._coherence.silent(name)

    def removed(self, name: str) -> None:
        metrics.CLUSTER_EXPELLED.inc()

    def report(self) -> str:
        return json.dumps({"capacity_bytes": self._settings.cache.size_bytes})

    def _distrust(self) -> None:
        if self._fence is not None:
            self._fence.trust(0, 0)

    def _new_epoch(self, reason: str) -> None:
        assert self._fence is not None
        _log.warning("every record will be confirmed once", extra={"reason": reason})
        metrics.CLUSTER_EPOCHS.inc()
        self._fence.new_epoch()

    # --- commands ---------------------------------------------------------------------------------------------------------

    def _do(self, commands: list[co.Command]) -> None:
        fence = self._fence
        assert fence is not None
        for command in commands:
            if isinstance(command, co.Tell):
                self._lines.tell(command.member, command.message)
            elif isinstance(command, co.Reply):
                self._lines.reply(command.member, command.message)
            elif isinstance(command, co.Pass):
                fence.bump_all(command.slots)
            elif isinstance(command, co.Mark):
                fence.mark(command.slots)
            elif isinstance(command, co.Unmark):
                fence.unmark(command.slots)
            elif isinstance(command, co.NewEpoch):
                self._new_epoch(command.reason)
            elif isinstance(command, co.Trust):
                seconds = max(0.0, command.until)
                until = FOREVER_NS if seconds == math.inf else int(seconds * 1e9)
                fence.trust(until, until)
            elif isinstance(command, co.Restart):
                self._lines.restart(command.member)
            else:
                self.writes.ended(command.number, command.ok)

    # --- lines.Talk -------------------------------------------------------------------------------------------------------

    @property
    def me(self) -> Member:
        return self._me

    @property
    def daemon(self) -> int:
        return self._daemon

    @property
    def version(self) -> int:
        return self._view.version

    @property
    def _looked_at(self) -> float:
        return -math.inf if self._control is None else self._control.looked_at

    def _c(self) -> Coherence:
        if self._coherence is None:
            raise ProtocolBroken("this node is no member yet")
        return self._coherence

    def greet(self, name: str) -> Greeting:
        return self._c().greet(name)

    def lost(self, name: str, reason: str) -> None:
        if self._coherence is not None:
            self._coherence.lost(name)
        for number, (member, future) in list(self._asks.items()):
            if member == name:
                del self._asks[number]
                if not future.done():
                    future.set_exception(Away(reason))

    def told(self, name: str, message: Any) -> None:
        """What a listener says on our line."""
        c, now = self._c(), self._now()
        if isinstance(message, wire.Ack):
            self._do(c.acknowledged(name, message, now))
        elif isinstance(message, wire.Welcome):
            self._do(c.welcomed(name, message.version, now))
        elif isinstance(message, wire.Renew):
            self._do(c.renew(name, message.serial, now))
        elif isinstance(message, wire.Resigned):
            self._do(c.resigned(name, now))
        elif isinstance(message, wire.Said):
            _, future = self._asks.pop(message.ask, ("", None))
            if future is not None and not future.done():
                future.set_result(message.body)
        elif isinstance(message, wire.AskView):
            self._lines.tell(name, c.view_for_asker())
        elif isinstance(message, wire.Viewed):
            self.seen(message.view, self._looked_at)
        else:
            raise ProtocolBroken(f"{type(message).__name__} from a listener")

    def known(self, name: str) -> bool:
        return self._c().known(name)

    def hello(self, hello: wire.Hello) -> None:
        c = self._c()
        self._do(c.hello(hello, self._now(), self._looked_at))
        self._lines.follow(c.wanted)
        if self._cluster.membership == "static":
            self._learn_state(hello.member)

    def listening(self, name: str) -> None:
        self._do(self._c().listening(name, self._now()))

    def heard(self, name: str, message: Any) -> None:
        """What a writer says on its line."""
        c = self._c()
        if isinstance(message, wire.Begin):
            self._do(c.begun(name, message))
        elif isinstance(message, wire.End):
            self._do(c.ended(name, message))
        elif isinstance(message, wire.Renewed):
            self._do(c.renewed(name, message, self._now()))
        elif isinstance(message, wire.Ask):
            with contextlib.suppress(TasksClosed):
                self.tasks.spawn(self._answer(name, message), "answer")
        elif isinstance(message, wire.AskView):
            self._lines.reply(name, c.view_for_asker())
        elif isinstance(message, wire.Viewed):
            self.seen(message.view, self._looked_at)
        else:
            raise ProtocolBroken(f"{type(message).__name__} from a writer")

    def refused(self, name: str, reason: str) -> None:
        if self._coherence is not None:
            self._coherence.refused(name, self._now())

    def left(self, name: str, reason: str) -> None:
        if self._coherence is not None:
            self._coherence.left(name)

    # --- questions of operators -------------------------------------------------------------------------------------------

    async def ask(self, name: str, topic: str, body: bytes) -> bytes:
        """Another member's answer, or this one's own. Raises Away."""
        if name == self._me.name:
            return await self._answers(topic, body)
        if len(self._asks) >= _ASKS_MAX:
            raise Away("too many questions at a time")
        number = next(self._ask_numbers)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asks[number] = name, future
        try:
            if not self._lines.tell(name, wire.Ask(number, topic, body)):
                raise Away("there is no line to it")
            async with asyncio.timeout(_ASK_S):
                return await future
        except TimeoutError:
            raise Away(f"no answer within {_ASK_S:g} s") from None
        finally:
            self._asks.pop(number, None)

    async def _answer(self, name: str, message: wire.Ask) -> None:
        body = await self._answers(message.topic, message.body)
        self._lines.reply(name, wire.Said(message.ask, body))

    # --- draining ---------------------------------------------------------------------------------------------------------

    async def set_state(self, state: MemberState) -> None:
        """This node's own place on the ring: none while it drains. Raises ControlUnavailable, Away."""
        if self._control is not None:
            if not await self._control.set_state(self._me.name, state):
                raise Away("this node is no member at the moment")
            return
        if state is self.state:
            return
        self._take_state(state)
        self._learn_state(self._me)
        # Each Hello says it: that is how the others hear of it, those who come later as well.
        for member in self._view.others(self._me.name):
            self._lines.restart(member.name)

    def _take_state(self, state: MemberState) -> None:
        """This node's own state, and what it is to be when it joins again: in cache.dir, for the control store forgets who
        has left, and a static list knows none."""
        self._me = msgspec.structs.replace(self._me, state=state)
        if self._control is not None:
            self._control.me = msgspec.structs.replace(self._control.me, state=state)
        try:
            if state is MemberState.DRAINING:
                self._draining_path.touch()
            else:
                self._draining_path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a restart will not remember this node's state", extra={"state": state, "reason": str(error)})

    def _learn_state(self, member: Member) -> None:
        """In a static cluster a node's state is what it says of itself."""
        members = tuple(
            msgspec.structs.replace(each, state=member.state) if each.name == member.name else each
            for each in self._view.members
        )
        if members != self._view.members:
            self._go_by(View(self._view.version, members))

    def _go_by(self, view: View) -> None:
        self._view = view
        self._view_changed(view)
        for follow in self.followers:
            follow(view)

    def _with_own_state(self, view: View) -> View:
        return View(view.version, tuple(self._me if each.name == self._me.name else each for each in view.members))

    @property
    def state(self) -> MemberState:
        """Whether this node has a place on the ring, as it knows."""
        return self._me.state

    # --- what there is to see ---------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        return self._view

    @property
    def control_away(self) -> str:
        """Why the control store cannot be asked; empty when it can, or there is none."""
        return "" if self._control is None else self._control.away

    @property
    def fence(self) -> Fence | None:
        """The one that workers look at."""
        return self._fence

    @property
    def trusting(self) -> bool:
        return self._fence is not None and self._fence.trusted()

    @property
    def epoch(self) -> str:
        return "" if self._fence is None else f"{self._fence.epoch:016x}"

    def in_trouble(self) -> dict[str, str]:
        return {} if self._coherence is None else self._coherence.in_trouble(self._now())

    # --- time -------------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await self.clock.sleep(self._cluster.lease_s / _TICKS_A_LEASE)
            self._follow_fence()
            now = self._now()
            if self._coherence is not None:
                self._do(self._coherence.tick(now))
            self.writes.look(now)
            metrics.CLUSTER_MEMBERS.set(len(self._view.members))
            metrics.CLUSTER_TROUBLED.set(len(self.in_trouble()))
            metrics.CLUSTER_TRUSTED.set(1 if self.trusting else 0)
            metrics.CLUSTER_CONTROL_AWAY.set(1 if self.control_away else 0)
            metrics.CLUSTER_WRITES_WAITING.set(self.writes.waiting)

    def _follow_fence(self) -> None:
        """Somebody took the fence's file away while we run: workers make a new one, which nobody is told to trust yet."""
        old = self._fence
        if old is None or old.current():
            return
        old.trust(0, 0)
        try:
            fence = Fence.open(self._settings.cache.dir, alone=False)
        except OSError as error:
            _log.error("there is no fence", extra={"reason": str(error)})
            return
        self._fence = fence
        fence.stop_vouching()
        self._new_epoch("the fence's file was taken away")
        if self._coherence is not None:
            for slots in self._coherence.marked():
                fence.mark(slots)
            fence.incarnation = old.incarnation
            until = self._coherence.trusted_until()
            self._do([co.Trust(until)] if until > 0 else [])
        old.close()

    # --- what the next daemon must know -----------------------------------------------------------------------------------

    @property
    def _draining_path(self) -> Path:
        return Path(self._settings.cache.dir, _DRAINING)

    def _write_resigned(self, left: co.Left) -> bool:
        """False: nobody may be told to pass over us, so they wait until we are back, or expelled."""
        path = Path(self._settings.cache.dir, _RESIGNED)
        try:
            path.with_suffix(".new").write_bytes(msgspec.json.encode(_Resigned(read_boot_id(), self._daemon, left)))
            path.with_suffix(".new").rename(path)
        except OSError as error:
            _log.warning("not resigned", extra={"reason": str(error)})
            return False
        return True

    def _read_resigned(self) -> co.Left | None:
        """What the daemon before left; this one goes on under its number, for nothing of what it knew is lost. The file is gone
        then: should this daemon die, the next one is another."""
        path = Path(self._settings.cache.dir, _RESIGNED)
        try:
            text = path.read_bytes()
            os.unlink(path)
            resigned = msgspec.json.decode(text, type=_Resigned)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("what the last daemon left cannot be read", extra={"reason": str(error)})
            return None
        if resigned.boot_id != read_boot_id():
            return None
        self._daemon = resigned.daemon
        return resigned.left
