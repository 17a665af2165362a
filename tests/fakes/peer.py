"""Members of a cluster that answer as they are told, on loopback sockets, and what asks them.

    async with FakePeer("a") as a, FakePeer("b") as b:
        a.plan(says(b"body"), hangs())              # for the first question, and the second; then default
        async with peers_of(a, b) as peers:
            response = await peers.ask(["a", "b"], wire.BLOCK, block(4))
    a.questions: what was asked, in order. a.connections: accepted so far; a.open: now.

A behaviour is an async callable (peer, reader, writer, question) -> whether to read on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from kos.clock import Clock
from kos.config import Cluster
from kos.tasks import Tasks
from koscache.carrier import peer_wire as wire
from koscache.carrier.peers import Peers
from koscache.cluster.view import Member, View
from koscache.content import Record

SECRET: Final = b"a secret of the cluster"
RECORD: Final = Record('"etag"', 1 << 20, "", (), (), True, b"c" * 16, 1.0, 1)


@dataclass(frozen=True, slots=True)
class Question:
    path: str
    headers: dict[str, str]
    connection: int


Behaviour = Callable[["FakePeer", asyncio.StreamReader, asyncio.StreamWriter, Question], Awaitable[bool]]


def block(length: int, **more: Any) -> wire.AskBlock:
    return wire.AskBlock("b", "k", RECORD, 0, 0, length, **more)


def head(length: int, status: int = 200, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {length}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def says(body: bytes = b"", status: int = 200, *more: str, after: asyncio.Event | None = None) -> Behaviour:
    """A whole answer, once `after` is set."""

    async def behave(
        peer: FakePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question
    ) -> bool:
        if after is not None:
            await after.wait()
        writer.write(head(len(body), status, *more) + body)
        await writer.drain()
        return True

    return behave


def sends(*parts: bytes | asyncio.Event, close: bool = True) -> Behaviour:
    """These bytes; where there is an event it is waited for. close: then the connection."""

    async def behave(
        peer: FakePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question
    ) -> bool:
        for part in parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
            else:
                writer.write(part)
                await writer.drain()
        return not close

    return behave


def hangs(*first: bytes) -> Behaviour:
    """These bytes and nothing more, until the other end closes."""

    async def behave(
        peer: FakePeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question
    ) -> bool:
        for part in first:
            writer.write(part)
        await writer.drain()
        await reader.read()
        return False

    return behave


class FakePeer:
    def __init__(self, name: str, *behaviours: Behaviour, default: Behaviour | None = None) -> None:
        self.name = name
        self.default = default or says()
        self.questions: list[Question] = []
        self.connections = 0
        self.open = 0
        self._plan = deque(behaviours)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def plan(self, *behaviours: Behaviour) -> None:
        self._plan.extend(behaviours)

    @property
    def member(self) -> Member:
        return Member(self.name, 1, f"127.0.0.1:{self.port}", "127.0.0.1:1", 1)

    async def __aenter__(self) -> FakePeer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def down(self) -> None:
        """Listens no more; every connection is cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                fields = (line.partition(": ") for line in lines[1:] if line)
                question = Question(lines[0].split(" ")[1], {name: value for name, _, value in fields}, number)
                self.questions.append(question)
                behave = self._plan.popleft() if self._plan else self.default
                if not await behave(self, reader, writer, question):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the other end is gone, or this one is to go
        finally:
            self.open -= 1
            writer.transport.abort()
            self._tasks.discard(task)


@contextlib.asynccontextmanager
async def peers_of(*members: FakePeer, clock: Clock | None = None, **settings: Any) -> AsyncIterator[Peers]:
    tasks = Tasks("test")
    options: dict[str, Any] = {"membership": "static", "connect_timeout_s": 5.0, "read_timeout_s": 5.0} | settings
    peers = Peers(Cluster(**options), "me", SECRET, clock or Clock(), tasks, None)
    peers.update(View(0, tuple(member.member for member in members)))
    try:
        yield peers
    finally:
        peers.close()
        await tasks.close()
        await asyncio.sleep(0)  # transports of the fakes that were closed meanwhile
