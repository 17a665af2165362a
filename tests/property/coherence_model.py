"""A cluster as a model: the real decisions of koscache.cluster.coherence over imagined nodes, lines, clocks and stores.

Owns: time, the order of everything, failures, and the judgement: a read that began after a write of its key was answered
returns that write's version or a later one. Does not own: any decision of the protocol.

A node is three things that fail apart, as on a machine: its workers, which read and write and go on without the daemon; its
daemon, which hangs, dies, is stopped and started; and what outlives both, the fence and the records. At any step a message
arrives (each line is first in, first out, and breaks as a whole, of which either end learns in its own time), the store answers
or does not, a write or a read takes its next step. Between, time goes by in which everybody who can does what is due.

What hub and membership do around a Coherence is done here in the same order; where they change, this must.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from koscache.cluster import coherence as co
from koscache.cluster import wire
from koscache.cluster.coherence import RATE_SLACK, Coherence, Membership
from koscache.cluster.view import LEAP, Member, View

LEASE_S = 1.0
MEMBER_LEASE_S = 5.0
SLOTS = 6
#: Of a clock's second, how much real ones differ from it: all that RATE_SLACK allows between two of them, but a little.
RATES = (0.96, 1.0, 1.04)

#: of write_wait
WAITS_S = (3.0, 30.0)
FAILURES = ("cut", "stop", "freeze", "crash", "off", "retire", "leap", "store", "part", "backup", "restore")
#: of versions, as RESTORED_LIFT
LIFT = 1_000_000
#: A daemon that starts does not know that the store has forgotten members, and lets none of them part: a limit. So none starts
#: before those have noticed, and then for so long.
NO_START_S = 2 * MEMBER_LEASE_S
FORGOT_S = MEMBER_LEASE_S * (1 + RATE_SLACK)
MENDING = ("go", "thaw", "start", "heal", "mend", "mend")


class Violation(AssertionError):
    """A read saw less than had been answered before it began."""


@dataclass
class Line:
    """From writer to listener. to_listener, to_writer: what is on its way. begun: the listener has heard the Hello."""

    to_listener: deque[Any] = field(default_factory=deque)
    to_writer: deque[Any] = field(default_factory=deque)
    begun: bool = False


@dataclass
class Node:
    """values, marks, epoch, trust_until, vouch_until, incarnation: the fence. records: key -> (version, value of the fence).
    left: the number of the last daemon, and what it left when it resigned; before: the same in the hands of the next one.
    coherence: None while the daemon is no member; last: the latest that there was. course: its membership, each step as far
    as one answer of the store."""

    name: str
    rate: float
    values: list[int]
    marks: list[int]
    epoch: int = 0
    trust_until: float = 0.0
    vouch_until: float = 0.0
    incarnation: int = 0
    records: dict[int, tuple[int, Any]] = field(default_factory=dict)
    left: tuple[int, co.Left] | None = None
    before: co.Left | None = None
    off: bool = False
    frozen: bool = False
    dead: bool = True
    stopped: bool = False
    store_away: bool = False
    daemon: int = 0
    numbers: int = 0
    member: Member | None = None
    coherence: Coherence | None = None
    last: Coherence | None = None
    course: Iterator[None] | None = None
    joined_at: float = 0.0
    looked_at: float = -math.inf
    known: int = -1
    beats: int = -1
    noticed_at: float = -math.inf
    forgot_until: float = -math.inf

    @property
    def works(self) -> bool:
        """Its workers do."""
        return not self.off and not self.frozen

    @property
    def runs(self) -> bool:
        """Its daemon does."""
        return self.works and not self.dead and not self.stopped

    @property
    def c(self) -> Coherence:
        assert self.coherence is not None
        return self.coherence


@dataclass
class Write:
    """number: at the node's daemon; 0: it does not know of it. ending: the origin has answered, and the client waits. asked:
    and the daemon knows. orphan: nobody waits, and the origin may still carry it out."""

    node: str
    key: int
    number: int = 0
    version: int | None = None
    ending: bool = False
    asked: bool = False
    orphan: bool = False


@dataclass(frozen=True)
class Answered:
    """The latest write of a key that was answered. by: through whom. known: of whom that node knew, when the store was away
    from it; None: of all."""

    version: int = 0
    by: str = ""
    known: frozenset[str] | None = None


@dataclass
class Read:
    node: str
    key: int
    floor: Answered
    step: str = "look"
    value: Any = 0
    home: str = ""
    home_value: Any = 0
    version: int = 0


@dataclass
class Notice:
    """An end of a line that has not seen yet that it broke. coherence: what it was of."""

    node: str
    coherence: Coherence
    other: str
    ours: bool


class Model:
    """calm: nothing is left to chance but what step() does: clocks agree, nobody has been started, the store answers at once."""

    def __init__(self, seed: int, membership: Membership, nodes: int = 3, *, calm: bool = False) -> None:
        self.rng = random.Random(seed)
        self.lag = 0.0 if calm else 0.1
        self.static = membership is Membership.STATIC
        self.membership = membership
        self.now = 100.0
        self.fresh = itertools.count(1)
        self.origin = [0] * SLOTS
        self.answered = [Answered()] * SLOTS
        self.store_version = 1
        #: name -> member, when its time runs out, its heartbeats
        self.rows: dict[str, tuple[Member, float, int]] = {}
        self.backup: tuple[int, dict[str, tuple[Member, float, int]]] = (1, {})
        self.restored_at = -math.inf
        self.nodes: dict[str, Node] = {}
        self.lines: dict[tuple[str, str], Line] = {}
        self.notices: list[Notice] = []
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.counts: dict[str, int] = {}
        #: pairs that cannot reach each other
        self.parted: set[frozenset[str]] = set()
        # Few kinds of failures in each run: many at once hide each other's consequences.
        self.kinds = [*MENDING, *self.rng.sample(FAILURES, 3) * 3]
        names = [f"n{i}" for i in range(nodes)]
        for name in names:
            if self.static:
                self.rows[name] = (Member(name, 0, "", "", 1), math.inf, 0)
            values = [next(self.fresh) for _ in range(SLOTS)]
            self.nodes[name] = Node(name, 1.0 if calm else self.rng.choice(RATES), values, [0] * SLOTS)
        for name in names:
            if not calm and self.rng.random() < 0.8:
                self.start(name)

    def clock(self, node: Node) -> float:
        return self.now * node.rate

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- daemons

    def start(self, name: str) -> None:
        """A daemon, of a machine that may have been off: then its fence is new."""
        node = self.nodes[name]
        assert node.dead
        new = node.off or node.daemon == 0  # its fence
        if node.off:
            node.values = [next(self.fresh) for _ in range(SLOTS)]
            node.trust_until, node.epoch, node.incarnation, node.off = 0.0, next(self.fresh), 0, False
        node.dead = False
        node.vouch_until, node.marks = 0.0, [0] * SLOTS
        # Who finds what the one before left goes on as the same.
        node.daemon, node.before = node.left or (next(self.fresh), None)
        node.left, node.numbers = None, next(self.fresh) << 32
        node.known, node.forgot_until = -1, -math.inf
        if self.static:
            node.member = self.rows[name][0]
            self.begin_coherence(node, after_crash=not new and node.before is None)
            self.see(node, self.view(), -math.inf)
        else:
            node.course = self.course(node)

    def begin_coherence(self, node: Node, *, after_crash: bool, forgot: bool = False) -> None:
        node.coherence = node.last = Coherence(
            node.name, self.membership, LEASE_S, member_lease_s=MEMBER_LEASE_S,
            trusted_until=node.trust_until, before=node.before, after_crash=after_crash, forgot=forgot,
            first=node.numbers,
        )  # fmt: skip
        node.before = None

    def end_daemon(self, node: Node) -> None:
        """However it came to that: its lines break, and its workers' writes wait for the next one."""
        node.dead, node.stopped, node.coherence, node.course = True, False, None, None
        for pair in [pair for pair in self.lines if node.name in pair]:
            self.cut(*pair)
        for write in self.writes:
            if write.node == node.name:
                write.number, write.asked = 0, False

    def switch_off(self, node: Node) -> None:
        """The machine, with its workers."""
        if not node.dead:
            self.end_daemon(node)
        node.off, node.frozen = True, False
        for write in self.writes:
            if write.node == node.name:
                write.orphan = True
        self.writes = [write for write in self.writes if not write.orphan or write.version is None]
        self.reads = [read for read in self.reads if read.node != node.name]

    def retire(self, node: Node, leave: bool) -> None:
        """A daemon that is told to stop; its workers go on. leave: for good."""
        if not node.runs or node.coherence is None:
            return
        c = node.coherence
        for write in self.writes:
            if write.node == node.name and write.number:
                # Its session ends; what it was about may still be carried out.
                self.forget(node, write)
                node.numbers, commands = c.begin((write.key,), self.clock(node))
                self.do(node, commands)
        left, commands = c.resign()
        node.left = node.daemon, left
        self.do(node, commands)
        for _ in range(self.rng.choice([0, 0, 10, 40]) if self.lag else 0):
            # It is on its way out, and hears others meanwhile.
            self.move()
            assert not self.trusted(node), "a node that has resigned trusts again"
            if node.coherence is not c:
                break
        for pair in [pair for pair in self.lines if node.name in pair]:
            for _ in range(self.rng.choice([0, 3, 100]) if self.lag else 100):  # what is queued may still be read
                if pair in self.lines and self.queue(pair, pair[1] == node.name):
                    self.deliver(*pair, upstream=pair[1] == node.name)
        if leave and not node.store_away and not self.static and node.name in self.rows:
            del self.rows[node.name]
            self.store_version += 1
            self.count("left")
        self.end_daemon(node)
        self.count("retired")

    # --- the control store

    def view(self) -> View:
        members = tuple(member for _, (member, *_) in sorted(self.rows.items()))
        return View(0 if self.static else self.store_version, members)

    def course(self, node: Node) -> Iterator[None]:
        """As ControlMembership: between two yields is what happens at one place at one time; the store's answers may be
        lost."""
        while True:
            while True:
                yield
                sent = self.clock(node)
                if node.store_away or (node.known < 0 and self.just_restored()):
                    continue
                if self.store_version < node.known:
                    self.store_version = node.known + LIFT
                row = self.rows.get(node.name)
                resumed = row is not None and row[0].incarnation == node.incarnation
                if row is None:
                    self.store_version += 1
                member = row[0] if row else Member(node.name, next(self.fresh), "", "", 1)
                beats = row[2] + 1 if row else 0
                self.rows[node.name] = (member, self.now + MEMBER_LEASE_S, beats)
                view = self.view()
                yield
                if not node.store_away:
                    break
            node.joined_at, node.noticed_at = sent, self.now
            node.looked_at = sent
            if self.lifted(view.version, node.known):
                node.forgot_until = self.clock(node) + FORGOT_S
            forgot = sent < node.forgot_until
            node.known, node.beats = view.version, beats
            self.joined(node, member, view, resumed, forgot)
            self.do(node, node.c.stood(sent + MEMBER_LEASE_S * (1 - RATE_SLACK), (), self.clock(node)))
            yield from self.stay(node)
            self.expelled(node)

    def stay(self, node: Node) -> Iterator[None]:
        assert node.member is not None
        while True:
            yield
            sent, known = self.clock(node), max(node.known, node.c._view.version)
            if self.rng.random() < self.lag:
                yield
            if node.store_away:
                continue
            row = self.rows.get(node.name)
            if row is None or row[0].incarnation != node.member.incarnation:
                return
            if row[2] < node.beats:
                node.known, node.forgot_until = known, self.clock(node) + FORGOT_S
                self.count("forgotten")
                return
            beats = row[2] + 1
            self.rows[node.name] = (row[0], self.now + MEMBER_LEASE_S, beats)
            view = self.view()
            late = [(name, row[0].incarnation) for name, row in self.rows.items() if row[1] < self.now]
            if self.rng.random() < self.lag:
                yield
                if node.store_away:
                    continue
            if view.version < known or self.lifted(view.version, node.known):
                node.known, node.forgot_until = known, self.clock(node) + FORGOT_S
                self.count("forgotten")
                return
            node.known, node.beats, node.noticed_at = view.version, beats, self.now
            self.see(node, view, node.looked_at)
            node.looked_at = sent
            stood = node.c.stood(sent + MEMBER_LEASE_S * (1 - RATE_SLACK), [name for name, _ in late], self.clock(node))
            self.do(node, stood)
            if sent - node.joined_at < MEMBER_LEASE_S:
                continue
            for name, incarnation in late:
                if not node.c.silent(name):
                    continue
                if self.rng.random() < self.lag:
                    yield
                if node.store_away:
                    break
                row = self.rows.get(name)
                if row is not None and row[0].incarnation == incarnation and row[1] < self.now:
                    del self.rows[name]
                    self.store_version += 1
                    self.count("expelled")
                if not self.lifted(self.store_version, node.known):
                    node.known = self.store_version
                self.see(node, self.view(), node.looked_at)

    def just_restored(self) -> bool:
        elders = any(each.coherence is not None and each.noticed_at < self.restored_at for each in self.nodes.values())
        return elders or self.now < self.restored_at + NO_START_S

    def lifted(self, version: int, known: int) -> bool:
        return known >= 0 and version >= known + LEAP

    def joined(self, node: Node, member: Member, view: View, resumed: bool, forgot: bool) -> None:
        node.member = member
        if not resumed:
            node.trust_until = node.vouch_until = 0.0
            node.epoch, node.incarnation, node.before = next(self.fresh), member.incarnation, None
            node.daemon = next(self.fresh)
        self.begin_coherence(node, after_crash=resumed and node.before is None, forgot=forgot)
        for write in self.writes:
            if write.node == node.name and write.number:
                self.tell_begun(node, write)
        self.see(node, view, -math.inf)

    def expelled(self, node: Node) -> None:
        node.trust_until = node.vouch_until = 0.0
        node.coherence = None
        node.daemon = next(self.fresh)
        node.marks = [0] * SLOTS
        for pair in [pair for pair in self.lines if node.name in pair]:
            self.cut(*pair)

    # --- lines

    def cut(self, writer: str, listener: str, seen_by: str = "") -> None:
        """seen_by: who did it, and knows at once."""
        line = self.lines.pop((writer, listener), None)
        if line is None:
            return
        for name, other, ours in ((writer, listener, True), (listener, writer, False)):
            node = self.nodes[name]
            if node.coherence is not None and (ours or line.begun):
                self.notices.append(Notice(name, node.coherence, other, ours))
                if name == seen_by:
                    self.notice(self.notices[-1])

    def notice(self, notice: Notice) -> None:
        node = self.nodes[notice.node]
        if node.coherence is notice.coherence:
            if not node.runs:
                return
            if notice.ours:
                node.c.lost(notice.other)
            else:
                node.c.left(notice.other)
        self.notices.remove(notice)

    def unnoticed(self, name: str, other: str, ours: bool) -> Notice | None:
        c = self.nodes[name].coherence
        for notice in self.notices:
            if (notice.node, notice.other, notice.ours) == (name, other, ours) and notice.coherence is c:
                return notice
        return None

    def connect(self, writer: str, listener: str) -> None:
        one, other = self.nodes[writer], self.nodes[listener]
        if (writer, listener) in self.lines or not one.runs or not other.runs:
            return
        if one.coherence is None or other.coherence is None or frozenset((writer, listener)) in self.parted:
            return
        if listener not in one.c.wanted or self.unnoticed(writer, listener, True):
            return
        assert one.member is not None
        greeting = one.c.greet(listener)
        hello = wire.Hello(one.member, one.daemon, greeting.version, 0, 0, greeting.skipped, greeting.under_way)
        self.lines[writer, listener] = Line(deque([hello]))

    def queue(self, pair: tuple[str, str], upstream: bool) -> deque[Any]:
        line = self.lines[pair]
        return line.to_writer if upstream else line.to_listener

    def deliver(self, writer: str, listener: str, upstream: bool) -> None:
        line, queue = self.lines[writer, listener], self.queue((writer, listener), upstream)
        here = self.nodes[writer if upstream else listener]
        if not queue or not here.runs or here.coherence is None:
            return
        message = queue.popleft()
        now, c = self.clock(here), here.c
        other = listener if upstream else writer
        try:
            if isinstance(message, wire.Hello):
                gone = self.unnoticed(listener, writer, False)
                if gone is not None:
                    self.notices.remove(gone)  # its line of before is ended by this one, without a word
                commands = c.hello(message, now, here.looked_at)
                line.begun = True
                self.do(here, commands)
                self.do(here, c.listening(writer, now))
            elif isinstance(message, wire.Viewed):
                self.see(here, message.view, here.looked_at)
            elif isinstance(message, wire.AskView):
                (line.to_listener if upstream else line.to_writer).append(c.view_for_asker())
            else:
                self.do(here, self.hear(c, other, message, now))
        except co.ProtocolBroken:
            self.count("broken")
            self.cut(writer, listener, here.name)

    def hear(self, c: Coherence, other: str, message: Any, now: float) -> list[co.Command]:
        if isinstance(message, wire.Welcome):
            return c.welcomed(other, message.version, now)
        if isinstance(message, wire.Ack):
            return c.acknowledged(other, message, now)
        if isinstance(message, wire.Resigned):
            return c.resigned(other, now)
        if isinstance(message, wire.Renew):
            return c.renew(other, message.serial, now)
        if isinstance(message, wire.Begin):
            return c.begun(other, message)
        if isinstance(message, wire.End):
            return c.ended(other, message)
        assert isinstance(message, wire.Renewed)
        return c.renewed(other, message, now)

    def see(self, node: Node, view: View, since: float) -> None:
        """As the hub: lines to who is gone, or has come back as another, end at once."""
        before = node.c.wanted
        self.do(node, node.c.viewed(view, self.clock(node), since))
        wanted = node.c.wanted
        for name, member in before.items():
            if name not in wanted or wanted[name].incarnation != member.incarnation:
                self.cut(node.name, name, node.name)
                self.cut(name, node.name, node.name)

    def do(self, node: Node, commands: list[co.Command]) -> None:
        for command in commands:
            if isinstance(command, co.Tell):
                line = self.lines.get((node.name, command.member))
                if line is not None:
                    line.to_listener.append(command.message)
            elif isinstance(command, co.Reply):
                line = self.lines.get((command.member, node.name))
                if line is not None:
                    line.to_writer.append(command.message)
            elif isinstance(command, co.Pass):
                self.bump(node, command.slots)
            elif isinstance(command, co.Mark):
                for slot in command.slots:
                    node.marks[slot] += 1
            elif isinstance(command, co.Unmark):
                for slot in command.slots:
                    node.marks[slot] -= 1
                    assert node.marks[slot] >= 0, "unmarked more often than marked"
            elif isinstance(command, co.NewEpoch):
                node.epoch = next(self.fresh)
                self.count("epochs")
            elif isinstance(command, co.Trust):
                node.trust_until = node.vouch_until = command.until
            elif isinstance(command, co.Restart):
                self.cut(node.name, command.member, node.name)
            elif isinstance(command, co.Ended):
                self.write_ended(node, command)

    def bump(self, node: Node, slots: tuple[int, ...]) -> None:
        for slot in slots:
            node.values[slot] = next(self.fresh)

    # --- writes

    def tell_begun(self, node: Node, write: Write) -> None:
        """To the daemon, by a worker that has just found it, or by its hub under a new incarnation."""
        write.number, commands = node.c.begin((write.key,), self.clock(node))
        node.numbers = write.number
        self.do(node, commands)
        if write.asked:
            self.ask_end(node, write)

    def ask_end(self, node: Node, write: Write) -> None:
        write.asked = True
        self.do(node, node.c.end(write.number, self.clock(node), self.rng.choice(WAITS_S)))

    def begin_write(self, name: str) -> None:
        if self.nodes[name].works:
            self.begin(name, self.rng.randrange(SLOTS))

    def begin(self, name: str, key: int) -> Write:
        node, write = self.nodes[name], Write(name, key)
        self.bump(node, (key,))
        self.writes.append(write)
        if node.runs and node.coherence is not None:
            self.tell_begun(node, write)
        return write

    def carry_out(self, write: Write) -> None:
        self.origin[write.key] += 1
        write.version = self.origin[write.key]

    def step_write(self, write: Write) -> None:
        node = self.nodes[write.node]
        told = node.runs and node.coherence is not None
        if write.version is None:
            self.carry_out(write)
            if write.orphan:
                self.writes.remove(write)
        elif not node.works:
            return
        elif told and not write.number:
            self.tell_begun(node, write)
        elif not write.ending:
            self.bump(node, (write.key,))
            if told and self.rng.random() < 0.1:
                self.forget(node, write)
                self.writes.remove(write)
            else:
                write.ending = True
        elif told and not write.asked:
            self.ask_end(node, write)

    def forget(self, node: Node, write: Write) -> None:
        """Nobody waits for its end."""
        number, write.number = write.number, 0
        if not write.asked:  # else it is given up when its time is over
            self.do(node, node.c.end(number, self.clock(node), None))

    def write_ended(self, node: Node, command: co.Ended) -> None:
        for write in self.writes:
            if write.node == node.name and write.number == command.number:
                if command.ok:
                    assert write.version is not None
                    if write.version > self.answered[write.key].version:
                        known = None if self.in_store(node) else frozenset(node.c.wanted)
                        self.answered[write.key] = Answered(write.version, node.name, known)
                self.count("answered" if command.ok else "refused")
                self.writes.remove(write)
                return

    # --- reads

    def trusted(self, node: Node) -> bool:
        return node.trust_until > self.clock(node)

    def value(self, node: Node, key: int) -> Any:
        return node.values[key], node.epoch

    def fresh_version(self, node: Node, key: int) -> int | None:
        record = node.records.get(key)
        if record is None or record[1] != self.value(node, key) or not self.trusted(node):
            return None
        return record[0]

    def begin_read(self, name: str) -> None:
        if self.nodes[name].works:
            key = self.rng.randrange(SLOTS)
            self.reads.append(Read(name, key, self.answered[key]))

    def step_read(self, read: Read) -> None:
        node = self.nodes[read.node]
        if not node.works:
            return
        key = read.key
        if read.step == "look":
            version = self.fresh_version(node, key)
            if version is not None:
                self.finish(read, version, "hit")
                return
            read.value = self.value(node, key)
            homes = [each.name for each in self.nodes.values() if each is not node and each.works]
            if homes and self.trusted(node) and self.rng.random() < 0.7:
                read.home, read.step = self.rng.choice(homes), "home"
            else:
                read.step = "origin"
        elif read.step == "origin":
            self.keep(node, key, self.origin[key], read.value)
            self.finish(read, self.origin[key], "origin")
        elif not self.nodes[read.home].works:
            read.step = "origin"
        elif read.step == "home":
            home = self.nodes[read.home]
            version = self.fresh_version(home, key)
            if version is not None:
                self.from_home(read, home, version)
            else:
                read.home_value = self.value(home, key)
                read.step = "home asks"
        elif read.step == "home asks":
            home, version = self.nodes[read.home], self.origin[key]
            self.keep(home, key, version, read.home_value)
            self.from_home(read, home, version)
        else:
            if read.step == "vouched":
                self.keep(node, key, read.version, read.value)
            self.finish(read, read.version, read.step)

    def from_home(self, read: Read, home: Node, version: int) -> None:
        """The mark first, then the record's value again (koscache.fence.vouching). What is fresh and marked is told for this
        one question: its write cannot have been answered yet."""
        vouching = home.marks[read.key] == 0 and home.vouch_until > self.clock(home)
        holds = home.records.get(read.key) == (version, self.value(home, read.key))
        read.version, read.step = version, "vouched" if vouching and holds else "for once"

    def keep(self, node: Node, key: int, version: int, value: Any) -> None:
        """The daemon writes records."""
        if node.runs:
            node.records[key] = (version, value)

    def finish(self, read: Read, version: int, how: str) -> None:
        self.reads.remove(read)
        self.count(how)
        if version >= read.floor.version:
            return
        if self.strangers(self.nodes[read.node], read.floor):
            self.count("limit")
            return
        raise Violation(f"{read.node} read version {version} of {read.key} ({how}), {read.floor} had been answered")

    def strangers(self, node: Node, written: Answered) -> bool:
        """A limit that docs/consistency.md names: who has lost the store goes on with those whom he knows, and so may not
        hear of who joins meanwhile, nor the other of him."""
        if written.by == node.name or node.last is None:
            return False
        unheard = not self.in_store(node) and written.by not in node.last.wanted
        return unheard or (written.known is not None and node.name not in written.known)

    def in_store(self, node: Node) -> bool:
        """Its own row holds, as it knows."""
        return self.static or (node.last is not None and node.last._member_until > self.clock(node))

    # --- the course of things

    def step(self) -> None:
        roll = self.rng.random()
        if roll < 0.02:
            self.fail()
        elif roll < 0.03:
            self.pass_time(self.rng.choice([0.3, 1.5, 4.0, 12.0]))
        else:
            self.move()

    def move(self) -> None:
        """One thing somewhere."""
        rng = self.rng
        self.now += rng.expovariate(200.0)
        names = list(self.nodes)
        for pair in itertools.permutations(names, 2):
            if pair not in self.lines and rng.random() < 0.2:
                self.connect(*pair)
        if self.notices and rng.random() < 0.2:
            self.notice(rng.choice(self.notices))
        roll = rng.random()
        if roll < 0.45 and self.lines:
            pair, upstream = rng.choice(list(self.lines)), rng.random() < 0.5
            for _ in range(rng.randrange(1, 5)):
                if pair in self.lines:
                    self.deliver(*pair, upstream=upstream)
        elif roll < 0.52:
            self.tick(self.nodes[rng.choice(names)])
        elif roll < 0.535:
            self.begin_write(rng.choice(names))
        elif roll < 0.60 and self.writes:
            self.step_write(rng.choice(self.writes))
        elif roll < 0.64:
            self.begin_read(rng.choice(names))
        elif roll < 0.92 and self.reads:
            for _ in range(rng.randrange(1, 4)):
                if self.reads:
                    self.step_read(rng.choice(self.reads))
        elif roll < 0.96:
            self.advance(self.nodes[rng.choice(names)])

    def tick(self, node: Node) -> None:
        if node.runs and node.coherence is not None:
            self.do(node, node.c.tick(self.clock(node)))

    def advance(self, node: Node) -> None:
        if node.runs and node.course is not None:
            next(node.course)

    def pass_time(self, seconds: float) -> None:
        """Everybody who can does what is due; reads and writes are few."""
        until = self.now + seconds
        while self.now < until:
            self.round(0.25)
            if self.rng.random() < 0.1:
                self.begin_read(self.rng.choice(list(self.nodes)))
            if self.rng.random() < 0.1:
                self.begin_write(self.rng.choice(list(self.nodes)))
            for read in list(self.reads):
                self.step_read(read)
            for write in list(self.writes):
                if self.rng.random() < 0.3:
                    self.step_write(write)

    def round(self, seconds: float) -> None:
        self.now += seconds
        for notice in list(self.notices):
            self.notice(notice)
        for pair in itertools.permutations(self.nodes, 2):
            self.connect(*pair)
        for node in self.nodes.values():
            if not self.lag or self.rng.random() < 0.5:
                self.advance(node)
            self.tick(node)
        self.deliver_all()

    def deliver_all(self) -> None:
        moved = True
        while moved:
            moved = False
            for pair in list(self.lines):
                for upstream in (False, True):
                    while pair in self.lines and (queue := self.queue(pair, upstream)):
                        left = len(queue)
                        self.deliver(*pair, upstream=upstream)
                        if len(queue) >= left:
                            break
                        moved = True

    def fail(self) -> None:
        rng = self.rng
        node = rng.choice(list(self.nodes.values()))
        kind = rng.choice(self.kinds)
        if kind == "cut" and self.lines:
            self.cut(*rng.choice(list(self.lines)))
        elif kind == "stop":
            node.stopped = not node.dead
        elif kind == "go":
            node.stopped = False
        elif kind == "freeze":
            node.frozen = not node.off
        elif kind == "thaw":
            node.frozen = False
        elif kind == "crash" and not node.dead:
            self.end_daemon(node)
        elif kind == "off" and not node.off:
            self.switch_off(node)
        elif kind == "retire":
            self.retire(node, leave=rng.random() < 0.2)
        elif kind == "start" and node.dead and not node.frozen:
            self.start(node.name)
        elif kind == "leap":
            self.now += rng.uniform(0.0, 2 * MEMBER_LEASE_S)
        elif kind == "part" and len(self.nodes) > 1:
            pair = rng.sample(list(self.nodes), 2)
            self.parted ^= {frozenset(pair)}
            self.cut(*pair)
            self.cut(pair[1], pair[0])
        elif kind == "heal":
            self.parted.clear()
            for each in self.nodes.values():
                each.store_away = False
        elif kind == "mend":
            self.mend()
            self.pass_time(rng.choice([1.0, 2.5]))
            self.read_all()
        elif kind == "store":
            node.store_away = not node.store_away
        elif kind == "backup":
            self.backup = self.store_version, dict(self.rows)
        elif (
            kind == "restore" and not self.static and all(each.known >= 0 for each in self.nodes.values() if each.runs)
        ):
            # An incarnation that is given out stays so: the lift sees to that.
            self.store_version, rows = self.backup
            self.rows, self.restored_at = dict(rows), self.now
            self.count("restored")
            if rng.random() < 0.5:
                rng.choice(list(self.nodes.values())).store_away = True  # and does not notice
            for _ in range(3):
                self.pass_time(rng.choice([0.5, 1.0]))
                self.read_all()

    def read_all(self) -> None:
        """Each key on each node. What was done behind somebody's back is seen only when he trusts again, and if he has not read
        it meanwhile: so this is done then, and otherwise reads are few."""
        for node in self.nodes.values():
            for key in range(SLOTS if node.works else 0):
                self.reads.append(Read(node.name, key, self.answered[key]))
        while any(self.nodes[read.node].works for read in self.reads):
            for read in list(self.reads):
                self.step_read(read)

    def mend(self) -> None:
        self.parted.clear()
        for node in self.nodes.values():
            node.store_away = node.stopped = node.frozen = False
            if node.dead:
                self.start(node.name)

    def settle(self) -> None:
        """Everything is mended: after a while all nodes trust again and no write waits."""
        self.mend()
        for _ in range(400):
            self.round(0.1)
            for write in list(self.writes):
                self.step_write(write)
        for node in self.nodes.values():
            assert self.trusted(node), f"{node.name} does not trust: {node.c.in_trouble(self.clock(node))}"
            assert not any(node.marks), f"{node.name} has marks left: {node.marks}"
            assert not node.c._writes, f"{node.name} has writes left"
        assert not self.writes, "a write waits for ever"
        self.read_all()
