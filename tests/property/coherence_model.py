"""A cluster as a model: the real decisions of koscache.cluster.coherence over imagined nodes, lines, clocks and an origin.

Owns: time, the order of everything, failures, and the judgement: a read that began after a write of its key was answered
returns that write's version or a later one. Does not own: any decision of the protocol.

What can happen at any step: a message arrives (each line is first in, first out, and breaks as a whole); a node stops and
goes on, crashes, comes back; the control store is away for some; a write is begun, carried out by the origin, ended; a read takes
its next step. A node that reads from another keeps what it got only if the other vouched for it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from koscache.cluster import coherence as co
from koscache.cluster import wire
from koscache.cluster.coherence import Coherence, Membership
from koscache.cluster.view import Member, View

LEASE_S = 1.0
MEMBER_LEASE_S = 5.0
SLOTS = 2


class Violation(AssertionError):
    """A read saw less than had been answered before it began."""


@dataclass
class Line:
    """From writer to listener. to_listener, to_writer: what is on its way."""

    to_listener: deque[Any] = field(default_factory=deque)
    to_writer: deque[Any] = field(default_factory=deque)


@dataclass
class Node:
    name: str
    member: Member
    coherence: Coherence
    daemon: int
    rate: float
    values: list[int]
    marks: list[int]
    epoch: int = 0
    trust_until: float = 0.0
    vouch_until: float = 0.0
    #: key -> (version, value of the fence)
    records: dict[int, tuple[int, int]] = field(default_factory=dict)
    stopped: bool = False
    dead: bool = False
    store_away: bool = False
    before: dict[str, int] | None = None
    joined_at: float = 0.0
    looked_at: float = 0.0


def resumed_or_static(membership: Membership, resumed: bool) -> bool:
    return resumed or membership is Membership.STATIC


@dataclass
class Write:
    node: str
    daemon: int
    key: int
    number: int
    version: int | None = None
    state: str = "begun"


@dataclass
class Read:
    node: str
    key: int
    floor: int
    step: str = "look"
    value: int = 0
    home: str | None = None
    home_value: int = 0
    version: int = 0


class Model:
    def __init__(self, seed: int, membership: Membership, nodes: int = 3) -> None:
        self.rng = random.Random(seed)
        self.membership = membership
        self.now = 100.0
        self.fresh = itertools.count(1)
        self.origin = [0] * SLOTS
        self.answered = [0] * SLOTS
        self.store_version = 1
        self.rows: dict[str, tuple[Member, float]] = {}
        self.nodes: dict[str, Node] = {}
        self.lines: dict[tuple[str, str], Line] = {}
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.counts: dict[str, int] = {}
        #: pairs that cannot reach each other
        self.parted: set[frozenset[str]] = set()
        names = [f"n{i}" for i in range(nodes)]
        if membership is Membership.STATIC:
            for name in names:
                self.rows[name] = (Member(name, 1, "", "", 1), math.inf)
        for name in names:
            self.start(name)

    # --- nodes

    def clock(self, node: Node) -> float:
        return self.now * node.rate

    def start(self, name: str) -> None:
        old = self.nodes.get(name)
        rate = old.rate if old else self.rng.choice([0.97, 1.0, 1.03])
        member = Member(name, 1, "", "", 1)
        resumed = False
        if self.membership is Membership.CONTROL:
            row = self.rows.get(name)
            resumed = row is not None
            member = row[0] if row else Member(name, next(self.fresh), "", "", 1)
            if not resumed:
                self.store_version += 1
            self.rows[name] = (member, self.now + MEMBER_LEASE_S)
        resigned = old is not None and old.dead and resumed_or_static(self.membership, resumed)
        lost = self.membership is Membership.CONTROL and not resumed
        coherence = Coherence(
            name,
            self.membership,
            LEASE_S,
            member_lease_s=MEMBER_LEASE_S,
            trusted_until=0.0 if old is None or lost else old.trust_until,
            before=old.before if old is not None and resigned else None,
        )
        values = old.values if old else [next(self.fresh) for _ in range(SLOTS)]
        node = Node(name, member, coherence, next(self.fresh), rate, values, [0] * SLOTS)
        node.joined_at = node.looked_at = self.now * rate
        if old is not None:
            # What lies in shared memory and on the disk outlives the daemon.
            node.records, node.epoch, node.trust_until = old.records, old.epoch, old.trust_until
        if self.membership is Membership.CONTROL and not resumed:
            node.epoch, node.trust_until = next(self.fresh), 0.0
        self.nodes[name] = node
        self.do(node, node.coherence.viewed(self.view(), self.clock(node)))
        if self.membership is Membership.CONTROL:
            self.do(node, node.coherence.stood(self.safe_until(node), (), self.clock(node)))

    def safe_until(self, node: Node) -> float:
        return self.clock(node) + MEMBER_LEASE_S * 0.9

    def view(self) -> View:
        members = tuple(member for _, (member, _) in sorted(self.rows.items()))
        return View(0 if self.membership is Membership.STATIC else self.store_version, members)

    def runs(self, name: str) -> bool:
        node = self.nodes[name]
        return not node.dead and not node.stopped

    def crash(self, name: str) -> None:
        node = self.nodes[name]
        node.dead = True
        for pair in [pair for pair in self.lines if name in pair]:
            self.cut(*pair)
        self.writes = [write for write in self.writes if write.node != name or write.state == "begun"]
        for write in self.writes:
            if write.node == name:
                write.state = "orphan"  # the origin may still carry it out

    def retire(self, node: Node) -> None:
        """A daemon that is told to stop: its writes have ended, and it says so."""
        if not self.runs(node.name) or any(write.node == node.name for write in self.writes):
            return
        before, commands = node.coherence.resign()
        self.do(node, commands)
        assert not self.trusted(node)
        for (writer, listener), line in list(self.lines.items()):
            if writer == node.name:
                line.to_listener.append(wire.Goodbye())
            while node.name in (writer, listener) and self.rng.random() < 0.9 and (writer, listener) in self.lines:
                upstream = listener == node.name
                if not self.queue((writer, listener), upstream):
                    break
                self.deliver(writer, listener, upstream)
        self.crash(node.name)
        node.before = before
        self.count("retired")

    def expelled(self, node: Node) -> None:
        """What the hub does: nothing of the old incarnation goes on."""
        for pair in [pair for pair in self.lines if node.name in pair]:
            self.cut(*pair)
        pending = [write for write in self.writes if write.node == node.name and write.state != "orphan"]
        for write in pending:
            write.state = "orphan" if write.state == "begun" else "failed"
        self.writes = [write for write in self.writes if write.state != "failed"]
        self.start(node.name)

    # --- lines

    def cut(self, writer: str, listener: str) -> None:
        if self.lines.pop((writer, listener), None) is None:
            return
        if not self.nodes[writer].dead:
            self.nodes[writer].coherence.lost(listener)
        if not self.nodes[listener].dead:
            self.nodes[listener].coherence.left(writer)

    def connect(self, writer: str, listener: str) -> None:
        one, other = self.nodes[writer], self.nodes[listener]
        if (writer, listener) in self.lines or not self.runs(writer) or not self.runs(listener):
            return
        if frozenset((writer, listener)) in self.parted:
            return
        if listener not in one.coherence.wanted or not other.coherence.known(writer):
            return
        greeting = one.coherence.greet(listener)
        hello = wire.Hello(
            1, one.member, one.daemon, greeting.version, 0, 0, b"", b"", greeting.skipped, greeting.under_way
        )
        self.lines[writer, listener] = Line(deque([hello]))

    def deliver(self, writer: str, listener: str, upstream: bool) -> None:
        line = self.lines[writer, listener]
        queue = line.to_writer if upstream else line.to_listener
        here = self.nodes[writer if upstream else listener]
        if (listener if upstream else writer) not in here.coherence.wanted and not isinstance(
            queue and queue[0], wire.Hello
        ):
            self.cut(writer, listener)  # as the hub does when the view changes
            return
        if not queue or not self.runs(here.name):
            return
        message = queue.popleft()
        now, c = self.clock(here), here.coherence
        other = listener if upstream else writer
        commands: list[co.Command] = []
        if isinstance(message, wire.Hello):
            try:
                commands = c.hello(message, now, here.looked_at)
            except co.ProtocolBroken:
                self.cut(writer, listener)
                return
            self.do(here, commands)
            line.to_writer.append(wire.Welcome(listener, here.daemon, c._view.version, b""))
            self.do(here, c.listening(writer, now))
            return
        if isinstance(message, wire.Welcome):
            commands = c.welcomed(other, message.version, now)
        elif isinstance(message, wire.Ack):
            commands = c.acknowledged(other, message, now)
        elif isinstance(message, wire.Resigned):
            commands = c.resigned(other, now)
        elif isinstance(message, wire.Goodbye):
            commands = c.goodbye(other)
        elif isinstance(message, wire.Renew):
            commands = c.renew(other, message.serial, now)
        elif isinstance(message, wire.Begin):
            commands = c.begun(other, message)
        elif isinstance(message, wire.End):
            commands = c.ended(other, message)
        elif isinstance(message, wire.Renewed):
            commands = c.renewed(other, message, now)
        elif isinstance(message, wire.AskView):
            (line.to_listener if upstream else line.to_writer).append(c.view_for_asker())
        elif isinstance(message, wire.Viewed):
            self.see(here, message.view)
        self.do(here, commands)

    def see(self, node: Node, view: View) -> None:
        """As the hub: lines to who is gone, or has come back as another, end at once."""
        before = node.coherence.wanted
        self.do(node, node.coherence.viewed(view, self.clock(node), node.looked_at))
        wanted = node.coherence.wanted
        for name, member in before.items():
            if name not in wanted or wanted[name].incarnation != member.incarnation:
                self.cut(node.name, name)
                self.cut(name, node.name)

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
            elif isinstance(command, co.Trust):
                node.trust_until = node.vouch_until = command.until
            elif isinstance(command, co.Ended):
                self.write_ended(node, command)

    def bump(self, node: Node, slots: tuple[int, ...]) -> None:
        for slot in slots:
            node.values[slot] = next(self.fresh)

    # --- writes

    def begin_write(self, name: str) -> None:
        node, key = self.nodes[name], self.rng.randrange(SLOTS)
        if not self.runs(name):
            return
        self.bump(node, (key,))
        number, commands = node.coherence.begin((key,), self.clock(node))
        self.writes.append(Write(name, node.daemon, key, number))
        self.do(node, commands)

    def step_write(self, write: Write) -> None:
        if write.version is None:
            self.origin[write.key] += 1
            write.version = self.origin[write.key]
            if write.state == "orphan":
                self.writes.remove(write)
            return
        if write.state == "orphan":
            self.writes.remove(write)
        elif write.state == "begun" and self.runs(write.node):
            write.state = "ending"
            node = self.nodes[write.node]
            self.bump(node, (write.key,))
            self.do(node, node.coherence.end(write.number, self.clock(node), self.rng.choice([3.0, 30.0])))

    def write_ended(self, node: Node, command: co.Ended) -> None:
        for write in self.writes:
            if write.node == node.name and write.number == command.number and write.daemon == node.daemon:
                if command.ok:
                    assert write.version is not None
                    self.answered[write.key] = max(self.answered[write.key], write.version)
                self.count("answered" if command.ok else "refused")
                self.writes.remove(write)
                return

    # --- reads

    def trusted(self, node: Node) -> bool:
        return node.trust_until > self.clock(node)

    def value(self, node: Node, key: int) -> tuple[int, int]:
        return node.values[key], node.epoch

    def fresh_version(self, node: Node, key: int) -> int | None:
        record = node.records.get(key)
        if record is None or record[1] != self.value(node, key) or not self.trusted(node):
            return None
        return record[0]

    def begin_read(self, name: str) -> None:
        if self.runs(name):
            key = self.rng.randrange(SLOTS)
            self.reads.append(Read(name, key, self.answered[key]))

    def step_read(self, read: Read) -> None:
        node = self.nodes[read.node]
        if node.dead:
            self.reads.remove(read)
            return
        if node.stopped:
            return
        key = read.key
        if read.step == "look":
            version = self.fresh_version(node, key)
            if version is not None:
                self.finish(read, version, "hit")
                return
            read.value = self.value(node, key)  # type: ignore[assignment]
            homes = [name for name in self.nodes if name != node.name and self.runs(name)]
            read.home = self.rng.choice(homes) if homes and self.trusted(node) and self.rng.random() < 0.7 else None
            read.step = "home" if read.home else "origin"
        elif read.step == "origin":
            self.keep(node, key, self.origin[key], read.value)
            self.finish(read, self.origin[key], "origin")
        else:
            assert read.home is not None
            home = self.nodes[read.home]
            if not self.runs(read.home):
                read.step = "origin"
            elif read.step == "home":
                version = self.fresh_version(home, key)
                if version is not None:
                    self.from_home(read, node, home, version)
                else:
                    read.home_value = self.value(home, key)  # type: ignore[assignment]
                    read.step = "home asks"
            elif read.step == "home asks":
                version = self.origin[key]
                self.keep(home, key, version, read.home_value)
                self.from_home(read, node, home, version)
            else:
                if read.version >= 0 and read.step == "vouched":
                    self.keep(node, key, read.version, read.value)
                self.finish(read, read.version, "vouched" if read.step == "vouched" else "for once")

    def from_home(self, read: Read, node: Node, home: Node, version: int) -> None:
        """The mark first, then the record's value again (koscache.fence.vouching). What is fresh and marked is told for this
        one question: its write cannot have been answered yet."""
        vouching = home.marks[read.key] == 0 and home.vouch_until > self.clock(home)
        record = home.records.get(read.key)
        holds = record is not None and record == (version, self.value(home, read.key))
        if vouching and holds:
            read.version, read.step = version, "vouched"
        else:
            read.version, read.step = version, "for once"

    def keep(self, node: Node, key: int, version: int, value: Any) -> None:
        node.records[key] = (version, value)

    def finish(self, read: Read, version: int, how: str) -> None:
        self.reads.remove(read)
        self.count(how)
        if version < read.floor:
            raise Violation(f"{read.node} read version {version} of {read.key} ({how}), {read.floor} had been answered")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- the control store

    def heartbeat(self, node: Node) -> None:
        if node.store_away or not self.runs(node.name):
            return
        row = self.rows.get(node.name)
        if row is None or row[0].incarnation != node.member.incarnation:
            self.expelled(node)
            return
        sent = self.safe_until(node)
        self.rows[node.name] = (row[0], self.now + MEMBER_LEASE_S)
        late = [name for name, (_, until) in self.rows.items() if until < self.now]
        settled = self.clock(node) - node.joined_at >= MEMBER_LEASE_S
        for name, (member, until) in list(self.rows.items()):
            if until < self.now and node.coherence.silent(name) and name != node.name and settled:
                del self.rows[name]
                self.store_version += 1
                self.count("expelled")
                assert member.name == name
        self.see(node, self.view())
        node.looked_at = self.clock(node)
        self.do(node, node.coherence.stood(sent, late, self.clock(node)))

    # --- the course of things

    def step(self) -> None:
        rng = self.rng
        self.now += rng.expovariate(200.0)
        names = list(self.nodes)
        for pair in itertools.permutations(names, 2):
            if pair not in self.lines and rng.random() < 0.2:
                self.connect(*pair)
        roll = rng.random()
        if roll < 0.45 and self.lines:
            pair, upstream = rng.choice(list(self.lines)), rng.random() < 0.5
            for _ in range(rng.randrange(1, 5)):
                if pair in self.lines:
                    self.deliver(*pair, upstream=upstream)
        elif roll < 0.52:
            name = rng.choice(names)
            if self.runs(name):
                node = self.nodes[name]
                self.do(node, node.coherence.tick(self.clock(node)))
        elif roll < 0.535:
            self.begin_write(rng.choice(names))
        elif roll < 0.60 and self.writes:
            self.step_write(rng.choice(self.writes))
        elif roll < 0.74:
            self.begin_read(rng.choice(names))
        elif roll < 0.92 and self.reads:
            for _ in range(rng.randrange(1, 4)):
                if self.reads:
                    self.step_read(rng.choice(self.reads))
        elif roll < 0.96 and self.membership is Membership.CONTROL:
            self.heartbeat(self.nodes[rng.choice(names)])
        elif roll > 0.994:
            self.fail()

    def fail(self) -> None:
        rng = self.rng
        name = rng.choice(list(self.nodes))
        node = self.nodes[name]
        kind = rng.choice(["cut", "stop", "go", "go", "crash", "retire", "start", "start", "leap", "store", "part", "part"])
        if kind == "cut" and self.lines:
            self.cut(*rng.choice(list(self.lines)))
        elif kind == "stop":
            node.stopped = True
        elif kind == "go":
            node.stopped = False
        elif kind == "crash" and not node.dead:
            self.crash(name)
        elif kind == "retire":
            self.retire(node)
        elif kind == "start" and node.dead:
            self.start(name)
        elif kind == "leap":
            self.now += rng.uniform(0.0, 2 * MEMBER_LEASE_S)
        elif kind == "part":
            pair = rng.sample(list(self.nodes), 2)
            self.parted ^= {frozenset(pair)}
            self.cut(*pair)
            self.cut(pair[1], pair[0])
        elif kind == "store":
            node.store_away = not node.store_away

    def settle(self) -> None:
        """Everything is mended: after a while all nodes trust again and no write waits."""
        self.parted.clear()
        for name, node in list(self.nodes.items()):
            node.store_away = node.stopped = False
            if node.dead:
                self.start(name)
        for round_ in range(600):
            self.now += 0.05
            for pair in itertools.permutations(list(self.nodes), 2):
                self.connect(*pair)
            for node in list(self.nodes.values()):
                if self.membership is Membership.CONTROL and round_ % 20 == 0:
                    self.heartbeat(node)
            for node in self.nodes.values():
                self.do(node, node.coherence.tick(self.clock(node)))
            for write in list(self.writes):
                self.step_write(write)
            for pair in list(self.lines):
                for upstream in (False, True):
                    while pair in self.lines and self.queue(pair, upstream):
                        self.deliver(*pair, upstream=upstream)
        for node in self.nodes.values():
            assert self.trusted(node), f"{node.name} does not trust: {node.coherence.in_trouble(self.clock(node))}"
            assert not any(node.marks), f"{node.name} has marks left: {node.marks}"
            assert not node.coherence._writes, f"{node.name} has writes left"
        assert not self.writes, "a write waits for ever"

    def queue(self, pair: tuple[str, str], upstream: bool) -> deque[Any]:
        line = self.lines[pair]
        return line.to_writer if upstream else line.to_listener
