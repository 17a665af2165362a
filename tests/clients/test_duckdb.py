"""DuckDB with its httpfs extension: SQL over Parquet and CSV in buckets, by its own signer.

It has two HTTP clients, libcurl (its default) and cpp-httplib (the default until 1.4). Both take the authority to trust
from ca_cert_file; httplib verifies only when it is told to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import duckdb_extension_httpfs
import pytest

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import ODD_KEY, sha256, stored, was_multipart
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

ROWS = 60_000
#: What every table here is made of; hash() is the same in every run and does not compress.
SOURCE = f"SELECT i AS n, 2020 + i % 3 AS year, 'city é ' || (i % 7) AS city, hash(i) AS noise FROM range({ROWS}) t(i)"


def connect(endpoint: Endpoint, secret: str = SECRET_KEY, http_client: str = "default") -> duckdb.DuckDBPyConnection:
    """A database in memory, with the extension loaded from its package: nothing is downloaded."""
    (extension,) = Path(duckdb_extension_httpfs.__file__).parent.rglob("httpfs.duckdb_extension")
    db = duckdb.connect(config={"autoinstall_known_extensions": False})
    db.execute(f"LOAD '{extension}'")
    db.execute(f"SET httpfs_client_implementation = '{http_client}'")
    db.execute("SET http_retries = 0")
    if endpoint.ca_file is not None:  # for all sessions: ATTACH looks at no session's settings
        db.execute(f"SET GLOBAL ca_cert_file = '{endpoint.ca_file}'")
        db.execute("SET GLOBAL enable_server_cert_verification = true")
    db.execute(
        f"CREATE SECRET (TYPE s3, KEY_ID '{ACCESS_KEY}', SECRET '{secret}', REGION 'us-east-1', URL_STYLE 'path', "
        f"ENDPOINT '{endpoint.host}', USE_SSL {endpoint.secure})"
    )
    return db


@pytest.fixture
def db(endpoint: Endpoint) -> Any:
    with connect(endpoint) as connection:
        yield connection


def test_partitioned_parquet(db: Any, origin: Any, bucket: str, tmp_path: Path) -> None:
    db.execute(f"COPY ({SOURCE}) TO 's3://{bucket}/dir +é&x' (FORMAT parquet, PARTITION_BY (year, city))")
    held = stored(origin, bucket)
    assert len(held) == 21 and all(key.startswith("dir +é&x/year=20") for key in held)
    # Twice: the second round is answered by the cache.
    for _ in range(2):
        found = db.execute(f"SELECT file FROM glob('s3://{bucket}/dir +é&x/*/*/*.parquet')").fetchall()
        assert {path.removeprefix(f"s3://{bucket}/") for (path,) in found} == held.keys()
        table = f"read_parquet('s3://{bucket}/dir +é&x/*/*/*.parquet', hive_partitioning = true)"
        assert db.execute(f"SELECT count(*), sum(n), sum(noise) FROM {table}").fetchone() == (
            db.execute(f"SELECT count(*), sum(n), sum(noise) FROM ({SOURCE})").fetchone()
        )
        some = "WHERE year = 2021 AND city = 'city é 3' AND n > 1000"
        assert db.execute(f"SELECT n, noise FROM {table} {some} ORDER BY n").fetchall() == (
            db.execute(f"SELECT n, noise FROM ({SOURCE}) {some} ORDER BY n").fetchall()
        )
        columns = db.execute(
            f"SELECT name FROM parquet_schema('s3://{bucket}/dir +é&x/year=2020/*/*.parquet')"
        ).fetchall()
        assert ("noise",) in columns
    # What the origin holds is a Parquet file for others too.
    key = next(iter(held))
    origin.download_file(bucket, key, str(tmp_path / "one.parquet"))
    (count,) = db.execute(f"SELECT count(*) FROM '{tmp_path}/one.parquet'").fetchone()
    assert db.execute(f"SELECT count(*) FROM 's3://{bucket}/{key}'").fetchone() == (count,) and count > 1000


def test_an_upload_of_many_parts(db: Any, origin: Any, bucket: str, tmp_path: Path) -> None:
    # The least that DuckDB can be told: a limit of 50 GB in 10 000 parts makes parts of 5 MiB.
    db.execute("SET s3_uploader_max_filesize = '50GB'")
    copy = "COPY (SELECT i AS n, hash(i) AS a, hash(i + 1) AS b FROM range(700000) t(i)) TO '{}' (FORMAT parquet)"
    db.execute("SET threads = 1")  # so that both files are the same, byte by byte
    db.execute(copy.format(f"s3://{bucket}/{ODD_KEY}"))
    db.execute(copy.format(tmp_path / "local.parquet"))
    assert was_multipart(origin, bucket, ODD_KEY)
    assert stored(origin, bucket) == {ODD_KEY: sha256((tmp_path / "local.parquet").read_bytes())}
    for _ in range(2):
        assert db.execute(f"SELECT sum(n) FROM read_parquet('s3://{bucket}/{ODD_KEY}')").fetchone() == (
            (700_000 * 699_999 // 2),
        )
        assert db.execute(f"SELECT b FROM read_parquet('s3://{bucket}/{ODD_KEY}') WHERE n = 650000").fetchone() == (
            db.execute("SELECT hash(650001)").fetchone()
        )
    # The file's bytes as they are, read whole.
    (body,) = db.execute(f"SELECT content FROM read_blob('s3://{bucket}/{ODD_KEY}')").fetchone()
    assert sha256(body) == stored(origin, bucket)[ODD_KEY]


@pytest.mark.parametrize("http_client", ["curl", "httplib"])
def test_csv_and_other_small_files(endpoint: Endpoint, s3: Any, origin: Any, bucket: str, http_client: str) -> None:
    db = connect(endpoint, http_client=http_client)
    db.execute(f"COPY (SELECT i AS a, 'x é ' || i AS b FROM range(3) t(i)) TO 's3://{bucket}/made &.csv'")
    assert (
        origin.get_object(Bucket=bucket, Key="made &.csv")["Body"].read() == "a,b\n0,x é 0\n1,x é 1\n2,x é 2\n".encode()
    )
    db.execute(f"COPY (SELECT 1 AS a WHERE false) TO 's3://{bucket}/no-rows.parquet' (FORMAT parquet)")
    s3.put_object(Bucket=bucket, Key="20m +é&=.csv", Body=b"a,b\n7,seven\n8,\n")
    s3.put_object(Bucket=bucket, Key="empty.txt", Body=b"")
    s3.put_object(Bucket=bucket, Key="one.json", Body=b'{"k": [1, 2]}')
    for _ in range(2):
        assert db.execute(f"FROM read_csv('s3://{bucket}/made &.csv')").fetchall() == [
            (0, "x é 0"),
            (1, "x é 1"),
            (2, "x é 2"),
        ]
        assert db.execute(f"FROM read_csv('s3://{bucket}/20m +é&=.csv')").fetchall() == [(7, "seven"), (8, None)]
        assert db.execute(f"SELECT content, size FROM read_text('s3://{bucket}/empty.txt')").fetchall() == [("", 0)]
        assert db.execute(f"FROM 's3://{bucket}/no-rows.parquet'").fetchall() == []
        assert db.execute(f"FROM 's3://{bucket}/one.json'").fetchall() == [([1, 2],)]


def test_a_database_in_a_bucket(db: Any, s3: Any, bucket: str, tmp_path: Path) -> None:
    """Attached where it lies: pages of 256 KiB by range, all over the file."""
    with duckdb.connect(str(tmp_path / "made.db")) as made:
        made.execute(f"CREATE TABLE t AS {SOURCE}")
        expected = made.execute("SELECT sum(n), sum(noise) FROM t").fetchone()
    s3.upload_file(str(tmp_path / "made.db"), bucket, "20m +é&.db")
    for _ in range(2):
        db.execute(f"ATTACH 's3://{bucket}/20m +é&.db' AS far (READ_ONLY)")
        assert db.execute("SELECT noise FROM far.t WHERE n = 59000").fetchone() == (
            db.execute("SELECT hash(59000)").fetchone()
        )
        assert db.execute("SELECT sum(n), sum(noise) FROM far.t").fetchone() == expected
        db.execute("DETACH far")


def test_a_table_that_is_written_again_is_read_anew(db: Any, bucket: str) -> None:
    for n in range(5):
        db.execute(f"COPY (SELECT {n} AS n) TO 's3://{bucket}/t.parquet' (FORMAT parquet)")
        for _ in range(2):
            assert db.execute(f"FROM 's3://{bucket}/t.parquet'").fetchall() == [(n,)]
    with pytest.raises(duckdb.HTTPException, match="404"):
        db.execute(f"FROM 's3://{bucket}/absent.parquet'")


def test_a_wrong_secret(endpoint: Endpoint, bucket: str) -> None:
    with connect(endpoint, secret="wrong") as stranger, pytest.raises(duckdb.HTTPException, match="403"):
        stranger.execute(f"FROM glob('s3://{bucket}/*.parquet')")
