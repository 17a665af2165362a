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
from kos.node.admin import Admin, AskCluster, Explain, forget_process
from kos.node.supervisor import EXIT_BAD_CONFIG, ChildSpec, Supervisor

#: a worker ends its open responses by itself at limits.drain; this is what it may take to do so
DRAIN_GRACE_S: Final = 1.0

#: what workers may listen to, by their options in `listen`
WORKER_PORTS: Final = ("s3", "s3_tls", "peer")

_log: Final = logging.getLogger("kos.node")


@dataclass(frozen=True, slots=True)
class Role:
    """What to run. Commands come without arguments.

    daemon: gets `--config FILE`. worker: gets `--config FILE --index I --s3 HOST:PORT --s3-tls HOST:PORT --peer HOST:PORT`,
    of the last three those that the configuration has (peer: in a cluster) and that are among `serves`, and is run
    `workers` times; not at all if that leaves none.
    explain: makes the answerer of /v1/explain from the configuration; cluster: that of /v1/cluster, for a node in one.
    """

    name: str
    daemon: Sequence[str] | None = None
    worker: Sequence[str] | None = None
    explain: Callable[[Config], Explain] | None = None
    cluster: Callable[[Config], AskCluster] | None = None
    serves: Sequence[str] = WORKER_PORTS


@dataclass(frozen=True, slots=True)
class _Ports:
    """Sockets of this process, and addresses as they came out. workers: reserved, by name. daemon: what it takes itself."""

    workers: Mapping[str, tuple[socket.socket, str]]
    admin: tuple[socket.socket, str]
    daemon: Mapping[str, str]

    def addresses(self) -> dict[str, str]:
        """Name to HOST:PORT of what is listened on."""
        return {**{name: port[1] for name, port in self.workers.items()}, "admin": self.admin[1], **self.daemon}

    def urls(self) -> dict[str, str]:
        """As URLs, those that are for anybody but other nodes."""
        schemes = {"s3": "http", "s3_tls": "https", "admin": "http"}
        return {name: f"{schemes[name]}://{at}" for name, at in self.addresses().items() if name in schemes}

    def close(self) -> None:
        for port in (*self.workers.values(), self.admin):
            port[0].close()


def run_role(config_path: str, role: Role) -> int:
    """Run in the foreground until SIGTERM or SIGINT; the exit code: 0 stopped as asked, 2 configuration, 1 else."""
    try:
        settings = config.load(config_path)
        log.setup(settings.log.level, role.name)
        raise_nofile()
        if "s3_tls" in _served(settings, role):
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

    addresses: s3, s3_tls, peer: where workers listen, with real ports.
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
    where = [(f"--{name.replace('_', '-')}", addresses[name]) for name in WORKER_PORTS if name in addresses]
    listening = [word for option, address in where for word in (option, address)]
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


def _served(settings: Config, role: Role) -> dict[str, str]:
    """What workers of this role listen to, as configured."""
    listen = settings.listen
    configured = {"s3": listen.s3, "s3_tls": listen.s3_tls, "peer": listen.peer if settings.cluster.enabled else None}
    served = role.serves if role.worker is not None else ()
    return {name: address for name, address in configured.items() if name in served and address is not None}


def _take_ports(settings: Config, role: Role) -> _Ports:
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, address in _served(settings, role).items():
            workers[name] = ports.reserve(f"listen.{name}", address)
            stack.callback(workers[name][0].close)
        # Only named, for whoever asks for the status: the daemon takes it itself.
        daemon = {"cluster": settings.listen.cluster} if role.daemon is not None and settings.cluster.enabled else {}
        taken = _Ports(workers, ports.listen("listen.admin", settings.listen.admin), daemon)
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
    cluster = role.cluster(settings) if role.cluster is not None and settings.cluster.enabled else None
    admin = Admin(
        supervisor,
        settings.supervisor,
        metrics_dir,
        explain,
        {**node, "listen": taken.addresses(), "urls": taken.urls()},
        cluster,
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
