"""The admin port of a node: is it alive, is it ready, what does it count, what does it know of a key.

Owns: /healthz, /readyz, /metrics, /v1/status, /v1/explain. Does not own: the answers (supervisor, metrics files of the
children, the injected explain).

There is no authentication: the port belongs on a loopback or management network, and shows no secret.

Invariant: no request here touches the origin or waits for a child.
"""

from __future__ import annotations

import asyncio
import contextlib
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

REQUEST_BYTES_MAX: Final = 64 * 1024
SHUTDOWN_S: Final = 1.0


class Admin:
    """The admin server. start() serves on a listening socket; close() stops."""

    def __init__(
        self,
        supervisor: Supervisor,
        settings: config.Supervisor,
        metrics_dir: Path,
        explain: Explain | None,
        node: Mapping[str, Any],
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._metrics_dir = metrics_dir
        self._explain = explain
        self._node = dict(node)
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
            return web.Response(status=503, text="too many admin requests\n", headers={"Retry-After": "1"})
        self._open += 1
        try:
            async with asyncio.timeout(self._settings.admin_timeout_s):
                return await handler(request)
        except TimeoutError:
            return web.Response(status=504, text=f"no answer within {self._settings.admin_timeout_s:g} s\n")
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
        bucket, key = request.query.get("bucket", ""), request.query.get("key", "")
        if not bucket or not key:
            return _json({"error": "found no bucket or no key, allowed: /v1/explain?bucket=BUCKET&key=KEY"}, 400)
        version_id = request.query.get("version_id") or None
        if version_id is not None and "\0" in version_id:
            return _json({"error": "found a NUL in version_id, allowed: an id that the origin gave"}, 400)
        if self._explain is None:
            return _json({"error": "this node keeps no cache"}, 501)
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._reading, self._explain, bucket, key, version_id)
        except KosError as error:
            return _json({"error": str(error)}, 503)
        return _json({"bucket": bucket, "key": key, "version_id": version_id, **answer})


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


def _json(content: Mapping[str, Any], status: int = 200) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(content, enc_hook=str), indent=2) + b"\n"
    return web.Response(body=body, status=status, content_type="application/json")
