"""s3fs, the file system of pandas, dask, datasets and zarr: fsspec over aiobotocore."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import (
    LARGE_BYTES,
    ODD_KEY,
    PART_BYTES,
    digests,
    objects,
    random_bytes,
    sha256,
    stored,
    tree,
    was_multipart,
    write_tree,
)
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

Connect = Callable[..., S3FileSystem]


@pytest.fixture
def connect(endpoint: Endpoint) -> Connect:
    """Makes a file system of its own: s3fs would remember one for equal arguments, with its listings."""

    def connect(secret: str = SECRET_KEY, **settings: Any) -> S3FileSystem:
        return S3FileSystem(
            key=ACCESS_KEY,
            secret=secret,
            endpoint_url=endpoint.url,
            client_kwargs={"region_name": "us-east-1", "verify": endpoint.verify},
            config_kwargs={"retries": {"total_max_attempts": 1}},
            skip_instance_cache=True,
            **settings,
        )

    return connect


@pytest.fixture
def fs(connect: Connect) -> S3FileSystem:
    return connect()


def test_round_trip(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    bodies = objects()
    for key, body in bodies.items():
        with fs.open(f"{bucket}/{key}", "wb", block_size=PART_BYTES) as file:
            file.write(body)
    assert stored(origin, bucket) == digests(bodies)
    assert was_multipart(origin, bucket, ODD_KEY) and not was_multipart(origin, bucket, "small.bin")
    for key, body in bodies.items():
        assert fs.size(f"{bucket}/{key}") == len(body)
        for _ in range(2):
            assert sha256(fs.cat_file(f"{bucket}/{key}")) == sha256(body)

    fs.copy(f"{bucket}/{ODD_KEY}", f"{bucket}/copy +é")
    fs.mv(f"{bucket}/small.bin", f"{bucket}/moved")
    assert not fs.exists(f"{bucket}/small.bin")
    bodies |= {"copy +é": bodies[ODD_KEY], "moved": bodies.pop("small.bin")}
    assert stored(origin, bucket) == digests(bodies)
    assert sha256(fs.cat_file(f"{bucket}/copy +é")) == sha256(bodies[ODD_KEY])
    fs.rm_file(f"{bucket}/{ODD_KEY}")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{bucket}/{ODD_KEY}")
    fs.rm(f"{bucket}/deep", recursive=True)
    assert stored(origin, bucket).keys() == {"empty", "copy +é", "moved"}
    fs.rm(bucket, recursive=True)
    assert not fs.exists(bucket)


def test_looking_around(fs: S3FileSystem, bucket: str) -> None:
    bodies = objects()
    bodies[ODD_KEY] = b"odd"
    fs.pipe({f"{bucket}/{key}": body for key, body in bodies.items()})
    names = sorted(f"{bucket}/{key}" for key in bodies)
    assert fs.cat(names) == {f"{bucket}/{key}": body for key, body in bodies.items()}
    assert sorted(fs.find(bucket)) == names
    assert sorted(fs.find(bucket, prefix="dee")) == [name for name in names if "/dee" in name]
    assert sorted(fs.ls(bucket, detail=False)) == sorted(
        [f"{bucket}/deep", f"{bucket}/{ODD_KEY}", f"{bucket}/empty", f"{bucket}/small.bin"]
    )
    kinds = {each["name"]: (each["type"], each["size"]) for each in fs.ls(f"{bucket}/deep", detail=True)}
    assert kinds == {f"{bucket}/deep/down": ("directory", 0), f"{bucket}/deep/er.bin": ("file", 70_001)}
    assert sorted(fs.glob(f"{bucket}/**/*.bin")) == sorted(name for name in names if name.endswith(".bin"))
    assert fs.glob(f"{bucket}/20m*") == [f"{bucket}/{ODD_KEY}"]
    assert list(fs.walk(f"{bucket}/deep")) == [
        (f"{bucket}/deep", ["down"], ["er.bin"]),
        (f"{bucket}/deep/down", [], ["with space.txt"]),
    ]
    assert fs.du(bucket) == sum(len(body) for body in bodies.values())
    assert fs.isdir(f"{bucket}/deep") and fs.isfile(f"{bucket}/empty") and not fs.isdir(f"{bucket}/empty")
    assert not fs.exists(f"{bucket}/none") and fs.exists(bucket)


def test_what_others_write_is_seen_when_asked_anew(fs: S3FileSystem, connect: Connect, bucket: str) -> None:
    fs.touch(f"{bucket}/folder/first")
    assert fs.ls(f"{bucket}/folder", detail=False) == [f"{bucket}/folder/first"]
    connect().touch(f"{bucket}/folder/second")
    fs.invalidate_cache()
    assert fs.ls(f"{bucket}/folder", detail=False) == [f"{bucket}/folder/first", f"{bucket}/folder/second"]
    assert fs.info(f"{bucket}/folder/second")["size"] == 0
    connect().rm(f"{bucket}/folder/first")
    assert fs.ls(f"{bucket}/folder", detail=False, refresh=True) == [f"{bucket}/folder/second"]


def test_seeking_and_many_ranges(fs: S3FileSystem, bucket: str) -> None:
    body = random_bytes(6_000_000)
    name = f"{bucket}/{ODD_KEY}"
    fs.pipe_file(name, body)
    rng = random.Random(5)
    with fs.open(name, "rb", block_size=256 * 1024) as file:
        for _ in range(20):
            start = file.seek(rng.randrange(len(body)))
            size = rng.choice([1, 1000, 300_000])
            assert file.read(size) == body[start : start + size]
        file.seek(-9, io.SEEK_END)
        assert file.read() == body[-9:]
    starts = [rng.randrange(len(body) - 100) for _ in range(20)]
    ends = [start + 100 for start in starts]
    assert fs.cat_ranges([name] * 20, starts, ends) == [body[start : start + 100] for start in starts]
    assert fs.cat_file(name, start=-10) == body[-10:]
    assert fs.cat_file(name, start=10, end=-10) == body[10:-10]
    assert fs.head(name, 5) == body[:5] and fs.tail(name, 5) == body[-5:]


def test_appending(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    """To something small s3fs puts the whole again; from 5 MiB on it copies what is there as the first part."""
    for size in (1000, PART_BYTES + 1):
        name = f"{bucket}/{ODD_KEY}"
        head, tail = random_bytes(size), random_bytes(2000, 2)
        fs.pipe_file(name, head)
        assert fs.cat_file(name) == head
        with fs.open(name, "ab", block_size=PART_BYTES) as file:
            file.write(tail)
        assert sha256(fs.cat_file(name)) == sha256(head + tail) == stored(origin, bucket)[ODD_KEY]
    assert was_multipart(origin, bucket, ODD_KEY)


def test_large_values_go_up_and_come_down_in_parallel(
    fs: S3FileSystem, origin: Any, bucket: str, tmp_path: Path
) -> None:
    body = random_bytes(LARGE_BYTES)
    fs.pipe_file(f"{bucket}/piped", body, chunksize=PART_BYTES)
    assert was_multipart(origin, bucket, "piped")
    (tmp_path / "up").write_bytes(body)
    fs.put_file(str(tmp_path / "up"), f"{bucket}/put", chunksize=PART_BYTES)
    assert was_multipart(origin, bucket, "put")
    assert stored(origin, bucket) == {"piped": sha256(body), "put": sha256(body)}
    fs.get_file(f"{bucket}/put", str(tmp_path / "down"), chunksize=PART_BYTES)
    assert sha256((tmp_path / "down").read_bytes()) == sha256(body)
    assert sha256(fs.cat_file(f"{bucket}/put", chunksize=PART_BYTES)) == sha256(body)


def test_folders(fs: S3FileSystem, origin: Any, bucket: str, tmp_path: Path) -> None:
    bodies = objects()
    write_tree(tmp_path / "up", bodies)
    fs.put(f"{tmp_path}/up/", f"{bucket}/up/", recursive=True)
    assert stored(origin, bucket) == digests(bodies, "up/")
    fs.get(f"{bucket}/up/", f"{tmp_path}/down/", recursive=True)
    assert tree(tmp_path / "down") == digests(bodies)
    # mv() of a folder is not for stores without folders: it wants to copy the folder's own name too, and fails.
    fs.copy(f"{bucket}/up/", f"{bucket}/copied/", recursive=True)
    fs.rm(f"{bucket}/up/", recursive=True)
    assert stored(origin, bucket) == digests(bodies, "copied/")


def test_exclusive_creation(fs: S3FileSystem, bucket: str) -> None:
    fs.pipe_file(f"{bucket}/once", b"first", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket}/once", b"second", mode="create")
    assert fs.cat_file(f"{bucket}/once") == b"first"


def test_metadata_tags_and_links(fs: S3FileSystem, bucket: str) -> None:
    fs.pipe_file(f"{bucket}/{ODD_KEY}", b"x", ContentType="text/x-odd", Metadata={"colour": "blue"})
    assert fs.info(f"{bucket}/{ODD_KEY}")["ContentType"] == "text/x-odd"
    fs.setxattr(f"{bucket}/{ODD_KEY}", shade="dark")
    assert fs.metadata(f"{bucket}/{ODD_KEY}", refresh=True) == {"colour": "blue", "shade": "dark"}
    fs.put_tags(f"{bucket}/{ODD_KEY}", {"team": "vision"})
    assert fs.get_tags(f"{bucket}/{ODD_KEY}") == {"team": "vision"}
    assert "Signature" in fs.sign(f"{bucket}/{ODD_KEY}")


async def test_asynchronously(connect: Connect, origin: Any, bucket: str) -> None:
    fs = connect(asynchronous=True)
    session = await fs.set_session()
    try:
        bodies = objects()
        await asyncio.gather(*(fs._pipe_file(f"{bucket}/{key}", body) for key, body in bodies.items()))
        assert stored(origin, bucket) == digests(bodies)
        for _ in range(2):
            found = await asyncio.gather(*(fs._cat_file(f"{bucket}/{key}") for key in bodies))
            assert [sha256(body) for body in found] == [sha256(body) for body in bodies.values()]
        file = await fs.open_async(f"{bucket}/{ODD_KEY}", "rb")
        assert await file.read(1000) == bodies[ODD_KEY][:1000]
        await file.close()
        await fs._rm(f"{bucket}/deep", recursive=True)
        assert sorted(await fs._find(bucket)) == sorted(f"{bucket}/{key}" for key in bodies if "deep/" not in key)
    finally:
        await session.close()


def test_what_is_wrong_is_said(connect: Connect, fs: S3FileSystem, bucket: str) -> None:
    for use in (fs.cat_file, fs.info, fs.ls, lambda name: fs.open(name, "rb")):
        with pytest.raises(FileNotFoundError):
            use(f"{bucket}/missing")
    with pytest.raises(FileNotFoundError):
        fs.pipe_file("no-such-bucket-here/k", b"x")
    stranger = connect(secret="wrong")
    for use in (stranger.cat_file, stranger.info, lambda name: stranger.pipe_file(name, b"x")):
        with pytest.raises(PermissionError):
            use(f"{bucket}/k")
