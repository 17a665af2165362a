"""The daemon's process: from a configuration file to an exit code.

Owns: the command line, signals, the loop, telling the supervisor. Does not own: anything the daemon does (koscache.daemon).

Invariant: says ready only when workers can connect, and after SIGTERM leaves a store with its clean mark.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from typing import Final

import uvloop

from kos import config, log
from kos.clock import Clock
from kos.config import Config
from kos.errors import ConfigError
from kos.node.status import EXIT_CONFIG, ChildStatus
from kos.tasks import Tasks
from koscache.daemon import Daemon
from koscache.store import Store

#: How often the supervisor is told whether caching is on.
_STATUS_EVERY_S: Final = 1.0


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="koscache.daemon_main")
    parser.add_argument("--config", required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    status = ChildStatus.from_env()
    status.starting()
    try:
        settings = config.load(arguments.config)
        log.setup(settings.log.level)
        uvloop.run(serve(settings, status))
    except ConfigError as error:
        status.failed(str(error))
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    return 0


async def serve(settings: Config, status: ChildStatus) -> None:
    """Be the daemon until SIGTERM or SIGINT. Raises ConfigError for what no restart can mend."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock = Clock()
    tasks = Tasks("daemon")
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        stop.set()

    daemon = Daemon(settings, lambda: Store.open(settings.cache, clock), clock, tasks, failed)
    status.starting("recovering the store")
    try:
        await daemon.start()
        tasks.spawn(_tell(daemon, status, clock), "status")
        await stop.wait()
        status.draining()
    finally:
        await daemon.close()
    if failures:
        raise ConfigError(failures[0])


async def _tell(daemon: Daemon, status: ChildStatus, clock: Clock) -> None:
    while True:
        status.ready(daemon.caching, daemon.reason)
        await clock.sleep(_STATUS_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())
