"""Figure scaling: what a cluster of 10, 100 and 1000 nodes costs, computed; no server is started.

Owns: the ring's evenness, what moves when members change, what a ring costs to build and keep; the load on the control
store and the messages between daemons, by arithmetic over the real messages; the CPU of a message, measured on sockets
of this machine. Does not own: the ring (koscache.cluster.ring), the protocol (koscache.cluster.coherence, wire).

`python -m bench.scaling [--quick]` prints everything as the tables that docs/scaling.md shows, and keeps the line.

Invariant: the ring's figures follow from fixed seeds and are the same on every machine; only times, CPU and memory differ.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from bench import results
from bench.figure import Settings, say
from bench.results import Outcome
from kos.config import Cluster
from koscache.cluster import wire
from koscache.cluster.coherence import Coherence, Membership
from koscache.cluster.ring import GROUP, POINTS, PROBES, Ring
from koscache.cluster.view import Member, View
from koscache.fence import SLOTS
from koscache.ipc import Connection, Message, frame

SUMMARY: Final = "a cluster of 10, 100 and 1000 nodes on paper: ring, messages, control store"
SIZES: Final = (10, 100, 1000)
WRITE_RATES: Final = (10, 100, 1000)
#: What a job reads, for the comparison with leases.
READS_PER_NODE_S: Final = 100
#: Directories above a key: a write passes a slot for itself, for each of them and for the bucket's top.
DEPTH: Final = 3
#: Ethernet, IPv4 and TCP with timestamps; each message in a packet of its own at worst.
_PACKET_BYTES: Final = 14 + 20 + 32
#: koscache.cluster.coherence renews when so much of a lease is over (with a store that answers, of one twice as long as a
#: membership in it); koscache.cluster.membership beats after 0.8 to 1 of it.
_RENEW_AT: Final = 0.25
_BEAT_AT: Final = 0.9
_WITHIN: Final = 0.25


class Tables:
    """What is found, as tables for people; the line keeps them as they are printed."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.found.append({"title": title, "columns": list(columns), "rows": [[_cell(c) for c in row] for row in rows]})


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{results.significant(value, 3):,.10g}".replace(",", " ")
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def markdown(tables: Iterable[dict[str, Any]]) -> str:
    """The tables as docs/scaling.md has them."""
    text: list[str] = []
    for table in tables:
        text += [f"**{table['title']}**", ""]
        text += ["| " + " | ".join(table["columns"]) + " |", "|" + "---|" * len(table["columns"])]
        text += ["| " + " | ".join(row) + " |" for row in table["rows"]] + [""]
    return "\n".join(text)


def run(settings: Settings) -> Outcome:
    """Compute everything; rounds are of what is timed."""
    outcome, tables = Outcome(), Tables()
    sizes = SIZES[:2] if settings.quick else SIZES
    effort = 0.02 if settings.quick else 1.0
    _building(outcome, tables, sizes, settings.rounds)
    _keys(outcome, tables, sizes, effort)
    _blocks(outcome, tables, effort)
    _movement(outcome, tables, sizes, effort)
    cpu = _cpu(outcome, tables, sizes, settings.rounds, effort)
    _messages(tables)
    _writes(outcome, tables, sizes, cpu)
    _idle(outcome, tables, sizes, cpu)
    _connections(tables, sizes)
    _leases(tables, sizes, cpu)
    _control_store(outcome, tables, sizes)
    outcome.limit("blocks_8_nodes_512", "blocks_8_nodes_512_worst", at_most=1.25)
    outcome.limit("blocks_5_nodes_256", "blocks_5_nodes_256_worst", at_most=1.25)
    outcome.notes["tables"] = tables.found
    return outcome


# --- the ring -------------------------------------------------------------------------------------------------------


def _members(weights: Iterable[int]) -> list[Member]:
    return [
        Member(
            f"gpu-{number:04}", number + 1, f"10.20.{number // 250}.{number % 250}:9010", f"10.20.0.1:{9011}", weight
        )
        for number, weight in enumerate(weights)
    ]


def _equal(count: int) -> list[Member]:
    return _members([100] * count)


def _contents(count: int) -> list[bytes]:
    rng = random.Random(7)
    return [rng.randbytes(16) for _ in range(count)]


def _places(ring: Ring, content: bytes, blocks: int) -> list[str]:
    return [ring.block_owners("b", content.hex(), content, number, 1)[0] for number in range(blocks)]


def _building(outcome: Outcome, tables: Tables, sizes: Sequence[int], rounds: int) -> None:
    rows = []
    for nodes in sizes:
        members = _equal(nodes)
        for turn in range(rounds):
            say(f"scaling: ring of {nodes}, round {turn + 1}")
            began = time.process_time()
            Ring(members)
            outcome.add(f"ring_{nodes}_build_ms", (time.process_time() - began) * 1e3)
        tracemalloc.start()
        ring = Ring(members)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        outcome.add(f"ring_{nodes}_kept_mb", kept / 1e6)
        outcome.add(f"ring_{nodes}_peak_mb", peak / 1e6)
        began = time.process_time()
        for number in range(10000):
            ring.owners("b", f"new/{number}")
        key_us = (time.process_time() - began) / 10000 * 1e6
        began = time.process_time()
        for number in range(10000):
            ring.owners("b", f"new/{number}")
        again_us = (time.process_time() - began) / 10000 * 1e6
        groups = _contents(50)
        began = time.process_time()
        for content in groups:
            ring.block_owners("b", "k", content, GROUP - 1)
        group_ms = (time.process_time() - began) / len(groups) * 1e3
        outcome.add(f"ring_{nodes}_look_up_us", key_us)
        outcome.add(f"ring_{nodes}_group_ms", group_ms)
        build = outcome.series(f"ring_{nodes}_build_ms").median
        rows.append((nodes, build, kept / 1e6, peak / 1e6, key_us, again_us, group_ms))
    tables.add(
        "What a ring costs",
        (
            "nodes",
            "to build, ms",
            "kept, MB",
            "while building, MB",
            "a key, µs",
            "a key again, µs",
            f"{GROUP} blocks, ms",
        ),
        rows,
    )


def _spread(owners: Iterable[str], ring: Ring) -> list[float]:
    """Of each node: what it owns over what it should."""
    counted = Counter(owners)
    total = counted.total()
    return [counted[name] / total / ring.share(name) for name in ring.members]


def _keys(outcome: Outcome, tables: Tables, sizes: Sequence[int], effort: float) -> None:
    rows = []
    for nodes in sizes:
        say(f"scaling: keys on {nodes} nodes")
        ring, keys = Ring(_equal(nodes)), int(1000 * effort) * nodes
        found = _spread((ring.owners("b", f"data/{number}", 1)[0] for number in range(keys)), ring)
        rng = random.Random(nodes)
        chance = Counter(rng.randrange(nodes) for _ in range(keys))
        outcome.add(f"keys_{nodes}_nodes_max", max(found))
        rows.append((nodes, keys, max(found), min(found), max(chance.values()) * nodes / keys))
    tables.add(
        "Keys, 1000 a node: a node's share over what it should be",
        ("nodes", "keys", "most", "least", "most, if chance alone decided"),
        rows,
    )
    attempts, outside = int(2000 * effort), 0
    for attempt in range(attempts):
        ring = Ring(Member(f"{attempt}-{number}", 1, "", "", 100) for number in range(5))
        found = _spread((ring.owners("b", f"{attempt}/{number}", 1)[0] for number in range(1000)), ring)
        outside += any(abs(share - 1) > _WITHIN for share in found)
    outcome.add("keys_5_nodes_outside_per_1000", outside / attempts * 1000)
    expected = [_outside(5, 1000, points) * 1000 for points in (_evened(POINTS), POINTS, 3 * POINTS, math.inf)]
    tables.add(
        "1000 keys on 5 nodes: a node is off its share by more than a quarter",
        ("clusters simulated", "of them off", "expected, of 1000", "with one place for each key", "and thrice the points", "with a perfect ring"),  # noqa: E501
        [(attempts, outside, *expected)],
    )  # fmt: skip


def _evened(points: int) -> float:
    """As many points would be as even with one place for each key. Of k places the nearest counts: a point that is a gap g
    (of mean 1) behind the one before it has k/(k-1) (1 - exp(-(k-1) g)) keys, whose variance is 1 / (2k - 1)."""
    return points * (2 * PROBES - 1)


def _outside(nodes: int, keys: int, points: float) -> float:
    """How probable it is that one of the nodes is off by more than a quarter: chance of the keys, and of the points."""
    share = 1 / nodes
    variance = keys * share * (1 - share) + (keys * share) ** 2 * (1 - share) / points
    off = math.floor(_WITHIN * keys * share) + 0.5
    return nodes * math.erfc(off / math.sqrt(2 * variance))


def _blocks(outcome: Outcome, tables: Tables, effort: float) -> None:
    cases: tuple[tuple[str, tuple[int, ...], int, int], ...] = (
        ("5", (100,) * 5, 256, 10000),
        ("5, weights 1 2 3 4 5", (1, 2, 3, 4, 5), 256, 5000),
        ("5, weights 1 1 2 2 4", (1, 1, 2, 2, 4), 256, 5000),
        ("8", (100,) * 8, 512, 5000),
        ("8", (100,) * 8, 64, 5000),
        ("16", (100,) * 16, 512, 1000),
        ("50", (100,) * 50, 512, 500),
        ("100", (100,) * 100, 1024, 200),
        ("1000", (100,) * 1000, 10240, 5),
    )
    rows = []
    for label, weights, blocks, most in cases[: 4 if effort < 1 else None]:
        attempts = max(5, int(most * effort))
        say(f"scaling: {attempts} objects of {blocks} blocks on {label}")
        ring = Ring(_members(weights))
        highs, lows, chances, outside = [], [], [], 0
        for content in _contents(attempts):
            found = _spread(_places(ring, content, blocks), ring)
            highs.append(max(found))
            lows.append(min(found))
            outside += highs[-1] > 1 + _WITHIN or lows[-1] < 1 - _WITHIN
        for content in _contents(min(attempts, 500)):
            chances.append(max(_spread((ring.owners("b", f"{content.hex()}/{n}", 1)[0] for n in range(blocks)), ring)))
        if len(set(weights)) == 1:
            outcome.add(f"blocks_{len(weights)}_nodes_{blocks}_worst", max(highs))
        rows.append((label, blocks, attempts, statistics.mean(highs), max(highs), min(lows), outside, max(chances)))
    tables.add(
        "Blocks of one object: a node's share over what it should be",
        ("nodes", "blocks", "objects", "most, mean", "most, worst", "least, worst", "objects off by a quarter", "most if each block were placed for itself"),  # noqa: E501
        rows,
    )  # fmt: skip


def _movement(outcome: Outcome, tables: Tables, sizes: Sequence[int], effort: float) -> None:
    cases = [(f"{n} equal", [100] * n) for n in sorted({2, 5, 8, 16, 32, *sizes})]
    cases += [(f"9 of 100 and 1 of {weight}", [100] * 9 + [weight]) for weight in (20, 50, 200, 400)]
    rows = []
    for label, weights in cases:
        say(f"scaling: one of {label} leaves")
        members = _members(weights)
        gone = members[-1]
        before, after = Ring(members), Ring(members[:-1])
        keys = [f"data/{number}" for number in range(int(50000 * effort))]
        went = sum(before.owners("b", key, 1) != after.owners("b", key, 1) for key in keys) / len(keys)
        blocks, moved, owned, expected = 512, 0, 0, 0
        contents = _contents(max(2, int(effort * (200 if len(members) > 500 else 60))))
        for content in contents:
            was, now = _places(before, content, blocks), _places(after, content, blocks)
            moved += sum(one != other for one, other in zip(was, now, strict=True))
            for number, name in enumerate(was):
                if name == gone.name:
                    owned += 1
                    second = before.block_owners("b", content.hex(), content, number)[1]
                    expected += second == now[number]
        share = before.share(gone.name)
        moved_share = moved / blocks / len(contents)
        if len(set(weights)) == 1:
            outcome.add(f"blocks_{len(weights)}_nodes_moved_over_share", moved_share / share)
        rows.append((label, share, went, went / share, moved_share, moved_share / share, expected / max(1, owned)))
    tables.add(
        "What moves when the last one leaves (and moves back when it joins)",
        ("nodes", "its share", "keys", "× its share", "blocks of large objects", "× its share", "its blocks that go to the node that was second"),  # noqa: E501
        rows,
    )  # fmt: skip


# --- CPU ------------------------------------------------------------------------------------------------------------


class Cpu:
    """Of a message: what both of its ends spend, µs. Of decisions: by cluster size, µs."""

    def __init__(self) -> None:
        self.message_us = 0.0
        self.write_us: dict[int, float] = {}
        self.heard_us: dict[int, float] = {}
        self.renewals_us: dict[int, float] = {}

    def share(self, sent_s: float, received_s: float, decisions_us_s: float = 0.0) -> float:
        """Of one core, for so many messages and decisions a second."""
        return ((sent_s + received_s) / 2 * self.message_us + decisions_us_s) / 1e6


def _slots(depth: int = DEPTH) -> tuple[int, ...]:
    """Of a write of a key so many directories deep: its own, its directories', that of the bucket's top."""
    rng = random.Random(3)
    return tuple(sorted(rng.randrange(1 << 16, SLOTS) for _ in range(depth + 2)))


def _begin(depth: int = DEPTH) -> wire.Begin:
    return wire.Begin(1_000_000, _slots(depth))


class _Counting:
    """A connection's peer that counts what comes."""

    def __init__(self) -> None:
        self.count = 0
        self.wanted = 0
        self.reached = asyncio.Event()

    def connected(self, connection: Connection) -> None:
        pass

    def received(self, connection: Connection, message: object) -> None:
        self.count += 1
        if self.count == self.wanted:
            self.reached.set()

    def lost(self, connection: Connection, reason: str) -> None:
        pass


async def _unix_pair(make: Callable[[], Connection], count: int) -> tuple[list[Connection], list[Connection]]:
    loop = asyncio.get_running_loop()
    ends: tuple[list[Connection], list[Connection]] = [], []
    for _ in range(count):
        for side, end in zip(ends, socket.socketpair(), strict=True):
            end.setblocking(False)
            side.append((await loop.create_connection(make, sock=end))[1])
    return ends


async def _tcp_pair(make: Callable[[], Connection], count: int) -> tuple[list[Connection], list[Connection]]:
    loop = asyncio.get_running_loop()
    ends: tuple[list[Connection], list[Connection]] = [], []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for _ in range(count):
            out = socket.create_connection(listening.getsockname())
            for side, end in zip(ends, (out, listening.accept()[0]), strict=True):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                side.append((await loop.create_connection(make, sock=end))[1])
    return ends


Pairs = Callable[[Callable[[], Connection], int], Awaitable[tuple[list[Connection], list[Connection]]]]


async def memory_of_lines(lines: int) -> float:
    """Resident memory of an end of a line, kB; what the kernel holds for it not counted."""
    counting = _Counting()
    before = _resident_kb()
    outs, ins = await _tcp_pair(
        lambda: Connection(lambda: counting, wire.ToListener, wire.MESSAGE_BYTES_MAX, wire.QUEUE_BYTES_MAX), lines
    )
    after = _resident_kb()
    for connection in (*outs, *ins):
        await connection.close()
    return (after - before) / (2 * lines)


def _resident_kb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e3


async def _sending(pairs: Pairs, lines: int, burst: int, turns: int) -> float:
    """CPU of both ends for each message, µs: in each turn of the loop so many on each line."""
    counting = _Counting()
    outs, ins = await pairs(
        lambda: Connection(lambda: counting, wire.ToListener, wire.MESSAGE_BYTES_MAX, wire.QUEUE_BYTES_MAX), lines
    )
    message = _begin()
    counting.wanted = lines * burst * turns
    began = time.process_time()
    for _ in range(turns):
        for out in outs:
            for _ in range(burst):
                out.send(message)
        await asyncio.sleep(0)
    await asyncio.wait_for(counting.reached.wait(), 60)
    spent = time.process_time() - began
    for connection in (*outs, *ins):
        await connection.close()
    return spent / counting.wanted * 1e6


def _coherence(nodes: int, membership: Membership) -> tuple[Coherence, list[str]]:
    """The decisions of one node, all lines standing."""
    members = tuple(_equal(nodes))
    coherence = Coherence(members[0].name, membership, Cluster().lease_s)
    coherence.viewed(View(1, members), 0.0)
    for other in members[1:]:
        coherence.greet(other.name)
        coherence.welcomed(other.name, 1, 0.0)
        coherence.hello(wire.Hello(other, 1, 1, 0, 0, (), ()), 0.0)
        coherence.listening(other.name, 0.0)
    return coherence, [member.name for member in members[1:]]


def _decide_write(nodes: int, count: int) -> tuple[float, float]:
    """CPU of the writer's decisions for a write, and of a listener's, µs."""
    coherence, others = _coherence(nodes, Membership.CONTROL)
    slots = _slots()
    began = time.process_time()
    for _ in range(count):
        number, _ = coherence.begin(slots, 1.0)
        for name in others:
            coherence.acknowledged(name, wire.Ack(number, False, 1), 1.0)
        coherence.end(number, 1.0, 20.0)
        for name in others:
            coherence.acknowledged(name, wire.Ack(number, True, 1), 1.0)
    wrote = time.process_time() - began
    began = time.process_time()
    for number in range(1000):
        coherence.begun(others[0], wire.Begin(number, slots))
        coherence.ended(others[0], wire.End(number))
    return wrote / count * 1e6, (time.process_time() - began) / 1000 * 1e6


def _decide_renewals(nodes: int, count: int) -> float:
    """CPU of a round of renewals, asking all and answering all, µs."""
    coherence, others = _coherence(nodes, Membership.STATIC)
    began = time.process_time()
    for turn in range(1, count + 1):
        now = turn * Cluster().lease_s
        coherence.tick(now)
        for name in others:
            coherence.renewed(name, wire.Renewed(turn + 1, 1), now)
            coherence.renew(name, turn, now)
    return (time.process_time() - began) / count * 1e6


def _cpu(outcome: Outcome, tables: Tables, sizes: Sequence[int], rounds: int, effort: float) -> Cpu:
    cpu = Cpu()
    sending: list[tuple[str, int, float]] = []
    turns = max(20, int(2000 * effort))
    kinds: tuple[tuple[str, Pairs], ...] = (("socketpair", _unix_pair), ("TCP, loopback", _tcp_pair))
    for label, pairs in kinds:
        for burst in (1, 16):
            name = f"message_{label.split()[0].strip(',').lower()}_{burst}_us"
            for turn in range(rounds):
                say(f"scaling: messages over {label}, {burst} a turn, round {turn + 1}")
                outcome.add(name, uvloop.run(_sending(pairs, 32, burst, max(5, turns // burst))))
            sending.append((label, burst, outcome.series(name).median))
    tables.add("CPU of a message, sending and receiving together", ("over", "a turn of the loop", "µs"), sending)
    # In a process that has not grown yet.
    script = "import uvloop; from bench import scaling; print(uvloop.run(scaling.memory_of_lines(300)))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    outcome.add("line_end_kb", float(ran.stdout))
    tables.add("Memory of one end of a line", ("kB",), [(outcome.values["line_end_kb"][0],)])
    cpu.message_us = outcome.series("message_tcp_1_us").median
    rows = []
    for nodes in sizes:
        count = max(3, int(2000 * effort / nodes))
        for _ in range(rounds):
            wrote, heard = _decide_write(nodes, count)
            outcome.add(f"decide_{nodes}_write_us", wrote)
            outcome.add(f"decide_{nodes}_heard_us", heard)
            outcome.add(f"decide_{nodes}_renewals_us", _decide_renewals(nodes, count))
        cpu.write_us[nodes] = outcome.series(f"decide_{nodes}_write_us").median
        cpu.heard_us[nodes] = outcome.series(f"decide_{nodes}_heard_us").median
        cpu.renewals_us[nodes] = outcome.series(f"decide_{nodes}_renewals_us").median
        rows.append((nodes, cpu.write_us[nodes], cpu.heard_us[nodes], cpu.renewals_us[nodes]))
    tables.add(
        "CPU of decisions, µs",
        ("nodes", "own write, start to end", "another's write", "a round of renewals with all"),
        rows,
    )
    return cpu


# --- messages -------------------------------------------------------------------------------------------------------


def _samples() -> dict[str, Message]:
    return {
        "Begin": _begin(),
        "End": wire.End(1_000_000),
        "Ack": wire.Ack(1_000_000, True, 1000),
        "Ping": wire.Ping(),
        "Pong": wire.Pong(),
        "Renew": wire.Renew(1_000_000),
        "Renewed": wire.Renewed(1_000_000, 1000),
    }


_BYTES: Final = {name: len(frame(message)) for name, message in _samples().items()}


def _messages(tables: Tables) -> None:
    deep = {f"Begin, {depth} directories deep": len(frame(_begin(depth))) for depth in (0, DEPTH, 10)}
    sizes = deep | {name: each for name, each in _BYTES.items() if name != "Begin"}
    tables.add("Bytes of a message with its frame", list(sizes), [list(sizes.values())])


def _writes(outcome: Outcome, tables: Tables, sizes: Sequence[int], cpu: Cpu) -> None:
    """A write: Begin and End to all others, an Ack for each."""
    told = _BYTES["Begin"] + _BYTES["End"]
    acknowledged = 2 * _BYTES["Ack"]
    rows, one = [], []
    for nodes in sizes:
        others = nodes - 1
        for rate in WRITE_RATES:
            own, heard = rate / nodes, rate * others / nodes
            sent = received = 2 * own * others + 2 * heard
            bytes_s = own * others * told + heard * acknowledged
            share = cpu.share(sent, received, own * cpu.write_us[nodes] + heard * cpu.heard_us[nodes])
            outcome.add(f"writes_{nodes}_nodes_{rate}_s_cpu_share", share)
            rows.append((nodes, rate, sent, bytes_s / 1e3, (bytes_s + sent * _PACKET_BYTES) / 1e3, _percent(share)))
        write_us = cpu.share(2 * others, 2 * others, cpu.write_us[nodes]) * 1e6
        outcome.add(f"writes_{nodes}_nodes_one_writer_us", write_us)
        one.append((nodes, 2 * others, 2 * others, write_us / 1e3, 1e6 / write_us))
    tables.add(
        "Writes, spread over all nodes: what each daemon sends a second (and receives as much)",
        ("nodes", "writes/s in the cluster", "messages/s", "kB/s", "kB/s with packets", "CPU, of a core"),
        rows,
    )
    tables.add(
        "Writes, all through one node: what its daemon does for each",
        ("nodes", "messages sent", "received", "CPU, ms", "writes/s that fill a core"),
        one,
    )


def _percent(share: float) -> str:
    return f"{results.significant(share * 100, 2):g} %"


def _idle(outcome: Outcome, tables: Tables, sizes: Sequence[int], cpu: Cpu) -> None:
    """On each line a Ping each lease, and Renew and Renewed each quarter of a lease: of the long one, or the short one."""
    settings = Cluster()
    kinds = (("control store", 2 * settings.member_lease_s), ("static, or store away", settings.lease_s))
    rows = []
    for nodes in sizes:
        for label, lease_s in kinds:
            others, rounds = nodes - 1, 1 / (_RENEW_AT * lease_s)
            pings, renewals = others / settings.lease_s, others * rounds
            sent = 2 * (pings + renewals)
            bytes_s = pings * (_BYTES["Ping"] + _BYTES["Pong"]) + renewals * (_BYTES["Renew"] + _BYTES["Renewed"])
            share = cpu.share(sent, sent, rounds * cpu.renewals_us[nodes])
            outcome.add(f"idle_{nodes}_nodes_{label.split()[0].strip(',')}_cpu_share", share)
            with_packets = (bytes_s + sent * _PACKET_BYTES) / 1e3
            rows.append((nodes, label, sent, with_packets, _percent(share)))
    tables.add(
        "Nothing happens: what each daemon sends a second (and receives as much)",
        ("nodes", "members are known from", "messages/s", "kB/s with packets", "CPU, of a core"),
        rows,
    )  # fmt: skip


def _connections(tables: Tables, sizes: Sequence[int]) -> None:
    each = Cluster().connections
    tables.add(
        f"Connections of a node: lines of its daemon, and at most {each} to each peer for each of its workers",
        ("nodes", "lines in all", "lines of a daemon, out and in", "of a worker to peers, at most"),
        [(nodes, nodes * (nodes - 1), 2 * (nodes - 1), each * (nodes - 1)) for nodes in sizes],
    )


def _leases(tables: Tables, sizes: Sequence[int], cpu: Cpu) -> None:
    """The other design: a record is leased from its key's home, and asked for again once the lease has run out."""
    rows = []
    for nodes in sizes:
        others = (nodes - 1) / nodes
        asked = READS_PER_NODE_S * others
        # Asking, and being asked; a write commits at its home, and finds nobody there who holds a lease.
        for rate in WRITE_RATES:
            told, leased = 4 * rate * others, 2 * asked + 2 * rate / nodes * others
            rows.append(
                (
                    nodes,
                    rate,
                    told,
                    _percent(cpu.share(told, told)),
                    0,
                    leased,
                    _percent(cpu.share(leased, leased)),
                    f"{others:.1%}",
                )
            )
    tables.add(
        f"Telling everybody of writes, or leasing records: {READS_PER_NODE_S} small files/s read at each node; CPU of messages alone",  # noqa: E501
        ("nodes", "writes/s in the cluster", "told: messages/s", "CPU, of a core", "reads that wait for a node", "leased: messages/s", "CPU, of a core", "reads that wait for a node"),  # noqa: E501
        rows,
    )  # fmt: skip


# --- the control store ----------------------------------------------------------------------------------------------


def _control_store(outcome: Outcome, tables: Tables, sizes: Sequence[int]) -> None:
    """A heartbeat is one UPDATE, which tells the view's version and whether any row is late; all rows are read by all when
    the version has changed."""
    row = (
        "gpu-0001",
        1234,
        "10.20.0.1:9010",
        "10.20.0.1:9011",
        8192,
        "active",
        1.7e9,
        1.7e9,
        '{"capacity_bytes": 8796093022208}',
    )
    row_bytes = len(msgspec.msgpack.encode(row))
    rows = []
    for nodes in sizes:
        beats = nodes / (_BEAT_AT * Cluster().heartbeat_s)
        outcome.add(f"control_{nodes}_nodes_updates_per_s", beats)
        view_kb = len(frame(wire.Viewed(View(1000, tuple(_equal(nodes)))))) / 1e3
        rows.append((nodes, beats, beats * nodes, nodes, nodes * nodes, nodes * nodes * row_bytes / 1e6, view_kb))
    tables.add(
        f"The control store: heartbeats each {Cluster().heartbeat_s:g} s at most; rows of {row_bytes} bytes",
        (
            "nodes",
            "UPDATEs/s",
            "rows they look at/s",
            "one joins or leaves: reads",
            "rows read",
            "MB read",
            "a view as a message, kB",
        ),
        rows,
    )


def main() -> int:
    """Entry point; returns the exit status."""
    options = argparse.ArgumentParser(prog="python -m bench.scaling", description=SUMMARY)
    options.add_argument("--quick", action="store_true", help="smoke test: little, and no figure")
    options.add_argument("--rounds", type=int, help="how often what is timed is timed (default 5, quick 1)")
    asked = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kos-bench-scaling-") as under:
        outcome = run(Settings(Path(under), asked.quick, asked.rounds or (1 if asked.quick else 5)))
    line = results.line_of("scaling", outcome, quick=asked.quick, seconds=time.monotonic() - began)
    results.append(line)
    print(markdown(outcome.notes["tables"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
