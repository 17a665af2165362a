"""The edge of a worker with lanes that say what they were asked, over http or https.

async with serving(tmp_path, secure=True, header_timeout_s=0.2) as served: ... served.open() ... served.lanes.seen
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp.web_request import BaseRequest

from kos.config import Limits
from kos.errors import S3Error
from kosproxy.server import Connection, Edge, Sent
from kosproxy.tls import TlsEdge
from tests.fakes import certificates

BODY = bytes(range(256)) * 40_000


class Piece(NamedTuple):
    fd: int
    offset: int
    length: int


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


class FakeLanes:
    """/fast and /copy are answered at once, /file by sendfile, all else by the slow lane, which repeats what it was sent."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(BODY)
        self.fd = os.open(path, os.O_RDONLY)
        self.seen: list[str] = []
        self.errors: list[str] = []
        self.begun = 0
        self.go = asyncio.Event()
        self.go.set()

    def fast(self, connection: Connection, data: bytes) -> bool:
        assert data.endswith(b"\r\n\r\n") and connection.quiet
        if data.count(b"\r\n\r\n") > 1:
            return False
        target = data.split(b" ")[1].decode()
        if target in ("/fast", "/copy"):
            self.seen.append(target[1:])
            assert connection.transport is not None
            connection.transport.write(answer(b"fast" if target == "/fast" else BODY))
            connection.answered_fast()
            return True
        if target == "/file":
            self.seen.append("file")
            relay = connection.relay()
            assert relay is not None
            connection.in_fast = True

            def done(failure: BaseException | None) -> None:
                if failure is None:
                    connection.answered_fast()
                else:
                    self.errors.append(type(failure).__name__)
                    connection.drop()

            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)
            relay.start(head, [Piece(self.fd, 0, len(BODY))], done)
            return True
        return False

    async def slow(self, request: BaseRequest, connection: Connection) -> Sent:
        self.begun += 1
        await self.go.wait()
        body = await request.content.read()
        self.seen.append(f"{request.method} {request._message.path} {len(body)}")
        await connection.send(answer(body))
        return Sent(keep_alive=not request._message.should_close)

    async def malformed(self, connection: Connection, error: S3Error) -> None:
        self.errors.append(error.code)
        with contextlib.suppress(ConnectionError):
            await connection.send(answer(error.code.encode(), f"{error.status} no"))


class Served(NamedTuple):
    lanes: FakeLanes
    edge: Edge
    port: int
    secure: bool

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = certificates.client_context() if self.secure else None
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24, ssl=context)


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path, *, secure: bool = False, kernel_bytes: int = 0, **limits: Any
) -> AsyncIterator[Served]:
    lanes = FakeLanes(tmp_path / "body")
    with ThreadPoolExecutor(2) as threads:
        edge = Edge(lanes, Limits(**limits), threads, answer(b"full", "503 Slow Down"))
        context = certificates.server().context()
        factory = TlsEdge(edge, lambda: context, answer(b"not tls", "400 no")) if secure else edge
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        if kernel_bytes:
            # Connections inherit it: so little the kernel holds of what a client does not take.
            server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_bytes)
        try:
            yield Served(lanes, edge, server.sockets[0].getsockname()[1], secure)
        finally:
            server.close()
            lanes.go.set()
            await edge.drain(0.1)
            os.close(lanes.fd)


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)
