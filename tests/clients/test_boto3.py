"""boto3 as it comes, against a real node with moto behind it."""

from __future__ import annotations

import hashlib
import io
import random
import urllib.error
import urllib.request
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from tests.conditions import eventually
from tests.fakes.node import Node, client, phase

KEYS = [
    "plain",
    "with space",
    "plus+plus",
    "é/ü/日本",
    "a//b",
    "trailing/",
    "a/../b",
    "./dot",
    "percent%41",
    "equal=and&question?hash#",
    "20m +é&=.bin",
    "quote'\"<>",
    "tilde~star*",
]


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_survives_put_get_list_and_delete(s3: Any, origin: Any, bucket: str, key: str) -> None:
    body = random_bytes(1000)
    s3.put_object(Bucket=bucket, Key=key, Body=body, Metadata={"colour": "blue"}, ContentType="text/x-odd")

    def read() -> str:
        answer = s3.get_object(Bucket=bucket, Key=key)
        assert answer["Body"].read() == body
        assert answer["Metadata"] == {"colour": "blue"}
        assert answer["ContentType"] == "text/x-odd"
        return phase(answer)

    assert read() == "miss"
    eventually(lambda: read() == "hit", "the daemon has stored it")
    assert [each["Key"] for each in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [key]
    assert [each["Key"] for each in origin.list_objects_v2(Bucket=bucket)["Contents"]] == [key]
    s3.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(ClientError) as refusal:
        s3.get_object(Bucket=bucket, Key=key)
    assert refusal.value.response["Error"]["Code"] == "NoSuchKey"


def test_an_empty_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="empty", Body=b"")
    for _ in range(2):
        answer = s3.get_object(Bucket=bucket, Key="empty")
        assert answer["Body"].read() == b"" and answer["ContentLength"] == 0
    with pytest.raises(ClientError) as refusal:
        s3.get_object(Bucket=bucket, Key="empty", Range="bytes=0-0")
    assert refusal.value.response["Error"]["Code"] == "InvalidRange"


def test_a_hundred_mib_multipart_and_back(s3: Any, bucket: str) -> None:
    body = random_bytes(100 << 20)
    transfer = TransferConfig(multipart_chunksize=8 << 20, max_concurrency=4)
    s3.upload_fileobj(io.BytesIO(body), bucket, "large", Config=transfer)
    assert s3.head_object(Bucket=bucket, Key="large")["ContentLength"] == len(body)
    for _ in range(2):
        whole = io.BytesIO()
        s3.download_fileobj(bucket, "large", whole, Config=transfer)
        assert hashlib.sha256(whole.getvalue()).digest() == hashlib.sha256(body).digest()
    answer = s3.get_object(Bucket=bucket, Key="large")
    assert answer["Body"].read() == body
    assert phase(answer) == "hit"


def test_ranges(s3: Any, bucket: str) -> None:
    body = random_bytes(5_000_000)
    s3.put_object(Bucket=bucket, Key="ranged", Body=body)
    rng = random.Random(7)
    for _ in range(40):
        start = rng.randrange(len(body))
        stop = min(len(body), start + rng.choice([1, 100, 70_000, 1 << 20, 3 << 20]))
        answer = s3.get_object(Bucket=bucket, Key="ranged", Range=f"bytes={start}-{stop - 1}")
        assert answer["Body"].read() == body[start:stop]
        assert answer["ContentRange"] == f"bytes {start}-{stop - 1}/{len(body)}"
    assert s3.get_object(Bucket=bucket, Key="ranged", Range="bytes=-10")["Body"].read() == body[-10:]
    assert s3.get_object(Bucket=bucket, Key="ranged", Range="bytes=4999990-")["Body"].read() == body[4999990:]
    assert s3.get_object(Bucket=bucket, Key="ranged", Range="bytes=4999990-9999999")["Body"].read() == body[4999990:]
    with pytest.raises(ClientError) as refusal:
        s3.get_object(Bucket=bucket, Key="ranged", Range="bytes=5000000-")
    assert refusal.value.response["Error"]["Code"] == "InvalidRange"
    assert refusal.value.response["Error"]["ActualObjectSize"] == "5000000"


def test_conditional_reads(s3: Any, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="c", Body=b"abc")["ETag"]
    assert s3.get_object(Bucket=bucket, Key="c", IfMatch=etag)["Body"].read() == b"abc"
    for arguments, status in (({"IfNoneMatch": etag}, 304), ({"IfMatch": '"other"'}, 412)):
        for _ in range(2):
            with pytest.raises(ClientError) as refusal:
                s3.get_object(Bucket=bucket, Key="c", **arguments)
            assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def test_an_overwrite_a_copy_and_a_delete_are_seen_at_once(s3: Any, bucket: str) -> None:
    for n in range(20):
        s3.put_object(Bucket=bucket, Key="k", Body=b"version %d" % n)
        assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"version %d" % n
    s3.put_object(Bucket=bucket, Key="source", Body=b"copied")
    s3.copy_object(Bucket=bucket, Key="k", CopySource={"Bucket": bucket, "Key": "source"})
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"copied"
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k"}, {"Key": "source"}]})
    for key in ("k", "source"):
        with pytest.raises(ClientError) as refusal:
            s3.get_object(Bucket=bucket, Key=key)
        assert refusal.value.response["Error"]["Code"] == "NoSuchKey"


def test_metadata_that_changes_under_the_same_etag_is_seen(s3: Any, bucket: str) -> None:
    """A copy onto itself keeps the bytes and their ETag."""
    s3.put_object(Bucket=bucket, Key="same", Body=b"bytes", Metadata={"n": "1"}, ContentType="text/plain")
    before = s3.get_object(Bucket=bucket, Key="same")
    source = {"Bucket": bucket, "Key": "same"}
    for n in ("2", "3"):
        s3.copy_object(Bucket=bucket, Key="same", CopySource=source, MetadataDirective="REPLACE", Metadata={"n": n})
        answer = s3.get_object(Bucket=bucket, Key="same")
        assert answer["ETag"] == before["ETag"] and answer["Body"].read() == b"bytes"
        assert answer["Metadata"] == {"n": n}


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
def test_checksums_survive_and_are_not_on_a_range(s3: Any, bucket: str, algorithm: str) -> None:
    body = random_bytes(100_000)
    put = s3.put_object(Bucket=bucket, Key="sum", Body=body, ChecksumAlgorithm=algorithm)
    name = f"Checksum{algorithm}"
    for _ in range(2):
        answer = s3.get_object(Bucket=bucket, Key="sum", ChecksumMode="ENABLED")
        assert answer["Body"].read() == body  # boto3 compares the checksum itself
        assert answer[name] == put[name]
    ranged = s3.get_object(Bucket=bucket, Key="sum", ChecksumMode="ENABLED", Range="bytes=0-9")
    assert ranged["Body"].read() == body[:10] and name not in ranged


def test_tagging_and_multipart_listing_are_passed_on(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="t", Body=b"x")
    tags = [{"Key": "a", "Value": "b c"}]
    s3.put_object_tagging(Bucket=bucket, Key="t", Tagging={"TagSet": tags})
    assert s3.get_object_tagging(Bucket=bucket, Key="t")["TagSet"] == tags
    upload = s3.create_multipart_upload(Bucket=bucket, Key="m")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="m", UploadId=upload, PartNumber=1, Body=b"part one")
    assert [p["PartNumber"] for p in s3.list_parts(Bucket=bucket, Key="m", UploadId=upload)["Parts"]] == [1]
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key="m", UploadId=upload, MultipartUpload=parts)
    assert s3.get_object(Bucket=bucket, Key="m")["Body"].read() == b"part one"


def test_a_completion_replaces_what_was_cached(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="m", Body=b"old")
    assert s3.get_object(Bucket=bucket, Key="m")["Body"].read() == b"old"
    upload = s3.create_multipart_upload(Bucket=bucket, Key="m")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="m", UploadId=upload, PartNumber=1, Body=b"new bytes")
    assert s3.get_object(Bucket=bucket, Key="m")["Body"].read() == b"old"
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key="m", UploadId=upload, MultipartUpload=parts)
    assert s3.get_object(Bucket=bucket, Key="m")["Body"].read() == b"new bytes"


@pytest.mark.parametrize("key", KEYS)
def test_presigned(kos_node: Node, bucket: str, key: str) -> None:
    s3 = client(kos_node.s3_url, signature_version="s3v4")
    url = s3.generate_presigned_url("put_object", {"Bucket": bucket, "Key": key}, ExpiresIn=60)
    # Without a type urllib calls it a form, and moto then looks for the body in the form's fields.
    put = urllib.request.Request(url, data=b"signed body", method="PUT", headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(put, timeout=10).close()
    url = s3.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, ExpiresIn=60)
    for _ in range(2):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read() == b"signed body"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(url.replace("X-Amz-Expires=60", "X-Amz-Expires=61"), timeout=10)
    assert refusal.value.code == 403 and b"SignatureDoesNotMatch" in refusal.value.read()


@pytest.mark.parametrize(
    ("access_key", "secret_key", "code"),
    [("nobody", "wrong", "InvalidAccessKeyId"), ("kostestkey", "wrong", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(kos_node: Node, bucket: str, access_key: str, secret_key: str, code: str) -> None:
    stranger = client(kos_node.s3_url, access_key, secret_key)
    with pytest.raises(ClientError) as refusal:
        stranger.get_object(Bucket=bucket, Key="x")
    assert refusal.value.response["Error"]["Code"] == code
    assert refusal.value.response["ResponseMetadata"]["HTTPHeaders"]["x-amz-request-id"]


def test_bucket_operations_and_errors_come_from_the_origin(s3: Any, bucket: str) -> None:
    assert bucket in [each["Name"] for each in s3.list_buckets()["Buckets"]]
    s3.head_bucket(Bucket=bucket)
    with pytest.raises(ClientError) as refusal:
        s3.get_object(Bucket="no-such-bucket-here", Key="x")
    assert refusal.value.response["Error"]["Code"] == "NoSuchBucket"
    s3.delete_bucket(Bucket=bucket)
    with pytest.raises(ClientError):
        s3.head_bucket(Bucket=bucket)
