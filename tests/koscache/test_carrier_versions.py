"""Versions through the carrier: trusted for ever, fenced apart from the current object, blocks shared with it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kos.config import ALWAYS, Rule
from kos.errors import OriginRefused, S3Error
from koscache.carrier import Freshness, Phase, Reason, Want, version_name
from tests.fakes.cache_node import KIB, CacheNode, ShiftedClock

RULES = (Rule(match="b/always/*", freshness=ALWAYS, stale_if_error_s=0.0), Rule(match="*", freshness=30.0))


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
async def node(tmp_path: Path, clock: ShiftedClock) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2, rules=RULES, clock=clock) as node:
        node.origin.create_bucket("b", versioned=True)
        yield node


@pytest.mark.parametrize("key", ["k", "always/k"])
@pytest.mark.parametrize("size", [0, 1, 4 * KIB + 1, 64 * KIB * 3 + 5])
async def test_a_version_is_trusted_for_ever_whatever_the_rule_says(
    node: CacheNode, clock: ShiftedClock, key: str, size: int
) -> None:
    old, new = os.urandom(size), os.urandom(size + 1)
    name = version_name(key, node.origin.put("b", key, old).version_id)
    node.origin.put("b", key, new)
    opened, got = await node.get("b", name)
    assert (got, opened.phase) == (old, Phase.MISS)
    assert ("x-amz-version-id", name.split("\0")[1]) in [(n.lower(), v) for n, v in opened.record.headers]
    await node.settled()
    node.origin.forget()
    clock.ahead_s += 1e9
    for worker in (0, 1):
        opened, got = await node.get("b", name, worker=worker)
        assert (got, opened.phase, opened.reason) == (old, Phase.HIT, Reason.FRESH)
    assert node.fast("b", name) == old and node.origin.requests == []
    assert await node.read("b", key) == new


async def test_every_request_for_a_version_names_it(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 4 + 1)
    version = node.origin.put("b", "k", body)
    node.origin.put("b", "k", b"newer")
    assert await node.read("b", version_name("k", version.version_id)) == body
    await node.settled()
    assert len(node.origin.requests) == 5
    assert {each.query.get("versionId") for each in node.origin.requests} == {version.version_id}
    assert {each.key for each in node.origin.requests} == {"k"}


async def test_versions_of_the_same_bytes_share_their_blocks(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 3)
    version = node.origin.put("b", "k", body)
    assert await node.read("b", "k") == body
    await node.settled()
    node.origin.forget()
    want = Want(head_only=True)
    await node.open("b", version_name("k", version.version_id), want)
    assert await node.read("b", version_name("k", version.version_id)) == body
    assert [(each.method, each.status) for each in node.origin.requests] == [("HEAD", 200)]


async def test_a_plain_write_leaves_versions_alone(node: CacheNode) -> None:
    name = version_name("k", node.origin.put("b", "k", b"old").version_id)
    await node.read("b", name)
    await node.settled()
    async with node.workers[0].carrier.writing("b", ["k"]):
        node.origin.put("b", "k", b"new")
    assert node.workers[1].carrier.peek("b", name).freshness is Freshness.FRESH
    assert await node.read("b", "k", worker=1) == b"new"


async def test_a_version_that_is_removed_through_the_node_is_gone_at_once(node: CacheNode) -> None:
    kept, gone = (node.origin.put("b", "k", body).version_id for body in (b"kept", b"gone"))
    for each in (kept, gone):
        await node.read("b", version_name("k", each))
    await node.settled()
    async with node.workers[0].carrier.writing("b", ["k"], versions=["k"]):
        assert node.workers[1].carrier.peek("b", version_name("k", gone)).freshness is Freshness.FENCED
        node.origin.store.remove("b", "k", gone)
    for worker in (0, 1):
        with pytest.raises(OriginRefused) as refused:
            await node.read("b", version_name("k", gone), worker=worker)
        assert refused.value.status == 404 and b"NoSuchVersion" in refused.value.body
    opened, got = await node.get("b", version_name("k", kept))
    assert (got, opened.phase, opened.reason) == (b"kept", Phase.REVALIDATED, Reason.FENCED)


async def test_the_null_version_follows_the_rule_and_the_writes_of_its_key(
    node: CacheNode, clock: ShiftedClock
) -> None:
    node.origin.put("plain", "k", b"first")
    name = version_name("k", "null")
    assert await node.read("plain", name) == b"first"
    await node.settled()
    assert (await node.get("plain", name))[0].phase is Phase.HIT
    async with node.workers[0].carrier.writing("plain", ["k"]):
        node.origin.put("plain", "k", b"second")
    assert await node.read("plain", name, worker=1) == b"second"
    await node.settled()
    clock.ahead_s += 31
    node.origin.put("plain", "k", b"third, around kos")
    assert await node.read("plain", name) == b"third, around kos"


async def test_a_suspended_bucket_replaces_the_null_version_and_keeps_the_others(node: CacheNode) -> None:
    version = version_name("k", node.origin.put("b", "k", b"numbered").version_id)
    node.origin.store.suspend_versions("b")
    node.origin.put("b", "k", b"null 1")
    null = version_name("k", "null")
    assert [await node.read("b", name) for name in (version, null)] == [b"numbered", b"null 1"]
    await node.settled()
    async with node.workers[0].carrier.writing("b", ["k"]):
        node.origin.put("b", "k", b"null 2")
    assert [await node.read("b", name, worker=1) for name in (version, null)] == [b"numbered", b"null 2"]


async def test_delete_markers_are_refusals_and_not_kept(node: CacheNode) -> None:
    node.origin.put("b", "k", b"body")
    marker = node.origin.store.remove("b", "k")
    assert marker is not None
    for times in (1, 2):
        with pytest.raises(OriginRefused) as refused:
            await node.read("b", version_name("k", marker.version_id))
        told = {name.lower(): value for name, value in refused.value.headers}
        assert refused.value.status == 405 and told["x-amz-delete-marker"] == "true"
        assert told["x-amz-version-id"] == marker.version_id
        assert node.origin.count(key="k", status=405) == times
    with pytest.raises(OriginRefused) as refused:
        await node.read("b", "k")
    told = {name.lower(): value for name, value in refused.value.headers}
    assert refused.value.status == 404 and told["x-amz-delete-marker"] == "true"


@pytest.mark.parametrize("conditional", [True, False])
async def test_a_refused_get_has_the_origins_document_however_it_was_asked(node: CacheNode, conditional: bool) -> None:
    with pytest.raises(OriginRefused) as refused:
        await node.read("b", version_name("k", "v9"), want=Want(conditional=conditional))
    assert b"NoSuchVersion" in refused.value.body
    assert [each.method for each in node.origin.requests] == (["HEAD", "GET"] if conditional else ["GET"])


@pytest.mark.parametrize("said", [None, "another"])
async def test_an_origin_that_does_not_say_it_is_that_version_is_relayed_and_not_kept(
    node: CacheNode, said: str | None
) -> None:
    body = os.urandom(64 * KIB * 2)
    node.origin.put("b", "k", body)
    name = version_name("k", "v-unknown-to-it")
    node.origin.fault(times=None, where=_current_object, headers={"x-amz-version-id": said})
    for _ in range(2):
        opened, got = await node.get("b", name)
        assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.NOT_THE_VERSION)
    await node.settled()
    assert node.workers[0].carrier.peek("b", name).freshness is Freshness.ABSENT


@pytest.mark.parametrize(
    ("headers", "numbered", "plain"),
    [
        ({"x-amz-restore": 'ongoing-request="true"'}, False, False),
        ({"x-amz-restore": 'ongoing-request="false", expiry-date="Fri, 21 Dec 2040 00:00:00 GMT"'}, True, True),
        ({"x-amz-replication-status": "PENDING"}, False, True),
        ({"x-amz-replication-status": "COMPLETED"}, True, True),
    ],
)
async def test_what_will_change_by_itself_is_not_kept_for_ever(
    node: CacheNode, headers: dict[str, str], numbered: bool, plain: bool
) -> None:
    version = version_name("k", node.origin.put("b", "k", b"body").version_id)
    for name, kept in ((version, numbered), ("k", plain)):
        fault = node.origin.fault(times=None, headers=headers)
        opened, got = await node.get("b", name, want=Want(head_only=True))
        assert opened.reason is (Reason.COLD if kept else Reason.IN_MOTION)
        fault.end()
        await node.settled()
        opened, got = await node.get("b", name)
        assert got == b"body"
        said = {n.lower() for n, _ in opened.record.headers}
        assert (headers.keys() <= said) is kept, "as kept, or as it is now"


async def test_a_new_version_of_the_same_bytes_and_second_is_told_from_the_old_one(
    node: CacheNode, clock: ShiftedClock
) -> None:
    old = node.origin.put("b", "k", b"body")
    await node.read("b", "k")
    await node.settled()
    new = node.origin.put("b", "k", b"body", last_modified=old.last_modified)
    clock.ahead_s += 31
    opened, got = await node.get("b", "k")
    assert [each.status for each in node.origin.requests[-2:]] == [304, 200]
    assert got == b"body" and old.version_id != new.version_id
    assert {n.lower(): v for n, v in opened.record.headers}["x-amz-version-id"] == new.version_id


def _current_object(request: object) -> bool:
    request.query.pop("versionId", None)  # type: ignore[attr-defined]
    return True


async def test_a_version_is_served_while_the_origin_is_down_and_not_when_it_may_be_gone(node: CacheNode) -> None:
    name = version_name("k", node.origin.put("b", "k", b"body").version_id)
    await node.read("b", name)
    await node.settled()
    await node.origin.down()
    assert await node.read("b", name, worker=1) == b"body"
    async with node.workers[0].carrier.writing("b", ["k"], versions=["k"]):
        pass
    with pytest.raises(S3Error):
        await node.read("b", name)


async def test_names_as_long_as_they_can_be_are_kept(node: CacheNode) -> None:
    key, version_id = "k" * 1024, "v" * 1024
    node.origin.put("b", key, b"body").version_id = version_id
    name = version_name(key, version_id)
    assert await node.read("b", name) == b"body"
    await node.settled()
    assert node.fast("b", name, worker=1) == b"body"
    await node.stop_daemon()
    await node.start_daemon()
    assert (await node.get("b", name, worker=1))[0].phase is Phase.HIT
