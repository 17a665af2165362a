"""A node that is killed with SIGKILL, and may lose its index: versions and parts come back under the right names."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conditions import eventually
from tests.fakes.node import Node, client, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20
SETTINGS: dict[str, Any] = {"rules": [{"match": "*", "freshness": "immutable"}]}
#: One ETag for bodies of three lengths: only id and length tell them apart.
ETAG = f'"{"cd" * 16}-3"'
PARTS = {"small": (5, 6, 7), "large": (MIB + 3, 2 * MIB, 40_000), "larger": (2 * MIB, MIB + 9, 70_000)}


@pytest.fixture
def origin() -> Iterator[FakeOrigin]:
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b", versioned=True)
        yield origin


def kill(one: Node) -> None:
    for pid in [*one.worker_pids(), one.daemon_pid()]:
        os.kill(pid, signal.SIGKILL)
    assert one.process is not None
    one.process.kill()
    one.stop()


def lose(cache: Path, what: str) -> None:
    if what != "nothing":
        (cache / "CURRENT").unlink()
    if what == "index":
        for index in cache.glob("index-*"):
            shutil.rmtree(index)


@pytest.mark.parametrize("what", ["nothing", "pointer", "index"])
def test_versions_and_parts_after_a_loss(origin: FakeOrigin, tmp_path: Path, what: str) -> None:
    bodies: dict[str, bytes] = {}
    parts: dict[str, tuple[int, ...]] = {}
    for seed, lengths in enumerate(PARTS.values()):
        body = random.Random(seed).randbytes(sum(lengths))
        version = origin.put("b", "k", body, {"x-amz-meta-seed": str(seed)}, etag=ETAG, parts=lengths)
        bodies[version.version_id], parts[version.version_id] = body, lengths
    current = list(bodies)[-1]

    one = Node(tmp_path, origin.endpoint, SETTINGS)
    one.start()

    def read(version_id: str | None, number: int | None) -> str:
        asked: dict[str, Any] = {"Bucket": "b", "Key": "k"}
        if version_id is not None:
            asked["VersionId"] = version_id
        if number is not None:
            asked["PartNumber"] = number
        answer = client(one.s3_url).get_object(**asked)
        body, lengths = bodies[version_id or current], parts[version_id or current]
        if number is not None:
            begin = sum(lengths[: number - 1])
            body = body[begin : begin + lengths[number - 1]]
        assert answer["Body"].read() == body, (version_id, number)
        assert answer["VersionId"] == (version_id or current) and answer["ETag"] == ETAG
        assert answer["Metadata"] == {"seed": str(list(bodies).index(version_id or current))}
        return phase(answer)

    names = [(version_id, number) for version_id in (*bodies, None) for number in (None, 1, 2, 3)]
    for name in names:
        read(*name)
    eventually(lambda: {read(*name) for name in names} == {"hit"}, "all of it is kept")
    kill(one)
    lose(tmp_path / "cache", what)
    origin.forget()
    one.start()
    for name in names:
        read(*name)
    asked = [each for each in origin.requests if each.method == "GET" and each.status != 304]
    if what == "nothing":
        assert origin.requests == []
    assert len(asked) <= 1, "no body is asked for again, but for one whose entry was at the end of the file"
    eventually(lambda: {read(*name) for name in names} == {"hit"})
    assert one.stop() == 0
