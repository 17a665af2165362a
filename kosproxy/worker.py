"""One worker process: an S3 endpoint on a port that it shares with its siblings, and what other nodes ask of this one.

Owns: making the parts and taking them down in order, the listening socket, signals, telling the supervisor how it is.
Does not own: being restarted (kos.node.supervisor), or anything that happens to a request.

Invariant: says ready only when a request that arrives next will be answered, and exits 0 after SIGTERM within
limits.drain and a moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import uvloop

from kos import config, log, metrics
from kos.clock import Clock
from kos.config import Config
from kos.errors import ConfigError
from kos.log import AccessLog
from kos.node.status import EXIT_CONFIG, ChildStatus
from kos.origin.credentials import from_config
from kos.origin.lane import OriginLane
from kos.rules import Rules
from kos.tasks import Tasks
from koscache.carrier import Carrier, Peers, Phase, TouchMap
from koscache.reader import Reader
from kosproxy.certificate import Certificate
from kosproxy.listings import Listings
from kosproxy.pages import Pages, PageStore
from kosproxy.parts import Parts
from kosproxy.peering import edge_of
from kosproxy.pipeline import Pipeline
from kosproxy.render import not_tls, turned_away
from kosproxy.server import Edge
from kosproxy.tls import TlsEdge

#: Threads that wait for the disk on behalf of clients; each at most one window of a file at a time.
DISK_THREADS: Final = 8
#: Threads that hash request bodies. A worker is one core's worth of serving; hashing may take others while they idle.
HASH_THREADS: Final = 4
#: How often the supervisor is told whether this worker caches.
STATUS_EVERY_S: Final = 1.0
#: A request makes some hundred containers and frees them by count, not by cycle: looking for cycles every 700 of them
#: costs 3 % of a hit. At this rate a leak of cycles is found every few hundred requests.
_GC_ALLOCATIONS: Final = 50_000
#: What tasks may take to end after the drain.
CLOSE_S: Final = 0.5

_log: Final = logging.getLogger("kosproxy.worker")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="kosproxy.worker")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--index", type=int, default=0, help="this worker's number on its node")
    parser.add_argument("--s3", metavar="HOST:PORT", help="where to listen for clients")
    parser.add_argument("--s3-tls", metavar="HOST:PORT", help="where to listen for clients over https")
    parser.add_argument("--peer", metavar="HOST:PORT", help="where to listen for other nodes of the cluster")
    parser.epilog = "With none of these addresses: all that the configuration has."
    arguments = parser.parse_args(argv)
    named = {"s3": arguments.s3, "s3_tls": arguments.s3_tls, "peer": arguments.peer}
    status = ChildStatus.from_env()
    status.starting()
    try:
        settings = config.load(arguments.config)
        log.setup(settings.log.level)
        addresses = {name: at for name, at in named.items() if at is not None} or _configured(settings)
        # First: from the moment that it listens, clients come to this worker instead of to its siblings.
        certificate = Certificate(settings.listen) if "s3_tls" in addresses else None
        backlog = settings.limits.backlog
        listening = {name: listen(f"listen.{name}", at, backlog) for name, at in addresses.items()}
        uvloop.run(serve(settings, listening, certificate, status))
    except ConfigError as error:
        status.failed(str(error))
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _configured(settings: Config) -> dict[str, str]:
    listen = settings.listen
    found = {"s3": listen.s3, "s3_tls": listen.s3_tls, "peer": listen.peer if settings.cluster.enabled else None}
    return {name: at for name, at in found.items() if at is not None}


def listen(option: str, address: str, backlog: int) -> socket.socket:
    """A listening socket on a port that all workers share. Raises ConfigError if the port is somebody else's."""
    host, port = config.split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(where)
    except OSError as error:
        raise ConfigError(f"{option}: {address}: {error.strerror}") from error
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


async def serve(
    settings: Config,
    listening: Mapping[str, socket.socket],
    certificate: Certificate | None,
    status: ChildStatus,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then drain. listening: sockets by name: s3, s3_tls, peer."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with parts_of(settings) as parts:
        loop.add_signal_handler(signal.SIGHUP, _hangup, parts.access_log, certificate)
        edge = Edge(Pipeline(parts), settings.limits, parts.threads, turned_away())
        edges = [edge]
        servers = []
        for name, sock in listening.items():
            factory: Edge | TlsEdge = edge
            if name == "s3_tls":
                assert certificate is not None, "made before it was listened"
                factory = TlsEdge(edge, certificate.context, not_tls())
                parts.tasks.spawn(certificate.watch(parts.clock, parts.threads), "certificate")
            elif name == "peer":
                factory = edge_of(parts)
                edges.append(factory)
            servers.append(await loop.create_server(factory, sock=sock, backlog=settings.limits.backlog))
        # What lives now lives as long as the process: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_ALLOCATIONS)
        telling = parts.tasks.spawn(_tell(parts, status), "status")
        await stop.wait()
        telling.cancel()
        status.draining()
        for server in servers:
            server.close()
        await asyncio.gather(*(each.drain(settings.limits.drain_s) for each in edges))


@contextlib.asynccontextmanager
async def parts_of(settings: Config, clock: Clock | None = None) -> AsyncIterator[Parts]:
    """The parts of a worker, started; closed in reverse order."""
    clock = clock or Clock()
    tasks = Tasks("worker")
    async with contextlib.AsyncExitStack() as stack:
        access_log = AccessLog(settings.log)
        await access_log.start()
        stack.push_async_callback(access_log.close)
        threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="disk")
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        hashers = ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash")
        stack.callback(hashers.shutdown, wait=False, cancel_futures=True)
        origin = OriginLane(settings.origin, from_config(settings.origin, clock), clock)
        await origin.start()
        stack.push_async_callback(origin.close)
        reader = Reader(settings.cache.dir, alone=not settings.cluster.enabled)
        stack.callback(reader.close)
        rules = Rules(settings.rules)
        peers, touches = _cluster_parts(settings, clock, tasks)
        if touches is not None:
            stack.callback(touches.close)
        carrier = Carrier(settings, reader, origin, rules, clock, tasks, peers, touches)
        metrics.REQUEST_COUNTS.flushed = partial(_tell_hits, carrier)
        await carrier.start()
        stack.push_async_callback(carrier.close)
        listings = None
        cache = settings.cache
        if cache.enabled and cache.listings_bytes:
            pages = Pages(PageStore(cache.dir, cache.listings_bytes, cache.min_free_bytes), clock)
            stack.push_async_callback(pages.close)
            listings = Listings(pages, carrier, origin, rules, clock, tasks)
        tasks.spawn(metrics.flush_forever(clock), "metrics")
        stack.push_async_callback(tasks.close, CLOSE_S)
        yield Parts(
            config=settings,
            secrets={each.access_key: each.secret_key for each in settings.credentials},
            carrier=carrier,
            origin=origin,
            clock=clock,
            tasks=tasks,
            access_log=access_log,
            threads=threads,
            hashers=hashers,
            listings=listings,
        )


def _cluster_parts(settings: Config, clock: Clock, tasks: Tasks) -> tuple[Peers | None, TouchMap | None]:
    """What it takes to ask other nodes. Raises ConfigError."""
    cluster = settings.cluster
    if not cluster.enabled:
        return None, None
    assert cluster.secret is not None, "checked with the configuration"
    try:
        os.makedirs(settings.cache.dir, mode=0o750, exist_ok=True)
        touches = TouchMap(settings.cache.dir)
    except OSError as error:
        raise ConfigError(f"cache.dir: {settings.cache.dir}: {error.strerror}") from error
    host, _ = config.split_address(settings.listen.peer)
    local = None if host in ("0.0.0.0", "::") else host
    return Peers(cluster, config.own_name(settings), cluster.secret.encode(), clock, tasks, local), touches


def _tell_hits(carrier: Carrier, counts: Mapping[tuple[str, ...], float]) -> None:
    """Of reads that the cache has a part in, how many did without the origin."""
    reads = hits = 0.0
    for (operation, _, _, phase), count in counts.items():
        if operation in ("GetObject", "HeadObject") and phase != "none":
            reads += count
            hits += count if phase in (Phase.HIT, Phase.PEER) else 0
    carrier.counted(int(reads), int(hits))


def _hangup(access_log: AccessLog, certificate: Certificate | None) -> None:
    access_log.reopen()
    if certificate is not None:
        certificate.reload()


async def _tell(parts: Parts, status: ChildStatus) -> None:
    """Keep the supervisor informed. Ready is said once the loop has come round, with the socket in it."""
    while True:
        await parts.clock.sleep(0)
        status.ready(parts.carrier.caching, parts.carrier.reason)
        await parts.clock.sleep(STATUS_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())
