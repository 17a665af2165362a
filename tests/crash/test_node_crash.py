"""Real processes, killed with SIGKILL at bad moments; a full disk; a stopped daemon."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.conditions import eventually
from tests.fakes.http import read_answer, signed
from tests.fakes.node import Node, client, node, phase
from tests.fakes.origin import FakeOrigin

MIB = 1 << 20
IMMUTABLE: dict[str, Any] = {"rules": [{"match": "*", "freshness": "immutable"}]}


def body_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def read(kos: Any, key: str) -> bytes:
    return bytes(kos.get_object(Bucket="b", Key=key)["Body"].read())


@pytest.fixture
def origin() -> Iterator[FakeOrigin]:
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b")
        yield origin


def _all_hit(kos: Any, keys: Any) -> bool:
    return all(phase(kos.get_object(Bucket="b", Key=key)) == "hit" for key in keys)


def test_kill_9_of_the_whole_node_in_the_middle_of_fills_and_evictions(origin: FakeOrigin, tmp_path: Path) -> None:
    bodies = {f"k{n}": body_of(200_000 + 1000 * n, n) for n in range(120)}
    for key, body in bodies.items():
        origin.put("b", key, body)
    settings = {**IMMUTABLE, "cache": {"size": "32MiB", "segment_size": "2MiB", "index_size": "8MiB"}}
    one = Node(tmp_path, origin.endpoint, settings)
    rng = random.Random(5)
    for _ in range(4):
        one.start()
        kos = client(one.s3_url, max_pool_connections=16)
        stop = threading.Event()

        def load(n: int, kos: Any = kos, stop: threading.Event = stop) -> int:
            done = 0
            chooser = random.Random(n)
            while not stop.is_set():
                key = chooser.choice(list(bodies))
                try:
                    got = read(kos, key)
                except (BotoCoreError, ClientError, OSError):
                    continue  # the node was killed under us
                assert got == bodies[key]
                done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            loads = [pool.submit(load, n) for n in range(8)]
            eventually(lambda: origin.count(method="GET") > 100 + rng.randrange(60), "fills are under way")
            for pid in [*one.worker_pids(), one.daemon_pid()]:
                os.kill(pid, signal.SIGKILL)
            assert one.process is not None
            one.process.kill()
            stop.set()
            assert sum(each.result() for each in loads) > 0
        one.stop()
        origin.forget()
    one.start()
    kos = client(one.s3_url)
    hits = 0
    for key, body in bodies.items():
        answer = kos.get_object(Bucket="b", Key=key)
        assert answer["Body"].read() == body
        hits += phase(answer) == "hit"
    assert hits > 0, "nothing of what was sealed survived"
    assert one.stop() == 0


def test_a_killed_daemon_is_replaced_while_hits_and_misses_go_on(origin: FakeOrigin, tmp_path: Path) -> None:
    hot, cold = body_of(3 * MIB, 1), body_of(3 * MIB, 2)
    origin.put("b", "hot", hot)
    origin.put("b", "cold", cold)
    with node(tmp_path, origin.endpoint, IMMUTABLE) as one:
        kos = client(one.s3_url)
        assert read(kos, "hot") == hot
        eventually(lambda: _all_hit(kos, ["hot"]), "hot is cached")
        daemon = one.daemon_pid()
        os.kill(daemon, signal.SIGSTOP)  # away, but its socket is still there: the harder case
        try:
            assert read(kos, "hot") == hot
            began = time.monotonic()
            assert read(kos, "cold") == cold
            assert time.monotonic() - began < 20
            kos.put_object(Bucket="b", Key="hot", Body=b"overwritten")
            assert read(kos, "hot") == b"overwritten"
        finally:
            os.kill(daemon, signal.SIGCONT)
        os.kill(daemon, signal.SIGKILL)
        for _ in range(20):
            assert read(kos, "cold") == cold
            assert read(kos, "hot") == b"overwritten"
        eventually(lambda: one.ready().get("ready") is True, "the daemon is back")
        assert one.daemon_pid() != daemon
        eventually(lambda: read(kos, "cold") == cold and _all_hit(kos, ["cold"]), "caching goes on")


def test_a_killed_leaders_followers_get_their_bytes(origin: FakeOrigin, tmp_path: Path) -> None:
    body = body_of(900_000)
    origin.put("b", "led", body)
    with node(tmp_path, origin.endpoint, IMMUTABLE) as one:
        hold = origin.hold(times=1, key="led", at="body", body_bytes=300_000)
        results: list[bytes | str] = []

        def get() -> None:
            kos = client(one.s3_url, retries={"total_max_attempts": 3})
            try:
                results.append(read(kos, "led"))
            except Exception as broken:  # a connection to the killed worker may break; that is an honest answer
                results.append(repr(broken))

        threads = [threading.Thread(target=get) for _ in range(12)]
        for thread in threads:
            thread.start()
        hold.wait_reached()
        os.kill(random.Random(1).choice(one.worker_pids()), signal.SIGKILL)
        hold.release()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a follower hangs"
        right = [each for each in results if each == body]
        assert all(isinstance(each, str) or each == body for each in results), "wrong bytes"
        assert len(right) >= 1
        kos = client(one.s3_url)
        assert read(kos, "led") == body


def test_a_worker_is_replaced_and_others_serve_meanwhile(origin: FakeOrigin, tmp_path: Path) -> None:
    origin.put("b", "k", b"bytes")
    with node(tmp_path, origin.endpoint, IMMUTABLE) as one:
        kos = client(one.s3_url, retries={"total_max_attempts": 4})
        before = one.worker_pids()
        for pid in before[:1]:
            os.kill(pid, signal.SIGKILL)
        for _ in range(20):
            assert read(kos, "k") == b"bytes"
        eventually(lambda: len(one.worker_pids()) == 2 and before[0] not in one.worker_pids(), "the worker is back")


def test_sigterm_lets_open_answers_finish_and_exits_0(origin: FakeOrigin, tmp_path: Path) -> None:
    body = body_of(4 * MIB)
    origin.put("b", "k", body)
    with node(tmp_path, origin.endpoint, IMMUTABLE) as one:
        read(client(one.s3_url), "k")
        hold = origin.hold(times=1, key="slow", at="body", body_bytes=100_000)
        origin.put("b", "slow", body)
        with signed(one, "GET", "/b/slow").open() as connection:
            hold.wait_reached()
            assert one.process is not None
            one.process.terminate()
            hold.release()
            answer = read_answer(connection)
        assert answer.status == 200 and answer.body == body
        assert one.process.wait(20) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(where)], check=False)
    if made.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_turns_caching_off_and_serving_goes_on(
    origin: FakeOrigin, tmp_path: Path, small_disk: Path
) -> None:
    bodies = {f"k{n}": body_of(3 * MIB, n) for n in range(12)}
    for key, body in bodies.items():
        origin.put("b", key, body)
    cache = {"dir": str(small_disk / "cache"), "size": "1GiB", "segment_size": "8MiB", "min_free": "0B"}
    with node(tmp_path, origin.endpoint, {**IMMUTABLE, "cache": {**cache, "index_size": "8MiB"}}) as one:
        kos = client(one.s3_url)
        (small_disk / "filler").write_bytes(b"x" * (12 * MIB))
        for _ in range(2):
            for key, body in bodies.items():
                assert read(kos, key) == body
        state = one.ready()
        assert "off" in str(state) and state["ready"] is True, state
        assert "kos_caching" in one.metrics()
        assert "caching" in one.log_path.read_text()
        kos.put_object(Bucket="b", Key="k0", Body=b"written")
        assert read(kos, "k0") == b"written"
