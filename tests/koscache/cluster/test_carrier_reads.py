"""Reads through a cluster when all is well: bytes, requests at the origin, who keeps what, and what a client is told."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from kos.config import ALWAYS, Rule
from kos.errors import OriginRefused, S3Error
from kos.s3 import ranges
from kos.s3.ranges import RangeSpec
from koscache.carrier import Phase, Reason, Want, version_name
from koscache.carrier import peer_wire as wire
from koscache.cluster.view import MemberState, View
from koscache.content import Record
from tests.conditions import until
from tests.fakes.cache_node import KIB
from tests.fakes.peering import BLOCK, PeerCluster, PeerNode, take_into

LARGE = random.Random(61).randbytes(7 * BLOCK + 1234)
POLICIES = ["never", "hot", "always"]


def rules(policy: str, freshness: float = 1000.0) -> tuple[Rule, ...]:
    return (Rule(match="*", local_copy=policy, freshness=freshness, stale_if_error_s=1000.0),)  # type: ignore[arg-type]


def record_of(node: PeerNode, key: str = "k") -> Record:
    record = node.record(key)
    assert record is not None, f"{node.name} knows nothing of {key}"
    return record


# --- one request to the origin for each block ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_an_object_of_one_block_costs_one_request_however_many_nodes_read_it(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for size in (1, 4 * KIB, 4 * KIB + 1, BLOCK - 1, BLOCK):
            key, body = f"k{size}", LARGE[:size]
            them.origin.put("b", key, body)
            got = await them.read_all("b", key, times=3)
            assert all(each.body == body for each in got)
            await them.settled()
            got = await them.read_all("b", key, times=2)
            assert all(each.body == body for each in got)
            assert {each.phase for each in got} <= {Phase.HIT, Phase.PEER}
            assert them.origin.count(key=key) == 1
            home = them.order("b", key)[0]
            assert [each.key for each in home.asked].count(key) == 1, "the home asks for all"


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_large_object_costs_one_request_a_block_however_many_nodes_read_it(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", LARGE)
        for _ in range(3):
            got = await them.read_all("b", "k", times=2)
            assert all(each.body == LARGE for each in got)
            await them.settled()
        asked = sorted(start for start, _ in them.gets("k"))
        assert asked == list(range(0, len(LARGE), BLOCK))
        assert sum(each.sent_bytes for each in them.origin.requests) == len(LARGE)


async def test_many_small_objects_cost_one_request_each(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        bodies = {f"k{each}": LARGE[each * 100 : each * 150 + 1] for each in range(40)}
        for key, body in bodies.items():
            them.origin.put("b", key, body)
        got = await asyncio.gather(*(node.read("b", key) for key in bodies for node in them.nodes))
        assert [each.body for each in got] == [body for body in bodies.values() for _ in them.nodes]
        assert len(them.origin.requests) == len(bodies)
        await them.settled()
        for key in bodies:
            assert [node.blocks(record_of(node, key)) for node in them.nodes] == [[0]] * 3


async def test_blocks_are_asked_for_by_the_nodes_that_keep_them(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        them.origin.put("b", "k", LARGE)
        *_, last = them.order("b", "k")
        await last.read("b", "k")
        await them.settled()
        record = record_of(last)
        for node in them.nodes:
            theirs = [at for at in range(8) if them.block_order("b", "k", record, at)[0] is node]
            assert node.blocks(record) == theirs
            assert sorted(int(each.headers["range"][6:].partition("-")[0]) // BLOCK for each in node.asked) == theirs


# --- who keeps a copy -----------------------------------------------------------------------------------------------------


async def test_never_leaves_no_byte_on_other_nodes_disks(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        them.origin.put("b", "k", LARGE)
        them.origin.put("b", "small", b"small")
        for _ in range(3):
            await them.read_all("b", "k")
            await them.read_all("b", "small")
            await them.read_all("b", "k", "bytes=70000-70999")
            await them.settled()
        for key in ("k", "small"):
            record = record_of(them.nodes[0], key)
            kept = [block for node in them.nodes for block in node.blocks(record)]
            assert sorted(kept) == list(range(8 if key == "k" else 1)), "each block is somewhere, and nowhere twice"


async def test_hot_copies_at_the_second_read(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot")) as them:
        them.origin.put("b", "k", LARGE)
        home, _, other = them.order("b", "k")
        first = await other.read("b", "k")
        await them.settled()
        record = record_of(other)
        own = [at for at in range(8) if them.block_order("b", "k", record, at)[0] is other]
        assert first.phase == Phase.MISS and other.blocks(record) == own
        second = await other.read("b", "k")
        await them.settled()
        assert second.phase == Phase.PEER and second.body == LARGE
        assert other.blocks(record) == list(range(8))
        questions = [len(node.questions) for node in them.nodes]
        third = await other.read("b", "k")
        assert third.phase == Phase.HIT and third.body == LARGE
        assert [len(node.questions) for node in them.nodes] == questions, "nobody was asked"
        assert home.blocks(record) == [at for at in range(8) if them.block_order("b", "k", record, at)[0] is home]


async def test_hot_copies_an_object_of_one_block_at_the_second_read(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot")) as them:
        for size in (1000, 20_000, BLOCK):
            key, body = f"k{size}", LARGE[:size]
            them.origin.put("b", key, body)
            *_, other = them.order("b", key)
            kept = []
            for _ in range(3):
                assert (await other.read("b", key)).body == body
                await them.settled()
                kept.append(other.blocks(record_of(other, key)))
            assert kept == [[], [0], [0]]
            assert them.origin.count(key=key) == 1


async def test_always_copies_at_the_first_read(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        sizes = (1000, 20_000, BLOCK, len(LARGE))
        for size in sizes:
            them.origin.put("b", f"k{size}", LARGE[:size])
            *_, other = them.order("b", f"k{size}")
            assert (await other.read("b", f"k{size}")).body == LARGE[:size]
            await them.settled()
            assert other.blocks(record_of(other, f"k{size}")) == list(range(-(-size // BLOCK)))
        for node in them.nodes:
            await node.gone()
        await them.origin.down()
        for size in sizes:
            *_, other = them.order("b", f"k{size}")
            got = await other.read("b", f"k{size}")
            assert (got.phase, got.body) == (Phase.HIT, LARGE[:size])


async def test_a_head_is_no_touch(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot")) as them:
        them.origin.put("b", "k", LARGE[:20_000])
        *_, other = them.order("b", "k")
        for _ in range(3):
            await other.read("b", "k", want=Want(head_only=True))
            await them.settled()
        await other.read("b", "k")
        await them.settled()
        assert other.blocks(record_of(other)) == []


async def test_a_short_read_of_a_cold_block_passes_through_twice_and_is_then_filled(tmp_path: Path) -> None:
    """As on one node, where the second touch fills; here it is the owner's second touch, and the asker's third read."""
    async with PeerCluster(tmp_path, rules=rules("hot")) as them:
        them.origin.put("b", "k", LARGE)
        *_, other = them.order("b", "k")
        kept = []
        for _ in range(3):
            assert (await other.read("b", "k", "bytes=100-199")).body == LARGE[100:200]
            await them.settled()
            kept.append([node.blocks(record_of(other)) for node in them.order("b", "k")])
        assert kept == [[[], [], []], [[0], [], []], [[0], [], [0]]]
        assert them.gets("k") == [(100, 199), (0, BLOCK - 1)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_cold_short_read_costs_one_request(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", LARGE[:20_000])
        *_, other = them.order("b", "k")
        assert (await other.read("b", "k", "bytes=100-199")).body == LARGE[100:200]
        await them.settled()
        assert len(them.origin.requests) == 1


async def test_a_cold_range_behind_the_first_block_brings_its_block_once(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        for each in range(6):
            key = f"k{each}"
            them.origin.put("b", key, LARGE)
            *_, other = them.order("b", key)
            assert (await other.read("b", key, f"bytes={3 * BLOCK}-{4 * BLOCK - 1}")).body == LARGE[
                3 * BLOCK : 4 * BLOCK
            ]
            await them.settled()
            record = record_of(other, key)
            assert sum(node.has(record, 3) for node in them.nodes) == 1
            assert them.origin.sent_bytes(key=key) == BLOCK


# --- shapes ------------------------------------------------------------------------------------------------------------


SHAPES = [
    "bytes=0-0",
    "bytes=0-9999",
    "bytes=0-",
    "bytes=-70000",
    "bytes=-99999999",
    f"bytes={BLOCK - 1}-{BLOCK}",
    f"bytes={BLOCK}-{2 * BLOCK - 1}",
    f"bytes={BLOCK - 5}-{3 * BLOCK + 5}",
    f"bytes={7 * BLOCK + 1233}-",
    f"bytes={7 * BLOCK + 1000}-99999999",
]


@pytest.mark.parametrize("policy", POLICIES)
async def test_ranges_of_all_shapes(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for at, header in enumerate(SHAPES):
            key = f"k{at}"
            them.origin.put("b", key, LARGE)
            spec = ranges.parse(header)
            assert spec is not None
            start, stop = ranges.resolve(spec, len(LARGE))
            for _ in range(2):
                got = await them.read_all("b", key, header)
                assert [each.body == LARGE[start:stop] for each in got] == [True] * 3, (header, policy)
        assert (await them.nodes[0].read("b", "k3")).body == LARGE
        await them.settled()


async def test_a_range_outside_of_the_object(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        for at, header in enumerate((f"bytes={len(LARGE)}-", "bytes=99999999-", "bytes=-0")):
            them.origin.put("b", f"k{at}", LARGE)
            them.origin.forget()
            for node in [*them.nodes, *them.nodes]:
                with pytest.raises(S3Error) as refused:
                    await node.read("b", f"k{at}", header)
                assert refused.value.code == "InvalidRange"
            assert len(them.origin.requests) <= 2


@pytest.mark.parametrize("policy", POLICIES)
async def test_an_empty_object(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", b"")
        for _ in range(2):
            assert {each.body for each in await them.read_all("b", "k")} == {b""}
            await them.settled()
        assert len(them.origin.requests) == 2  # the range of the first one says nothing of an empty object


# --- wants --------------------------------------------------------------------------------------------------------------


async def test_a_head_of_all_nodes_costs_one_head(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        version = them.origin.put(
            "b", "k", LARGE, {"x-amz-meta-a": "b"}, checksums={"x-amz-checksum-crc32": "AAAAAA=="}
        )
        want = Want(head_only=True)
        got = await asyncio.gather(*(node.read("b", "k", want=want) for node in them.nodes))
        for each in got:
            record = each.opened.record
            assert (record.etag, record.size) == (version.etag, len(LARGE))
            assert record.checksums_known and ("x-amz-meta-a", "b") in [(n.lower(), v) for n, v in record.headers]
        await them.settled()
        got = await asyncio.gather(*(node.read("b", "k", want=want) for node in them.nodes))
        assert {each.phase for each in got} == {Phase.HIT}
        assert [each.method for each in them.origin.requests] == ["HEAD"]


async def test_a_conditional_read_of_something_cold_asks_by_head_and_for_bytes_only_when_they_are_wanted(
    tmp_path: Path,
) -> None:
    async with PeerCluster(tmp_path) as them:
        body = LARGE[:20_000]
        them.origin.put("b", "k", body)
        home, _, other = them.order("b", "k")
        opened = await other.carrier.open("b", "k", Want(conditional=True))
        opened.close()
        await them.settled()
        assert [each.method for each in them.origin.requests] == ["HEAD"]
        assert [path for path, _ in home.questions] == [wire.OBJECT]
        assert (await other.read("b", "k", want=Want(conditional=True))).body == body
        assert [each.method for each in them.origin.requests] == ["HEAD", "GET"]


async def test_checksums_come_through_the_home(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        for key, body in (("k", LARGE[:20_000]), ("large", LARGE)):
            them.origin.put("b", key, body, checksums={"x-amz-checksum-crc32": "AAAAAA=="})
            *_, other = them.order("b", key)
            got = await other.read("b", key, want=Want(checksum_mode=True))
            assert got.body == body
            assert got.opened.record.checksums_known and got.opened.record.checksums
            await them.settled()
        assert len(them.gets("k")) == 1 and len(them.gets("large")) == 8


async def test_a_record_without_checksums_is_completed_by_one_head_for_all(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        them.origin.put("b", "k", LARGE, checksums={"x-amz-checksum-crc32": "AAAAAA=="})
        await them.read_all("b", "k")  # ranged: no checksums
        await them.settled()
        them.origin.forget()
        want = Want(checksum_mode=True)
        got = await asyncio.gather(*(node.read("b", "k", want=want) for node in them.nodes))
        assert all(each.opened.record.checksums_known and each.body == LARGE for each in got)
        assert [each.method for each in them.origin.requests] == ["HEAD"]


async def test_a_version_and_the_current_object_share_their_bytes(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never", 10.0)) as them:
        them.origin.create_bucket("b", versioned=True)
        old = them.origin.put("b", "k", LARGE)
        new = them.origin.put("b", "k", LARGE[::-1])
        for node in them.nodes:
            assert (await node.read("b", version_name("k", old.version_id))).body == LARGE
            assert (await node.read("b", "k")).body == LARGE[::-1]
            assert (await node.read("b", version_name("k", new.version_id))).body == LARGE[::-1]
        await them.settled()
        asked = len(them.origin.requests)
        assert asked == 8 + 8 + 1
        them.clock.ahead_s += 10_000
        for node in them.nodes:
            assert (await node.read("b", version_name("k", old.version_id))).body == LARGE
        assert len(them.origin.requests) == asked, "a version never goes out of date"


async def test_parts_are_found_on_every_node(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        lengths = (3 * BLOCK, 4 * BLOCK, 1234)
        them.origin.put("b", "k", LARGE, etag='"x-3"', parts=lengths)
        for node in them.nodes:
            opened = await node.carrier.open("b", "k", Want(head_only=True))
            part = await node.carrier.find_part(opened, 2, lambda: None)
            assert part is not None and (part.start, part.stop, part.parts_count) == (3 * BLOCK, 7 * BLOCK, 3)
            body = node.carrier.body(opened, part.start, part.start + 10)
            got = await node.read("b", "k", f"bytes={part.start}-{part.stop - 1}")
            assert got.body == LARGE[part.start : part.stop]
            await body.aclose()
            opened.close()
        await them.settled()


# --- what is told ---------------------------------------------------------------------------------------------------------


async def test_what_a_client_is_told(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot", 30.0)) as them:
        them.origin.put("b", "k", LARGE[:20_000])
        home, second, third = them.order("b", "k")
        got = await third.read("b", "k")
        assert (got.phase, got.opened.reason, got.opened.origin_requests) == (Phase.MISS, Reason.COLD, 1)
        await them.settled()
        them.clock.ahead_s += 5
        got = await second.read("b", "k")
        assert (got.phase, got.opened.reason, got.opened.origin_requests) == (Phase.PEER, Reason.FRESH, 0)
        assert got.opened.age_s is not None and 5 <= got.opened.age_s < 15
        got = await third.read("b", "k")
        assert (got.phase, got.opened.origin_requests) == (Phase.PEER, 0)
        got = await home.read("b", "k")
        assert (got.phase, got.opened.reason) == (Phase.HIT, Reason.FRESH)


async def test_age_goes_on_with_a_copy_of_the_record(tmp_path: Path) -> None:
    """Its time does not begin anew with each node that gets one: in the end all ask together, and the origin once."""
    async with PeerCluster(tmp_path, rules=rules("always", 30.0)) as them:
        them.origin.put("b", "k", b"body")
        home, second, third = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        them.clock.ahead_s += 20
        await second.read("b", "k")
        await them.settled()
        them.clock.ahead_s += 9
        assert len(them.origin.requests) == 1
        assert (await third.read("b", "k")).opened.age_s >= 29  # type: ignore[operator]
        await them.settled()
        them.clock.ahead_s += 2
        got = await them.read_all("b", "k")
        assert {each.body for each in got} == {b"body"}
        assert [each.status for each in them.origin.requests] == [206, 304]


async def test_an_expired_record_is_revalidated_without_sending_the_copy_again(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always", 30.0)) as them:
        them.origin.put("b", "k", LARGE[:BLOCK])
        home, _, other = them.order("b", "k")
        await other.read("b", "k")
        await them.settled()
        them.clock.ahead_s += 31
        home.questions.clear()
        got = await other.read("b", "k")
        assert (got.body, got.phase) == (LARGE[:BLOCK], Phase.REVALIDATED)
        assert [each.status for each in them.origin.requests] == [206, 304]
        assert [ask.head_only for path, ask in home.questions if path == wire.OBJECT] == [True]


async def test_freshness_always_asks_the_origin_once_a_read(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot", ALWAYS)) as them:
        them.origin.put("b", "k", b"one")
        *_, other = them.order("b", "k")
        for count in range(1, 4):
            got = await other.read("b", "k")
            await them.settled()
            assert got.body == b"one" and len(them.origin.requests) == count
        them.origin.put("b", "k", b"two")
        assert (await other.read("b", "k")).body == b"two"


async def test_a_refusal_under_always_is_told_at_once(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("hot", ALWAYS)) as them:
        for count, node in enumerate(reversed(them.order("b", "none")), 1):
            with pytest.raises(OriginRefused) as refused:
                await node.read("b", "none")
            assert refused.value.status == 404 and len(them.origin.requests) == count


async def test_connections_are_used_again(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        home, other, _ = them.nodes
        for each in range(10):
            key = them.key_at(home, f"small{each}-")
            them.origin.put("b", key, LARGE[each : each + (1000 if each % 2 else 20_000)])
            await other.read("b", key)
            await them.settled()
        assert home.accepted <= 3


# --- what is not stored, and refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 3 * BLOCK])
async def test_what_may_not_be_stored_is_nowhere(tmp_path: Path, size: int) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", LARGE[:size], {"cache-control": "no-store"})
        got = await them.read_all("b", "k", times=2)
        assert all(each.body == LARGE[:size] for each in got)
        assert {(each.phase, each.opened.reason) for each in got} == {(Phase.BYPASS, Reason.NO_STORE)}
        await them.settled()
        assert all(node.record("k") is None and not node.blocks(got[0].opened.record) for node in them.nodes)


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
async def test_without_a_strong_etag_each_reader_gets_an_answer_of_his_own(tmp_path: Path, etag: str | None) -> None:
    async with PeerCluster(tmp_path) as them:
        body = LARGE[: 2 * BLOCK]
        them.origin.put("b", "k", body)
        them.origin.fault(times=None, headers={"etag": etag})
        for want, expected in (
            (Want(), body),
            (Want(range=RangeSpec(5, 70_000)), body[5:70_001]),
            (Want(head_only=True), b""),
        ):
            them.origin.forget()
            for node in them.nodes:
                got = await node.read("b", "k", want=want)
                assert got.body == expected and got.phase == Phase.BYPASS
            await them.settled()
            assert all(node.record("k") is None for node in them.nodes)
            assert len(them.origin.requests) <= 3 * len(them.nodes)


async def test_refusals_come_through_the_home_with_the_document_they_would_have_without(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        them.origin.fault(times=None, status=403, code="AccessDenied", key="secret")
        wants = (Want(), Want(head_only=True), Want(head_only=True, document=True), Want(conditional=True))
        for key, status, code in (("none", 404, "NoSuchKey"), ("secret", 403, "AccessDenied")):
            for want in wants:
                for node in them.order("b", key):
                    with pytest.raises((OriginRefused, S3Error)) as refused:
                        await node.read("b", key, want=want)
                    assert refused.value.status == status
                    if isinstance(refused.value, S3Error):
                        assert refused.value.code == code
                    elif not want.without_document:
                        assert code.encode() in refused.value.body


async def test_that_a_key_is_deleted_is_told_with_what_the_origin_says_of_it(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        them.origin.create_bucket("b", versioned=True)
        them.origin.put("b", "k", b"body")
        marker = them.origin.remove("b", "k")
        assert marker is not None
        for node in them.order("b", "k"):
            for want in (Want(), Want(head_only=True)):
                with pytest.raises(OriginRefused) as refused:
                    await node.read("b", "k", want=want)
                told = {name.lower(): value for name, value in refused.value.headers}
                assert (told["x-amz-delete-marker"], told["x-amz-version-id"]) == ("true", marker.version_id)
            with pytest.raises((OriginRefused, S3Error)) as other:
                await node.read("b", version_name("k", marker.version_id))
            assert other.value.status == 405


async def test_a_refusal_is_not_remembered_and_drops_what_was_known(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always", 30.0)) as them:
        *_, other = them.order("b", "k")
        with pytest.raises(OriginRefused):
            await other.read("b", "k")
        them.origin.put("b", "k", b"body")
        assert (await other.read("b", "k")).body == b"body"
        await them.settled()
        them.origin.remove("b", "k")
        them.clock.ahead_s += 31
        for node in them.nodes:
            with pytest.raises(OriginRefused):
                await node.read("b", "k")
        await them.settled()
        await them.origin.down()
        for node in them.nodes:
            with pytest.raises(S3Error):
                await node.read("b", "k")


# --- the way there ------------------------------------------------------------------------------------------------------------


async def test_hints_run_ahead_of_a_stream_that_is_not_copied(tmp_path: Path) -> None:
    """The owners of the blocks to come fill them while the first ones are sent: not one round trip after the other."""
    async with PeerCluster(tmp_path, rules=rules("never"), fill_ahead_bytes=8 * BLOCK) as them:
        them.origin.put("b", "k", LARGE)
        *_, other = them.order("b", "k")
        opened = await other.carrier.open("b", "k", Want())
        body = other.carrier.body(opened, 0, len(LARGE))
        got: list[bytes] = []
        await take_into(got, await anext(body))
        reading = asyncio.ensure_future(anext(body))
        await until(lambda: len({start for start, _ in them.gets("k")}) == 8)
        await take_into(got, await reading)
        async for piece in body:
            await take_into(got, piece)
        await body.aclose()
        opened.close()
        assert b"".join(got) == LARGE
        assert sum(node.count(wire.AHEAD) for node in them.nodes) >= 1
        assert len(them.origin.requests) == 8


async def test_a_node_alone_in_its_view_asks_nobody(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path) as them:
        one = them.nodes[0]
        await them.tell(one, View(0, (one.member,)))
        for each in range(5):
            them.origin.put("b", f"k{each}", LARGE[: each * 10_000])
            assert (await one.read("b", f"k{each}")).body == LARGE[: each * 10_000]
        assert not any(node.questions for node in them.nodes)


async def test_a_node_that_drains_keeps_nothing_of_what_is_cold_and_answers_all_the_same(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("never")) as them:
        leaving = them.nodes[0]
        members = tuple(
            msgspec.structs.replace(node.member, state=MemberState.DRAINING) if node is leaving else node.member
            for node in them.nodes
        )
        for node in them.nodes:
            await them.tell(node, View(0, members))
        them.origin.put("b", "k", LARGE)
        assert (await leaving.read("b", "k")).body == LARGE
        await them.settled()
        assert leaving.blocks(record_of(leaving)) == [] and leaving.asked == []
        assert len(them.origin.requests) == 8
