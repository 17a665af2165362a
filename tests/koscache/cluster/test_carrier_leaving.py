"""Readers that leave, at whatever moment, and nodes that close: nothing is kept by anybody, and the next read is right.

That buffers, descriptors, leases, connections and tasks have been given back is what PeerCluster looks at when it ends.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kos.config import Rule
from koscache.carrier import Want
from koscache.carrier import peer_wire as wire
from tests.conditions import until
from tests.fakes.peering import BLOCK, PeerCluster, PeerNode, take_into

LARGE = random.Random(65).randbytes(3 * BLOCK + 500)
SOON_S = 10.0
POLICIES = ["never", "always"]


def rules(policy: str) -> tuple[Rule, ...]:
    return (Rule(match="*", local_copy=policy, freshness=1000.0),)  # type: ignore[arg-type]


def left_over(them: PeerCluster) -> list[str]:
    return [what for node in them.nodes for what in node.left_over()]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("body", [LARGE[:2000], LARGE[:30_000], LARGE])
async def test_a_read_that_is_cancelled_after_any_number_of_turns(tmp_path: Path, policy: str, body: bytes) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy), patience_s=0.002) as them:
        cancelled, turns, step = 0, 0, 1
        while True:
            key = f"k{turns}"
            them.origin.put("b", key, body)
            *_, other = them.order("b", key)
            reading = asyncio.ensure_future(other.read("b", key))
            for _ in range(turns):
                await asyncio.sleep(0)
            if reading.done():
                break
            reading.cancel()
            await asyncio.wait([reading])
            cancelled += 1
            if turns % 8 == 0:
                await them.settled()
                await until(lambda: not left_over(them))
                assert all(each.body == body for each in await them.read_all("b", key))
            turns += step
            step += turns > 60
        assert cancelled > 10


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_read_that_is_cancelled_while_its_peers_fail(tmp_path: Path, policy: str) -> None:
    """Between one source and the next."""
    chance = random.Random(66)
    faults = [{"cut": -1}, {"cut": 100}, {"cut": 20_000}, {"status": 404}, {"status": 503}, {"garble": 50}]
    async with PeerCluster(tmp_path, rules=rules(policy), patience_s=0.002) as them:
        for turns in range(0, 90, 3):
            key = f"k{turns}"
            them.origin.put("b", key, LARGE)
            *others, reader = them.order("b", key)
            for node in others:
                node.fault(None, path=chance.choice([wire.OBJECT, wire.BLOCK]), **chance.choice(faults))  # type: ignore[arg-type]
            reading = asyncio.ensure_future(reader.read("b", key))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            for node in others:
                node.heal()
            reader.forgive()
            if turns % 9 == 0:
                await them.settled()
                await until(lambda: not left_over(them))
                assert (await reader.read("b", key)).body == LARGE


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_body_that_is_closed_early(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for pieces in range(4):
            key = f"k{pieces}"
            them.origin.put("b", key, LARGE)
            for node in them.nodes:
                opened = await node.carrier.open("b", key, Want())
                body = node.carrier.body(opened, 0, len(LARGE))
                got: list[bytes] = []
                for _ in range(pieces):
                    await take_into(got, await anext(body))
                await body.aclose()
                opened.close()
                assert LARGE.startswith(b"".join(got))
            await them.settled()
            assert all(each.body == LARGE for each in await them.read_all("b", key))


@pytest.mark.parametrize("policy", POLICIES)
async def test_what_was_opened_and_never_read(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for at, size in enumerate((0, 1000, 30_000, len(LARGE))):
            them.origin.put("b", f"k{at}", LARGE[:size])
            for node in them.nodes:
                (await node.carrier.open("b", f"k{at}", Want())).close()
                opened = await node.carrier.open("b", f"k{at}", Want())
                await node.carrier.body(opened, 0, size).aclose()
                opened.close()


async def test_a_stream_that_its_taker_leaves_half_taken(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        them.origin.put("b", "k", LARGE)
        await them.read_all("b", "k")
        await them.settled()
        for node in them.nodes:
            opened = await node.carrier.open("b", "k", Want())
            body = node.carrier.body(opened, 0, len(LARGE))
            async for piece in body:
                if hasattr(piece, "stream"):
                    data = await piece.stream.receive(1000)
                    assert data
                    break
            await body.aclose()
            opened.close()
            assert (await node.read("b", "k")).body == LARGE


async def test_an_asker_that_leaves_takes_no_fill_with_it(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", LARGE[:BLOCK])
        home, _, other = them.order("b", "k")
        hold = them.origin.hold(at="body", body_bytes=10_000)
        reading = asyncio.ensure_future(other.read("b", "k"))
        await hold.reached()
        reading.cancel()
        hold.release()
        await them.settled()
        record = home.record("k")
        assert record is not None and home.has(record, 0) and other.has(record, 0)
        assert len(them.origin.requests) == 1


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_worker_that_closes_under_its_reads(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        hold = them.origin.hold(times=None, at="body", body_bytes=5000)
        for at in range(6):
            them.origin.put("b", f"k{at}", LARGE)
        closing = them.nodes[0]
        reading = [asyncio.ensure_future(closing.read("b", f"k{at}")) for at in range(6)]
        await hold.reached()
        async with asyncio.timeout(SOON_S):
            assert await closing.tasks.close()
            for each in reading:
                each.cancel()
            await asyncio.wait(reading)
        hold.release()
        others: list[PeerNode] = them.nodes[1:]
        for node in others:
            assert (await node.read("b", "k0")).body == LARGE


async def test_a_member_that_goes_while_it_answers(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never"), cluster={"read_timeout_s": 1.0}) as them:
        for at in range(5):
            key = f"k{at}"
            them.origin.put("b", key, LARGE)
            home, *_, other = them.order("b", key)
            fault = home.fault(stall=7000 * at, path=wire.OBJECT)
            reading = asyncio.ensure_future(other.read("b", key))
            await fault.met()
            await home.gone()
            async with asyncio.timeout(SOON_S):
                assert (await reading).body == LARGE
            fault.end()
            await home.back()
            other.forgive()
