"""s5cmd, in Go, as a process: many objects at once, large ones in ranges at once."""

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

PARTS = ["--part-size", "5", "--concurrency", "2"]


def program(endpoint: Endpoint, env: dict[str, str]) -> Command:
    return Command(str(BIN / "s5cmd"), "--retry-count", "0", "--endpoint-url", endpoint.url, env=env)


@pytest.fixture
def s5cmd(endpoint: Endpoint, client_env: dict[str, str]) -> Command:
    return program(endpoint, client_env)


def test_round_trip(s5cmd: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    bodies = objects()
    write_tree(tmp_path / "tree", bodies)
    s5cmd("cp", *PARTS, "--metadata", "colour=blue", f"{tmp_path}/tree/", f"s3://{bucket}/up/")
    assert stored(origin, bucket) == digests(bodies, "up/")
    assert was_multipart(origin, bucket, f"up/{ODD_KEY}")
    assert origin.head_object(Bucket=bucket, Key=f"up/{ODD_KEY}")["Metadata"] == {"colour": "blue"}

    listed = s5cmd("--json", "ls", f"s3://{bucket}/up/*").splitlines()
    assert sorted(json.loads(line)["key"] for line in listed) == sorted(f"s3://{bucket}/up/{key}" for key in bodies)
    folders = s5cmd("ls", f"s3://{bucket}/up/deep/")
    assert folders.split() == ["DIR", "down/", *folders.split()[2:5], "er.bin"]
    assert len(s5cmd("--use-list-objects-v1", "ls", f"s3://{bucket}/up/*.bin").splitlines()) == 3
    total = sum(len(body) for body in bodies.values())
    assert s5cmd("du", f"s3://{bucket}/*").startswith(f"{total} bytes in {len(bodies)} objects")
    about = json.loads(s5cmd("head", f"s3://{bucket}/up/{ODD_KEY}"))
    assert about["size"] == len(bodies[ODD_KEY]) and about["metadata"] == {"colour": "blue"}

    for n in range(2):
        s5cmd("cp", *PARTS, f"s3://{bucket}/up/*", f"{tmp_path}/back{n}/")
        assert tree(tmp_path / f"back{n}") == digests(bodies)
    assert sha256(s5cmd.binary("cat", *PARTS, f"s3://{bucket}/up/{ODD_KEY}")) == sha256(bodies[ODD_KEY])
    # s5cmd writes a blank in a copy's source as "+": S3 reads it as one, moto does not. So here are sources without.
    s5cmd("mv", f"s3://{bucket}/up/small.bin", f"s3://{bucket}/+é&=.bin")
    s5cmd("cp", f"s3://{bucket}/+é&=.bin", f"s3://{bucket}/copy +é")
    assert sha256(s5cmd.binary("cat", f"s3://{bucket}/copy +é")) == sha256(bodies["small.bin"])
    s5cmd("rm", f"s3://{bucket}/up/*")
    assert stored(origin, bucket) == dict.fromkeys(("+é&=.bin", "copy +é"), sha256(bodies["small.bin"]))


def test_sync_moves_only_what_differs(s5cmd: Command, origin: Any, bucket: str, tmp_path: Path) -> None:
    bodies = {"a": b"1", ODD_KEY: b"2", "deep/c": b"3"}
    write_tree(tmp_path / "tree", bodies)
    assert len(s5cmd("sync", f"{tmp_path}/tree/", f"s3://{bucket}/s/").splitlines()) == 3
    (tmp_path / "tree" / "a").write_bytes(b"another")
    (tmp_path / "tree" / "deep" / "c").unlink()
    again = s5cmd("sync", "--size-only", "--delete", f"{tmp_path}/tree/", f"s3://{bucket}/s/")
    assert sorted(line.split()[0] for line in again.splitlines()) == ["cp", "rm"]
    bodies = {"a": b"another", ODD_KEY: b"2"}
    assert stored(origin, bucket) == digests(bodies, "s/")
    s5cmd("sync", f"s3://{bucket}/s/*", f"{tmp_path}/back/")
    assert tree(tmp_path / "back") == digests(bodies)


def test_streams_batches_and_links(
    s5cmd: Command, endpoint: Endpoint, origin: Any, bucket: str, tmp_path: Path
) -> None:
    body = random_bytes(6 << 20)
    s5cmd("pipe", *PARTS, f"s3://{bucket}/{ODD_KEY}", stdin=body)
    s5cmd("pipe", f"s3://{bucket}/empty", stdin=b"")
    assert stored(origin, bucket) == {ODD_KEY: sha256(body), "empty": sha256(b"")}
    assert was_multipart(origin, bucket, ODD_KEY)
    with urllib.request.urlopen(
        s5cmd("presign", f"s3://{bucket}/{ODD_KEY}").strip(), timeout=10, context=endpoint.tls
    ) as answer:
        assert sha256(answer.read()) == sha256(body)
    batch = [f'cp "s3://{bucket}/{ODD_KEY}" "{tmp_path}/{n}"' for n in range(3)] + [f"rm s3://{bucket}/empty"]
    s5cmd("run", stdin="\n".join(batch).encode())
    assert tree(tmp_path) == dict.fromkeys("012", sha256(body)) and stored(origin, bucket).keys() == {ODD_KEY}


def test_what_is_wrong_is_said(s5cmd: Command, endpoint: Endpoint, client_env: dict[str, str], bucket: str) -> None:
    assert "not found" in s5cmd.failing("cat", f"s3://{bucket}/missing")
    assert "no object found" in s5cmd.failing("ls", f"s3://{bucket}/missing")
    assert "NoSuchBucket" in s5cmd.failing("ls", "s3://no-such-bucket-here/")
    stranger = program(endpoint, client_env | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert "SignatureDoesNotMatch" in stranger.failing("ls", f"s3://{bucket}/")
