"""Serving a small hit again without looking anew: only while nothing whatever has changed."""

import os
from pathlib import Path

import pytest

from kos.errors import OriginUnavailable, S3Error
from koscache.carrier import Carrier, Freshness, Sight
from tests.conditions import until
from tests.fakes.cache_node import CacheNode

SIZE = 5000


async def ready(node: CacheNode, key: str, body: bytes) -> tuple[Carrier, Sight]:
    node.origin.put("b", key, body)
    assert await node.read("b", key) == body
    carrier = node.workers[0].carrier
    await until(lambda: carrier.sight("b", key, 0, len(body)) is not None)
    sight = carrier.sight("b", key, 0, len(body))
    assert sight is not None
    return carrier, sight


def again(node: CacheNode, carrier: Carrier, sight: Sight, after_s: float = 0.0) -> bytes | None:
    if not carrier.still(sight, node.clock.now() + after_s):
        return None
    found = carrier.read_again(sight, memoryview(bytearray(SIZE * 2)))
    return None if found is None else bytes(found)


async def test_the_same_bytes_while_nothing_changes(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        body = os.urandom(SIZE)
        carrier, sight = await ready(node, "k", body)
        for _ in range(3):
            assert again(node, carrier, sight) == body
        part = carrier.sight("b", "k", 100, 300)
        assert part is not None and again(node, carrier, part) == body[100:300]


async def test_not_after_its_time_and_not_before(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        carrier, sight = await ready(node, "k", os.urandom(SIZE))
        fresh_s = carrier.peek("b", "k").rule.freshness
        assert 0 < fresh_s < float("inf")
        assert again(node, carrier, sight, after_s=fresh_s + 1) is None
        assert again(node, carrier, sight, after_s=-10_000.0) is None, "the clock was set back"


async def test_not_after_a_write(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=2) as node:
        carrier, sight = await ready(node, "k", os.urandom(SIZE))
        async with node.workers[1].carrier.writing("b", ["k"]):
            assert again(node, carrier, sight) is None, "in the other worker, and before the write has ended"
        assert again(node, carrier, sight) is None
        assert carrier.peek("b", "k").freshness is Freshness.FENCED


async def test_not_after_any_change_of_the_index(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        body = os.urandom(SIZE)
        carrier, sight = await ready(node, "k", body)
        carrier, other = await ready(node, "other", os.urandom(SIZE))
        assert again(node, carrier, sight) is None, "something was stored: look properly"
        anew = carrier.sight("b", "k", 0, SIZE)
        assert anew is not None and again(node, carrier, anew) == body
        assert again(node, carrier, other) is not None


async def test_it_goes_on_while_the_daemon_is_away_and_ends_with_a_new_index(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        body = os.urandom(SIZE)
        carrier, _ = await ready(node, "k", body)
        await node.stop_daemon()
        now = carrier.sight("b", "k", 0, SIZE)
        assert now is not None and again(node, carrier, now) == body
        Path(node.config.cache.dir, "CURRENT").unlink()
        await node.start_daemon()
        await until(lambda: carrier.caching)
        assert again(node, carrier, now) is None


async def test_a_write_of_unknown_end_is_fenced_once_more_and_only_such_a_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koscache.carrier.carrier._UNSETTLED_MAX", 3)
    async with CacheNode(tmp_path, workers=1) as node:
        carrier = node.workers[0].carrier
        fence = carrier._reader.fence

        async def fail(error: Exception) -> int:
            with pytest.raises(type(error)):
                async with carrier.writing("b", ["k"]):
                    raise error
            return fence.value_of("b", "k")

        await fail(S3Error("BadDigest"))
        assert not carrier._unsettled, "it never was a whole request for the origin"
        passed = {await fail(OriginUnavailable("lost")) for _ in range(3)}
        assert len(passed) == 3 and len(carrier._unsettled) == 3
        await fail(OriginUnavailable("lost"))
        assert len(carrier._unsettled) == 3, "bounded: the oldest counts as ended"
        before = fence.value_of("b", "k")
        carrier._settle()
        assert fence.value_of("b", "k") != before
        assert len(carrier._unsettled) == 2


async def test_a_write_passes_the_listings_that_may_show_its_keys_before_and_after(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=2) as node:
        writer, reader = node.workers[0].carrier, node.workers[1].carrier
        prefixes = ("", "a", "a/", "a/b/", "a/b/k", "a/b/kk", "z/")
        seen = [[reader.listing_values("b", prefix) for prefix in prefixes]]
        async with writer.writing("b", ["a/b/k"]):
            seen.append([reader.listing_values("b", prefix) for prefix in prefixes])
        seen.append([reader.listing_values("b", prefix) for prefix in prefixes])
        for number, prefix in enumerate(prefixes):
            values = {each[number] for each in seen}
            assert len(values) == (1 if prefix == "z/" else 3), prefix
        async with writer.writing("b", [], bucket_itself=True):
            pass
        now = [reader.listing_values("b", prefix) for prefix in prefixes]
        assert all(value != was for value, was in zip(now, seen[-1], strict=True))


async def test_a_write_of_a_thousand_keys_is_told_to_the_daemon_in_messages_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        carrier = node.workers[0].carrier
        keys = ["/".join(f"{number}-{level}" for level in range(33)) for number in range(1000)]
        (session,) = node.daemon._sessions.values()
        async with carrier.writing("b", keys):
            await until(lambda: len({slot for slots in session.writes.values() for slot in slots}) > 20_000)
            assert all(len(slots) <= 8192 for slots in session.writes.values())
        await until(lambda: not session.writes)
        monkeypatch.setattr("koscache.carrier.carrier._UNSETTLED_SLOTS_MAX", 50_000)
        for _ in range(3):
            with pytest.raises(OriginUnavailable):
                async with carrier.writing("b", keys):
                    raise OriginUnavailable("lost")
        assert len(carrier._unsettled) == 1, "bounded by slots as well"
        assert carrier._unsettled_slots == len(carrier._unsettled[0].slots)
