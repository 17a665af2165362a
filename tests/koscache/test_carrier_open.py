"""Opening objects: origin requests counted, single flight over workers, revalidation, what is not stored."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from koscache.carrier import Phase, Reason, Want
from tests.fakes.cache_node import KIB, CacheNode


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2) as node:
        yield node


@pytest.mark.parametrize("size", [1, 100, 4 * KIB, 4 * KIB + 1, 64 * KIB])
async def test_a_cold_object_of_one_block_costs_one_request_and_then_none(node: CacheNode, size: int) -> None:
    body = os.urandom(size)
    node.origin.put("b", "k", body)
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.MISS, Reason.COLD)
    await node.settled()
    assert node.fast("b", "k", worker=0) == body
    assert node.fast("b", "k", worker=1) == body
    opened, got = await node.get("b", "k", worker=1)
    assert (got, opened.phase, opened.reason) == (body, Phase.HIT, Reason.FRESH)
    assert len(node.origin.requests) == 1


async def test_a_large_cold_object_costs_one_request_a_block(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 9 + 17)
    node.origin.put("b", "k", body)
    opened, got = await node.get("b", "k")
    assert got == body
    assert len(node.origin.requests) == 10
    await node.settled()
    assert node.fast("b", "k", worker=1) == body
    assert len(node.origin.requests) == 10


async def test_100_concurrent_cold_gets_over_two_workers_cost_one_request_a_block(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 3)
    node.origin.put("b", "k", body)
    got = await asyncio.gather(*(node.read("b", "k", worker=each % 2) for each in range(100)))
    assert all(each == body for each in got)
    assert len(node.origin.requests) == 3
    assert node.origin.count(key="k", method="GET") == 3


async def test_100_concurrent_cold_gets_of_something_small_cost_one_request(node: CacheNode) -> None:
    node.origin.put("b", "k", b"little")
    got = await asyncio.gather(*(node.read("b", "k", worker=each % 2) for each in range(100)))
    assert set(got) == {b"little"}
    assert len(node.origin.requests) == 1


async def test_an_empty_object(node: CacheNode) -> None:
    node.origin.put("b", "k", b"")
    assert await node.read("b", "k") == b""
    assert len(node.origin.requests) == 2  # the range of the first one says nothing of an empty object
    await node.settled()
    opened, got = await node.get("b", "k", worker=1)
    assert (got, opened.phase) == (b"", Phase.HIT)
    assert len(node.origin.requests) == 2


async def test_checksums_are_asked_for_with_one_whole_get(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 3)
    node.origin.put("b", "k", body, checksums={"crc32": "AAAAAA=="})
    opened, got = await node.get("b", "k", want=Want(checksum_mode=True))
    assert got == body
    assert opened.record.checksums_known
    assert node.origin.count(method="GET", key="k") == 3
