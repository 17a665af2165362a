"""minio-py, which signs by itself: every part's SHA-256 over http, UNSIGNED-PAYLOAD over https, Content-MD5 on deletes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from minio import Minio
from minio.commonconfig import ComposeSource, CopySource, Tags
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

from tests.clients.conftest import Endpoint
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
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

Connect = Callable[..., Minio]


@pytest.fixture
def connect(endpoint: Endpoint) -> Iterator[Connect]:
    """Makes a client with a secret; one try, so that a failure is seen as it is."""
    pool = urllib3.PoolManager(timeout=30, maxsize=4, retries=False, ca_certs=endpoint.verify)

    def connect(secret_key: str = SECRET_KEY, region: str | None = "us-east-1") -> Minio:
        return Minio(
            endpoint=endpoint.host,
            access_key=ACCESS_KEY,
            secret_key=secret_key,
            region=region,
            secure=endpoint.secure,
            http_client=pool,
        )

    yield connect
    pool.clear()


@pytest.fixture
def minio(connect: Connect) -> Minio:
    return connect()


def put(minio: Minio, bucket: str, key: str, body: bytes, **settings: Any) -> Any:
    return minio.put_object(
        bucket_name=bucket, object_name=key, data=io.BytesIO(body), length=len(body), part_size=PART_BYTES, **settings
    )


def get(minio: Minio, bucket: str, key: str, **settings: Any) -> bytes:
    response = minio.get_object(bucket_name=bucket, object_name=key, **settings)
    try:
        return bytes(response.read())
    finally:
        response.close()
        response.release_conn()


def listed(minio: Minio, bucket: str, **settings: Any) -> list[str]:
    return [str(each.object_name) for each in minio.list_objects(bucket_name=bucket, **settings)]


def test_round_trip(minio: Minio, origin: Any, bucket: str) -> None:
    bodies = objects()
    for key, body in bodies.items():
        put(minio, bucket, key, body, metadata={"colour": "blue"}, content_type="text/x-odd")
    assert stored(origin, bucket) == digests(bodies)
    assert was_multipart(origin, bucket, ODD_KEY) and not was_multipart(origin, bucket, "small.bin")

    assert listed(minio, bucket, recursive=True) == sorted(bodies)
    assert sorted(listed(minio, bucket)) == sorted(["deep/", ODD_KEY, "empty", "small.bin"])
    assert sorted(listed(minio, bucket, prefix="deep/")) == ["deep/down/", "deep/er.bin"]
    assert listed(minio, bucket, prefix="deep/", recursive=True, use_api_v1=True) == sorted(
        key for key in bodies if key.startswith("deep/")
    )
    assert listed(minio, bucket, recursive=True, start_after="empty") == ["small.bin"]
    assert listed(minio, bucket, prefix="none") == []

    for key, body in bodies.items():
        about = minio.stat_object(bucket_name=bucket, object_name=key)
        assert about.size == len(body) and about.content_type == "text/x-odd"
        assert about.metadata is not None and about.metadata["x-amz-meta-colour"] == "blue"
        for _ in range(2):
            assert sha256(get(minio, bucket, key)) == sha256(body)
    whole = bodies[ODD_KEY]
    for offset, length in ((0, 10), (PART_BYTES - 5, 10), (3_000_000, 0), (len(whole) - 7, 7)):
        expected = whole[offset : offset + length if length else None]
        assert get(minio, bucket, ODD_KEY, offset=offset, length=length) == expected

    minio.copy_object(
        bucket_name=bucket, object_name="copy", source=CopySource(bucket_name=bucket, object_name=ODD_KEY)
    )
    assert sha256(get(minio, bucket, "copy")) == sha256(whole)
    minio.remove_object(bucket_name=bucket, object_name=ODD_KEY)
    with pytest.raises(S3Error) as refusal:
        get(minio, bucket, ODD_KEY)
    assert refusal.value.code == "NoSuchKey"
    # A key that is not there is no error; a slash at the end is a key like any other.
    names = [*bodies, "copy", "never/was/"]
    errors = minio.remove_objects(bucket_name=bucket, delete_object_list=(DeleteObject(name=name) for name in names))
    assert list(errors) == []
    assert stored(origin, bucket) == {} and listed(minio, bucket, recursive=True) == []


class Pipe(io.RawIOBase):
    """Bytes of which nobody knows how many there will be, a few at a time."""

    def __init__(self, body: bytes) -> None:
        self._rest = io.BytesIO(body)

    def read(self, size: int = -1) -> bytes:
        return self._rest.read(min(size, 100_000) if size >= 0 else -1)


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES, MULTIPART_BYTES])
def test_a_stream_of_unknown_length(minio: Minio, origin: Any, bucket: str, size: int) -> None:
    body = random_bytes(size)
    minio.put_object(
        bucket_name=bucket,
        object_name="stream",
        data=Pipe(body),
        length=-1,
        part_size=PART_BYTES,
        num_parallel_uploads=2,
    )
    assert stored(origin, bucket) == {"stream": sha256(body)}
    assert was_multipart(origin, bucket, "stream") == (size > PART_BYTES)
    assert sha256(get(minio, bucket, "stream")) == sha256(body)


def test_files(minio: Minio, origin: Any, bucket: str, tmp_path: Path) -> None:
    body = random_bytes(MULTIPART_BYTES, 7)
    (tmp_path / "up").write_bytes(body)
    minio.fput_object(bucket_name=bucket, object_name=ODD_KEY, file_path=str(tmp_path / "up"), part_size=PART_BYTES)
    assert stored(origin, bucket) == {ODD_KEY: sha256(body)}
    for n in range(2):
        minio.fget_object(bucket_name=bucket, object_name=ODD_KEY, file_path=str(tmp_path / f"down{n}"))
        assert sha256((tmp_path / f"down{n}").read_bytes()) == sha256(body)


def test_compose_copies_parts_within_the_store(minio: Minio, origin: Any, bucket: str) -> None:
    first, second = random_bytes(PART_BYTES, 8), random_bytes(100_000, 9)
    put(minio, bucket, "first", first)
    put(minio, bucket, ODD_KEY, second)
    put(minio, bucket, "whole", b"what was there before")
    assert get(minio, bucket, "whole") == b"what was there before"
    sources = [
        ComposeSource(bucket_name=bucket, object_name="first"),
        ComposeSource(bucket_name=bucket, object_name=ODD_KEY, offset=10, length=50_000),
    ]
    minio.compose_object(bucket_name=bucket, object_name="whole", sources=sources)
    expected = sha256(first + second[10:50_010])
    assert stored(origin, bucket)["whole"] == expected
    assert sha256(get(minio, bucket, "whole")) == expected


def test_metadata_and_tags(minio: Minio, origin: Any, bucket: str) -> None:
    tags = Tags.new_object_tags()
    tags["team"] = "vision +é="
    put(minio, bucket, "k", b"x", tags=tags, metadata={"Cache-Control": "max-age=9", "x-amz-meta-a": "1"})
    assert origin.get_object_tagging(Bucket=bucket, Key="k")["TagSet"] == [{"Key": "team", "Value": "vision +é="}]
    assert minio.get_object_tags(bucket_name=bucket, object_name="k") == tags
    about = origin.head_object(Bucket=bucket, Key="k")
    assert about["CacheControl"] == "max-age=9" and about["Metadata"] == {"a": "1"}
    tags["team"] = "speech"
    minio.set_object_tags(bucket_name=bucket, object_name="k", tags=tags)
    assert minio.get_object_tags(bucket_name=bucket, object_name="k") == tags
    minio.delete_object_tags(bucket_name=bucket, object_name="k")
    assert minio.get_object_tags(bucket_name=bucket, object_name="k") is None


def test_presigned(minio: Minio, endpoint: Endpoint, bucket: str) -> None:
    pool = urllib3.PoolManager(ca_certs=endpoint.verify, retries=False)
    body = random_bytes(50_000)
    url = minio.presigned_put_object(bucket_name=bucket, object_name=ODD_KEY)
    # Without a type of its own urllib3 sends none, and moto then takes the body for a form.
    assert pool.request("PUT", url, body=body, headers={"Content-Type": "application/octet-stream"}).status == 200
    url = minio.presigned_get_object(
        bucket_name=bucket, object_name=ODD_KEY, response_headers={"response-content-type": "text/x-asked"}
    )
    for _ in range(2):
        answer = pool.request("GET", url)
        assert answer.data == body and answer.headers["Content-Type"] == "text/x-asked"
    assert pool.request("GET", url.replace("x-asked", "x-other")).status == 403
    pool.clear()


def test_a_client_that_is_told_no_region_asks_for_it(connect: Connect, bucket: str) -> None:
    put(connect(region=None), bucket, "k", b"x")
    assert get(connect(region=None), bucket, "k") == b"x"


def test_pages(minio: Minio, origin: Any, bucket: str) -> None:
    keys = sorted(f"page/{n} +é&=" for n in range(8))
    for key in keys:
        origin.put_object(Bucket=bucket, Key=key, Body=b"")
    for version_1 in (False, True):
        pages = {"use_api_v1": version_1, "extra_query_params": {"max-keys": "3"}}
        assert listed(minio, bucket, prefix="page/", recursive=True, **pages) == keys
        assert listed(minio, bucket, **pages) == ["page/"]


def test_what_is_wrong_is_said(connect: Connect, minio: Minio, bucket: str) -> None:
    for use in (get, lambda *names: minio.stat_object(bucket_name=names[1], object_name=names[2])):
        with pytest.raises(S3Error) as refusal:
            use(minio, bucket, "missing")
        assert refusal.value.code == "NoSuchKey"
    with pytest.raises(S3Error) as refusal:
        get(minio, "no-such-bucket-here", "k")
    assert refusal.value.code == "NoSuchBucket"
    stranger = connect(secret_key="wrong")
    for refused in (lambda: put(stranger, bucket, "k", b"x"), lambda: get(stranger, bucket, "k")):
        with pytest.raises(S3Error) as refusal:
            refused()
        assert refusal.value.code == "SignatureDoesNotMatch"
    assert not minio.bucket_exists(bucket_name="no-such-bucket-here") and minio.bucket_exists(bucket_name=bucket)
