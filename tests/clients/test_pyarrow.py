"""pyarrow's S3FileSystem, the AWS SDK for C++: what Parquet readers, Ray and Hugging Face datasets go through."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, FileType, S3FileSystem

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import ODD_KEY, digests, objects, random_bytes, sha256, stored, was_multipart
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

#: Arrow sends what is shorter than its part of 10 MiB as one object.
LARGE_BYTES = (10 << 20) + 12_345


def connect(endpoint: Endpoint, secret: str = SECRET_KEY) -> S3FileSystem:
    return S3FileSystem(
        access_key=ACCESS_KEY,
        secret_key=secret,
        region="us-east-1",
        scheme="https" if endpoint.secure else "http",
        endpoint_override=endpoint.host,
        tls_ca_file_path=None if endpoint.ca_file is None else str(endpoint.ca_file),
    )


@pytest.fixture
def fs(endpoint: Endpoint) -> S3FileSystem:
    return connect(endpoint)


def put(fs: S3FileSystem, path: str, body: bytes) -> None:
    with fs.open_output_stream(path) as stream:
        stream.write(body)


def test_round_trip(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    bodies = objects() | {ODD_KEY: random_bytes(LARGE_BYTES, 5)}
    for key, body in bodies.items():
        put(fs, f"{bucket}/{key}", body)
    assert stored(origin, bucket) == digests(bodies)
    assert was_multipart(origin, bucket, ODD_KEY)
    for key, body in bodies.items():
        about = fs.get_file_info(f"{bucket}/{key}")
        assert (about.type, about.size, about.base_name) == (FileType.File, len(body), key.rpartition("/")[2])
        for _ in range(2):
            with fs.open_input_stream(f"{bucket}/{key}") as stream:
                assert sha256(stream.read()) == sha256(body)
    assert fs.get_file_info(f"{bucket}/absent").type == FileType.NotFound
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(f"{bucket}/absent")

    fs.copy_file(f"{bucket}/{ODD_KEY}", f"{bucket}/copy +é")
    fs.move(f"{bucket}/small.bin", f"{bucket}/moved")
    fs.delete_file(f"{bucket}/empty")
    bodies |= {"copy +é": bodies[ODD_KEY], "moved": bodies.pop("small.bin")}
    del bodies["empty"]
    assert stored(origin, bucket) == digests(bodies)
    with fs.open_input_stream(f"{bucket}/copy +é") as stream:
        assert sha256(stream.read()) == sha256(bodies[ODD_KEY])


def test_random_access(fs: S3FileSystem, bucket: str) -> None:
    body = random_bytes(3_500_000, 6)
    put(fs, f"{bucket}/{ODD_KEY}", body)
    for _ in range(2):
        with fs.open_input_file(f"{bucket}/{ODD_KEY}") as file:
            assert file.size() == len(body)
            assert file.read_at(1000, 3_000_000) == body[3_000_000:3_001_000]
            assert file.read_at(5000, len(body) - 10) == body[-10:]
            file.seek(1 << 20)
            assert file.read(100_000) == body[1 << 20 :][:100_000]
            assert file.read(7) == body[(1 << 20) + 100_000 :][:7]
            assert file.tell() == (1 << 20) + 100_007
            with pytest.raises(OSError):
                file.read_at(1, len(body) + 1)


def test_folders(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    """Arrow marks a folder by an empty key that ends with a slash, and deletes with DeleteObjects."""
    fs.create_dir(f"{bucket}/a/b +é/c")
    assert stored(origin, bucket) == digests({"a/": b"", "a/b +é/": b"", "a/b +é/c/": b""})
    assert fs.get_file_info(f"{bucket}/a/b +é").type == FileType.Directory
    assert fs.get_file_info(f"{bucket}/a/b").type == FileType.NotFound
    put(fs, f"{bucket}/a/b +é/c/x", b"x")
    put(fs, f"{bucket}/a/y", b"yy")
    put(fs, f"{bucket}/ay", b"not in a")

    def below(path: str, recursive: bool) -> dict[str, int | None]:
        found = fs.get_file_info(FileSelector(f"{bucket}/{path}", recursive=recursive))
        return {each.path.removeprefix(f"{bucket}/"): each.size for each in found}

    assert below("a", False) == {"a/b +é": None, "a/y": 2}
    assert below("a", True) == {"a/b +é": None, "a/b +é/c": None, "a/b +é/c/x": 1, "a/y": 2}
    assert below("", False) == {"a": None, "ay": 8}
    with pytest.raises(FileNotFoundError):
        below("nowhere", True)

    fs.delete_dir_contents(f"{bucket}/a/b +é")
    assert below("a", True) == {"a/b +é": None, "a/y": 2}
    fs.delete_dir(f"{bucket}/a/b +é")
    # An empty folder above would be gone from sight with its last key, so Arrow writes its mark.
    assert stored(origin, bucket) == digests({"a/": b"", "a/y": b"yy", "ay": b"not in a"})
    fs.delete_dir(f"{bucket}/a")
    assert stored(origin, bucket) == digests({"ay": b"not in a"})


def test_a_partitioned_dataset(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    count = 30_000
    table = pa.table(
        {
            "city": [("north", "south é", "east&west")[n % 3] for n in range(count)],
            "n": range(count),
            "noise": [random_bytes(40, n) for n in range(count)],
        }
    )
    parts = ds.partitioning(pa.schema([("city", pa.string())]), flavor="hive")
    ds.write_dataset(table, f"{bucket}/set", filesystem=fs, format="parquet", partitioning=parts)
    files = [key for key in stored(origin, bucket) if key.endswith(".parquet")]
    assert len(files) == 3

    # Twice: the second round is answered by the cache, footers and column chunks as ranges.
    for _ in range(2):
        found = ds.dataset(f"{bucket}/set", filesystem=fs, partitioning=parts)
        assert sorted(found.files) == sorted(f"{bucket}/{key}" for key in files)
        few = found.to_table(columns=["n"], filter=(ds.field("city") == "south é") & (ds.field("n") < 100))
        assert sorted(few["n"].to_pylist()) == list(range(1, 100, 3))
        assert found.to_table(columns=["city", "n", "noise"]).sort_by("n").equals(table)
        (path,) = [f"{bucket}/{key}" for key in files if "north" in key]
        one = pq.ParquetFile(path, filesystem=fs)
        assert one.metadata.num_rows == count / 3
        assert one.read_row_group(0, columns=["n"])["n"].to_pylist() == list(range(0, count, 3))


def test_a_parquet_file_of_several_parts(fs: S3FileSystem, origin: Any, bucket: str) -> None:
    table = pa.table({"n": range(200), "noise": [random_bytes(100_000, n) for n in range(200)]})
    pq.write_table(table, f"{bucket}/large.parquet", filesystem=fs, row_group_size=25, compression="none")
    assert was_multipart(origin, bucket, "large.parquet")
    for _ in range(2):
        assert pq.read_table(f"{bucket}/large.parquet", filesystem=fs, columns=["n"])["n"].to_pylist() == [*range(200)]
        assert pq.read_table(f"{bucket}/large.parquet", filesystem=fs, filters=[("n", ">=", 190)]) == table[190:]


def test_a_wrong_secret(endpoint: Endpoint, origin: Any, bucket: str) -> None:
    stranger = connect(endpoint, secret="wrong")
    with pytest.raises(OSError, match=r"SIGNATURE_DOES_NOT_MATCH"):
        stranger.get_file_info(FileSelector(bucket))
    with pytest.raises(OSError, match=r"SIGNATURE_DOES_NOT_MATCH"):
        put(stranger, f"{bucket}/k", b"x")
    assert stored(origin, bucket) == {}
