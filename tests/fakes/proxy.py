"""A worker's server in a thread of its own, over any carrier and origin, for tests that talk to it by blocking sockets.

    with Proxy(carrier).running() as proxy: ... proxy.port ... proxy.lines (access log) ...

lanes: "both", or "slow" to keep the fast lane out. The wall clock stands still at NOW, so that Date, Age and signatures
are the same for every proxy; request ids count from the same start.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import uvloop

from kos import config
from kos.clock import Clock
from kos.tasks import Tasks
from kosproxy.access_log import Line
from kosproxy.parts import Parts
from kosproxy.pipeline import Pipeline
from kosproxy.render import not_tls, turned_away
from kosproxy.server import Connection, Edge
from kosproxy.tls import TlsEdge
from tests.fakes import certificates
from tests.fakes.carrier import NOW

ACCESS_KEY: Final = "kostestkey"
SECRET_KEY: Final = "kos/test+secret"


class StandingClock(Clock):
    """Real monotonic time, a wall clock that stands still."""

    def now(self) -> float:
        return NOW


class Lines:
    """An access log that keeps its lines."""

    enabled = True

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def write(self, line: Line | bytes) -> None:
        self.lines.append(msgspec.json.decode(line, type=Line) if isinstance(line, bytes) else line)


class _SlowOnly(Pipeline):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.fast = self._never

    def _never(self, connection: Connection, data: bytes) -> bool:
        return False


class Proxy:
    """origin: makes a started origin lane, in the proxy's loop. settings: further options of the configuration."""

    def __init__(
        self,
        carrier: Any,
        *,
        lanes: str = "both",
        origin: Callable[[], Any] | None = None,
        clock: Clock | None = None,
        **settings: Any,
    ) -> None:
        self.carrier = carrier
        self.log = Lines()
        self._lanes = lanes
        self._origin = origin
        self._clock = clock or StandingClock()
        self._settings = settings
        self.port = 0
        #: the same over TLS, with tests.fakes.certificates.server()
        self.tls_port = 0
        self.tasks = Tasks("proxy")
        self.edge: Edge | None = None
        self.origin: Any = None
        self.parts: Parts | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def lines(self) -> list[Line]:
        return self.log.lines

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        ready = threading.Event()
        thread = threading.Thread(target=lambda: uvloop.run(self._serve(ready)), name="proxy")
        thread.start()
        ready.wait()
        try:
            yield self
        finally:
            assert self.loop is not None and self._stop is not None
            self.loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        settings = config.Config(
            region="test",
            origin=self._settings.pop("origin_settings", config.Origin(endpoint="http://127.0.0.1:9")),
            cache=config.Cache(dir="/nonexistent", size_bytes=1 << 30),
            credentials=(config.Credential(access_key=ACCESS_KEY, secret_key=SECRET_KEY),),
            **self._settings,
        )
        if self._origin is not None:
            self.origin = self._origin()
            await self.origin.start()
        with ThreadPoolExecutor(2) as threads:
            parts = Parts(
                config=settings,
                secrets={ACCESS_KEY: SECRET_KEY},
                carrier=self.carrier,
                origin=self.origin,
                clock=self._clock,
                tasks=self.tasks,
                access_log=self.log,  # type: ignore[arg-type]
                threads=threads,
                hashers=threads,
            )
            self.parts = parts
            parts.request_ids._next = 1
            lanes = Pipeline(parts) if self._lanes == "both" else _SlowOnly(parts)
            self.edge = Edge(lanes, settings.limits, threads, turned_away())
            server = await self.loop.create_server(self.edge, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            context = certificates.server().context()
            secure = await self.loop.create_server(TlsEdge(self.edge, lambda: context, not_tls()), "127.0.0.1", 0)
            self.tls_port = secure.sockets[0].getsockname()[1]
            ready.set()
            await self._stop.wait()
            server.close()
            secure.close()
            await self.edge.drain(1.0)
            await self.tasks.close(1.0)
            if self.origin is not None:
                await self.origin.close()
