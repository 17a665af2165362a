"""aws-cli as a process.

Starting one takes most of a second of CPU: so each does as much as it can, and what does not depend on how the bytes
travel is tried over one of http and https.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.clients.command import BIN, Command
from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import (
    ODD_KEY,
    digests,
    objects,
    random_bytes,
    sha256,
    stored,
    tree,
    was_multipart,
    write_tree,
)


@pytest.fixture
def aws(endpoint: Endpoint, client_env: dict[str, str], tmp_path: Path) -> Command:
    """Multipart from 5 MiB on, one try."""
    config = tmp_path / "aws-config"
    config.write_text("[default]\nmax_attempts = 1\ns3 =\n  multipart_threshold = 5MB\n  multipart_chunksize = 5MB\n")
    env = client_env | {"AWS_CONFIG_FILE": str(config)}
    return Command(str(BIN / "aws"), "--endpoint-url", endpoint.url, env=env)


def test_round_trip(aws: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    bodies = objects()
    write_tree(tmp_path / "tree", bodies)
    aws("s3", "cp", "--recursive", "--only-show-errors", str(tmp_path / "tree"), f"s3://{bucket}/up")
    assert stored(origin, bucket) == digests(bodies, "up/")
    assert was_multipart(origin, bucket, f"up/{ODD_KEY}")

    listed = aws("s3", "ls", "--recursive", "--page-size", "2", f"s3://{bucket}/up/")
    assert [line[31:] for line in listed.splitlines()] == [f"up/{key}" for key in sorted(bodies)]
    aws("s3", "sync", "--only-show-errors", f"s3://{bucket}/up", str(tmp_path / "back"))
    assert tree(tmp_path / "back") == digests(bodies)
    part = tmp_path / "part"
    get = ["s3api", "get-object", "--bucket", bucket, "--key", f"up/{ODD_KEY}", "--range", "bytes=100-1099"]
    assert json.loads(aws(*get, str(part)))["ContentLength"] == 1000
    assert part.read_bytes() == bodies[ODD_KEY][100:1100]

    # Above the threshold: a copy in parts, made by the store.
    aws("s3", "cp", "--only-show-errors", f"s3://{bucket}/up/{ODD_KEY}", f"s3://{bucket}/copy")
    assert stored(origin, bucket)["copy"] == sha256(bodies[ODD_KEY]) and was_multipart(origin, bucket, "copy")
    aws("s3", "rm", "--recursive", "--only-show-errors", f"s3://{bucket}/up")
    assert stored(origin, bucket).keys() == {"copy"}


@pytest.mark.parametrize("endpoint", ["http"], indirect=True)
def test_sync_moves_only_what_differs(aws: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    bodies = {"a": b"1", ODD_KEY: b"2", "deep/c": b"3"}
    write_tree(tmp_path / "tree", bodies)
    assert aws("s3", "sync", str(tmp_path / "tree"), f"s3://{bucket}/s").count("upload:") == 3
    (tmp_path / "tree" / "a").write_bytes(b"another")
    (tmp_path / "tree" / "deep" / "c").unlink()
    again = aws("s3", "sync", "--size-only", "--delete", "--no-progress", str(tmp_path / "tree"), f"s3://{bucket}/s")
    assert again.count("upload:") == 1 and again.count("delete:") == 1
    assert stored(origin, bucket) == digests({"a": b"another", ODD_KEY: b"2"}, "s/")


def test_streams_and_links(aws: Command, endpoint: Endpoint, origin: Any, bucket: str, tmp_path: Path) -> None:
    body = random_bytes(6 << 20)
    aws("s3", "cp", "-", f"s3://{bucket}/{ODD_KEY}", stdin=body)
    assert stored(origin, bucket) == {ODD_KEY: sha256(body)} and was_multipart(origin, bucket, ODD_KEY)
    assert sha256(aws.binary("s3", "cp", f"s3://{bucket}/{ODD_KEY}", "-")) == sha256(body)
    link = aws("s3", "presign", f"s3://{bucket}/{ODD_KEY}").strip()
    with urllib.request.urlopen(link, timeout=10, context=endpoint.tls) as answer:
        assert sha256(answer.read()) == sha256(body)


def test_checksums_and_attributes(aws: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"hello")
    put = ["s3api", "put-object", "--bucket", bucket, "--checksum-algorithm", "SHA256"]
    made = json.loads(aws(*put, "--key", ODD_KEY, "--body", str(tmp_path / "body")))
    assert made["ChecksumSHA256"] == "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="
    assert stored(origin, bucket) == {ODD_KEY: sha256(b"hello")}
    attributes = ["s3api", "get-object-attributes", "--bucket", bucket, "--key", ODD_KEY]
    about = json.loads(aws(*attributes, "--object-attributes", "ETag", "Checksum", "ObjectSize"))
    assert about["ObjectSize"] == 5 and about["ETag"] == made["ETag"].strip('"')
    assert about["Checksum"]["ChecksumSHA256"] == made["ChecksumSHA256"]
    get = ["s3api", "get-object", "--bucket", bucket, "--key", ODD_KEY, "--checksum-mode", "ENABLED"]
    assert json.loads(aws(*get, str(tmp_path / "back")))["ChecksumSHA256"] == made["ChecksumSHA256"]
    assert (tmp_path / "back").read_bytes() == b"hello"


@pytest.mark.parametrize("endpoint", ["http"], indirect=True)
def test_an_empty_file_and_another_over_one_connection(aws: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    """Over http it sends Expect with every file. An answer without "100 Continue" before it, which an empty body does not
    need, it takes for the answer to its next request too, and waits for the rest of that until its time is up."""
    config = tmp_path / "aws-config"
    config.write_text(f"{config.read_text()}  max_concurrent_requests = 1\n")
    bodies = {"empty": b"", "next": b"hello"}
    write_tree(tmp_path / "tree", bodies)
    aws(
        "--cli-read-timeout",
        "10",
        "s3",
        "cp",
        "--recursive",
        "--only-show-errors",
        f"{tmp_path}/tree",
        f"s3://{bucket}",
    )
    assert stored(origin, bucket) == digests(bodies)


@pytest.mark.parametrize("endpoint", ["https"], indirect=True)
def test_what_is_wrong_is_said(aws: Command, endpoint: Endpoint, client_env: dict[str, str], bucket: str) -> None:
    assert "NoSuchKey" in aws.failing("s3api", "get-object", "--bucket", bucket, "--key", "missing", "/dev/null")
    env = client_env | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    stranger = Command(str(BIN / "aws"), "--endpoint-url", endpoint.url, env=env)
    assert "SignatureDoesNotMatch" in stranger.failing("s3", "ls", f"s3://{bucket}/")
