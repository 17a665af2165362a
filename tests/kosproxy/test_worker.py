"""A worker as a process, without a daemon beside it: starts, says so, serves what it can, drains, exits as it should."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kos.node.status import EXIT_CONFIG
from kosproxy import worker
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, client
from tests.fakes.origin import FakeOrigin

BODY = random.Random(5).randbytes(30_000_000)


@pytest.fixture
def origin() -> Iterator[FakeOrigin]:
    one = FakeOrigin()
    with one.in_thread():
        one.put("bucket", "key", BODY)
        yield one


def configuration(directory: Path, endpoint: str, **changes: Any) -> Path:
    path = directory / "kos.yaml"
    settings = {
        "region": "test",
        "origin": {"endpoint": endpoint, "access_key": "a", "secret_key": "b", "retries": 0},
        "cache": {"dir": str(directory / "cache"), "size": "1GiB", "block_size": "1MiB", "segment_size": "16MiB"},
        "credentials": [{"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}],
        "log": {"access": str(directory / "access.jsonl")},
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


class Worker:
    """port: reserved by the test the way the supervisor does, so that nobody else takes it."""

    def __init__(self, config: Path) -> None:
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.port = self.reserved.getsockname()[1]
        self._status, status = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kosproxy.worker", "--config", str(config), "--s3", f"127.0.0.1:{self.port}"],
            env={**os.environ, "KOS_STATUS_FD": str(status)},
            pass_fds=[status],
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(status)
        self._lines = os.fdopen(self._status)

    def status(self) -> dict[str, Any]:
        """The next report; {} when the process has ended without a further one."""
        readable, _, _ = select.select([self._lines], [], [], 60)
        assert readable, "no status within a minute"
        line = self._lines.readline()
        return dict(json.loads(line)) if line else {}

    def until(self, state: str) -> dict[str, Any]:
        while report := self.status():
            if report["state"] == state:
                return report
        raise AssertionError(f"ended before it was {state}: {self.process.communicate()[1]}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._lines.close()
        self.reserved.close()


@contextlib.contextmanager
def working(config: Path) -> Iterator[Worker]:
    worker = Worker(config)
    try:
        yield worker
    finally:
        worker.close()


def test_it_serves_without_a_daemon_and_drains(tmp_path: Path, origin: FakeOrigin) -> None:
    with working(configuration(tmp_path, origin.endpoint)) as worker:
        assert worker.until("ready")["caching"] == "off"
        s3 = client(f"http://127.0.0.1:{worker.port}")
        s3.put_object(Bucket="bucket", Key="small", Body=b"hello")
        answer = s3.get_object(Bucket="bucket", Key="small")
        assert answer["Body"].read() == b"hello"
        assert answer["ResponseMetadata"]["HTTPHeaders"]["x-kos-cache"].startswith("bypass;reason=")
        slow = s3.get_object(Bucket="bucket", Key="key", ChecksumMode="ENABLED")["Body"]
        first = slow.read(1000)
        worker.process.send_signal(signal.SIGTERM)
        worker.until("draining")
        assert first + slow.read() == BODY, "a response that is under way is finished"
        assert worker.process.wait(timeout=15) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", worker.port))
    lines = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert [line["operation"] for line in lines] == ["PutObject", "GetObject", "GetObject"]
    assert lines[2]["bytes"] == len(BODY) and lines[2]["status"] == 200 and lines[2]["key_id"] == ACCESS_KEY
    assert SECRET_KEY not in (tmp_path / "access.jsonl").read_text()


def test_a_drain_does_not_wait_for_ever(tmp_path: Path, origin: FakeOrigin) -> None:
    with working(configuration(tmp_path, origin.endpoint, limits={"drain": "300ms"})) as worker:
        worker.until("ready")
        body = client(f"http://127.0.0.1:{worker.port}").get_object(Bucket="bucket", Key="key")["Body"]
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(timeout=15) == 0
        body.close()


def test_a_bad_configuration_ends_it_with_a_word(tmp_path: Path) -> None:
    with working(configuration(tmp_path, "http://127.0.0.1:9", colour="blue")) as worker:
        report = worker.until("failed")
        assert "colour" in report["reason"]
        assert worker.process.wait(timeout=15) == 78


def test_without_a_certificate_it_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is started again while the files are bad must not draw clients from its siblings, only to reset them."""
    absent = str(tmp_path / "absent.pem")
    listen = {"s3": "127.0.0.1:0", "s3_tls": "127.0.0.1:0", "tls_cert_file": absent, "tls_key_file": absent}
    path = configuration(tmp_path, "http://127.0.0.1:9", listen=listen)
    listened: list[str] = []
    monkeypatch.setattr(worker, "listen", lambda option, address, backlog: listened.append(option))
    assert worker.main(["--config", str(path)]) == EXIT_CONFIG and not listened


def test_workers_share_a_port(tmp_path: Path, origin: FakeOrigin) -> None:
    path = configuration(tmp_path, origin.endpoint)
    with working(path) as one:
        one.until("ready")
        command = [sys.executable, "-m", "kosproxy.worker", "--config", str(path), "--s3", f"127.0.0.1:{one.port}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as other:
            one.process.send_signal(signal.SIGTERM)
            assert one.process.wait(timeout=15) == 0
            s3 = client(f"http://127.0.0.1:{one.port}", retries={"max_attempts": 20, "mode": "standard"})
            assert s3.head_object(Bucket="bucket", Key="key")["ContentLength"] == len(BODY)
            other.terminate()
            assert other.wait(timeout=15) == 0
