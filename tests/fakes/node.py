"""A real node (`kos up`: its daemon and its workers) and a moto origin as child processes, for tests with real clients.

Faults that a test can cause: kill -9 of a worker or of the daemon (`worker_pids`, `daemon_pid`), SIGTERM of the whole
node (`stop`), and a start again over the same cache directory (`start`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import yaml
from botocore.config import Config

from koscli.demo.processes import answers, running, saw_line, tail
from tests.conditions import eventually
from tests.fakes import certificates
from tests.fakes.ports import free_ports

ACCESS_KEY = "kostestkey"
SECRET_KEY = "kos/test+secret"
START_TIMEOUT_S = 60.0


class Node:
    """One node. `overrides` are merged into the configuration, mapping by mapping."""

    def __init__(self, directory: Path, origin_url: str, overrides: dict[str, Any] | None = None) -> None:
        s3, s3_tls, admin, peer = free_ports(4)
        self.directory = directory
        self.config = _merge(_configuration(directory, origin_url, s3, s3_tls, admin, peer), overrides or {})
        self.config_path = directory / "kos.yaml"
        self.s3_url = f"http://127.0.0.1:{s3}"
        self.s3_port = s3
        self.s3_tls_url = f"https://127.0.0.1:{s3_tls}"
        self.s3_tls_port = s3_tls
        #: the authority that signed the node's certificate, in PEM
        self.ca_file = certificates.ca_file()
        self.admin_url = f"http://127.0.0.1:{admin}"
        self.log_path = directory / "node.log"
        self._stack = contextlib.ExitStack()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.config_path.write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "koscli", "up", "--config", str(self.config_path)]
        log = self._stack.enter_context(self.log_path.open("a"))
        self.process = self._stack.enter_context(running("kos up", command, stderr=log))
        assert self.process.stdout is not None
        if not saw_line(self.process.stdout, "kos ready", START_TIMEOUT_S):
            raise AssertionError(f"the node did not become ready:\n{tail(self.log_path, 60)}")

    def stop(self) -> int:
        """SIGTERM, wait, and return the exit status."""
        assert self.process is not None
        process = self.process
        self._stack.close()
        self.process = None
        return int(process.returncode)

    def daemon_pid(self) -> int:
        (pid,) = self._children("koscache")
        return pid

    def daemon_alive(self) -> bool:
        return len(self._children("koscache")) == 1

    def worker_pids(self) -> list[int]:
        return self._children("kosproxy")

    def _children(self, package: str) -> list[int]:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if any(package in word for word in child.cmdline())]

    def ready(self) -> dict[str, Any]:
        """What /readyz says, whatever its status."""
        try:
            with urllib.request.urlopen(f"{self.admin_url}/readyz", timeout=5) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as refusal:
            return dict(json.load(refusal))

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=5) as response:
            return str(response.read().decode())


@contextlib.contextmanager
def node(directory: Path, origin_url: str, overrides: dict[str, Any] | None = None) -> Iterator[Node]:
    one = Node(directory, origin_url, overrides)
    one.start()
    try:
        yield one
    finally:
        if one.process is not None:
            one.stop()


@contextlib.contextmanager
def moto_origin(directory: Path) -> Iterator[str]:
    """A moto server as a child process; yields its URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log_path = directory / "moto.log"
    with log_path.open("w") as log, running("moto", command, stderr=log) as process:
        eventually(lambda: process.poll() is not None or answers(url + "/moto-api/"), "moto answers")
        assert process.poll() is None, tail(log_path)
        yield url


def client(
    url: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY, verify: str | None = None, **settings: Any
) -> Any:
    """A boto3 S3 client, path style, one try. verify: file of the authority to trust over https."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        verify=verify,
        config=Config(**{"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}, **settings}),
    )


def phase(answer: dict[str, Any]) -> str:
    """hit, miss, revalidated, stale or bypass, as x-kos-cache of a boto3 answer says."""
    return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-kos-cache", "none")).partition(";")[0]


def _configuration(directory: Path, origin_url: str, s3: int, s3_tls: int, admin: int, peer: int) -> dict[str, Any]:
    pair = certificates.server()
    return {
        "region": "test",
        "listen": {
            "s3": f"127.0.0.1:{s3}",
            "s3_tls": f"127.0.0.1:{s3_tls}",
            "tls_cert_file": str(pair.cert_file),
            "tls_key_file": str(pair.key_file),
            "admin": f"127.0.0.1:{admin}",
            "peer": f"127.0.0.1:{peer}",
        },
        "workers": 2,
        "origin": {
            "endpoint": origin_url,
            "region": "us-east-1",
            "addressing": "path",
            "access_key": "origin-key",
            "secret_key": "origin-secret",
        },
        "cache": {"dir": str(directory / "cache"), "size": "1GiB", "block_size": "1MiB", "segment_size": "16MiB"},
        "credentials": [{"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}],
        "rules": [{"match": "datasets/*", "freshness": "immutable"}, {"match": "*", "freshness": "30s"}],
        "control": {"url": f"sqlite:///{directory}/control.db"},
        "log": {"access": str(directory / "access.jsonl")},
    }


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
