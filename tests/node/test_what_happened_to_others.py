"""Each test is named after something that went wrong in another cache, replication or gateway."""

from __future__ import annotations

import random
import shutil
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conditions import eventually
from tests.fakes.http import exchange, signed
from tests.fakes.node import Node, client, node, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20


def body_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def read(kos: Any, key: str, **arguments: Any) -> bytes:
    return bytes(kos.get_object(Bucket="b", Key=key, **arguments)["Body"].read())


def test_torn_metadata_and_body_on_a_hot_overwrite(kos: Any, origin: FakeOrigin) -> None:
    versions = {}
    for n in range(1, 41):
        body = body_of(200_000 + n, n)
        versions[origin.put("b", "short/torn", body, {"x-amz-meta-n": str(n)}).etag] = (str(n), body)
        stop = threading.Event()

        def overwrite(n: int = n, stop: threading.Event = stop) -> None:
            body = body_of(200_000 + 100 + n, 1000 + n)
            version = origin.put("b", "short/torn", body, {"x-amz-meta-n": f"{n}b"})
            versions[version.etag] = (f"{n}b", body)
            stop.set()

        thread = threading.Thread(target=overwrite)
        thread.start()
        for _ in range(4):
            answer = kos.get_object(Bucket="b", Key="short/torn")
            got = answer["Body"].read()
            stop.wait(10)
            number, body = versions[answer["ETag"]]
            assert answer["Metadata"]["n"] == number and got == body and answer["ContentLength"] == len(body)
        thread.join()


def test_an_object_that_changes_between_its_blocks_is_never_mixed(kos: Any, origin: FakeOrigin) -> None:
    old, new = body_of(6 * MIB, 1), body_of(6 * MIB, 2)
    for round_number in range(5):
        key = f"short/mixed{round_number}"
        origin.put("b", key, old)
        origin.fault(times=1, key=key, skip=round_number, then=lambda o, k=key: o.put("b", k, new))
        try:
            got = read(kos, key)
        except Exception as broken:  # whichever way the client's library names a broken connection
            assert "nection" in repr(broken) or "IncompleteRead" in repr(broken), broken
        else:
            assert got in (old, new)
        eventually(lambda k=key: read(kos, k) == new, "the new version is served")


def test_a_multipart_completion_missed_by_the_invalidation(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "mp", b"old bytes")
    assert read(kos, "mp") == b"old bytes"
    upload = kos.create_multipart_upload(Bucket="b", Key="mp")["UploadId"]
    part = kos.upload_part(Bucket="b", Key="mp", UploadId=upload, PartNumber=1, Body=b"new bytes!")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    kos.complete_multipart_upload(Bucket="b", Key="mp", UploadId=upload, MultipartUpload=parts)
    assert read(kos, "mp") == b"new bytes!"


def test_a_write_that_fails_half_way_still_makes_the_cache_ask_again(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "half", b"old")
    assert read(kos, "half") == b"old"
    # The origin stores the object, and the answer is lost: only asking again can tell.
    origin.fault(times=None, method="PUT", key="half", close=True)
    with pytest.raises(ClientError):
        kos.put_object(Bucket="b", Key="half", Body=b"new")
    origin.heal()
    assert read(kos, "half") == b"new"


def test_a_clients_timeout_cancelled_the_fill_so_the_cache_never_warmed(
    shared_node: Node, kos: Any, origin: FakeOrigin
) -> None:
    body = body_of(3 * MIB)
    origin.put("b", "impatient", body)
    hold = origin.hold(times=1, key="impatient", at="body", body_bytes=100_000)
    connection = signed(shared_node, "GET", "/b/impatient").open()
    hold.wait_reached()
    connection.close()
    hold.release()
    origin_requests = len(origin.requests)
    assert origin_requests >= 1
    eventually(lambda: phase(kos.head_object(Bucket="b", Key="impatient")) == "hit", "the record is kept")
    eventually(
        lambda: phase(kos.get_object(Bucket="b", Key="impatient", Range="bytes=0-99")) == "hit", "the fill went on"
    )
    assert read(kos, "impatient") == body


def test_fills_limited_by_count_not_bytes_took_21_gb(own_origin: FakeOrigin, own_directory: Path) -> None:
    """Many large cold reads at once: what is granted to fills is bounded in bytes, and so is memory."""
    import psutil

    for n in range(8):
        own_origin.put("b", f"large{n}", body_of(24 * MIB, n))
    cache = {"fills_max": "4MiB", "fill_ahead": "8MiB", "size": "400MiB"}
    with node(own_directory, own_origin.endpoint, {"cache": cache}) as one:
        kos = client(one.s3_url, max_pool_connections=32)
        with ThreadPoolExecutor(8) as pool:
            bodies = list(pool.map(lambda n: read(kos, f"large{n}"), range(8)))
        assert bodies == [body_of(24 * MIB, n) for n in range(8)]
        for pid in one.worker_pids():
            assert psutil.Process(pid).memory_info().rss < 250 * MIB


def test_a_range_across_two_blocks_came_back_truncated(kos: Any, origin: FakeOrigin) -> None:
    body = body_of(3 * MIB)
    origin.put("b", "two", body)
    for start, stop in [(MIB - 10, MIB + 10), (MIB - 1, MIB + 1), (0, MIB + 1), (MIB, 2 * MIB), (MIB - 5, 3 * MIB)]:
        for _ in range(3):
            assert read(kos, "two", Range=f"bytes={start}-{stop - 1}") == body[start:stop]


def test_one_blocks_bytes_in_anothers_place(kos: Any, origin: FakeOrigin) -> None:
    body = b"".join(bytes([n]) * MIB for n in range(12))
    origin.put("b", "places", body)
    with ThreadPoolExecutor(12) as pool:
        ranges = [f"bytes={n * MIB}-{(n + 1) * MIB - 1}" for n in range(12)]
        for n, got in enumerate(pool.map(lambda r: read(kos, "places", Range=r), ranges)):
            assert got == bytes([n]) * MIB
    assert read(kos, "places") == body


def test_the_cache_grew_to_twice_its_size(own_origin: FakeOrigin, own_directory: Path) -> None:
    limit = 96 * MIB
    bodies = {f"k{n}": body_of(3 * MIB + n, n) for n in range(80)}
    for key, body in bodies.items():
        own_origin.put("b", key, body)
    settings = {"cache": {"size": "96MiB", "segment_size": "8MiB", "index_size": "8MiB"}}
    with node(own_directory, own_origin.endpoint, settings) as one:
        kos = client(one.s3_url, max_pool_connections=16)
        largest = 0
        with ThreadPoolExecutor(4) as pool:
            for key, got in pool.map(lambda k: (k, read(kos, k)), list(bodies) * 2):
                assert got == bodies[key]
                largest = max(largest, _disk_bytes(own_directory / "cache"))
        assert largest <= limit
        assert largest >= limit // 2, "the cache was used at all"


def _disk_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # unlinked while we look
        if path.is_file():
            total += status.st_blocks * 512
    return total


def test_the_cache_was_wiped_by_a_restart(own_origin: FakeOrigin, own_directory: Path) -> None:
    bodies = {f"k{n}": body_of(40_000 * (n + 1), n) for n in range(40)}
    for key, body in bodies.items():
        own_origin.put("b", key, body)
    settings = {"rules": [{"match": "*", "freshness": "immutable"}]}
    with node(own_directory, own_origin.endpoint, settings) as one:
        kos = client(one.s3_url)
        for key, body in bodies.items():
            assert read(kos, key) == body
        eventually(lambda: all(phase(kos.get_object(Bucket="b", Key=k)) == "hit" for k in bodies), "all cached")
        assert one.stop() == 0
        own_origin.forget()
        one.start()
        for key, body in bodies.items():
            assert read(kos, key) == body
    assert own_origin.requests == []


def test_a_fill_changed_who_may_see_the_object(shared_node: Node, kos: Any, origin: FakeOrigin) -> None:
    """A fill only reads at the origin, and what is cached is shown to nobody without a signature."""
    origin.put("b", "private", b"secret bytes")
    assert read(kos, "private") == b"secret bytes"
    assert {each.method for each in origin.requests if each.key == "private"} == {"GET"}
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{shared_node.s3_url}/b/private", timeout=10)
    assert refusal.value.code == 403 and b"secret" not in refusal.value.read()
    with pytest.raises(ClientError) as stranger:
        read(client(shared_node.s3_url, "other", "other"), "private")
    assert stranger.value.response["Error"]["Code"] == "InvalidAccessKeyId"


@pytest.mark.parametrize("trailer", ["x-amz-checksum-crc32:AAAAAA==", "x-amz-checksum-crc32:nonsense", "junk"])
def test_trailers_accepted_unverified(shared_node: Node, origin: FakeOrigin, trailer: str) -> None:
    body = b"5\r\nhello\r\n0\r\n" + trailer.encode() + b"\r\n\r\n"
    answer = exchange(
        signed(
            shared_node,
            "PUT",
            "/b/trailer",
            headers={
                "content-encoding": "aws-chunked",
                "x-amz-decoded-content-length": "5",
                "x-amz-trailer": "x-amz-checksum-crc32",
            },
            payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            body=body,
        )
    )
    assert answer.status == 400
    assert answer.code in ("BadDigest", "MalformedTrailerError", "InvalidRequest", "InvalidDigest")
    assert origin.get("b", "trailer") is None


def test_a_replica_answered_an_empty_body_under_right_headers(kos: Any, origin: FakeOrigin) -> None:
    """The origin's answer ends before its first byte, or short of its length: never a whole answer to the client."""
    body = body_of(300_000)
    for n, fault in enumerate([{"body_cut": 0}, {"body_cut": 1000}, {"body_cut": 299_999}]):
        key = f"empty{n}"
        origin.put("b", key, body)
        origin.fault(times=1, key=key, **fault)
        assert read(kos, key) == body
        assert read(kos, key) == body
    origin.put("b", "always-empty", body)
    origin.fault(times=None, key="always-empty", body_cut=0)
    with pytest.raises(Exception) as broken:  # 503, or a connection that breaks off: never 200 and nothing
        read(kos, "always-empty")
    assert not isinstance(broken.value, AssertionError)
    origin.heal()
    eventually(lambda: _reads(kos, "always-empty") == body, "healed")


def _reads(kos: Any, key: str) -> bytes | None:
    try:
        return read(kos, key)
    except ClientError:
        return None


@pytest.mark.parametrize("control", ["no-store", "private", "private, max-age=60"])
def test_what_must_not_be_stored_is_not(kos: Any, origin: FakeOrigin, control: str) -> None:
    key = f"control/{control}"
    origin.put("b", key, b"first", {"cache-control": control})
    for n in range(1, 4):
        answer = kos.get_object(Bucket="b", Key=key)
        assert answer["Body"].read() == b"first" and phase(answer) == "bypass"
        assert origin.count(key=key) == n


def test_customer_keys_are_never_stored(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "sse", b"plain")
    for n in range(1, 3):
        answer = kos.get_object(Bucket="b", Key="sse", SSECustomerAlgorithm="AES256", SSECustomerKey="0" * 32)
        assert answer["Body"].read() == b"plain" and phase(answer) == "bypass"
        assert origin.count(key="sse") == n


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda index: [p.write_bytes(b"garbage" * 1000) for p in index.glob("*.mdb")], id="garbled"),
        pytest.param(lambda index: shutil.rmtree(index), id="lost"),
    ],
)
def test_a_lost_index_is_rebuilt_from_the_segments(
    own_origin: FakeOrigin, own_directory: Path, spoil: Callable[[Path], object]
) -> None:
    bodies = {f"k{n}": body_of(500_000 + n, n) for n in range(60)}
    for key, body in bodies.items():
        own_origin.put("b", key, body)
    settings = {"rules": [{"match": "*", "freshness": "immutable"}], "cache": {"segment_size": "4MiB"}}
    with node(own_directory, own_origin.endpoint, settings) as one:
        kos = client(one.s3_url)
        for key, body in bodies.items():
            assert read(kos, key) == body
        assert one.stop() == 0
        for index in (own_directory / "cache").glob("index-*"):
            spoil(index)
        own_origin.forget()
        one.start()
        for key, body in bodies.items():
            assert read(kos, key) == body
        asked = [each.status for each in own_origin.requests]
        assert asked.count(304) >= len(bodies) * 0.8, f"blocks were kept, records asked once: {asked}"
