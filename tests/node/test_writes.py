"""Writes through a real node, and what readers see before and after, over http and https."""

from __future__ import annotations

import base64
import gzip
import hashlib
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from kos.s3.checksums import ALGORITHMS
from tests.conditions import eventually
from tests.fakes.node import Node, client, node, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20


def body_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(params=["http", "https"])
def s3(request: Any, shared_node: Node, origin: FakeOrigin) -> Any:
    """A boto3 client: over https it sends checksums behind its bodies, in chunks, without Content-Length."""
    if request.param == "http":
        return client(shared_node.s3_url)
    return client(shared_node.s3_tls_url, verify=str(shared_node.ca_file))


@pytest.fixture
def under(request: Any) -> str:
    """A prefix of this test's own: objects here are cached for ever."""
    return "writes/" + re.sub(r"\W+", "-", request.node.name)


def read(s3: Any, key: str, **arguments: Any) -> bytes:
    return bytes(s3.get_object(Bucket="b", Key=key, **arguments)["Body"].read())


def cached(s3: Any, key: str, body: bytes) -> None:
    """The object is in the cache, by a rule that trusts it for ever: only a write through kos makes it ask again."""
    assert read(s3, key) == body
    eventually(lambda: phase(s3.head_object(Bucket="b", Key=key)) == "hit", "it is cached")


def refusal(call: Any, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as refused:
        call(Bucket="b", **arguments)
    answer = refused.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


# -- conditions: whatever the answer is, readers see what the origin has


def test_conditional_puts(s3: Any, origin: FakeOrigin, under: str) -> None:
    old = origin.put("b", f"{under}/put", b"old")
    cached(s3, f"{under}/put", b"old")
    assert refusal(s3.put_object, Key=f"{under}/put", Body=b"new", IfNoneMatch="*") == (412, "PreconditionFailed")
    assert refusal(s3.put_object, Key=f"{under}/put", Body=b"new", IfMatch='"x"') == (412, "PreconditionFailed")
    assert read(s3, f"{under}/put") == b"old"
    # A refusal is also news: somebody else's object is there now.
    cached(s3, f"{under}/put", b"old")
    origin.put("b", f"{under}/put", b"of another")
    assert refusal(s3.put_object, Key=f"{under}/put", Body=b"n", IfMatch=old.etag) == (412, "PreconditionFailed")
    assert read(s3, f"{under}/put") == b"of another"
    etag = s3.head_object(Bucket="b", Key=f"{under}/put")["ETag"]
    s3.put_object(Bucket="b", Key=f"{under}/put", Body=b"new", IfMatch=etag)
    assert read(s3, f"{under}/put") == b"new"
    s3.put_object(Bucket="b", Key=f"{under}/first", Body=b"1", IfNoneMatch="*")
    assert read(s3, f"{under}/first") == b"1"


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 409, "code": "ConditionalRequestConflict"},
        {"status": 404, "code": "NoSuchKey"},
        {"close": True},  # carried out, and nobody hears of it
        {"close": True, "reset": True},
        {"close": True, "after": "head"},  # not carried out
    ],
    ids=["409", "404", "closed", "reset", "not begun"],
)
def test_a_conditional_put_that_ends_otherwise(s3: Any, origin: FakeOrigin, under: str, fault: dict[str, Any]) -> None:
    old = origin.put("b", f"{under}/odd", b"old")
    cached(s3, f"{under}/odd", b"old")
    fault_set = origin.fault(method="PUT", key=f"{under}/odd", **fault)
    status, _ = refusal(s3.put_object, Key=f"{under}/odd", Body=b"new", IfMatch=old.etag)
    assert status == fault.get("status", 503) and fault_set.used == 1
    assert origin.count(method="PUT", key=f"{under}/odd") == 1, "kos repeats no conditional write"
    present = origin.get("b", f"{under}/odd")
    assert present is not None and read(s3, f"{under}/odd") == present.body


def test_conditional_deletes(s3: Any, origin: FakeOrigin, under: str) -> None:
    old = origin.put("b", f"{under}/delete", b"old")
    cached(s3, f"{under}/delete", b"old")
    assert refusal(s3.delete_object, Key=f"{under}/delete", IfMatch='"x"') == (412, "PreconditionFailed")
    assert read(s3, f"{under}/delete") == b"old"
    s3.delete_object(Bucket="b", Key=f"{under}/delete", IfMatch=old.etag)
    assert refusal(s3.get_object, Key=f"{under}/delete") == (404, "NoSuchKey")
    assert refusal(s3.delete_object, Key=f"{under}/delete", IfMatch=old.etag) == (404, "NoSuchKey")


def test_several_deletes_each_with_its_condition(s3: Any, origin: FakeOrigin, under: str) -> None:
    etags = [origin.put("b", f"{under}/{n}", b"%d" % n).etag for n in range(3)]
    for n in range(3):
        cached(s3, f"{under}/{n}", b"%d" % n)
    items: list[dict[str, Any]] = [{"Key": f"{under}/{n}", "ETag": etags[n]} for n in range(3)]
    items[1]["ETag"] = '"other"'
    answer = s3.delete_objects(Bucket="b", Delete={"Objects": items})
    assert [each["Key"] for each in answer["Deleted"]] == [f"{under}/0", f"{under}/2"]
    assert [(each["Key"], each["Code"]) for each in answer["Errors"]] == [(f"{under}/1", "PreconditionFailed")]
    assert "content-md5" in origin.requests[-1].headers
    assert refusal(s3.get_object, Key=f"{under}/0") == (404, "NoSuchKey")
    assert read(s3, f"{under}/1") == b"1"


def test_conditional_copies(s3: Any, origin: FakeOrigin, under: str) -> None:
    source = origin.put("b", f"{under}/source", b"source")
    origin.put("b", f"{under}/target", b"old")
    cached(s3, f"{under}/target", b"old")
    where: dict[str, Any] = {"Key": f"{under}/target", "CopySource": f"b/{under}/source"}
    assert refusal(s3.copy_object, **where, CopySourceIfMatch='"x"') == (412, "PreconditionFailed")
    assert read(s3, f"{under}/target") == b"old"
    s3.copy_object(Bucket="b", **where, CopySourceIfMatch=source.etag)
    assert read(s3, f"{under}/target") == b"source"


# -- multipart


def upload(s3: Any, key: str, bodies: list[bytes], **options: Any) -> tuple[str, list[dict[str, Any]]]:
    upload_id = s3.create_multipart_upload(Bucket="b", Key=key, **options)["UploadId"]
    parts = []
    for number, body in enumerate(bodies, 1):
        where = {"Bucket": "b", "Key": key, "UploadId": upload_id, "PartNumber": number}
        parts.append({"PartNumber": number, "ETag": s3.upload_part(**where, Body=body)["ETag"]})
    return upload_id, parts


def test_a_multipart_upload_from_its_beginning_to_each_end(s3: Any, origin: FakeOrigin) -> None:
    bodies = [body_of(5 * MIB, 1), body_of(70_000, 2)]
    origin.put("b", "multipart/k", b"old")
    cached(s3, "multipart/k", b"old")
    upload_id, parts = upload(s3, "multipart/k", bodies, Metadata={"colour": "blue"}, ContentType="text/odd")
    listed = s3.list_parts(Bucket="b", Key="multipart/k", UploadId=upload_id)["Parts"]
    assert [(each["PartNumber"], each["ETag"]) for each in listed] == [(p["PartNumber"], p["ETag"]) for p in parts]
    uploads = s3.list_multipart_uploads(Bucket="b")["Uploads"]
    assert [each["Key"] for each in uploads if each["UploadId"] == upload_id] == ["multipart/k"]
    assert read(s3, "multipart/k") == b"old"
    whole = {"Bucket": "b", "Key": "multipart/k", "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.complete_multipart_upload(**whole, IfNoneMatch="*")
    with pytest.raises(ClientError, match="InvalidRequest"):
        s3.complete_multipart_upload(**whole, MpuObjectSize=7)
    done = s3.complete_multipart_upload(**whole, MpuObjectSize=sum(map(len, bodies)), ChecksumType="FULL_OBJECT")
    assert done["ETag"].endswith('-2"')
    assert origin.requests[-1].headers["x-amz-checksum-type"] == "FULL_OBJECT"
    answer = s3.get_object(Bucket="b", Key="multipart/k")
    assert answer["Body"].read() == b"".join(bodies) and answer["ETag"] == done["ETag"]
    assert answer["Metadata"] == {"colour": "blue"} and answer["ContentType"] == "text/odd"
    # Said once more, as a client does that did not hear the answer.
    again = s3.complete_multipart_upload(**whole)
    assert (again["ETag"], again["Bucket"], again["Key"]) == (done["ETag"], "b", "multipart/k")

    copy_id, _ = upload(s3, "multipart/copy", [])
    where = {"Bucket": "b", "Key": "multipart/copy", "UploadId": copy_id}
    part = s3.upload_part_copy(
        **where, PartNumber=1, CopySource="b/multipart/k", CopySourceRange=f"bytes=5-{5 * MIB + 4}"
    )["CopyPartResult"]
    parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert read(s3, "multipart/copy") == b"".join(bodies)[5 : 5 * MIB + 5]

    gone, _ = upload(s3, "multipart/gone", [b"x"])
    s3.abort_multipart_upload(Bucket="b", Key="multipart/gone", UploadId=gone)
    assert refusal(s3.abort_multipart_upload, Key="multipart/gone", UploadId=gone) == (404, "NoSuchUpload")
    assert refusal(s3.get_object, Key="multipart/gone") == (404, "NoSuchKey")


def test_a_client_repeats_a_completion_whose_answer_was_lost(shared_node: Node, origin: FakeOrigin) -> None:
    s3 = client(shared_node.s3_url, retries={"total_max_attempts": 3, "mode": "standard"})
    upload_id, parts = upload(s3, "multipart/lost", [b"x" * 1000])
    lost = origin.fault(op="CompleteMultipartUpload", close=True)
    s3.complete_multipart_upload(Bucket="b", Key="multipart/lost", UploadId=upload_id, MultipartUpload={"Parts": parts})
    assert lost.used == 1 and origin.count(op="CompleteMultipartUpload") == 2
    assert read(s3, "multipart/lost") == b"x" * 1000


# -- checksums


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS.keys() - {"md5"}))  # botocore makes no MD5
@pytest.mark.parametrize("size", [0, 1000, MIB])
def test_each_checksum_that_clients_send(s3: Any, origin: FakeOrigin, algorithm: str, size: int) -> None:
    body, key = body_of(size), f"checksums/{algorithm}/{size}"
    s3.put_object(Bucket="b", Key=key, Body=body, ChecksumAlgorithm=algorithm.upper())
    stored = origin.get("b", key)
    assert stored is not None and stored.body == body
    assert list(stored.checksums) == ["x-amz-checksum-" + algorithm]
    answer = s3.get_object(Bucket="b", Key=key, ChecksumMode="ENABLED")
    assert answer["Body"].read() == body
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-amz-checksum-" + algorithm] == stored.checksums.popitem()[1]


def test_a_composite_checksum_is_shown_with_its_number(s3: Any, origin: FakeOrigin) -> None:
    checksums = {"x-amz-checksum-crc32c": "AAAAAA==-2", "x-amz-checksum-type": "COMPOSITE"}
    origin.put("b", "checksums/composite", b"ab", checksums=checksums, etag='"' + "0" * 32 + '-2"', parts=(1, 1))
    for _ in range(2):
        answer = s3.get_object(Bucket="b", Key="checksums/composite", ChecksumMode="ENABLED")
        assert answer["Body"].read() == b"ab"
        assert (answer["ChecksumCRC32C"], answer["ChecksumType"]) == ("AAAAAA==-2", "COMPOSITE")
    ranged = s3.get_object(Bucket="b", Key="checksums/composite", ChecksumMode="ENABLED", Range="bytes=0-0")
    assert ranged["Body"].read() == b"a" and "ChecksumCRC32C" not in ranged


# -- bodies as they are


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_packed_object_is_neither_unpacked_nor_packed_again(s3: Any, origin: FakeOrigin, size: int) -> None:
    packed, key = gzip.compress(body_of(size), mtime=0), f"packed/{size}"
    s3.put_object(Bucket="b", Key=key, Body=packed, ContentEncoding="gzip")
    s3.copy_object(Bucket="b", Key=key + "/copy", CopySource=f"b/{key}")
    for each in (key, key + "/copy"):
        stored = origin.get("b", each)
        assert stored is not None and stored.body == packed and stored.headers["content-encoding"] == "gzip"
        for _ in range(2):  # cold, then hot
            answer = s3.get_object(Bucket="b", Key=each)
            raw = b"".join(answer["Body"]._raw_stream.stream(1 << 16, decode_content=False))
            assert raw == packed
            assert (answer["ContentEncoding"], answer["ContentLength"]) == ("gzip", len(packed))
            eventually(lambda each=each: phase(s3.head_object(Bucket="b", Key=each)) == "hit", "it is cached")  # type: ignore[misc]
        answer = s3.get_object(Bucket="b", Key=each, Range="bytes=10-99")
        raw = b"".join(answer["Body"]._raw_stream.stream(1 << 16, decode_content=False))
        assert raw == packed[10:100] and answer["ContentEncoding"] == "gzip"
    assert {each.headers["accept-encoding"] for each in origin.requests} == {"identity"}


# -- an older store behind


@pytest.fixture
def old_store(own_directory: Path, own_origin: FakeOrigin) -> Iterator[tuple[Any, FakeOrigin]]:
    """One that refuses checksums behind bodies, and wants Content-MD5 with documents; a client over https."""
    own_origin.fault(
        times=None, where=lambda asked: "x-amz-trailer" in asked.headers, status=501, code="NotImplemented"
    )
    own_origin.fault(
        times=None, where=lambda asked: _document(asked) and "content-md5" not in asked.headers, status=400, code="MD5"
    )
    overrides = {
        "origin": {"trailing_checksums": False, "retries": 0},
        "limits": {"relay_buffer": "64KiB", "completion_wait": "200ms"},
    }
    with node(own_directory, own_origin.endpoint, overrides) as one:
        yield client(one.s3_tls_url, verify=str(one.ca_file)), own_origin


def _document(asked: Any) -> bool:
    return (asked.method == "POST" and "delete" in asked.query) or "tagging" in asked.query


def test_an_older_store_gets_all_in_a_form_that_it_takes(old_store: tuple[Any, FakeOrigin]) -> None:
    s3, origin = old_store
    for size in (0, 1000, MIB):
        body = body_of(size)
        s3.put_object(Bucket="b", Key=f"old/{size}", Body=body)
        stored = origin.get("b", f"old/{size}")
        assert stored is not None and stored.body == body
        crc32 = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        assert stored.checksums == ({} if size == MIB else {"x-amz-checksum-crc32": crc32})
        assert read(s3, f"old/{size}") == body
    s3.put_object_tagging(Bucket="b", Key="old/0", Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
    s3.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "old/0"}, {"Key": "old/1000"}]})
    assert refusal(s3.get_object, Key="old/1000") == (404, "NoSuchKey")
    # Two answers that take their time, over https.
    upload_id, parts = upload(s3, "old/parts", [b"x"])
    whole = {"Bucket": "b", "Key": "old/parts", "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
    origin.fault(op="CompleteMultipartUpload", delay_s=1.0)
    done = s3.complete_multipart_upload(**whole)
    assert done["ResponseMetadata"]["HTTPHeaders"]["transfer-encoding"] == "chunked"
    assert (
        done["ETag"] == f'"{hashlib.md5(hashlib.md5(b"x").digest()).hexdigest()}-1"' and read(s3, "old/parts") == b"x"
    )
    origin.fault(op="CopyObject", delay_s=1.0, status=500)
    with pytest.raises(ClientError, match="InternalError"):
        s3.copy_object(Bucket="b", Key="old/copy", CopySource="b/old/parts")
