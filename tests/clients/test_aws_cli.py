"""aws-cli and s5cmd as processes, against a real node with moto behind it."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.node import Node

BIN = Path(sys.executable).parent


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, bytes]:
    """A folder to upload: small, empty, large (multipart), and odd names."""
    rng = random.Random(3)
    files = {
        "small.bin": rng.randbytes(10_000),
        "empty": b"",
        "large.bin": rng.randbytes(100 << 20),
        "20m +é&=.bin": rng.randbytes(20 << 20),
        "deep/with space.txt": b"hello",
    }
    for name, body in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return files


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(400)
def test_aws_cli(kos_node: Node, bucket: str, s3: Any, client_env: dict[str, str], tmp_path: Path, tree: Any) -> None:
    aws = [str(BIN / "aws"), "--endpoint-url", kos_node.s3_url]
    run([*aws, "s3", "cp", "--recursive", "--quiet", str(tmp_path / "tree"), f"s3://{bucket}/up"], client_env)
    listed = run([*aws, "s3", "ls", "--recursive", f"s3://{bucket}/up/"], client_env)
    assert len(listed.splitlines()) == len(tree)
    for n in range(2):
        back = tmp_path / f"back{n}"
        run([*aws, "s3", "cp", "--recursive", "--quiet", f"s3://{bucket}/up", str(back)], client_env)
        assert contents(back) == contents(tmp_path / "tree")
    part = tmp_path / "part"
    get = ["s3api", "get-object", "--bucket", bucket, "--key", "up/20m +é&=.bin", "--range", "bytes=100-1099"]
    run([*aws, *get, str(part)], client_env)
    assert part.read_bytes() == tree["20m +é&=.bin"][100:1100]
    run([*aws, "s3", "cp", "--quiet", f"s3://{bucket}/up/small.bin", f"s3://{bucket}/copy"], client_env)
    assert s3.get_object(Bucket=bucket, Key="copy")["Body"].read() == tree["small.bin"]
    url = run([*aws, "s3", "presign", f"s3://{bucket}/up/small.bin"], client_env).strip()
    assert "Signature" in url
    run([*aws, "s3", "rm", "--recursive", "--quiet", f"s3://{bucket}/up"], client_env)
    assert [each["Key"] for each in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["copy"]


@pytest.mark.timeout(400)
def test_s5cmd(kos_node: Node, bucket: str, s3: Any, client_env: dict[str, str], tmp_path: Path, tree: Any) -> None:
    s5cmd = [str(BIN / "s5cmd"), "--endpoint-url", kos_node.s3_url]
    run([*s5cmd, "cp", f"{tmp_path}/tree/", f"s3://{bucket}/up/"], client_env)
    assert len(run([*s5cmd, "ls", f"s3://{bucket}/up/*"], client_env).splitlines()) == len(tree)
    for n in range(2):
        back = tmp_path / f"back{n}"
        run([*s5cmd, "cp", f"s3://{bucket}/up/*", f"{back}/"], client_env)
        assert contents(back) == contents(tmp_path / "tree")
    streamed = subprocess.run(
        [*s5cmd, "cat", f"s3://{bucket}/up/large.bin"], env=client_env, capture_output=True, timeout=100, check=True
    )
    assert streamed.stdout == tree["large.bin"]
    run([*s5cmd, "cp", f"s3://{bucket}/up/small.bin", f"s3://{bucket}/copy"], client_env)
    assert s3.get_object(Bucket=bucket, Key="copy")["Body"].read() == tree["small.bin"]
    run([*s5cmd, "rm", f"s3://{bucket}/up/*"], client_env)
    assert [each["Key"] for each in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["copy"]
