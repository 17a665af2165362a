"""The demonstration's processes: a moto origin and one node, or several that form a cluster, in a temporary directory.

Owns: starting, pausing, killing and ending the processes, and the nodes' configuration files. Does not own: what is shown.

Invariant: when the `with` block is left, none of the processes is alive.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from koscli.admin_client import get
from koscli.demo.certificate import self_signed
from koscli.demo.processes import answers, free_ports, running, saw_line, tail

_START_TIMEOUT_S: Final = 60.0

_CONFIG: Final = """\
region: demo
listen: {{s3: "{s3}", s3_tls: "{s3_tls}", tls_cert_file: "{cert}", tls_key_file: "{key}", admin: "{admin}",
         peer: "{peer}", cluster: "{cluster}"}}
workers: {workers}
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

#: So that the death of a node, which is part of the tour, is over before anybody is bored.
_CLUSTER_CONFIG: Final = """\
cluster: {{membership: control, name: {name}, secret: "{secret}", member_lease: 3s, heartbeat: 500ms, lease: 1s}}
"""


class StageFailed(Exception):
    """A process of the demonstration did not start; the message says which and shows its last words."""


@dataclass(frozen=True, slots=True)
class StageNode:
    """One node: its name in the cluster, and where it answers."""

    name: str
    s3_url: str
    s3_tls_url: str
    admin_url: str
    directory: Path


class Stage:
    """Context manager: inside it an origin and the nodes are up. nodes: more than one form a cluster."""

    bucket = "demo"

    def __init__(self, directory: Path, *, s3_port: int = 0, nodes: int = 1) -> None:
        self.directory = directory
        self.access_key = "kosdemo" + secrets.token_hex(6)
        self.secret_key = secrets.token_urlsafe(24)
        self.nodes: list[StageNode] = []
        self._secret = secrets.token_hex(16)
        self._s3_port = s3_port
        self._count = nodes
        self._stack = contextlib.ExitStack()
        self._origin: subprocess.Popen[str] | None = None
        self._running: dict[str, contextlib.ExitStack] = {}
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            origin_port, *ports = free_ports(1 + 5 * self._count)
            self.origin_url = f"http://127.0.0.1:{origin_port}"
            self.ca_file, self._key_file = self_signed(self.directory)
            self._origin = stack.enter_context(self._start_origin(origin_port))
            for n in range(self._count):
                self.nodes.append(self._prepare(n, ports[5 * n : 5 * n + 5]))
            stack.callback(self._stop_nodes)
            self.start_nodes(self.nodes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def s3_url(self) -> str:
        """Of the first node; the same for the next two."""
        return self.nodes[0].s3_url

    @property
    def s3_tls_url(self) -> str:
        return self.nodes[0].s3_tls_url

    @property
    def admin_url(self) -> str:
        return self.nodes[0].admin_url

    @contextlib.contextmanager
    def origin_stopped(self) -> Iterator[None]:
        """The origin's process does not run inside the block (SIGSTOP): what kos asks of it gets no answer."""
        assert self._origin is not None
        os.kill(self._origin.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._origin.pid, signal.SIGCONT)

    def kill_node(self, node: StageNode) -> None:
        """SIGKILL to all of its processes, the supervisor first."""
        parts = get(node.admin_url, "/v1/status")["parts"]
        self._processes[node.name].kill()
        for part in (part for part in parts if part["pid"] is not None):
            with contextlib.suppress(ProcessLookupError):
                os.kill(part["pid"], signal.SIGKILL)
        self._running.pop(node.name).close()

    def start_nodes(self, nodes: Sequence[StageNode]) -> None:
        """All at once; returns when all are ready. Raises StageFailed."""
        for node in nodes:
            stack = self._running[node.name] = contextlib.ExitStack()
            command = [sys.executable, "-m", "koscli", "up", "--config", str(node.directory / "kos.yaml")]
            log = stack.enter_context((node.directory / "node.log").open("a"))
            self._processes[node.name] = stack.enter_context(running(f"kos up ({node.name})", command, stderr=log))
        for node in nodes:
            stdout = self._processes[node.name].stdout
            assert stdout is not None
            if not saw_line(stdout, "kos ready", _START_TIMEOUT_S):
                raise StageFailed(f"{node.name} did not become ready:\n{tail(node.directory / 'node.log')}")

    def _stop_nodes(self) -> None:
        # Together: each is given time to end what it does.
        stacks, self._running = list(self._running.values()), {}
        with ThreadPoolExecutor(max(1, len(stacks))) as pool:
            list(pool.map(contextlib.ExitStack.close, stacks))

    def _prepare(self, n: int, ports: Sequence[int]) -> StageNode:
        s3, s3_tls, admin, peer, cluster = ports
        if n == 0 and self._s3_port:
            s3 = self._s3_port
        name = f"node-{n + 1}"
        directory = self.directory / name
        directory.mkdir()
        text = _CONFIG if self._count == 1 else _CONFIG + _CLUSTER_CONFIG
        (directory / "kos.yaml").write_text(
            text.format(
                s3=f"127.0.0.1:{s3}",
                s3_tls=f"127.0.0.1:{s3_tls}",
                cert=self.ca_file,
                key=self._key_file,
                admin=f"127.0.0.1:{admin}",
                peer=f"127.0.0.1:{peer}",
                cluster=f"127.0.0.1:{cluster}",
                workers=2 if self._count == 1 else 1,
                origin=self.origin_url,
                cache=directory / "cache",
                control=self.directory / "control.db",
                access_log=directory / "access.jsonl",
                access_key=self.access_key,
                secret_key=self.secret_key,
                name=name,
                secret=self._secret,
            )
        )
        s3_url, s3_tls_url = f"http://127.0.0.1:{s3}", f"https://127.0.0.1:{s3_tls}"
        return StageNode(name, s3_url, s3_tls_url, f"http://127.0.0.1:{admin}", directory)

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
