"""Runs a node, or one role of it, in the foreground.

Owns: the order of things from a configuration file to an exit code: check, raise limits, take ports, start children and
admin, say `kos ready`, wait for a signal, stop. Does not own: what the children are: the entry points pass in commands,
for kos.node imports neither the proxy nor the cache.

Invariant: whatever run_role prints on stdout is for a machine to read: the one line `kos ready …`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import kos
from kos import config, log, metrics, tls
from kos.clock import Clock
from kos.config import Config
from kos.errors import ConfigError
from kos.node import ports
from kos.node.admin import Admin, Explain, forget_process
from kos.node.supervisor import EXIT_BAD_CONFIG, ChildSpec, Supervisor

#: a worker ends its open responses by itself at limits.drain; this is what it may take to do so
DRAIN_GRACE_S: Final = 1.0

_log: Final = logging.getLogger("kos.node")


@dataclass(frozen=True, slots=True)
class Role:
    """What to run. Commands come without arguments.

    daemon: gets `--config FILE`. worker: gets `--config FILE --index I --s3 HOST:PORT --s3-tls HOST:PORT`, of the
    last two those that the configuration has, and is run `workers` times.
    explain: makes the answerer of /v1/explain from the configuration.
    """

    name: str
    daemon: Sequence[str] | None = None
    worker: Sequence[str] | None = None
    explain: Callable[[Config], Explain] | None = None


@dataclass(frozen=True, slots=True)
class _Ports:
    """Sockets of this process, and addresses as they came out."""

    s3: tuple[socket.socket, str] | None
    s3_tls: tuple[socket.socket, str] | None
    admin: tuple[socket.socket, str]

    def addresses(self) -> dict[str, str]:
        """Name to HOST:PORT of what is listened on."""
        taken = {"s3": self.s3, "s3_tls": self.s3_tls, "admin": self.admin}
        return {name: port[1] for name, port in taken.items() if port is not None}

    def urls(self) -> dict[str, str]:
        """The same as URLs."""
        schemes = {"s3_tls": "https"}
        return {name: f"{schemes.get(name, 'http')}://{at}" for name, at in self.addresses().items()}

    def close(self) -> None:
        for port in (self.s3, self.s3_tls, self.admin):
            if port is not None:
                port[0].close()


def run_role(config_path: str, role: Role) -> int:
    """Run in the foreground until SIGTERM or SIGINT; the exit code: 0 stopped as asked, 2 configuration, 1 else."""
    try:
        settings = config.load(config_path)
        log.setup(settings.log.level, role.name)
        raise_nofile()
        if role.worker is not None and settings.listen.s3_tls is not None:
            tls.load(settings.listen)  # every worker does: said here it is said once, and before anything has started
        taken = _take_ports(settings, role)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    metrics_dir = Path(tempfile.mkdtemp(prefix="kos-metrics-"))
    try:
        return asyncio.run(_run(os.path.abspath(config_path), settings, role, taken, metrics_dir))
    finally:
        shutil.rmtree(metrics_dir, ignore_errors=True)
        taken.close()


def raise_nofile() -> int:
    """Raise the limit of open descriptors to what the system allows; children inherit it. The limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:
            _log.warning("limit of open files stays as it is", extra={"limit": soft, "reason": str(error)})
            return soft
    return hard


def children_of(
    config_path: str, settings: Config, role: Role, addresses: Mapping[str, str], metrics_dir: Path
) -> list[ChildSpec]:
    """The child processes of a role. Workers stop first, so that what they finish still finds its daemon.

    addresses: s3, s3_tls: where workers listen, with real ports.
    """

    def env(name: str) -> dict[str, str]:
        return {metrics.MULTIPROC_DIR: str(metrics_dir), metrics.PROCESS: name}

    specs = []
    if role.daemon is not None:
        specs.append(
            ChildSpec(
                name="daemon",
                argv=(*role.daemon, "--config", config_path),
                env=env("daemon"),
                serves=False,
                stop_rank=1,
                stop_s=settings.supervisor.stop_timeout_s,
            )
        )
    where = [("--s3", addresses.get("s3")), ("--s3-tls", addresses.get("s3_tls"))]
    listening = [word for option, address in where if address is not None for word in (option, address)]
    if role.worker is not None and listening:
        specs.extend(
            ChildSpec(
                name=f"worker-{index}",
                argv=(*role.worker, "--config", config_path, "--index", str(index), *listening),
                env=env(f"worker-{index}"),
                stop_s=settings.limits.drain_s + DRAIN_GRACE_S,
                forward_hangup=True,
            )
            for index in range(settings.workers)
        )
    return specs


def _take_ports(settings: Config, role: Role) -> _Ports:
    listen = settings.listen
    with contextlib.ExitStack() as stack:

        def reserve(option: str, address: str | None) -> tuple[socket.socket, str] | None:
            if role.worker is None or address is None:
                return None
            taken = ports.reserve(option, address)
            stack.callback(taken[0].close)
            return taken

        taken = _Ports(
            s3=reserve("listen.s3", listen.s3),
            s3_tls=reserve("listen.s3_tls", listen.s3_tls),
            admin=ports.listen("listen.admin", listen.admin),
        )
        stack.pop_all()
        return taken


async def _run(config_path: str, settings: Config, role: Role, taken: _Ports, metrics_dir: Path) -> int:
    ready = "kos ready " + " ".join(f"{name}={url}" for name, url in taken.urls().items())
    supervisor = Supervisor(
        children_of(config_path, settings, role, taken.addresses(), metrics_dir),
        settings.supervisor,
        Clock(),
        on_ready=lambda: _say(ready),
        on_exit=lambda name: forget_process(name, metrics_dir),
    )
    node = {"role": role.name, "version": kos.__version__, "region": settings.region, "pid": os.getpid()}
    explain = role.explain(settings) if role.explain is not None else None
    admin = Admin(
        supervisor,
        settings.supervisor,
        metrics_dir,
        explain,
        {**node, "listen": taken.addresses(), "urls": taken.urls()},
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    loop.add_signal_handler(signal.SIGHUP, supervisor.hangup)
    await admin.start(taken.admin[0])
    try:
        code = await supervisor.run()
    finally:
        await admin.close()
    if supervisor.failure:
        print(f"{config_path}: {supervisor.failure}", file=sys.stderr)
    return code


def _say(line: str) -> None:
    # Whoever started the node may have closed its end long ago; that is no reason to stop serving.
    with contextlib.suppress(OSError):
        print(line, flush=True)
