"""Reads through a cluster while something is broken: the bytes are right all the same, and nobody waits for long."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos import metrics
from kos.config import ALWAYS, Rule
from kos.errors import OriginRefused, S3Error
from koscache.carrier import Phase, Reason, Want
from koscache.carrier import carrier as carrier_module
from koscache.carrier import peer_wire as wire
from koscache.cluster.view import MemberState, View
from koscache.content import Record
from tests.conditions import until
from tests.fakes.peering import BLOCK, PeerCluster, PeerNode

LARGE = random.Random(62).randbytes(5 * BLOCK + 777)
SMALL = LARGE[:1000]
MIDDLE = LARGE[:40_000]
#: A peer that says nothing is given up soon; long enough for one that is only slow, on a busy machine.
IMPATIENT: dict[str, Any] = {"read_timeout_s": 0.15, "connect_timeout_s": 1.0}
#: What such a read may take: a few of those.
SOON_S = 8.0
POLICIES = ["never", "always"]


def rules(policy: str, freshness: float = 1000.0, stale: float = 1000.0) -> tuple[Rule, ...]:
    return (Rule(match="*", local_copy=policy, freshness=freshness, stale_if_error_s=stale),)  # type: ignore[arg-type]


def record_of(node: PeerNode, key: str = "k") -> Record:
    record = node.record(key)
    assert record is not None
    return record


async def known(them: PeerCluster, key: str, body: bytes) -> Record:
    """All nodes know the version; its blocks are nowhere."""
    them.origin.put("b", key, body)
    for node in them.nodes:
        await node.read("b", key, want=Want(head_only=True))
    await them.settled()
    return record_of(them.nodes[0], key)


def block_of(number: int) -> str:
    return f"bytes={number * BLOCK}-{(number + 1) * BLOCK - 1}"


def bad_blocks(node: PeerNode) -> float:
    return float(metrics.PEER_BLOCKS_BAD.labels(node.name)._value.get())


# --- the home -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_home_that_is_gone_before_the_question(tmp_path: Path, policy: str) -> None:
    """The next node on the ring is asked, for all the others; then all is as before."""
    async with PeerCluster(tmp_path, 4, rules=rules(policy)) as them:
        for key, body in (("small", SMALL), ("middle", MIDDLE), ("large", LARGE)):
            them.origin.put("b", key, body)
            home, second, *others = them.order("b", key)
            await home.gone()
            for node in others:
                assert (await node.read("b", key)).body == body
            await them.settled()
            assert record_of(second, key)
            if key != "large":
                assert them.origin.count(key=key) == 1, "the next one asks for all"
            await home.back()
            for node in others:
                node.forgive()
        assert all(each.body == LARGE for each in await them.read_all("b", "large"))


@pytest.mark.parametrize("policy", POLICIES)
async def test_while_a_home_is_gone_the_next_node_asks_once_for_all(tmp_path: Path, policy: str) -> None:
    """However many come while its fill is under way."""
    async with PeerCluster(tmp_path, 4, rules=rules(policy)) as them:
        them.origin.put("b", "k", MIDDLE)
        home, second, *others = them.order("b", "k")
        await home.gone()
        hold = them.origin.hold(at="body", body_bytes=20_000, times=None)
        reading = [asyncio.ensure_future(others[0].read("b", "k"))]
        await hold.reached()
        await until(lambda: second.carrier.stats().fills)
        reading += [asyncio.ensure_future(node.read("b", "k")) for node in others for _ in range(3)]
        await until(lambda: second.count(wire.OBJECT) == 2)
        hold.release()
        assert all(each.body == MIDDLE for each in await asyncio.gather(*reading))
        assert len(them.origin.requests) == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("body", [SMALL, MIDDLE, LARGE])
async def test_nobody_else_is_there(tmp_path: Path, policy: str, body: bytes) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy), cluster=IMPATIENT) as them:
        them.origin.put("b", "k", body)
        home, second, other = them.order("b", "k")
        await home.gone()
        await second.gone()
        async with asyncio.timeout(SOON_S):
            assert (await other.read("b", "k")).body == body
        await them.settled()
        assert home.asked == second.asked == []
        assert sorted(start for start, _ in them.gets("k")) == list(range(0, len(body), BLOCK))
        if body is not LARGE:
            # A second one costs nothing: it is kept here, where it was brought.
            assert (await other.read("b", "k")).phase == Phase.HIT


@pytest.mark.parametrize("what", [{"cut": -1}, {"stall": -1}, {"status": 500}, {"status": 503}, {"status": 404}])
async def test_a_home_that_fails_during_the_head(tmp_path: Path, what: dict[str, Any]) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), cluster=IMPATIENT) as them:
        for key, body in (("small", SMALL), ("large", LARGE)):
            them.origin.put("b", key, body)
            home, _, other = them.order("b", key)
            fault = home.fault(path=wire.OBJECT, **what)
            async with asyncio.timeout(SOON_S):
                assert (await other.read("b", key)).body == body
            assert fault.used == 1
            fault.end()
            await them.settled()
        assert other.blocks(record_of(other, "large")) == list(range(6))


CUTS: list[tuple[bytes, int]] = [(MIDDLE, 0), (MIDDLE, 1), (MIDDLE, 39_999), (LARGE, 30_000), (SMALL, 500)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", ["cut", "stall"])
async def test_a_home_that_breaks_off_or_stands_still_in_the_body(tmp_path: Path, policy: str, way: str) -> None:
    """Gone on with from the right byte, from another source."""
    async with PeerCluster(tmp_path, rules=rules(policy), cluster=IMPATIENT) as them:
        for at, (body, count) in enumerate(CUTS):
            key = f"k{at}"
            them.origin.put("b", key, body)
            home, _, other = them.order("b", key)
            fault = home.fault(path=wire.OBJECT, **{way: count})
            async with asyncio.timeout(SOON_S):
                assert (await other.read("b", key)).body == body, (body[:1], count)
            assert fault.used == 1
            fault.end()
            await them.settled()
            assert all(each.body == body for each in await them.read_all("b", key))


async def test_a_break_goes_on_at_the_byte_where_it_was(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never"), cluster=IMPATIENT) as them:
        them.origin.put("b", "k", MIDDLE)
        home, _, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        them.origin.forget()
        fault = home.fault(path=wire.OBJECT, cut=30_000)
        assert (await other.read("b", "k")).body == MIDDLE
        assert fault.used == 1
        asked = [ask for path, ask in [*home.questions, *them.order("b", "k")[1].questions] if path == wire.BLOCK]
        starts = [ask.start for ask in asked] + [start for start, _ in them.gets("k")]
        assert len(starts) == 1 and 0 < starts[0] <= 30_000


# --- a block's owner ------------------------------------------------------------------------------------------------------


FAULTS: list[dict[str, Any]] = [
    {"cut": -1},
    {"cut": 0},
    {"cut": 20_000},
    {"stall": -1},
    {"stall": 0},
    {"stall": 20_000},
    {"status": 404},
    {"status": 500},
    {"status": 503, "failed": wire.unavailable("its origin is down", 1.0)},
    {"status": 409, "failed": wire.not_stored("of another block size")},
    {"status": 401},
    {"status": 400},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("both", [False, True])
async def test_owners_that_fail_cost_time_and_nothing_else(tmp_path: Path, policy: str, both: bool) -> None:
    """both: the next node as well. Whatever they do, the bytes are right, within a few timeouts."""
    async with PeerCluster(tmp_path, rules=rules(policy), cluster=IMPATIENT) as them:
        for at, what in enumerate(FAULTS):
            key, number = f"k{at}", at % 5
            record = await known(them, key, LARGE)
            owner, second, reader = them.block_order("b", key, record, number)
            faults = [owner.fault(None, path=wire.BLOCK, **what)]
            if both:
                faults.append(second.fault(None, path=wire.BLOCK, **what))
            async with asyncio.timeout(SOON_S):
                got = await reader.read("b", key, block_of(number))
            assert got.body == LARGE[number * BLOCK : (number + 1) * BLOCK], what
            assert faults[0].used >= 1, what
            for fault in faults:
                fault.end()
            await them.settled()
            async with asyncio.timeout(SOON_S):
                assert (await reader.read("b", key)).body == LARGE, what
            reader.forgive()


async def test_an_owner_that_is_late_is_overtaken_by_who_has_it_at_hand(tmp_path: Path) -> None:
    settings = {"hedges": 100, "hedge_most_s": 0.02, "hedge_least_s": 0.01, "read_timeout_s": 30.0}
    async with PeerCluster(tmp_path, rules=rules("never"), cluster=settings) as them:
        record, number = await known(them, "k", LARGE), 1
        owner, second, reader = them.block_order("b", "k", record, number)
        second.carrier.ahead("b", "k", record, (number,))
        await them.settled()
        fault = owner.fault(path=wire.BLOCK, stall=-1)
        async with asyncio.timeout(SOON_S):
            assert (await reader.read("b", "k", block_of(number))).body == LARGE[number * BLOCK : (number + 1) * BLOCK]
        assert fault.used == 1 and second.count(wire.BLOCK) == 1
        fault.end()


async def test_an_owner_that_waits_for_the_origin_makes_nobody_else_ask_it(tmp_path: Path) -> None:
    settings = {"hedges": 100, "hedge_most_s": 0.005, "hedge_least_s": 0.005}
    async with PeerCluster(tmp_path, rules=rules("always"), cluster=settings) as them:
        them.origin.put("b", "k", LARGE)
        hold = them.origin.hold(at="answer", times=None)
        reading = asyncio.ensure_future(them.read_all("b", "k"))
        await hold.reached()
        home, second, _ = them.order("b", "k")
        await until(lambda: any(ask.cached for path, ask in second.questions if path == wire.OBJECT))
        hold.release()
        assert all(each.body == LARGE for each in await reading)
        assert len(them.origin.requests) == 6 and len(home.asked) < 6


async def test_an_owner_that_refuses_for_the_origin_is_believed(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        record, number = await known(them, "k", LARGE), 1
        *_, reader = them.block_order("b", "k", record, number)
        them.origin.fault(times=None, status=403, code="AccessDenied", method="GET")
        with pytest.raises(OriginRefused) as refused:
            await reader.read("b", "k", block_of(number))
        assert refused.value.status == 403 and b"AccessDenied" in refused.value.body


# --- wrong bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [SMALL, MIDDLE, LARGE])
async def test_a_block_that_is_not_what_its_checksum_says_is_never_kept(tmp_path: Path, body: bytes) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", body)
        await them.order("b", "k")[0].read("b", "k")
        await them.settled()
        record, number = record_of(them.order("b", "k")[0]), 1 if body is LARGE else 0
        owner, _, other = them.block_order("b", "k", record, number)
        owner.corrupt(record, number, at=700)
        counted, right = bad_blocks(owner), body[number * BLOCK : (number + 1) * BLOCK]
        them.origin.forget()
        await other.read("b", "k")
        await them.settled()
        assert bad_blocks(owner) == counted + 1
        assert other.stored(record, number) in (None, right)
        assert (await other.read("b", "k")).body == body, "at the next try the origin is asked"
        await them.settled()
        assert them.gets("k") == [(number * BLOCK, number * BLOCK + len(right) - 1)]
        assert other.stored(record, number) == right
        assert (await other.read("b", "k")).phase == Phase.HIT


@pytest.mark.parametrize("warm", [False, True])
async def test_bytes_that_are_spoiled_on_the_way(tmp_path: Path, warm: bool) -> None:
    """warm: the owner says the checksum with the head; else it is asked for it afterwards."""
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        record, number = await known(them, "k", LARGE), 1
        owner, _, reader = them.block_order("b", "k", record, number)
        if warm:
            await owner.read("b", "k", block_of(number))
            await them.settled()
        counted = bad_blocks(owner)
        owner.fault(path=wire.BLOCK, garble=50_000)
        await reader.read("b", "k", block_of(number))
        await them.settled()
        assert not reader.has(record, number) and bad_blocks(owner) == counted + 1
        assert (await reader.read("b", "k", block_of(number))).body == LARGE[number * BLOCK : (number + 1) * BLOCK]


async def test_whoever_reads_behind_a_spoiled_block_starts_no_loop(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", MIDDLE)
        home, _, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        home.corrupt(record_of(home), 0)
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*(other.read("b", "k") for _ in range(5)))
            await them.settled()
            assert (await other.read("b", "k")).body == MIDDLE


async def test_an_owner_that_cannot_say_the_checksum_has_passed_on_what_the_origin_sent(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), cluster=IMPATIENT) as them:
        for at, what in enumerate(({"status": 404}, {"cut": -1}, {"stall": -1})):
            key, number = f"k{at}", 1
            record = await known(them, key, LARGE)
            owner, _, reader = them.block_order("b", key, record, number)
            fault = owner.fault(None, path=wire.CHECKSUM, **what)  # type: ignore[arg-type]
            async with asyncio.timeout(SOON_S):
                assert (await reader.read("b", key, block_of(number))).body == LARGE[
                    number * BLOCK : (number + 1) * BLOCK
                ]
                await until(lambda reader=reader: not reader.carrier.stats().fills)
            fault.end()
            await them.settled()
            assert reader.has(record, number)
            reader.forgive()


# --- the origin -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_the_origin_is_down_for_the_home_alone(tmp_path: Path, policy: str) -> None:
    """Another node answers, or this one asks for itself; the home's own clients get it through the next one."""
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for key, body in (("small", SMALL), ("middle", MIDDLE), ("large", LARGE)):
            them.origin.put("b", key, body)
            order = them.order("b", key)
            order[0].cut_off = True
            for node in reversed(order):
                async with asyncio.timeout(SOON_S):
                    assert (await node.read("b", key)).body == body, (key, node.name)
            order[0].cut_off = False
            await them.settled()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [2, 3])
async def test_the_origin_is_there_for_one_node_alone(tmp_path: Path, policy: str, count: int) -> None:
    async with PeerCluster(tmp_path, count, rules=rules(policy)) as them:
        for connected in them.nodes:
            for node in them.nodes:
                node.cut_off = node is not connected
            for key, body in (("small", SMALL), ("large", LARGE)):
                key += connected.name
                them.origin.put("b", key, body)
                async with asyncio.timeout(SOON_S):
                    assert (await connected.read("b", key)).body == body
                await them.settled()


async def test_the_origin_is_down_for_all(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), origin_retries=0) as them:
        await them.origin.down()
        async with asyncio.timeout(SOON_S):
            for node in them.order("b", "k"):
                with pytest.raises(S3Error) as refused:
                    await node.read("b", "k")
                assert refused.value.code == "ServiceUnavailable"
                assert int(refused.value.headers["Retry-After"]) >= 1
        await them.settled()
        await them.origin.up()


@pytest.mark.parametrize("body", [SMALL, MIDDLE, LARGE])
async def test_the_origin_is_down_for_all_what_the_home_has_is_served_stale(tmp_path: Path, body: bytes) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot", 30.0, 100.0), origin_retries=0) as them:
        them.origin.put("b", "k", body)
        home, second, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        await them.origin.down()
        them.clock.ahead_s += 31
        for node in (other, second, home, other):
            async with asyncio.timeout(SOON_S):
                got = await node.read("b", "k")
            assert (got.body, got.phase, got.opened.reason) == (body, Phase.STALE, Reason.ORIGIN_DOWN), node.name
            assert got.opened.age_s is not None and 31 <= got.opened.age_s < 60
        await them.settled()
        them.clock.ahead_s += 100
        for node in them.nodes:
            async with asyncio.timeout(SOON_S):
                with pytest.raises(S3Error) as refused:
                    await node.read("b", "k")
            assert refused.value.code == "ServiceUnavailable"


async def test_a_nodes_own_stale_record_is_as_good_as_anothers(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always", 30.0, 100.0), cluster=IMPATIENT, origin_retries=0) as them:
        them.origin.put("b", "k", MIDDLE)
        *_, other = them.order("b", "k")
        await other.read("b", "k")
        await them.settled()
        await them.origin.down()
        them.clock.ahead_s += 31
        for node in them.nodes:
            if node is not other:
                await node.gone()
        async with asyncio.timeout(SOON_S):
            got = await other.read("b", "k")
        assert (got.body, got.phase) == (MIDDLE, Phase.STALE)


async def test_what_is_fresh_is_served_whether_or_not_anybody_can_be_asked(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never"), cluster=IMPATIENT, origin_retries=0) as them:
        them.origin.put("b", "k", LARGE)
        await them.read_all("b", "k")
        await them.settled()
        await them.origin.down()
        for node in them.nodes:
            got = await node.read("b", "k")
            assert got.body == LARGE, "from where the blocks are"
        record = record_of(them.nodes[0])
        lost = them.block_order("b", "k", record, 1)[0]
        await lost.gone()
        for node in them.nodes:
            if node is not lost:
                async with asyncio.timeout(SOON_S):
                    with pytest.raises(S3Error) as refused:
                        await node.read("b", "k", block_of(1))
                assert refused.value.status == 503


# --- this node's daemon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_without_its_daemon_a_node_passes_on_what_others_keep(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for key, body in (("small", SMALL), ("large", LARGE)):
            them.origin.put("b", key, body)
            home, _, other = them.order("b", key)
            await home.read("b", key)
            await them.settled()
            await other.stop_daemon()
            await until(lambda other=other: not other.carrier.caching)
            them.origin.forget()
            got = await other.read("b", key)
            assert got.body == body
            await other.start_daemon()
            await until(lambda other=other: other.carrier.caching)
            own = sum(them.block_order("b", key, record_of(home, key), at)[0] is other for at in range(6))
            assert len(them.origin.requests) <= (own if body is LARGE else 0)


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_home_without_its_daemon_asks_the_origin_for_the_others(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", LARGE)
        home, _, other = them.order("b", "k")
        await home.stop_daemon()
        await until(lambda: not home.carrier.caching)
        async with asyncio.timeout(SOON_S):
            assert (await other.read("b", "k")).body == LARGE
            assert (await home.read("b", "k")).body == LARGE
        await home.start_daemon()
        await until(lambda: home.carrier.caching)


@pytest.mark.parametrize("policy", ["hot", "always"])
async def test_what_cannot_be_copied_now_still_comes_from_its_owner(tmp_path: Path, policy: str) -> None:
    """All that fills may hold is granted: just when many read, the origin is not to be asked for what others keep."""
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", LARGE)
        home, _, reader = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        record = record_of(home)
        foreign = [at for at in range(6) if them.block_order("b", "k", record, at)[0] is not reader]
        leases = reader.daemon._leases
        room, leases._fills_max_bytes = leases._fills_max_bytes, 0
        them.origin.forget()
        for _ in range(3):
            for number in foreign:
                got = await reader.read("b", "k", block_of(number))
                assert got.body == LARGE[number * BLOCK : (number + 1) * BLOCK]
        assert them.origin.requests == []
        leases._fills_max_bytes = room


# --- views ------------------------------------------------------------------------------------------------------------------


def only(them: PeerCluster, keeper: PeerNode) -> View:
    """One node keeps everything."""
    members = (
        node.member if node is keeper else msgspec.structs.replace(node.member, state=MemberState.DRAINING)
        for node in them.nodes
    )
    return View(0, tuple(members))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("body", [SMALL, MIDDLE, LARGE])
async def test_two_nodes_each_of_which_takes_the_other_for_the_home(tmp_path: Path, policy: str, body: bytes) -> None:
    """Neither waits for the other: who is asked by a peer asks the origin, whatever else it is doing."""
    async with PeerCluster(tmp_path, 2, rules=rules(policy), cluster={"read_timeout_s": 30.0}) as them:
        a, b = them.nodes
        await them.tell(a, only(them, b))
        await them.tell(b, only(them, a))
        them.origin.put("b", "k", body)
        async with asyncio.timeout(SOON_S):
            got = await them.read_all("b", "k", times=3)
            await them.settled()
        assert all(each.body == body for each in got)
        blocks = -(-len(body) // BLOCK)
        assert len(them.origin.requests) <= 2 * len(them.nodes) * blocks


async def test_an_owner_that_fetches_from_who_copies_from_it(tmp_path: Path) -> None:
    """The origin is down for a block's owner, which turns to the next node, which is just asking it."""
    async with PeerCluster(tmp_path, 2, rules=rules("always"), cluster={"read_timeout_s": 30.0}) as them:
        for key in ("k1", "k2", "k3"):
            record, number = await known(them, key, LARGE), 1
            owner, reader = them.block_order("b", key, record, number)
            owner.cut_off = True
            async with asyncio.timeout(SOON_S):
                got = await asyncio.gather(
                    *(n.read("b", key, block_of(number)) for n in (reader, owner, reader, owner))
                )
            start = number * BLOCK
            assert all(each.body == LARGE[start : start + BLOCK] for each in got)
            owner.cut_off = False
            await them.settled()


async def test_a_member_that_is_gone_from_the_view_is_asked_no_more(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        them.origin.put("b", "k", LARGE)
        await them.read_all("b", "k")
        await them.settled()
        lost, *others = them.order("b", "k")
        view = View(1, tuple(node.member for node in others))
        for node in others:
            await them.tell(node, view)
        await lost.gone()
        lost.questions.clear()
        for node in others:
            assert (await node.read("b", "k")).body == LARGE
        assert lost.questions == []


async def test_a_view_that_changes_under_a_read(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        them.origin.put("b", "k", LARGE)
        reader = them.nodes[0]
        views = [only(them, node) for node in them.nodes] + [them.view]
        reading = [asyncio.ensure_future(reader.read("b", "k")) for _ in range(4)]
        chance = random.Random(5)
        while not all(each.done() for each in reading):
            for node in them.nodes:
                await them.tell(node, chance.choice(views))
        assert all(each.result().body == LARGE for each in reading)
        for node in them.nodes:
            await them.tell(node, them.view)


# --- drains -------------------------------------------------------------------------------------------------------------------


async def test_blocks_are_taken_from_a_node_that_leaves(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", LARGE)
        giver, taker, _ = them.nodes
        await giver.read("b", "k")
        await them.settled()
        record = record_of(giver)
        assert giver.blocks(record) == list(range(6))
        them.origin.forget()
        numbers = [at for at in range(6) if not taker.has(record, at)]
        assert taker.carrier.take("b", "k", record, numbers, giver.name)
        await them.settled()
        assert taker.blocks(record) == list(range(6))
        assert them.origin.requests == []
        assert [ask.cached for path, ask in giver.questions if path == wire.BLOCK][-len(numbers) :] == [True] * len(
            numbers
        )


async def test_what_a_leaving_node_has_not_got_comes_from_the_origin(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never"), cluster=IMPATIENT) as them:
        giver, taker, _ = them.nodes
        record = await known(them, "k", LARGE)
        assert taker.carrier.take("b", "k", record, (1, 2), giver.name)
        await them.settled()
        assert taker.blocks(record) == [1, 2]
        await giver.gone()
        assert taker.carrier.take("b", "k", record, (3,), giver.name)
        assert taker.carrier.take("b", "k", record, (4,), "nobody")
        await them.settled()
        assert taker.blocks(record) == [1, 2, 3, 4]
        assert len(them.gets("k")) == 4


async def test_who_is_busy_or_cannot_store_takes_nothing(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, 2, fills_max_bytes=64 * BLOCK) as them:
        giver, taker = them.nodes
        body = os.urandom(40 * BLOCK)
        record = await known(them, "k", body)
        hold = them.origin.hold(times=None, at="answer")
        assert taker.carrier.take("b", "k", record, range(20), giver.name)
        await until(lambda: taker.carrier.stats().fills >= 16)
        assert not taker.carrier.take("b", "k", record, (30,), giver.name)
        hold.release()
        await them.settled()
        assert taker.carrier.take("b", "k", record, (30,), giver.name)
        await them.settled()
        await taker.stop_daemon()
        await until(lambda: not taker.carrier.caching)
        assert not taker.carrier.take("b", "k", record, (31,), giver.name)
        await taker.start_daemon()
        await until(lambda: taker.carrier.caching)


async def test_fills_from_other_nodes_leave_room_for_those_that_the_others_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has buffers waiting for bytes of the others, which need buffers to have them brought."""
    monkeypatch.setattr(carrier_module, "_buffers_max", lambda *_: 2)
    patient = {"read_timeout_s": 30.0}
    async with PeerCluster(
        tmp_path, 3, rules=rules("always"), cluster=patient, patience_s=0.01, fill_ahead_bytes=64 * BLOCK
    ) as them:
        body = random.Random(3).randbytes(48 * BLOCK)
        await known(them, "k", body)
        for node in them.nodes:
            await node.read("b", "k", block_of(0))  # so that they look ahead at once
        await them.settled()
        hold = them.origin.hold(at="head", method="GET", times=None)
        reading = asyncio.ensure_future(them.read_all("b", "k"))
        # Heads of the others are here, and their bytes are not.
        pools = [(each.buffers, each.peer_buffers) for each in (node.carrier._context for node in them.nodes)]
        await until(lambda: all(any(pool.made == 2 and not pool._free for pool in each) for each in pools))
        hold.release()
        async with asyncio.timeout(SOON_S):
            assert all(each.body == body for each in await reading)
            await them.settled()
        assert sorted(start for start, _ in them.gets("k")) == list(range(0, len(body), BLOCK))


# --- nodes of several workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["never", "hot", "always"])
async def test_workers_of_all_nodes_ask_the_origin_once_for_all(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy), workers=2) as them:
        for key, body in (("small", SMALL), ("middle", MIDDLE), ("large", LARGE)):
            them.origin.put("b", key, body)
            for _ in range(2):
                assert all(each.body == body for each in await them.read_all("b", key))
                await them.settled()
            assert sorted(start for start, _ in them.gets(key)) == list(range(0, len(body), BLOCK))
            assert them.origin.count(key=key) == len(them.gets(key))


async def test_nodes_of_different_block_sizes(tmp_path: Path) -> None:
    """A mistake in the configuration costs requests, and no byte."""
    async with PeerCluster(tmp_path, rules=rules("always"), each=lambda at: {"block_bytes": BLOCK << at}) as them:
        for size in (0, 1000, 40_000, BLOCK, BLOCK + 1, 3 * BLOCK, len(LARGE)):
            key = f"k{size}"
            them.origin.put("b", key, LARGE[:size])
            for _ in range(2):
                assert all(each.body == LARGE[:size] for each in await them.read_all("b", key))
            await them.settled()


async def test_a_small_block_that_is_still_compared_is_waited_for_by_the_other_worker(tmp_path: Path) -> None:
    """The first has its bytes; the second sees them when they are in the store, and asks nobody."""
    async with PeerCluster(tmp_path, rules=rules("always"), workers=2) as them:
        record = await known(them, "k", SMALL)
        owner, _, reader = them.block_order("b", "k", record, 0)
        comparing = owner.fault(path=wire.CHECKSUM, stall=-1)
        first = asyncio.ensure_future(reader.read("b", "k"))
        await comparing.met()
        assert (await first).body == SMALL
        second = asyncio.ensure_future(reader.read("b", "k", worker=1))
        await until(lambda: reader.workers[1].carrier._blocks._followed)
        comparing.end()
        assert (await second).body == SMALL
        assert owner.count(wire.BLOCK) == 1 and not reader.asked


async def test_a_refusal_that_is_always_asked_for_reaches_all_workers(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot", ALWAYS), workers=2) as them:
        workers = [(node, at) for node in them.nodes for at in range(2)] * 6
        got = await asyncio.gather(*(n.read("b", "none", worker=at) for n, at in workers), return_exceptions=True)
        assert all(isinstance(each, OriginRefused) and each.status == 404 for each in got)


@pytest.mark.parametrize("body", [SMALL, MIDDLE, LARGE])
async def test_views_that_disagree_hold_up_no_worker_either(tmp_path: Path, body: bytes) -> None:
    """The fill that must not be waited for is another worker's: only the daemon knows of it."""
    async with PeerCluster(tmp_path, 2, rules=rules("always"), workers=2, cluster={"read_timeout_s": 30.0}) as them:
        a, b = them.nodes
        await them.tell(a, only(them, b))
        await them.tell(b, only(them, a))
        for at in range(2):
            them.origin.put("b", f"k{at}", body)
            async with asyncio.timeout(SOON_S):
                # Those without the peer port read: whoever asks them goes to the others.
                got = await asyncio.gather(*(n.read("b", f"k{at}", worker=1) for n in (a, b, a, b)))
                await them.settled()
            assert all(each.body == body for each in got)
        assert len(them.origin.requests) <= 2 * 4 * -(-len(body) // BLOCK)


async def test_a_fill_that_peers_wait_for_and_that_turns_to_peers_is_waited_for_no_longer(tmp_path: Path) -> None:
    """It began at the origin, which went away under it: then it may ask the very node that waits for it."""
    async with PeerCluster(tmp_path, 2, rules=rules("always"), workers=2, cluster={"read_timeout_s": 30.0}) as them:
        for at in range(3):
            key = f"k{at}"
            record = await known(them, key, LARGE)
            number = 1
            owner, reader = them.block_order("b", key, record, number)
            hold = them.origin.hold(at="head", method="GET", key=key)
            filling = asyncio.ensure_future(owner.read("b", key, block_of(number), worker=1))
            await hold.reached()
            asking = asyncio.ensure_future(reader.read("b", key, block_of(number), worker=at % 2))
            await until(lambda owner=owner: owner.count(wire.BLOCK))
            owner.cut_off = True
            await them.origin.drop_connections()
            hold.release()
            async with asyncio.timeout(SOON_S):
                got = await asyncio.gather(filling, asking)
            start = number * BLOCK
            assert all(each.body == LARGE[start : start + BLOCK] for each in got)
            owner.cut_off = False
            owner.questions.clear()
            await them.settled()


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_peer_that_breaks_off_where_nothing_is_tried_again(tmp_path: Path, policy: str) -> None:
    """No retries are allowed; the origin is asked for the rest all the same, and nothing is kept that is not whole."""
    async with PeerCluster(tmp_path, rules=rules(policy), cluster=IMPATIENT, origin_retries=0) as them:
        for at, (size, cut) in enumerate(((1000, 400), (40_000, 20_000), (BLOCK, 1), (len(LARGE), BLOCK - 1))):
            for path in (wire.OBJECT, wire.BLOCK):
                key, number = f"k{at}{path[-1]}", min(1, (size - 1) // BLOCK)
                body = LARGE[:size]
                if path == wire.BLOCK:
                    record = await known(them, key, body)
                    owner, _, reader = them.block_order("b", key, record, number)
                else:
                    them.origin.put("b", key, body)
                    owner, _, reader = them.order("b", key)
                fault = owner.fault(path=path, cut=cut)
                speechless = owner.fault(None, path=wire.CHECKSUM, cut=-1)  # it has died
                async with asyncio.timeout(SOON_S):
                    assert (await reader.read("b", key)).body == body
                assert fault.used == 1 or policy == "never" or path == wire.BLOCK
                fault.end()
                speechless.end()
                await them.settled()
                record = record_of(reader, key)
                for block in reader.blocks(record):
                    assert reader.stored(record, block) == body[block * BLOCK : (block + 1) * BLOCK]
                assert (await reader.read("b", key)).body == body
                reader.forgive()


async def test_an_origin_that_is_down_makes_no_two_fills_wait_for_each_other(tmp_path: Path) -> None:
    settings = {"read_timeout_s": 30.0}
    async with PeerCluster(tmp_path, 2, rules=rules("always"), cluster=settings, origin_retries=0) as them:
        for at in range(4):
            key = f"k{at}"
            record = await known(them, key, LARGE)
            owner, reader = them.block_order("b", key, record, 1)
            await them.origin.down()
            reader.peers._peers[owner.name].failed(False)  # so the reader takes the block for its own
            async with asyncio.timeout(SOON_S):
                got = await asyncio.gather(
                    *(node.read("b", key, block_of(1)) for node in (owner, reader) * 2), return_exceptions=True
                )
            assert all(isinstance(each, S3Error) and each.status == 503 for each in got)
            await them.origin.up()
            reader.forgive()
            await them.settled()
            assert (await reader.read("b", key)).body == LARGE
