"""boto3 as it comes, against a real node with moto behind it.

Over http and https where that changes what it sends: over https a body comes aws-chunked with its checksum behind it and
no length before it, over http plain with its checksum and SHA-256 before it.
"""

from __future__ import annotations

import gzip
import io
import random
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from tests.clients.conftest import DOMAIN, Endpoint
from tests.clients.roundtrip import (
    MULTIPART_BYTES,
    ODD_KEY,
    PART_BYTES,
    digests,
    objects,
    random_bytes,
    sha256,
    stored,
    was_multipart,
)
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
    ODD_KEY,
    "quote'\"<>",
    "tilde~star*",
]


#: Multipart from the least that S3 takes.
SPLIT = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)


def test_round_trip(endpoint: Endpoint, origin: Any, bucket: str) -> None:
    s3 = endpoint.boto3()
    bodies = objects()
    about = {"Metadata": {"colour": "blue"}, "ContentType": "text/x-odd"}
    for key, body in bodies.items():
        s3.upload_fileobj(io.BytesIO(body), bucket, key, ExtraArgs=about, Config=SPLIT)
    assert stored(origin, bucket) == digests(bodies) and was_multipart(origin, bucket, ODD_KEY)

    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 2})
    assert [each["Key"] for page in pages for each in page["Contents"]] == sorted(bodies)
    level = s3.list_objects_v2(Bucket=bucket, Prefix="deep/", Delimiter="/")
    assert [each["Key"] for each in level["Contents"]] == ["deep/er.bin"]
    assert level["CommonPrefixes"] == [{"Prefix": "deep/down/"}]

    for key, body in bodies.items():
        for _ in range(2):
            whole = io.BytesIO()
            s3.download_fileobj(bucket, key, whole, Config=SPLIT)
            assert sha256(whole.getvalue()) == sha256(body)
        head = s3.head_object(Bucket=bucket, Key=key)
        assert head["Metadata"] == {"colour": "blue"} and head["ContentType"] == "text/x-odd"
    ranged = s3.get_object(Bucket=bucket, Key=ODD_KEY, Range=f"bytes={PART_BYTES - 5}-{PART_BYTES + 4}")
    assert ranged["Body"].read() == bodies[ODD_KEY][PART_BYTES - 5 : PART_BYTES + 5]

    s3.copy({"Bucket": bucket, "Key": ODD_KEY}, bucket, "copy", Config=SPLIT)
    assert was_multipart(origin, bucket, "copy")
    assert sha256(s3.get_object(Bucket=bucket, Key="copy")["Body"].read()) == sha256(bodies[ODD_KEY])
    gone = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in bodies]})
    assert {each["Key"] for each in gone["Deleted"]} == set(bodies) and "Errors" not in gone
    assert stored(origin, bucket).keys() == {"copy"}


def test_a_body_without_a_length(endpoint: Endpoint, origin: Any, bucket: str) -> None:
    """Even an empty one: over https boto3 announces no length at all."""
    s3 = endpoint.boto3()
    sent = []
    s3.meta.events.register("before-send.s3.PutObject", lambda request, **_: sent.append(dict(request.headers)))
    bodies = {"empty": b"", "small": b"hello", ODD_KEY: random_bytes(MULTIPART_BYTES)}
    for key, body in bodies.items():
        # What was there before must have been forgotten, however the new body came.
        origin.put_object(Bucket=bucket, Key=key, Body=b"before")
        assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == b"before"
        s3.put_object(Bucket=bucket, Key=key, Body=body)
        assert sha256(s3.get_object(Bucket=bucket, Key=key)["Body"].read()) == sha256(body)
    assert stored(origin, bucket) == digests(bodies)
    for headers in sent:
        assert ("Transfer-Encoding" in headers) == ("Content-Length" not in headers) == endpoint.secure


def test_what_is_packed_stays_packed(endpoint: Endpoint, origin: Any, bucket: str) -> None:
    s3, packed = endpoint.boto3(), gzip.compress(random_bytes(1000) * 50, mtime=0)
    s3.put_object(Bucket=bucket, Key="k.gz", Body=packed, ContentEncoding="gzip")
    for client_of in (origin, s3, s3):
        answer = client_of.get_object(Bucket=bucket, Key="k.gz")
        assert answer["ContentEncoding"] == "gzip" and answer["ContentLength"] == len(packed)
        assert answer["Body"].read() == packed


def test_buckets_in_the_host_name(
    endpoint: Endpoint, origin: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual-hosted style, which boto3 prefers for names that it takes for a domain's."""
    resolve = socket.getaddrinfo

    def resolve_all(host: Any, *arguments: Any, **settings: Any) -> Any:
        below = isinstance(host, str) and host.endswith(DOMAIN)
        return resolve("127.0.0.1" if below else host, *arguments, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_all)
    there = Endpoint(endpoint.url.replace("127.0.0.1", DOMAIN), endpoint.ca_file)
    s3 = there.boto3(s3={"addressing_style": "virtual"}, signature_version="s3v4")
    link = s3.generate_presigned_url("get_object", {"Bucket": bucket, "Key": ODD_KEY})
    assert f"//{bucket}.{DOMAIN}:" in link
    s3.put_object(Bucket=bucket, Key=ODD_KEY, Body=b"hello")
    assert stored(origin, bucket) == {ODD_KEY: sha256(b"hello")}
    for _ in range(2):
        assert s3.get_object(Bucket=bucket, Key=ODD_KEY)["Body"].read() == b"hello"
        with urllib.request.urlopen(link, timeout=10, context=there.tls) as answer:
            assert answer.read() == b"hello"
    assert [each["Key"] for each in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [ODD_KEY]
    assert bucket in [each["Name"] for each in s3.list_buckets()["Buckets"]]


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


def test_an_empty_object(endpoint: Endpoint, bucket: str) -> None:
    s3 = endpoint.boto3()
    s3.put_object(Bucket=bucket, Key="empty", Body=b"")
    for _ in range(2):
        answer = s3.get_object(Bucket=bucket, Key="empty")
        assert answer["Body"].read() == b"" and answer["ContentLength"] == 0
    with pytest.raises(ClientError) as refusal:
        s3.get_object(Bucket=bucket, Key="empty", Range="bytes=0-0")
    assert refusal.value.response["Error"]["Code"] == "InvalidRange"


def test_a_hundred_mib_multipart_and_back(s3: Any, bucket: str) -> None:
    body = random_bytes(100 << 20)
    key = "large"
    transfer = TransferConfig(multipart_chunksize=8 << 20, max_concurrency=4)
    s3.upload_fileobj(io.BytesIO(body), bucket, key, Config=transfer)
    assert s3.head_object(Bucket=bucket, Key=key)["ContentLength"] == len(body)
    for _ in range(2):
        whole = io.BytesIO()
        s3.download_fileobj(bucket, key, whole, Config=transfer)
        assert sha256(whole.getvalue()) == sha256(body)
    answer = s3.get_object(Bucket=bucket, Key=key)
    assert answer["Body"].read() == body
    assert phase(answer) in ("hit", "revalidated")  # a busy machine may take longer than the rule's 30 s


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
def test_checksums_survive_and_are_not_on_a_range(endpoint: Endpoint, bucket: str, algorithm: str) -> None:
    s3, body = endpoint.boto3(), random_bytes(100_000)
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


@pytest.mark.parametrize("signature", ["s3", "s3v4"])
def test_links_of_both_signature_versions(endpoint: Endpoint, bucket: str, signature: str) -> None:
    """Version 2 is what boto3 still makes by itself for endpoints that are not AWS'."""
    s3, body = endpoint.boto3(signature_version=signature), random_bytes(50_000)
    where = {"Bucket": bucket, "Key": ODD_KEY}
    put = s3.generate_presigned_url(
        "put_object", {**where, "ContentType": "text/x-odd", "Metadata": {"colour": "blue"}}
    )
    headers = {"Content-Type": "text/x-odd", "x-amz-meta-colour": "blue"}
    request = urllib.request.Request(put, data=body, method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10, context=endpoint.tls).close()
    link = s3.generate_presigned_url("get_object", {**where, "ResponseContentType": "text/x-asked"})
    assert ("X-Amz-Signature" if signature == "s3v4" else "Signature") in link
    for _ in range(2):
        with urllib.request.urlopen(link, timeout=10, context=endpoint.tls) as answer:
            assert answer.read() == body and answer.headers["Content-Type"] == "text/x-asked"
            assert answer.headers["x-amz-meta-colour"] == "blue"
    head = urllib.request.Request(s3.generate_presigned_url("head_object", where), method="HEAD")
    with urllib.request.urlopen(head, timeout=10, context=endpoint.tls) as answer:
        assert answer.headers["Content-Length"] == str(len(body)) and answer.headers["Content-Type"] == "text/x-odd"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(link.replace("x-asked", "x-other"), timeout=10, context=endpoint.tls)
    assert refusal.value.code == 403 and b"SignatureDoesNotMatch" in refusal.value.read()


@pytest.mark.parametrize(
    ("access_key", "secret_key", "code"),
    [("nobody", "wrong", "InvalidAccessKeyId"), ("kostestkey", "wrong", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(endpoint: Endpoint, bucket: str, access_key: str, secret_key: str, code: str) -> None:
    stranger = endpoint.boto3(access_key, secret_key)
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
