"""The demonstration's processes: a moto origin and one node, in a temporary directory.

Owns: starting, pausing and ending both processes, and the node's configuration file. Does not own: what is shown.

Invariant: when the `with` block is left, neither process is alive.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from koscli.demo.certificate import self_signed
from koscli.demo.processes import answers, free_ports, running, saw_line, tail

_START_TIMEOUT_S = 60.0

_CONFIG = """\
region: demo
listen: {{s3: "{s3}", s3_tls: "{s3_tls}", tls_cert_file: "{cert}", tls_key_file: "{key}", admin: "{admin}", peer: "{peer}"}}
workers: 2
origin:
  endpoint: {origin}
  region: us-east-1
  addressing: path
  access_key: demo-origin
  secret_key: demo-origin-secret
  read_timeout: 5s
cache: {{dir: "{cache}", size: 2GiB, block_size: 8MiB, segment_size: 64MiB}}
credentials: [{{access_key: "{access_key}", secret_key: "{secret_key}"}}]
rules:
  - {{match: "*/datasets/*", freshness: immutable}}
  - {{match: "*", freshness: 30s}}
control: {{url: "sqlite:///{control}"}}
log: {{access: "{access_log}"}}
"""


class StageFailed(Exception):
    """A process of the demonstration did not start; the message says which and shows its last words."""


class Stage:
    """Context manager: inside it an origin and a node are up."""

    bucket = "demo"

    def __init__(self, directory: Path, *, s3_port: int = 0) -> None:
        self.directory = directory
        self.access_key = "kosdemo" + secrets.token_hex(6)
        self.secret_key = secrets.token_urlsafe(24)
        self._s3_port = s3_port
        self._stack = contextlib.ExitStack()
        self._origin: subprocess.Popen[str] | None = None

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            origin_port, s3_port, s3_tls_port, admin_port, peer_port = free_ports(5)
            self.origin_url = f"http://127.0.0.1:{origin_port}"
            self.s3_url = f"http://127.0.0.1:{self._s3_port or s3_port}"
            self.s3_tls_url = f"https://127.0.0.1:{s3_tls_port}"
            self.ca_file, key_file = self_signed(self.directory)
            self.admin_url = f"http://127.0.0.1:{admin_port}"
            self._origin = stack.enter_context(self._start_origin(origin_port))
            config = self.directory / "kos.yaml"
            config.write_text(
                _CONFIG.format(
                    s3=f"127.0.0.1:{self._s3_port or s3_port}",
                    s3_tls=f"127.0.0.1:{s3_tls_port}",
                    cert=self.ca_file,
                    key=key_file,
                    admin=f"127.0.0.1:{admin_port}",
                    peer=f"127.0.0.1:{peer_port}",
                    origin=self.origin_url,
                    cache=self.directory / "cache",
                    control=self.directory / "control.db",
                    access_log=self.directory / "access.jsonl",
                    access_key=self.access_key,
                    secret_key=self.secret_key,
                )
            )
            stack.enter_context(self._start_node(config))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def origin_stopped(self) -> Iterator[None]:
        """The origin's process does not run inside the block (SIGSTOP): what kos asks of it gets no answer."""
        assert self._origin is not None
        os.kill(self._origin.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._origin.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def _start_origin(self, port: int) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with (self.directory / "origin.log").open("w") as log, running("moto", command, stderr=log) as process:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not answers(self.origin_url + "/moto-api/"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise StageFailed(f"the origin (moto) did not start:\n{tail(self.directory / 'origin.log')}")
                time.sleep(0.05)
            yield process

    @contextlib.contextmanager
    def _start_node(self, config: Path) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "koscli", "up", "--config", str(config)]
        log_path = self.directory / "node.log"
        with log_path.open("w") as log, running("kos up", command, stderr=log) as process:
            assert process.stdout is not None
            if not saw_line(process.stdout, "kos ready", _START_TIMEOUT_S):
                raise StageFailed(f"the node did not become ready:\n{tail(log_path)}")
            yield process
