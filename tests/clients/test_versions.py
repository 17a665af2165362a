"""Versions, tags, parts and attributes by boto3, with moto as the origin: what a real client sees of them through a node."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.clients.conftest import Endpoint
from tests.conditions import eventually
from tests.fakes.node import client, phase

MIB = 1 << 20


def refusal(call: Any, **ask: Any) -> tuple[int, dict[str, str]]:
    with pytest.raises(ClientError) as caught:
        call(**ask)
    answer = caught.value.response["ResponseMetadata"]
    return answer["HTTPStatusCode"], answer["HTTPHeaders"]


@pytest.fixture
def s3(endpoint: Endpoint) -> Any:
    return endpoint.boto3()


@pytest.fixture
def versioned(s3: Any, bucket: str) -> str:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return bucket


def put(s3: Any, bucket: str, key: str, body: bytes, **more: Any) -> str:
    return str(s3.put_object(Bucket=bucket, Key=key, Body=body, **more)["VersionId"])


def test_every_version_is_read_as_it_was_written(s3: Any, versioned: str) -> None:
    bodies = [b"first", b"second " * 100_000, b"", b"fourth"]
    ids = [put(s3, versioned, "k", body, Metadata={"number": str(n)}) for n, body in enumerate(bodies)]
    assert len(set(ids)) == 4
    for _ in ("cold", "hot"):
        for n, (version_id, body) in enumerate(zip(ids, bodies, strict=True)):
            ask = {"Bucket": versioned, "Key": "k", "VersionId": version_id}
            answer = s3.get_object(**ask)
            assert answer["Body"].read() == body
            assert (answer["VersionId"], answer["Metadata"]) == (version_id, {"number": str(n)})
            head = s3.head_object(**ask)
            assert (head["VersionId"], head["ContentLength"]) == (version_id, len(body))
            if body:
                assert s3.get_object(**ask, Range="bytes=1-3")["Body"].read() == body[1:4]
    current = s3.get_object(Bucket=versioned, Key="k")
    assert (current["Body"].read(), current["VersionId"]) == (b"fourth", ids[3])


def test_a_version_becomes_a_hit_and_stays_one_after_overwrites(s3: Any, versioned: str) -> None:
    old = put(s3, versioned, "k", b"old" * MIB)
    ask = {"Bucket": versioned, "Key": "k", "VersionId": old}
    eventually(lambda: s3.get_object(**ask)["Body"].read() and phase(s3.get_object(**ask)) == "hit", "all is here")
    put(s3, versioned, "k", b"new")
    s3.delete_object(Bucket=versioned, Key="k")
    answer = s3.get_object(**ask)
    assert answer["Body"].read() == b"old" * MIB and phase(answer) == "hit"


def test_a_version_that_is_deleted_for_good_is_gone_at_once(s3: Any, versioned: str) -> None:
    ids = [put(s3, versioned, "k", body) for body in (b"1", b"2", b"3")]

    def read(version_id: str) -> bytes:
        return bytes(s3.get_object(Bucket=versioned, Key="k", VersionId=version_id)["Body"].read())

    assert [read(each) for each in ids] == [b"1", b"2", b"3"]
    s3.delete_object(Bucket=versioned, Key="k", VersionId=ids[0])
    assert refusal(read, version_id=ids[0])[0] == 404
    assert [read(each) for each in ids[1:]] == [b"2", b"3"]
    gone = {"Objects": [{"Key": "k", "VersionId": ids[2]}]}
    assert len(s3.delete_objects(Bucket=versioned, Delete=gone)["Deleted"]) == 1
    assert refusal(read, version_id=ids[2])[0] == 404
    assert s3.get_object(Bucket=versioned, Key="k")["Body"].read() == b"2", "which is the current one again"


def test_delete_markers_are_said_to_be_such(s3: Any, versioned: str, origin_url: str) -> None:
    put(s3, versioned, "k", b"body")
    assert s3.get_object(Bucket=versioned, Key="k")["Body"].read() == b"body"
    marker = s3.delete_object(Bucket=versioned, Key="k")
    assert marker["DeleteMarker"] is True
    current, version = {"Bucket": versioned, "Key": "k"}, {"Bucket": versioned, "Key": "k", **_id_of(marker)}
    for method, ask in itertools.product(("get_object", "head_object"), (current, version)):
        here, there = (refusal(getattr(each, method), **ask) for each in (s3, client(origin_url)))
        assert here[0] == there[0] == (404 if method == "get_object" or ask is current else 405)
        for name in ("x-amz-delete-marker", "x-amz-version-id", "allow"):
            assert here[1].get(name) == there[1].get(name)
    assert refusal(s3.head_object, **version)[1]["x-amz-delete-marker"] == "true"
    s3.delete_object(**version)
    assert s3.get_object(Bucket=versioned, Key="k")["Body"].read() == b"body"


def _id_of(answer: dict[str, Any]) -> dict[str, str]:
    return {"VersionId": answer["VersionId"]}


def test_listing_versions_says_what_the_origin_says(s3: Any, versioned: str, origin_url: str) -> None:
    for n in range(3):
        put(s3, versioned, "a/k", b"%d" % n)
    put(s3, versioned, "b", b"b")
    s3.delete_object(Bucket=versioned, Key="b")
    direct = client(origin_url)
    for more in ({}, {"Prefix": "a/"}, {"MaxKeys": 2}, {"Delimiter": "/"}):
        here, there = (each.list_object_versions(Bucket=versioned, **more) for each in (s3, direct))
        for field in ("Versions", "DeleteMarkers", "CommonPrefixes", "IsTruncated", "NextKeyMarker"):
            assert here.get(field) == there.get(field)


def test_the_null_version_is_the_current_one_of_a_bucket_that_had_none(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"before")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"before"
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    numbered = put(s3, bucket, "k", b"after")
    for _ in ("cold", "hot"):
        assert s3.get_object(Bucket=bucket, Key="k", VersionId="null")["Body"].read() == b"before"
        assert s3.get_object(Bucket=bucket, Key="k", VersionId=numbered)["Body"].read() == b"after"


def test_tags_show_in_reads_as_soon_as_they_are_changed(s3: Any, versioned: str) -> None:
    version_id = put(s3, versioned, "k", b"body", Tagging="a=1")
    current, version = {"Bucket": versioned, "Key": "k"}, {"Bucket": versioned, "Key": "k", "VersionId": version_id}

    def counts() -> list[int]:
        return [s3.get_object(**ask).get("TagCount", 0) for ask in (current, version)]

    assert counts() == counts() == [1, 1]
    s3.put_object_tagging(**current, Tagging={"TagSet": [{"Key": "b", "Value": "2"}, {"Key": "c", "Value": "3"}]})
    assert counts() == counts() == [2, 2], "of the version as well, which is the same object"
    assert {tag["Key"] for tag in s3.get_object_tagging(**version)["TagSet"]} == {"b", "c"}
    put(s3, versioned, "k", b"newer")
    s3.delete_object_tagging(**version)
    assert s3.get_object(**version).get("TagCount", 0) == 0
    assert s3.get_object_tagging(**version)["TagSet"] == []


@pytest.mark.parametrize("number", [None, 0])
def test_attributes_are_the_origins(s3: Any, versioned: str, origin_url: str, number: int | None) -> None:
    ids = [put(s3, versioned, "k", body, ChecksumAlgorithm="SHA256") for body in (b"one", b"and two")]
    ask: dict[str, Any] = {"Bucket": versioned, "Key": "k"}
    if number is not None:
        ask["VersionId"] = ids[number]
    ask["ObjectAttributes"] = ["ETag", "ObjectSize", "StorageClass", "Checksum"]
    here, there = (each.get_object_attributes(**ask) for each in (s3, client(origin_url)))
    for field in ("ETag", "ObjectSize", "StorageClass", "Checksum", "VersionId", "LastModified"):
        assert here.get(field) == there.get(field)
    assert here["ObjectSize"] == (7 if number is None else 3) and here["ETag"]


def test_the_first_part_of_an_object_of_one_piece(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    s3.put_object(Bucket=bucket, Key="empty", Body=b"")
    for _ in ("cold", "hot"):
        answer = s3.get_object(Bucket=bucket, Key="k", PartNumber=1)
        assert (answer["Body"].read(), answer["ContentRange"]) == (b"0123456789", "bytes 0-9/10")
        assert s3.head_object(Bucket=bucket, Key="k", PartNumber=1)["ContentLength"] == 10
        assert s3.get_object(Bucket=bucket, Key="empty", PartNumber=1)["Body"].read() == b""
        assert refusal(s3.get_object, Bucket=bucket, Key="k", PartNumber=2)[0] == 416


def test_parts_of_an_upload_are_what_the_origin_says_they_are(s3: Any, bucket: str, origin_url: str) -> None:
    """moto's HEAD names a part's own ETag, and its GET gives everything: kos cannot tell what the part is, and does not
    pretend to."""
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    bodies = [b"a" * (5 * MIB), b"b" * 1000]
    ask = {"Bucket": bucket, "Key": "k"}
    parts = [
        {"PartNumber": n, "ETag": s3.upload_part(**ask, UploadId=upload_id, PartNumber=n, Body=body)["ETag"]}
        for n, body in enumerate(bodies, 1)
    ]
    s3.complete_multipart_upload(**ask, UploadId=upload_id, MultipartUpload={"Parts": parts})
    direct = client(origin_url)
    for n in (1, 2):
        here, there = (each.get_object(**ask, PartNumber=n) for each in (s3, direct))
        assert here["Body"].read() == there["Body"].read() and here["ETag"] == there["ETag"]
        here, there = (each.head_object(**ask, PartNumber=n) for each in (s3, direct))
        assert (here["ContentLength"], here["PartsCount"]) == (there["ContentLength"], 2)
    assert s3.get_object(**ask)["Body"].read() == b"".join(bodies)
