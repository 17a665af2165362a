"""How often the origin is asked: the figure that a cache exists for."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conditions import eventually
from tests.fakes.node import Node, client, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20


def body_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [0, 10, 60_000, 70_000, MIB])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_a_cold_object_of_one_block_costs_one_request(
    shared_node: Node, origin: FakeOrigin, size: int, checksums: str
) -> None:
    key = f"one/{size}/{checksums}"
    origin.put("b", key, body_of(size))
    s3 = client(shared_node.s3_url, response_checksum_validation=checksums)
    assert s3.get_object(Bucket="b", Key=key)["Body"].read() == body_of(size)
    # Without a wish for checksums the first request has a range, which an empty object refuses.
    assert origin.count(key=key) == (2 if size == 0 and checksums == "when_required" else 1)
    # The record reaches the index a moment after the answer; a read in between shares it and asks nothing.
    eventually(lambda: phase(s3.get_object(Bucket="b", Key=key)) == "hit", "the second read is a hit")
    assert s3.get_object(Bucket="b", Key=key)["Body"].read() == body_of(size)
    assert origin.count(key=key) == (2 if size == 0 and checksums == "when_required" else 1)


@pytest.mark.parametrize("size", [30_000, 700_000, 5 * MIB + 17])
def test_a_hundred_concurrent_cold_reads_cost_one_request_a_block(kos: Any, origin: FakeOrigin, size: int) -> None:
    key = f"hundred/{size}"
    origin.put("b", key, body_of(size))
    start = threading.Barrier(100)

    def read(_: int) -> bytes:
        start.wait()
        return bytes(kos.get_object(Bucket="b", Key=key)["Body"].read())

    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(read, range(100))) == {body_of(size)}
    asked = [(each.op, each.headers.get("range"), each.status) for each in origin.requests if each.key == key]
    assert len(asked) == -(-size // MIB), asked
    # boto3 asks for checksums, so the first answer is whole and is left after its first block: what then lies in the
    # sockets' buffers is lost.
    assert sum(each.sent_bytes for each in origin.requests if each.key == key) <= 2 * size


def test_a_hot_read_asks_nothing_within_freshness(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "hot", body_of(2_500_000))
    kos.get_object(Bucket="b", Key="hot")["Body"].read()
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="hot", Range="bytes=2400000-")) == "hit", "all is cached")
    origin.forget()
    for _ in range(20):
        answer = kos.get_object(Bucket="b", Key="hot")
        assert answer["Body"].read() == body_of(2_500_000) and phase(answer) == "hit"
        assert kos.head_object(Bucket="b", Key="hot")["ContentLength"] == 2_500_000
    assert origin.requests == []


def test_an_expired_record_costs_one_304(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "always/a", body_of(400_000))
    kos.get_object(Bucket="b", Key="always/a")["Body"].read()
    origin.forget()
    answer = kos.get_object(Bucket="b", Key="always/a")
    assert answer["Body"].read() == body_of(400_000) and phase(answer) == "revalidated"
    assert [each.status for each in origin.requests] == [304]


def test_concurrent_revalidations_share_one_304(kos: Any, origin: FakeOrigin) -> None:
    """Rule `always`: each read asks, but those that wait together wait for one answer."""
    origin.put("b", "always/shared", body_of(50_000))
    kos.get_object(Bucket="b", Key="always/shared")["Body"].read()
    origin.forget()
    hold = origin.hold(times=1, key="always/shared")
    with ThreadPoolExecutor(20) as pool:
        reads = [pool.submit(lambda: kos.get_object(Bucket="b", Key="always/shared")["Body"].read()) for _ in range(20)]
        hold.wait_reached()
        hold.release()
        assert {each.result() for each in reads} == {body_of(50_000)}
    assert origin.count(key="always/shared") < 20


def test_a_short_range_of_a_large_object_pulls_no_block(kos: Any, origin: FakeOrigin) -> None:
    """A 100-byte range pulled the whole object: elsewhere; here the first touch is passed through as it is."""
    origin.put("b", "large", body_of(20 * MIB))
    body = body_of(20 * MIB)
    answer = kos.get_object(Bucket="b", Key="large", Range="bytes=5000000-5000099")
    assert answer["Body"].read() == body[5_000_000:5_000_100]
    eventually(lambda: sum(each.sent_bytes for each in origin.requests) > 0, "the origin counted what it sent")
    assert sum(each.sent_bytes for each in origin.requests) == 100
    answer = kos.get_object(Bucket="b", Key="large", Range="bytes=5000100-5000199")
    assert answer["Body"].read() == body[5_000_100:5_000_200]
    eventually(
        lambda: sum(each.sent_bytes for each in origin.requests) >= 100 + MIB, "the second touch fills its block"
    )
    assert sum(each.sent_bytes for each in origin.requests) <= 200 + MIB
    origin.forget()
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="large", Range="bytes=5000200-5000299")) == "hit", "a hit")


def test_a_missing_object_is_asked_for_each_time(kos: Any, origin: FakeOrigin) -> None:
    for n in range(1, 4):
        with pytest.raises(ClientError) as refusal:
            kos.get_object(Bucket="b", Key="absent")
        assert refusal.value.response["Error"]["Code"] == "NoSuchKey"
        assert origin.count(key="absent") == n
    origin.put("b", "absent", b"here now")
    assert kos.get_object(Bucket="b", Key="absent")["Body"].read() == b"here now"
