"""Random objects, readers, policies, members and failures: what is read is always one version's bytes, and the origin is not
asked without end.

Each example is a short history of a cluster of two to four nodes (tests.fakes.peering): groups of reads at once, and between
them things that happen to the origin, to members and to what they say.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kos.config import Rule
from kos.errors import OriginError, S3Error
from kos.s3 import ranges
from kos.s3.ranges import RangeSpec
from koscache.carrier import Changed, Want
from koscache.carrier import peer_wire as wire
from koscache.cluster.view import MemberState, View
from tests.fakes.peering import BLOCK, OPENS_MAX, PeerCluster, PeerNode

KEYS = ("a", "b", "c")
FRESH_S = 100.0
BLOCKS_MAX = 4
#: In the end all is read so often at most, until nobody asks the origin any more.
ROUNDS_MAX = 12
_POOL = random.Random(67).randbytes(BLOCKS_MAX * BLOCK + 1000)

Policy = Literal["never", "hot", "always"]


@dataclass(frozen=True)
class Read:
    node: int
    key: str
    range: RangeSpec | None
    head_only: bool
    conditional: bool
    checksums: bool


@dataclass(frozen=True)
class Put:
    """A new version, behind kos's back. at: where in the pool its bytes begin."""

    key: str
    size: int
    at: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Remove:
    key: str


@dataclass(frozen=True)
class Break:
    """A fault of a node's peer port, for a few questions."""

    node: int
    path: str | None
    what: dict[str, Any]
    times: int


@dataclass(frozen=True)
class Gone:
    node: int
    back: bool


@dataclass(frozen=True)
class Cut:
    """The way of a node to the origin."""

    node: int
    off: bool


@dataclass(frozen=True)
class Distrust:
    node: int


@dataclass(frozen=True)
class Mark:
    node: int
    key: str


@dataclass(frozen=True)
class See:
    """The node goes by another view: who has a place in it, as bits."""

    node: int
    active: int


@dataclass(frozen=True)
class OriginFault:
    what: dict[str, Any]


@dataclass(frozen=True)
class Later:
    seconds: float


nodes = st.integers(0, 3)
keys = st.sampled_from(KEYS)
edges = [0, 1, 4095, 4096, 4097, 40_000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, BLOCKS_MAX * BLOCK]
sizes = st.one_of(st.sampled_from(edges), st.integers(0, BLOCKS_MAX * BLOCK))
offsets = st.one_of(st.sampled_from(edges), st.integers(0, (BLOCKS_MAX + 1) * BLOCK))


def _spec(first: int | None, length: int | None) -> RangeSpec:
    if first is None:
        return RangeSpec(None, length or 0)
    return RangeSpec(first, None if length is None else first + length)


specs = st.one_of(
    st.none(),
    st.builds(_spec, offsets, st.one_of(st.none(), st.integers(0, 3 * BLOCK), st.integers(0, 2000))),
    st.builds(_spec, st.none(), offsets),
)
reads = st.builds(
    Read, nodes, keys, specs, st.sampled_from([False] * 5 + [True]), st.sampled_from([False] * 5 + [True]),
    st.sampled_from([False] * 5 + [True]),
)  # fmt: skip
spoils = st.one_of(
    st.builds(lambda n: {"cut": n}, st.sampled_from([-1, 0, 1, 1000, 30_000, BLOCK - 1])),
    st.builds(lambda n: {"stall": n}, st.sampled_from([-1, 0, 1000])),
    st.sampled_from([
        {"status": 404},
        {"status": 500},
        {"status": 401},
        {"status": 503, "failed": wire.unavailable("down", 1.0)},
        {"status": 409, "failed": wire.not_stored("no_store")},
        {"status": 409, "failed": wire.changed("another one")},
    ]),
)  # fmt: skip
events = st.one_of(
    st.builds(Put, keys, sizes, st.integers(0, 900), st.sampled_from([{}, {}, {}, {"cache-control": "no-store"}])),
    st.builds(Remove, keys),
    st.builds(Break, nodes, st.sampled_from([None, wire.OBJECT, wire.BLOCK, wire.CHECKSUM]), spoils, st.integers(1, 4)),
    st.builds(Gone, nodes, st.booleans()),
    st.builds(Cut, nodes, st.booleans()),
    st.builds(Distrust, nodes),
    st.builds(Mark, nodes, keys),
    st.builds(See, nodes, st.integers(0, 15)),
    st.builds(
        OriginFault,
        st.sampled_from(
            [{"status": 503}, {"status": 500}, {"body_cut": 3000}, {"close": True}, {"ignore_range": True}]
        ),
    ),
    st.builds(Later, st.sampled_from([1.0, FRESH_S / 2, FRESH_S + 1, 10 * FRESH_S])),
)
histories = st.lists(st.one_of(events, st.lists(reads, min_size=1, max_size=6)), min_size=2, max_size=8)


class History:
    """The model: every version that there ever was of a key, by its ETag."""

    def __init__(self, them: PeerCluster) -> None:
        self.them = them
        self.versions: dict[tuple[str, str], bytes] = {}
        self.reads = 0

    def node(self, number: int) -> PeerNode:
        return self.them.nodes[number % len(self.them.nodes)]

    def put(self, put: Put) -> None:
        body = _POOL[put.at : put.at + put.size]
        version = self.them.origin.put("b", put.key, body, put.headers)
        self.versions[put.key, version.etag] = body

    async def carry_out(self, event: Any) -> None:
        them = self.them
        if isinstance(event, list):
            await asyncio.gather(*(self.read(each) for each in event))
        elif isinstance(event, Put):
            self.put(event)
        elif isinstance(event, Remove):
            them.origin.remove("b", event.key)
        elif isinstance(event, Break):
            self.node(event.node).fault(event.times, path=event.path, **event.what)
        elif isinstance(event, Gone):
            node = self.node(event.node)
            if node.listens and not event.back:
                await node.gone()
            elif not node.listens and event.back:
                await node.back()
        elif isinstance(event, Cut):
            self.node(event.node).cut_off = event.off
        elif isinstance(event, Distrust):
            self.node(event.node).trust(False)
        elif isinstance(event, Mark):
            fence = self.node(event.node).reader.fence
            fence.mark([fence.slot("b", event.key)])
        elif isinstance(event, See):
            await self.see(self.node(event.node), event.active)
        elif isinstance(event, OriginFault):
            them.origin.fault(**event.what)
        else:
            assert isinstance(event, Later)
            them.clock.ahead_s += event.seconds

    async def see(self, node: PeerNode, active: int) -> None:
        members = tuple(
            msgspec.structs.replace(each.member, state=MemberState.ACTIVE if active >> at & 1 else MemberState.DRAINING)
            for at, each in enumerate(self.them.nodes)
        )
        await self.them.tell(node, View(0, members))

    async def read(self, read: Read) -> None:
        """What comes is right, or an error that S3 has."""
        self.reads += 1
        want = Want(read.head_only, read.range, read.checksums, read.conditional)
        try:
            got = await self.node(read.node).read("b", read.key, want=want)
        except Changed:
            return  # after the first byte: broken off
        except (S3Error, OriginError):
            return
        self.check(read.key, want, got.opened.record.etag, got.opened.record.size, got.body)

    def check(self, key: str, want: Want, etag: str, size: int, body: bytes) -> None:
        version = self.versions.get((key, etag))
        assert version is not None, f"{key}: never was {etag}"
        assert len(version) == size
        if want.head_only:
            return
        start, stop = (0, size) if want.range is None else ranges.resolve(want.range, size)
        assert body == version[start:stop], f"{key}: wrong bytes for {want.range} of {size}"

    async def heal(self) -> None:
        them = self.them
        them.origin.heal()
        for node in them.nodes:
            node.heal()
            if not node.listens:
                await node.back()
            node.trust()
            node.reader.fence.stop_vouching()
            node.trust()
            node.forgive()
            await them.tell(node, them.view)

    async def end(self) -> None:
        """All is well again, and what was known has expired: every node has what the origin has, and soon asks no more."""
        them = self.them
        them.clock.ahead_s += 10 * FRESH_S
        kept = 0
        for _ in range(ROUNDS_MAX):
            them.origin.forget()
            for key in KEYS:
                version = them.origin.get("b", key)
                if version is not None and (not kept or "cache-control" not in version.headers):
                    for got in await them.read_all("b", key):
                        assert got.body == version.body, f"{key}: not what the origin has"
            await them.settled()
            kept += 1
            if kept > 1 and not them.origin.requests:
                return
            for node in them.nodes:
                node.forgive()  # a peer may have been too slow, on a busy machine
        raise AssertionError(f"still asked after {kept} rounds: {them.origin.requests}")


async def carry_out(history: list[Any], count: int, policy: Policy, patience_s: float) -> None:
    rules = (Rule(match="*", local_copy=policy, freshness=FRESH_S, stale_if_error_s=FRESH_S),)
    patience = {"read_timeout_s": 0.15, "connect_timeout_s": 0.5}
    with tempfile.TemporaryDirectory() as directory:
        async with PeerCluster(
            Path(directory), count, rules=rules, cluster=patience, patience_s=patience_s, origin_retries=1
        ) as them:
            model = History(them)
            for key in KEYS[:2]:
                model.put(Put(key, 40_000 if key == "a" else 3 * BLOCK + 7, 0))
            for event in history:
                async with asyncio.timeout(30):
                    await model.carry_out(event)
            # Each open, and each block of each attempt, asks for itself at most, through two peers and twice more by itself.
            bound = model.reads * OPENS_MAX * (BLOCKS_MAX + 2) * 4
            assert len(them.origin.requests) <= bound
            async with asyncio.timeout(30):
                await model.heal()
                await them.settled()
                await model.end()


examples = given(
    histories, st.integers(2, 4), st.sampled_from(["never", "hot", "always"]), st.sampled_from([10.0, 0.0005])
)
too_large = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=10, suppress_health_check=too_large)
@examples
def test_what_is_read_is_one_versions_bytes(history: list[Any], count: int, policy: Policy, patience_s: float) -> None:
    asyncio.run(carry_out(history, count, policy, patience_s))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=400, suppress_health_check=too_large)
@examples
def test_many_more_histories(history: list[Any], count: int, policy: Policy, patience_s: float) -> None:
    asyncio.run(carry_out(history, count, policy, patience_s))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["never", "hot", "always"])
async def test_reads_from_stores_that_are_too_small(tmp_path: Path, policy: Policy) -> None:
    """Blocks are evicted while they are read, sent to peers, and copied from them."""
    chance = random.Random(68)
    rules = (Rule(match="*", local_copy=policy, freshness=FRESH_S),)
    small = {"size_bytes": 13 << 20, "segment_bytes": 256 << 10, "index_bytes": 1 << 20}
    async with PeerCluster(tmp_path, rules=rules, workers=2, patience_s=0.005, **small) as them:
        bodies = {}
        for at in range(60):
            bodies[f"k{at}"] = _POOL[at : at + chance.choice([500, 5000, 40_000, BLOCK, BLOCKS_MAX * BLOCK])]
            them.origin.put("b", f"k{at}", bodies[f"k{at}"])

        async def read(times: int) -> None:
            for _ in range(times):
                key = chance.choice(list(bodies))
                start = chance.randrange(len(bodies[key]))
                last = chance.randrange(start, len(bodies[key]))
                spec = chance.choice([None, RangeSpec(start, last), RangeSpec(start, None)])
                got = await chance.choice(them.nodes).read("b", key, want=Want(range=spec), worker=chance.randrange(2))
                begin, end = (0, len(bodies[key])) if spec is None else ranges.resolve(spec, len(bodies[key]))
                assert got.body == bodies[key][begin:end], (key, spec)

        await asyncio.gather(*(read(100) for _ in range(12)))
        stats = [await node.daemon._keeper.stats() for node in them.nodes]
        assert all(each.evicted_blocks > 100 for each in stats)  # type: ignore[union-attr]
