"""The fake origin is S3 enough for S3's own client."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.fakes.origin import FakeOrigin


@pytest.fixture
def fake() -> Iterator[FakeOrigin]:
    with FakeOrigin(secrets={"AK": "SK"}).in_thread() as fake:
        fake.create_bucket("b")
        yield fake


@pytest.fixture
def client(fake: FakeOrigin) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=fake.endpoint,
        aws_access_key_id="AK",
        aws_secret_access_key="SK",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def test_objects(fake: FakeOrigin, client: Any) -> None:
    key = "a//b é+%.txt"
    client.put_object(Bucket="b", Key=key, Body=b"hello", Metadata={"x": "y"}, CacheControl="no-store")
    got = client.get_object(Bucket="b", Key=key, Range="bytes=1-3")
    assert got["Body"].read() == b"ell" and got["ContentRange"] == "bytes 1-3/5" and got["CacheControl"] == "no-store"
    with pytest.raises(ClientError, match="InvalidRange"):
        client.get_object(Bucket="b", Key=key, Range="bytes=5-")
    with pytest.raises(ClientError, match="304"):
        client.get_object(Bucket="b", Key=key, IfNoneMatch=got["ETag"])
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.get_object(Bucket="b", Key=key, IfMatch='"other"')
    client.copy_object(Bucket="b", Key="copy", CopySource={"Bucket": "b", "Key": key})
    assert client.head_object(Bucket="b", Key="copy")["Metadata"] == {"x": "y"}
    client.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "copy"}]})
    assert fake.get("b", "copy") is None and fake.get("b", key) is not None


def test_multipart(fake: FakeOrigin, client: Any) -> None:
    body = bytes(range(256)) * 80_000
    client.upload_fileobj(io.BytesIO(body), "b", "big")
    stored = fake.get("b", "big")
    assert stored is not None and stored.body == body and stored.etag.endswith('-3"')
    part = client.get_object(Bucket="b", Key="big", PartNumber=2)
    assert part["Body"].read() == body[8 << 20 : 16 << 20] and part["PartsCount"] == 3
    assert not fake.store.uploads


def test_listings(fake: FakeOrigin, client: Any) -> None:
    for number in range(25):
        fake.put("b", f"d/{number % 5}/{number:03d}", b"x")
    pages = client.get_paginator("list_objects_v2")
    found = [o["Key"] for p in pages.paginate(Bucket="b", PaginationConfig={"PageSize": 7}) for o in p["Contents"]]
    assert found == sorted(f"d/{number % 5}/{number:03d}" for number in range(25))
    folders = pages.paginate(Bucket="b", Prefix="d/", Delimiter="/", PaginationConfig={"PageSize": 2})
    assert [f["Prefix"] for page in folders for f in page["CommonPrefixes"]] == [f"d/{n}/" for n in range(5)]


def test_versions(fake: FakeOrigin, client: Any) -> None:
    fake.create_bucket("v", versioned=True)
    first = client.put_object(Bucket="v", Key="k", Body=b"1")["VersionId"]
    client.put_object(Bucket="v", Key="k", Body=b"2")
    client.delete_object(Bucket="v", Key="k")
    assert fake.get("v", "k") is None
    assert client.get_object(Bucket="v", Key="k", VersionId=first)["Body"].read() == b"1"


def test_signatures_are_verified(fake: FakeOrigin) -> None:
    other = boto3.client(
        "s3",
        endpoint_url=fake.endpoint,
        aws_access_key_id="AK",
        aws_secret_access_key="wrong",
        region_name="us-east-1",
    )
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        other.list_objects_v2(Bucket="b")


def test_faults_and_log(fake: FakeOrigin, client: Any) -> None:
    fake.put("b", "k", b"12345")
    fault = fake.fault(2, status=503, code="SlowDown", key="k")
    fake.fault(op="HeadObject", then=lambda origin: origin.put("b", "k", b"other"))
    assert client.head_object(Bucket="b", Key="k")["ContentLength"] == 5
    assert fault.used == 2 and fake.count(op="HeadObject", status=503) == 2
    assert client.get_object(Bucket="b", Key="k")["Body"].read() == b"other"
    fake.call(fake.down())
    fake.call(fake.up())
    assert client.list_buckets()["Buckets"][0]["Name"] == "b"
