"""The node under test, as an operator would start it.

Owns: its configuration and directories for a run, starting `kos up`, its CPU time and the memory of its workers.
Does not own: anything of kos itself; what is used here is what the documentation promises.

Invariant: the node's directory is its own and goes away with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import signing
from bench.client import Address, address
from bench.processes import Server, command_line, memory_bytes
from bench.synthetic import BUCKET

READY = r"kos ready\b.*?\bs3=(\S+)(?: s3_tls=(\S+))?"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that answers. secure: the same over https, where the configuration has it."""

    server: Server
    at: Address
    log: Path
    secure: Address | None = None

    def cpu_seconds(self) -> float:
        """CPU time, user and system, of all of its processes."""
        return self.server.cpu_seconds()

    def workers(self) -> list[int]:
        """Pids of the proxy workers."""
        return [pid for pid in self.server.pids() if "kosproxy.worker" in command_line(pid)]

    def cpu_by_process(self) -> dict[str, float]:
        """CPU time by role, for the notes of a result."""
        from bench.processes import cpu_seconds

        roles: dict[str, float] = {}
        for pid in self.server.pids():
            command = command_line(pid)
            role = "worker" if "kosproxy.worker" in command else "daemon" if "koscache" in command else "supervisor"
            roles[role] = roles.get(role, 0.0) + cpu_seconds([pid])
        return roles

    def worker_memory(self) -> dict[str, int]:
        """memory_bytes of the largest worker."""
        return max((memory_bytes(pid) for pid in self.workers()), key=lambda m: m["VmRSS"])


def config(origin: Address, directory: Path, *, workers: int, cache_size: str, more: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a node in front of `origin`; `more` replaces or adds top-level keys."""
    anywhere = "127.0.0.1:0"
    return {
        "region": "bench",
        "listen": {"s3": anywhere, "admin": anywhere, "peer": anywhere},
        "workers": workers,
        "origin": {
            "endpoint": f"http://{origin}",
            "region": "us-east-1",
            "addressing": "path",
            "access_key": "BENCHORIGIN",
            "secret_key": "bench-origin-secret",
        },
        "cache": {"dir": str(directory / "cache"), "size": cache_size},
        "credentials": [{"access_key": signing.ACCESS_KEY, "secret_key": signing.SECRET_KEY}],
        "rules": [{"match": f"{BUCKET}/*", "freshness": "immutable"}],
        # As nginx's: into a file.
        "log": {"access": str(directory / "access.log")},
        "control": {"url": f"sqlite:///{directory}/control.db"},
    } | more


def command(config_file: Path) -> list[str]:
    """The command line of `kos up`, of the installation that this runs in."""
    script = Path(sys.executable).with_name("kos")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "koscli"]
    return [*start, "up", "--config", str(config_file)]


@contextlib.contextmanager
def running(
    origin: Address,
    under: Path,
    *,
    core: int | None = None,
    workers: int = 1,
    cache_size: str = "8GiB",
    more: dict[str, Any] | None = None,
) -> Iterator[Node]:
    """Run a node with an empty cache, in a directory of its own below `under`; ends it and removes the directory."""
    directory = Path(tempfile.mkdtemp(prefix="node-", dir=under))
    file = directory / "kos.yaml"
    # JSON is YAML.
    file.write_text(
        json.dumps(config(origin, directory, workers=workers, cache_size=cache_size, more=more or {}), indent=1)
    )
    log = under / f"{directory.name}.log"
    try:
        with Server(command(file), READY, log, core=core, within_s=60.0) as server:
            assert server.match is not None
            secure = server.match[2]
            yield Node(server, address(server.match[1]), log, address(secure) if secure else None)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
