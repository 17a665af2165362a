"""What the round trips of all clients have in common: what is uploaded, and what the origin must hold of it.

Each client's own way of doing things stands in its test.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

#: Every character here has tripped a client or a server over how URLs are written and signed.
ODD_KEY = "20m +é&=.bin"
#: The least size of a part that is not the last.
PART_BYTES = 5 << 20
#: A whole part and a rest.
MULTIPART_BYTES = PART_BYTES + 1_000_003
#: Two whole parts and a rest: for what several at once may do wrong.
LARGE_BYTES = 2 * PART_BYTES + 1_000_003


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def objects() -> dict[str, bytes]:
    """Key to body: empty, small, in a folder, and one for a multipart upload under the odd key."""
    return {
        "empty": b"",
        "small.bin": random_bytes(10_000, 2),
        "deep/down/with space.txt": b"hello",
        "deep/er.bin": random_bytes(70_001, 3),
        ODD_KEY: random_bytes(MULTIPART_BYTES, 4),
    }


def digests(bodies: dict[str, bytes], prefix: str = "") -> dict[str, str]:
    return {prefix + key: sha256(body) for key, body in bodies.items()}


def stored(origin: Any, bucket: str) -> dict[str, str]:
    """Key to SHA-256 of everything in the bucket, asked of the origin itself.

    Nothing of how the bodies came may have been kept: no chunk signatures inside, no aws-chunked as their encoding.
    """
    found = {}
    for page in origin.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for each in page.get("Contents", ()):
            answer = origin.get_object(Bucket=bucket, Key=each["Key"])
            assert "ContentEncoding" not in answer, each["Key"]
            found[each["Key"]] = sha256(answer["Body"].read())
    return found


def was_multipart(origin: Any, bucket: str, key: str) -> bool:
    """Whether the object came in parts: its ETag ends with how many."""
    return "-" in origin.head_object(Bucket=bucket, Key=key)["ETag"]


def write_tree(folder: Path, bodies: dict[str, bytes]) -> None:
    for name, body in bodies.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def tree(folder: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file below the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in files}
