"""Reads by partNumber, as SDKs that download in parts make them: right bounds, once asked for, blocks shared."""

from __future__ import annotations

import base64
import binascii
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conditions import eventually
from tests.fakes.node import Node, client, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20
SIZES = (MIB + 7, 2 * MIB, 5, 300_000)
BODY = random.Random(7).randbytes(sum(SIZES))
ETAG = f'"{"ab" * 16}-4"'


def piece(number: int) -> bytes:
    start = sum(SIZES[: number - 1])
    return BODY[start : start + SIZES[number - 1]]


def crc32(data: bytes) -> str:
    return base64.b64encode(binascii.crc32(data).to_bytes(4, "big")).decode()


def put(origin: FakeOrigin, key: str, *, etag: str = ETAG, composite: bool = True) -> Any:
    composed = {"x-amz-checksum-crc32": "AAAAAA==-4", "x-amz-checksum-type": "COMPOSITE"}
    whole = {"x-amz-checksum-crc32": crc32(BODY), "x-amz-checksum-type": "FULL_OBJECT"}
    each = tuple(
        {"x-amz-checksum-crc32": crc32(piece(number)), "x-amz-checksum-type": "COMPOSITE"} for number in (1, 2, 3, 4)
    )
    return origin.put(
        "b", key, BODY, etag=etag, parts=SIZES, checksums=composed if composite else whole,
        part_checksums=each if composite else (),
    )  # fmt: skip


@pytest.fixture
def ignorant(origin: FakeOrigin) -> Iterator[FakeOrigin]:
    origin.store.knows_parts = False
    yield origin
    origin.store.knows_parts = True


def headers(answer: dict[str, Any]) -> dict[str, str]:
    return dict(answer["ResponseMetadata"]["HTTPHeaders"])


def status(answer: dict[str, Any]) -> int:
    return int(answer["ResponseMetadata"]["HTTPStatusCode"])


def refusal(call: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_an_object_of_parts_is_read_part_by_part_as_from_the_origin(
    shared_node: Node, origin: FakeOrigin, checksums: str
) -> None:
    key = f"parts/{checksums}"
    put(origin, key)
    kos = client(shared_node.s3_url, response_checksum_validation=checksums)
    direct = client(origin.endpoint, response_checksum_validation=checksums)
    for _ in ("cold", "hot"):
        for number in (2, 1, 4, 3):
            for method in ("get_object", "head_object"):
                asked: dict[str, Any] = {"Bucket": "b", "Key": key, "PartNumber": number}
                if method == "head_object" and checksums == "when_supported":
                    asked["ChecksumMode"] = "ENABLED"
                here, there = getattr(kos, method)(**asked), getattr(direct, method)(**asked)
                if method == "get_object":
                    assert here["Body"].read() == there["Body"].read() == piece(number)
                assert status(here) == status(there) == 206
                for name in ("PartsCount", "ContentRange", "ContentLength", "ETag", "ChecksumCRC32", "ChecksumType"):
                    assert here.get(name) == there.get(name), name
                assert ("ChecksumCRC32" in here) is (checksums == "when_supported")


def test_each_parts_bounds_are_asked_for_once_by_the_whole_node(shared_node: Node, origin: FakeOrigin) -> None:
    put(origin, "once")
    s3 = client(shared_node.s3_url, max_pool_connections=64)

    def read(number: int) -> bool:
        return bool(s3.get_object(Bucket="b", Key="once", PartNumber=number)["Body"].read() == piece(number))

    assert read(1)
    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(read, [2, 3, 4, 1] * 16))
    asked = [each.query["partNumber"] for each in origin.requests if "partNumber" in each.query]
    assert sorted(asked) == ["1", "2", "3", "4"]
    assert all(each.method == "HEAD" for each in origin.requests if "partNumber" in each.query)
    # A short part of a block that nobody has read yet is passed through as it is; no part begins where a block does.
    asked = [each.headers.get("range", "bytes=0-") for each in origin.requests if each.method == "GET"]
    starts = [int(each.removeprefix("bytes=").partition("-")[0]) for each in asked]
    assert sorted(start for start in starts if start % MIB == 0) == [number * MIB for number in range(4)]
    origin.forget()
    eventually(
        lambda: phase(s3.get_object(Bucket="b", Key="once", PartNumber=4)) == "hit", "the last block is in the index"
    )
    origin.forget()
    for number in (1, 2, 3, 4):
        answer = s3.get_object(Bucket="b", Key="once", PartNumber=number)
        assert answer["Body"].read() == piece(number) and phase(answer) == "hit"
    assert origin.requests == []


def test_the_bounds_of_a_first_part_that_is_not_known_say_so(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "why")
    kos.get_object(Bucket="b", Key="why")["Body"].read()
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="why")) == "hit", "all is here")
    answer = kos.get_object(Bucket="b", Key="why", PartNumber=2)
    assert answer["Body"].read() == piece(2)
    assert headers(answer)["x-kos-cache"] == "miss;reason=part"
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="why", PartNumber=2)) == "hit", "now it is known")


def test_a_full_object_checksum_is_not_a_parts(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "full", composite=False)
    kos.head_object(Bucket="b", Key="full", ChecksumMode="ENABLED")
    for number in (1, 2):
        answer = kos.get_object(Bucket="b", Key="full", PartNumber=number)
        assert answer["Body"].read() == piece(number) and "ChecksumCRC32" not in answer
    # Nor if the origin says it is.
    wrong = {"x-amz-checksum-crc32": crc32(BODY), "x-amz-checksum-type": "FULL_OBJECT"}
    origin.fault(times=None, where=lambda each: "partNumber" in each.query, headers=wrong)
    answer = kos.get_object(Bucket="b", Key="full", PartNumber=4)
    assert answer["Body"].read() == piece(4) and "ChecksumCRC32" not in answer


@pytest.mark.parametrize("size", [1, 70_000, 3 * MIB])
def test_an_object_of_one_piece_is_its_own_first_part(kos: Any, origin: FakeOrigin, size: int) -> None:
    key, body = f"piece/{size}", random.Random(size).randbytes(size)
    sums = {"x-amz-checksum-crc32": crc32(body), "x-amz-checksum-type": "FULL_OBJECT"}
    origin.put("b", key, body, checksums=sums)
    for _ in ("cold", "hot"):
        answer = kos.get_object(Bucket="b", Key=key, PartNumber=1)
        assert answer["Body"].read() == body
        assert (status(answer), answer["ContentRange"]) == (206, f"bytes 0-{size - 1}/{size}")
        assert "PartsCount" not in answer and answer["ChecksumCRC32"] == crc32(body)
        answer = kos.head_object(Bucket="b", Key=key, PartNumber=1)
        assert (status(answer), answer["ContentLength"]) == (206, size)
    assert len(origin.requests) == max(1, -(-size // MIB)), "as a plain read would have cost"
    assert refusal(lambda: kos.get_object(Bucket="b", Key=key, PartNumber=2)) == (416, "InvalidPartNumber")
    assert refusal(lambda: kos.head_object(Bucket="b", Key=key, PartNumber=2))[0] == 416


@pytest.mark.parametrize("method", ["get_object", "head_object"])
def test_checksums_of_an_object_of_one_piece_of_which_a_range_was_read(
    shared_node: Node, origin: FakeOrigin, method: str
) -> None:
    body = random.Random(3).randbytes(3 * MIB)
    sums = {"x-amz-checksum-crc32": crc32(body), "x-amz-checksum-type": "FULL_OBJECT"}
    key = f"piece/{method}"
    origin.put("b", key, body, checksums=sums)
    kos = client(shared_node.s3_url, response_checksum_validation="when_required")
    kos.get_object(Bucket="b", Key=key, Range="bytes=0-9")["Body"].read()
    answer = getattr(kos, method)(Bucket="b", Key=key, PartNumber=1, ChecksumMode="ENABLED")
    assert (status(answer), answer.get("ChecksumCRC32")) == (206, crc32(body))


def test_an_empty_object_is_answered_whole(kos: Any, origin: FakeOrigin) -> None:
    origin.put("b", "empty", b"")
    for _ in ("cold", "hot"):
        for answer in (
            kos.get_object(Bucket="b", Key="empty", PartNumber=1),
            kos.head_object(Bucket="b", Key="empty", PartNumber=1),
        ):
            assert (status(answer), answer["ContentLength"]) == (200, 0)
            assert "ContentRange" not in answer and "PartsCount" not in answer
    assert refusal(lambda: kos.get_object(Bucket="b", Key="empty", PartNumber=2)) == (416, "InvalidPartNumber")


def test_a_part_that_is_not_there(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "five")
    for _ in ("cold", "hot"):
        assert refusal(lambda: kos.get_object(Bucket="b", Key="five", PartNumber=5)) == (416, "InvalidPartNumber")
        assert refusal(lambda: kos.head_object(Bucket="b", Key="five", PartNumber=5))[0] == 416
    for number in (1, 2):
        ask = {"Bucket": "b", "Key": "five/absent", "PartNumber": number}
        assert refusal(lambda ask=ask: kos.get_object(**ask)) == (404, "NoSuchKey")  # type: ignore[misc]
        assert refusal(lambda ask=ask: kos.head_object(**ask)) == (404, "404")  # type: ignore[misc]
    origin.remove("b", "five")
    kos.delete_object(Bucket="b", Key="five")
    assert refusal(lambda: kos.get_object(Bucket="b", Key="five", PartNumber=2)) == (404, "NoSuchKey")


@pytest.mark.parametrize("number", ["0", "10001", "-1", "1.0", "one", "", " 1", "99999999999999999999"])
def test_what_is_no_part_number(shared_node: Node, origin: FakeOrigin, number: str) -> None:
    put(origin, "number")
    s3 = client(shared_node.s3_url)
    s3.meta.events.register("before-sign.s3", lambda request, **_: request.params.update(partNumber=number))
    assert refusal(lambda: s3.get_object(Bucket="b", Key="number")) == (400, "InvalidArgument")
    assert refusal(lambda: s3.head_object(Bucket="b", Key="number"))[0] == 400
    assert origin.count(key="number") == 0


def test_a_part_and_a_range_are_too_much(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "both")
    ask = {"Bucket": "b", "Key": "both", "PartNumber": 1, "Range": "bytes=0-1"}
    assert refusal(lambda: kos.get_object(**ask)) == (400, "InvalidRequest")
    assert refusal(lambda: kos.head_object(**ask))[0] == 400
    assert origin.count(key="both") == 0


def test_conditions_come_before_the_part(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "conditional")
    ask = {"Bucket": "b", "Key": "conditional"}
    for number in (1, 5):
        assert refusal(lambda n=number: kos.get_object(**ask, PartNumber=n, IfNoneMatch=ETAG))[0] == 304  # type: ignore[misc]
        assert refusal(lambda n=number: kos.get_object(**ask, PartNumber=n, IfMatch='"x"'))[0] == 412  # type: ignore[misc]
    assert kos.get_object(**ask, PartNumber=3, IfMatch=ETAG)["Body"].read() == piece(3)


def test_an_origin_that_ignores_part_numbers_answers_itself(kos: Any, ignorant: FakeOrigin) -> None:
    put(ignorant, "ignored")
    for _ in range(2):
        answer = kos.get_object(Bucket="b", Key="ignored", PartNumber=2)
        assert answer["Body"].read() == BODY, "what the origin says, and never a slice that might be wrong"
        assert headers(answer)["x-kos-cache"] == "bypass;reason=part_number"


@pytest.mark.parametrize(
    "strange",
    [
        {"etag": '"of the part"'},
        {"content-range": None},
        {"content-range": f"bytes 0-4/{len(BODY) + 1}"},
        {"content-range": f"bytes {MIB}-{len(BODY)}/{len(BODY)}"},
        {"content-range": f"bytes 0-4/{len(BODY)}"},
        {"x-amz-mp-parts-count": "many"},
        {"x-amz-mp-parts-count": "1"},
    ],
)
def test_bounds_that_cannot_be_believed_are_not(kos: Any, origin: FakeOrigin, strange: dict[str, str | None]) -> None:
    key = f"strange/{abs(hash(str(strange)))}"
    put(origin, key)
    origin.fault(times=None, where=lambda each: each.method == "HEAD" and "partNumber" in each.query, headers=strange)
    answer = kos.get_object(Bucket="b", Key=key, PartNumber=2)
    assert answer["Body"].read() == piece(2)
    assert headers(answer)["x-kos-cache"] == "bypass;reason=part_number"


def test_another_object_has_other_parts(kos: Any, origin: FakeOrigin) -> None:
    key = "always/parts"
    put(origin, key)
    assert kos.get_object(Bucket="b", Key=key, PartNumber=2)["Body"].read() == piece(2)
    turned = BODY[::-1]
    origin.put("b", key, turned, etag=f'"{"cd" * 16}-2"', parts=(10, len(BODY) - 10))
    answer = kos.get_object(Bucket="b", Key=key, PartNumber=2)
    assert answer["Body"].read() == turned[10:] and answer["PartsCount"] == 2
    origin.put("b", key, b"one piece")
    assert kos.get_object(Bucket="b", Key=key, PartNumber=1)["Body"].read() == b"one piece"
    assert refusal(lambda: kos.get_object(Bucket="b", Key=key, PartNumber=2)) == (416, "InvalidPartNumber")


def test_an_object_that_became_another_is_noticed_by_its_parts(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "became")
    assert kos.get_object(Bucket="b", Key="became", PartNumber=1)["Body"].read() == piece(1)
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="became", PartNumber=1)) == "hit", "trusted for ever")
    turned, etag = BODY[::-1], f'"{"cd" * 16}-2"'
    origin.put("b", "became", turned, etag=etag, parts=(10, len(BODY) - 10))
    answer = kos.get_object(Bucket="b", Key="became", PartNumber=2)
    assert (answer["Body"].read(), answer["ETag"], answer["PartsCount"]) == (turned[10:], etag, 2)
    for number, body in ((1, turned[:10]), (2, turned[10:])):
        answer = kos.get_object(Bucket="b", Key="became", PartNumber=number)
        assert (answer["Body"].read(), answer["ETag"]) == (body, etag), "no part of the old one any more"


def test_parts_of_a_version(kos: Any, origin: FakeOrigin) -> None:
    origin.create_bucket("versions", versioned=True)
    old = origin.put("versions", "k", BODY, etag=ETAG, parts=SIZES)
    origin.put("versions", "k", BODY[::-1], etag=f'"{"cd" * 16}-2"', parts=(10, len(BODY) - 10))
    ask = {"Bucket": "versions", "Key": "k"}
    for _ in ("cold", "hot"):
        answer = kos.get_object(**ask, VersionId=old.version_id, PartNumber=4)
        assert answer["Body"].read() == piece(4) and answer["VersionId"] == old.version_id
        assert kos.get_object(**ask, PartNumber=1)["Body"].read() == BODY[::-1][:10]


def test_the_origin_is_down(kos: Any, origin: FakeOrigin) -> None:
    put(origin, "down")
    assert kos.get_object(Bucket="b", Key="down", PartNumber=3)["Body"].read() == piece(3)
    eventually(lambda: phase(kos.get_object(Bucket="b", Key="down", PartNumber=3)) == "hit", "it is kept")
    origin.fault(times=None, status=503, code="SlowDown")
    assert kos.get_object(Bucket="b", Key="down", PartNumber=3)["Body"].read() == piece(3)
    assert refusal(lambda: kos.get_object(Bucket="b", Key="down", PartNumber=4)) == (503, "SlowDown")
