"""The admin port of a node: is it alive, is it ready, what does it count, what does it know of a key, how is its cluster.

Owns: /healthz, /readyz, /metrics, /v1/status, /v1/explain, /v1/cluster/…. Does not own: the answers (supervisor, metrics
files of the children, the injected explain and cluster).

There is no authentication: the port belongs on a loopback or management network, and shows no secret. What changes something
is a POST that no web page can send, see _from_page().

Invariant: no request here touches the origin, and none but those below /v1/cluster waits for a child: whether this node is
alive and ready does not depend on other nodes, on the control store, or on the daemon's having time to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

from kos import config, metrics
from kos.errors import KosError
from kos.node.supervisor import Supervisor

#: (bucket, key, version id or None) -> what this node knows of the object; always called from one and the same thread
Explain = Callable[[str, str, str | None], Mapping[str, Any]]

#: (topic, question) -> status and answer; topics as in the paths below /v1/cluster. An answer other than 200 has an "error"
AskCluster = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, Mapping[str, Any]]]]

REQUEST_BYTES_MAX: Final = 64 * 1024
SHUTDOWN_S: Final = 1.0
#: on what changes something, with the value 1
CHANGE_HEADER: Final = "x-kos-admin"


class Admin:
    """The admin server. start() serves on a listening socket; close() stops."""

    def __init__(
        self,
        supervisor: Supervisor,
        settings: config.Supervisor,
        metrics_dir: Path,
        explain: Explain | None,
        node: Mapping[str, Any],
        cluster: AskCluster | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._metrics_dir = metrics_dir
        self._explain = explain
        self._node = dict(node)
        self._cluster = cluster
        self._runner: web.AppRunner | None = None
        self._open = 0
        # LMDB's read transactions belong to a thread: one thread asks all questions.
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")

    async def start(self, listening: socket.socket) -> None:
        application = web.Application(middlewares=[self._bounded], client_max_size=REQUEST_BYTES_MAX)
        application.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/v1/status", self._status),
                web.get("/v1/explain", self._explained),
                web.get("/v1/cluster/status", self._cluster_status),
                web.get("/v1/cluster/locate", self._cluster_locate),
                web.post("/v1/cluster/drain", self._cluster_change),
                web.post("/v1/cluster/rejoin", self._cluster_change),
            ]
        )
        self._runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=15.0
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._reading.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _bounded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """At most admin_connections requests at a time, each at most admin_timeout long."""
        if self._open >= self._settings.admin_connections:
            return _json({"error": "too many admin requests"}, 503, {"Retry-After": "1"})
        self._open += 1
        try:
            async with asyncio.timeout(self._settings.admin_timeout_s):
                return await handler(request)
        except TimeoutError:
            return _json({"error": f"no answer within {self._settings.admin_timeout_s:g} s"}, 504)
        finally:
            self._open -= 1

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        readiness = readiness_of(self._supervisor)
        return _json(readiness, 200 if readiness["ready"] else 503)

    async def _status(self, request: web.Request) -> web.Response:
        return _json({**self._node, **readiness_of(self._supervisor)})

    async def _metrics(self, request: web.Request) -> web.Response:
        metrics.NODE_READY.set(1 if self._supervisor.ready else 0)
        page = await asyncio.to_thread(metrics_page, self._metrics_dir)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _explained(self, request: web.Request) -> web.Response:
        asked = _object_of(request)
        if isinstance(asked, web.Response):
            return asked
        bucket, key, version_id = asked
        if self._explain is None:
            return _json({"error": "this node keeps no cache"}, 501)
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._reading, self._explain, bucket, key, version_id)
        except KosError as error:
            return _json({"error": str(error)}, 503)
        return _json({"bucket": bucket, "key": key, "version_id": version_id, **answer})

    async def _cluster_status(self, request: web.Request) -> web.Response:
        return await self._ask_cluster("status", {})

    async def _cluster_locate(self, request: web.Request) -> web.Response:
        asked = _object_of(request)
        if isinstance(asked, web.Response):
            return asked
        bucket, key, version_id = asked
        return await self._ask_cluster("locate", {"bucket": bucket, "key": key, "version_id": version_id})

    async def _cluster_change(self, request: web.Request) -> web.Response:
        node = request.query.get("node", "")
        transport = request.transport
        if transport is None or not _from_here(
            transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        ):
            return _json({"error": "changes are taken from this machine alone: run kos there"}, 403)
        if _from_page(request):
            return _json({"error": f"found no header {CHANGE_HEADER}, or an Origin: web pages may change nothing"}, 403)
        if not node:
            return _json({"error": f"found no node, allowed: {request.path}?node=NAME"}, 400)
        return await self._ask_cluster(request.path.rpartition("/")[2], {"node": node})

    async def _ask_cluster(self, topic: str, question: Mapping[str, Any]) -> web.Response:
        if self._cluster is None:
            return _json(
                {"error": "this node is in no cluster: cluster.membership is off, or no daemon runs here"}, 501
            )
        status, answer = await self._cluster(topic, question)
        return _json(answer, status)


def _object_of(request: web.Request) -> tuple[str, str, str | None] | web.Response:
    """(bucket, key, version id) that a request names, or what to answer."""
    bucket, key = request.query.get("bucket", ""), request.query.get("key", "")
    if not bucket or not key:
        return _json({"error": f"found no bucket or no key, allowed: {request.path}?bucket=BUCKET&key=KEY"}, 400)
    version_id = request.query.get("version_id") or None
    if version_id is not None and "\0" in version_id:
        return _json({"error": "found a NUL in version_id, allowed: an id that the origin gave"}, 400)
    return bucket, key, version_id


def _from_here(peer: object, local: object) -> bool:
    """Whether the other end is this machine, or this pod: who may look at metrics is not to change the cluster.

    peer, local: socket addresses of the two ends, (host, port, ...).
    """
    if not isinstance(peer, tuple) or not isinstance(local, tuple):
        return False
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return bool(peer[0] == local[0] or (mapped or address).is_loopback)


def _from_page(request: web.Request) -> bool:
    """Whether a web page may have made it. A browser beside this port sends what any page asks it to.

    A page of another origin can post a form without asking, but set no header of its own: for that the browser asks first, by
    OPTIONS, which nobody here answers. A page whose host name turns into this address (DNS rebinding) needs not ask; but
    browsers put an Origin on every POST, and no other client does.
    """
    return request.headers.get(CHANGE_HEADER) != "1" or "Origin" in request.headers


def readiness_of(supervisor: Supervisor) -> dict[str, Any]:
    """ready; the parts with their states; caching on or off with the reasons; which parts are not ready."""
    parts = [
        {
            "name": child.spec.name,
            "state": child.report.state,
            "pid": child.process.pid if child.process is not None and child.process.returncode is None else None,
            "restarts": child.restarts,
            "reason": child.report.reason,
        }
        for child in supervisor.children
    ]
    off = {
        f"{child.spec.name}: {child.report.reason}" for child in supervisor.children if child.report.caching == "off"
    }
    return {
        "ready": supervisor.ready,
        "state": "draining" if supervisor.stopping else "ready" if supervisor.was_ready else "starting",
        "not_ready": [child.spec.name for child in supervisor.children if not child.ready],
        "caching": "off" if off else "on",
        "caching_off_reasons": sorted(off),
        "parts": parts,
    }


def metrics_page(metrics_dir: Path) -> bytes:
    """The children's metrics, added up, and the supervisor's own. Reads files: not for the loop."""
    children = CollectorRegistry()
    multiprocess.MultiProcessCollector(children, path=str(metrics_dir))  # type: ignore[no-untyped-call]
    return generate_latest(children) + generate_latest(metrics.NODE_REGISTRY)


def forget_process(name: str, metrics_dir: Path) -> None:
    """A child ended: what it said about the present (fills in flight) holds no longer; what it counted does."""
    for file in metrics_dir.glob(f"gauge_live*_{name}.db"):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(content, enc_hook=str), indent=2) + b"\n"
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
