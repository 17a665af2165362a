"""A programmable S3 origin on 127.0.0.1 for tests: real sockets and HTTP, faults on demand, every request written down.

Owns: the HTTP server, the scripted faults, the request log. Does not own what S3 answers (tests.fakes.origin_store).
Invariant: a fault applies to exactly the requests that it names, in the order they arrive; without faults this is S3.

Start it (all three give a running origin and end it cleanly):
    async with FakeOrigin() as origin: ...            # in the test's own loop
    with FakeOrigin().in_thread() as origin: ...      # own thread and loop: for blocking clients and subprocesses
    await origin.start() / await origin.stop()
Arguments: secrets={access_key: secret_key} verifies SigV4 (kos.s3.sigv4) and answers 403; domain="s3.test" understands
virtual-host addressing; tls=ssl.SSLContext; now=callable (epoch seconds, for Last-Modified).
    origin.endpoint  "http://127.0.0.1:PORT"     origin.port     origin.store  (buckets, objects; see origin_store)

Behind the client's back:
    origin.put("b", "k", body, {"cache-control": "no-store"}, etag=None, last_modified=None, checksums={...}) -> Version
    (a body of GiBs: tests.fakes.generated.Generated)
    origin.remove("b", "k"); origin.get("b", "k") -> Version | None; origin.create_bucket("b", versioned=True)

What came in (origin.requests, a list of Recorded, in order of arrival):
    origin.count(method="GET", key="k", op="GetObject", status=206) -> int     any subset of the arguments
    origin.sent_bytes(key="k") -> int                                          of the bodies of the answers to those
    origin.forget() empties the log. origin.connections: accepted so far; origin.open_connections: now;
    origin.busiest: most requests that were in work at the same time. Recorded has method, target, raw_path, raw_query,
    bucket, key, query, headers (lower case), raw_headers, body, body_complete, status, sent_bytes, op, arrived, connection
    (its number).

Faults: origin.fault(times=1, <which>, <what>) -> Fault. times=None: until fault.end() or origin.heal(). The first fault
that matches a request applies, alone; fault.used counts.
  which  method= bucket= key= op= (exact), where=callable(Recorded) -> bool, skip=n (lets the first n matches pass)
  what   status=503, code="SlowDown", retry_after="1": an S3 error; early=True: before the request's body is read
         headers={"etag": None, "cache-control": "private"}   sets (or with None leaves out) headers of the answer
         body_cut=n            sends the right head, n bytes of the body, and closes (reset=True: with a TCP reset)
         body_length=+n / -n   announces that much more or less than it sends
         garble=n              flips every bit of byte n of the body
         close=True            closes without an answer (reset=True: with a TCP reset); after="request" (default) once
                               the request was read and carried out; after="head" as soon as its head is there
         ignore_range=True     answers 200 with everything
         force_304=True        answers 304 whatever was asked
         raw=b"..."            sends just that and closes
         then=callable(origin) runs after the answer was made, before it is sent: change the object mid-way
         before=callable(origin)  runs when the request arrived, before it is looked at
         delay_s=x             answers that much later (benchmarks only; tests use holds)
Holds: hold = origin.hold(times=1, <which>, at="head" | "answer" | "body", body_bytes=n). The request stops when its
head has come / when its answer is ready / when n bytes of the answer's body were sent. `await hold.reached()` or
`hold.wait_reached()` (thread) -> Recorded; hold.release() lets go all. Every request held by it: hold.held (a list).
Whole origin: origin.down() refuses connections and drops the open ones; origin.up() listens at the same port again;
origin.drop_connections() cuts what is open. (With in_thread these are awaited with origin.call(origin.down()).)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import ssl as ssl_module
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from tests.fakes.generated import Generated
from tests.fakes.origin_store import (
    Answer,
    Headers,
    OriginStore,
    Refusal,
    Request,
    decode_aws_chunked,
    operation,
    parse_target,
)

_PIECE_BYTES = 256 * 1024
_HEAD_BYTES_MAX = 1024 * 1024
_REASONS = {200: "OK", 204: "No Content", 206: "Partial Content", 304: "Not Modified", 404: "Not Found"}


@dataclass(slots=True, eq=False)
class Recorded:
    """One request as it arrived, and what became of it."""

    method: str
    target: str
    raw_path: str
    raw_query: str
    bucket: str
    key: str
    query: Headers
    headers: Headers
    raw_headers: list[tuple[str, str]]
    op: str
    connection: int
    body: bytes = b""
    body_complete: bool = False
    status: int | None = None
    sent_bytes: int = 0
    #: time.monotonic() when its head had come
    arrived: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class Fault:
    """See the module's docstring; built by FakeOrigin.fault and FakeOrigin.hold."""

    times: int | None = 1
    skip: int = 0
    method: str | None = None
    bucket: str | None = None
    key: str | None = None
    op: str | None = None
    where: Callable[[Recorded], bool] | None = None
    status: int | None = None
    code: str = "InternalError"
    retry_after: str | None = None
    early: bool = False
    headers: dict[str, str | None] = field(default_factory=dict)
    body_cut: int | None = None
    body_length: int = 0
    garble: int | None = None
    close: bool = False
    reset: bool = False
    after: str = "request"
    ignore_range: bool = False
    force_304: bool = False
    raw: bytes | None = None
    then: Callable[[FakeOrigin], object] | None = None
    before: Callable[[FakeOrigin], object] | None = None
    delay_s: float = 0.0
    holding: Hold | None = None
    used: int = 0
    ended: bool = False

    def takes(self, recorded: Recorded) -> bool:
        if self.ended or (self.times is not None and self.used >= self.times):
            return False
        for name in ("method", "bucket", "key", "op"):
            wanted = getattr(self, name)
            if wanted is not None and wanted != getattr(recorded, name):
                return False
        if self.where is not None and not self.where(recorded):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.used += 1
        return True

    def end(self) -> None:
        self.ended = True


class Hold:
    """Stops requests at a named point until released; usable from any loop or thread."""

    def __init__(self, at: str, body_bytes: int) -> None:
        assert at in ("head", "answer", "body")
        self.at, self.body_bytes = at, body_bytes
        self.held: list[Recorded] = []
        self._reached: concurrent.futures.Future[Recorded] = concurrent.futures.Future()
        self._released: concurrent.futures.Future[None] = concurrent.futures.Future()

    async def reached(self) -> Recorded:
        return await asyncio.shield(asyncio.wrap_future(self._reached))

    def wait_reached(self, timeout_s: float = 30.0) -> Recorded:
        return self._reached.result(timeout_s)

    def release(self) -> None:
        if not self._released.done():
            self._released.set_result(None)

    async def stop(self, recorded: Recorded) -> None:
        self.held.append(recorded)
        if not self._reached.done():
            self._reached.set_result(recorded)
        await asyncio.shield(asyncio.wrap_future(self._released))


_NO_FAULT = Fault(times=0)


class FakeOrigin:
    def __init__(
        self,
        *,
        secrets: Headers | None = None,
        domain: str | None = None,
        tls: ssl_module.SSLContext | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.store = OriginStore(now)
        self.requests: list[Recorded] = []
        self.connections = 0
        self.busiest = 0
        self.port = 0
        self._busy = 0
        self._secrets, self._domain, self._tls = secrets, domain, tls
        self._faults: list[Fault] = []
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.put, self.remove, self.get = self.store.put, self.store.remove, self.store.get
        self.create_bucket = self.store.create_bucket

    # -- running -------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def start(self, port: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(
            self._accepted, "127.0.0.1", port, limit=_HEAD_BYTES_MAX, ssl=self._tls, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.heal()
        await self.down()

    async def down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.drop_connections()

    async def up(self) -> None:
        await self.start(self.port)

    async def drop_connections(self) -> None:
        tasks = list(self._open)
        for writer in list(self._open.values()):
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> FakeOrigin:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[FakeOrigin]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="fake-origin", daemon=True)
        thread.start()
        self._loop = loop
        try:
            self.call(self.start())
            yield self
        finally:
            self.call(self.stop())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine of this origin in its thread and waits for it (in_thread only)."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    # -- script and log ------------------------------------------------------------------------------------------

    def fault(self, times: int | None = 1, **what: Any) -> Fault:
        fault = Fault(times=times, **what)
        self._faults.append(fault)
        return fault

    def hold(self, times: int | None = 1, *, at: str = "answer", body_bytes: int = 0, **which: Any) -> Hold:
        hold = Hold(at, body_bytes)
        self.fault(times, holding=hold, **which)
        return hold

    def heal(self) -> None:
        """Ends all faults and releases all holds."""
        for fault in self._faults:
            fault.end()
            if fault.holding is not None:
                fault.holding.release()
        self._faults.clear()

    def forget(self) -> None:
        self.requests.clear()
        self.busiest = 0

    def count(self, **which: Any) -> int:
        return sum(all(getattr(r, name) == wanted for name, wanted in which.items()) for r in list(self.requests))

    def sent_bytes(self, **which: Any) -> int:
        found = [r for r in list(self.requests) if all(getattr(r, name) == wanted for name, wanted in which.items())]
        return sum(r.sent_bytes for r in found)

    # -- serving -------------------------------------------------------------------------------------------------

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer, self.connections))
        self._open[task] = writer
        task.add_done_callback(self._open.pop)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        raw_socket = writer.get_extra_info("socket")
        if raw_socket is not None:
            raw_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while await self._exchange(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl_module.SSLError):
            pass  # the client went away or sent no HTTP: nothing to answer
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        recorded = self._record(head, number)
        self.requests.append(recorded)
        fault = next((f for f in list(self._faults) if f.takes(recorded)), _NO_FAULT)
        self._busy += 1
        self.busiest = max(self.busiest, self._busy)
        try:
            return await self._carry_out(recorded, fault, reader, writer)
        finally:
            self._busy -= 1

    def _record(self, head: bytes, number: int) -> Recorded:
        lines = head[:-4].decode("utf-8", "surrogateescape").split("\r\n")
        method, target, _ = lines[0].split(" ")
        pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        headers = {name.lower(): value for name, value in pairs}
        raw_path, raw_query, bucket, key, query = parse_target(target, headers.get("host", ""), self._domain)
        op = operation(method, key, query, headers) if bucket else "ListBuckets"
        return Recorded(method, target, raw_path, raw_query, bucket, key, query, headers, pairs, op, number)

    async def _carry_out(
        self, recorded: Recorded, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        hold = fault.holding
        if fault.before is not None:
            fault.before(self)
        if hold is not None and hold.at == "head":
            await hold.stop(recorded)
        if fault.close and fault.after == "head":
            return _cut(writer, fault)
        if fault.early and fault.status is not None:
            await self._send(recorded, _error(fault), fault, writer)
            return False  # what the client still sends is not a request
        if recorded.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        recorded.body = await _read_body(recorded, reader)
        recorded.body_complete = True
        if fault.status is not None:
            answer = _error(fault)
        elif fault.force_304:
            answer = Answer(304)
        else:
            answer = self._answer(recorded, fault)
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.then is not None:
            fault.then(self)
        if hold is not None and hold.at == "answer":
            await hold.stop(recorded)
        if fault.close:
            return _cut(writer, fault)
        if fault.raw is not None:
            writer.write(fault.raw)
            await writer.drain()
            return False
        return await self._send(recorded, answer, fault, writer)

    def _answer(self, recorded: Recorded, fault: Fault) -> Answer:
        headers = dict(recorded.headers)
        if fault.ignore_range:
            headers.pop("range", None)
        try:
            if self._secrets is not None:
                self._verify(recorded)
            body = recorded.body
            if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
                body, trailers = decode_aws_chunked(body)
                headers.update(trailers)
                if len(body) != int(headers.get("x-amz-decoded-content-length", len(body))):
                    raise Refusal(400, "IncompleteBody")
        except (Refusal, ValueError) as refusal:
            return (refusal if isinstance(refusal, Refusal) else Refusal(400, "IncompleteBody")).answer()
        request = Request(
            recorded.method,
            recorded.raw_path,
            recorded.raw_query,
            headers,
            recorded.bucket,
            recorded.key,
            recorded.query,
            body,
        )
        return self.store.serve(recorded.op, request)

    def _verify(self, recorded: Recorded) -> None:
        from kos.errors import S3Error
        from kos.s3 import sigv4
        from kos.s3.head import RequestHead

        assert self._secrets is not None
        head = RequestHead(recorded.method, recorded.raw_path, recorded.raw_query, recorded.headers)
        try:
            sigv4.verify(head, self._secrets, time.time())
        except S3Error as error:
            raise Refusal(error.status, error.code, error.message) from error

    async def _send(self, recorded: Recorded, answer: Answer, fault: Fault, writer: asyncio.StreamWriter) -> bool:
        body = answer.body if isinstance(answer.body, Generated) else memoryview(answer.body)
        if fault.garble is not None:
            assert not isinstance(body, Generated), "what is worked out again and again cannot be spoiled"
            garbled = bytearray(body)
            garbled[fault.garble] ^= 0xFF
            body = memoryview(garbled)
        headers: dict[str, str | None] = {
            "date": formatdate(usegmt=True),
            "server": "FakeS3",
            "x-amz-request-id": f"FAKE{len(self.requests)}",
            "x-amz-id-2": "FAKE",
            **answer.headers,
        }
        if answer.status not in (204, 304):
            headers["content-length"] = str(len(body) + fault.body_length)
        headers.update({name.lower(): value for name, value in fault.headers.items()})
        ends = fault.early or fault.body_cut is not None or fault.body_length != 0
        if ends or recorded.headers.get("connection", "").lower() == "close":
            headers.setdefault("connection", "close")
        lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        recorded.status = answer.status
        writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape"))
        if recorded.method == "HEAD":
            body = body[:0]
        if fault.body_cut is not None:
            body = body[: fault.body_cut]
        await self._send_body(recorded, body, fault, writer)
        if fault.body_cut is not None:
            return _cut(writer, fault)
        return headers.get("connection") != "close"

    async def _send_body(
        self, recorded: Recorded, body: memoryview | Generated, fault: Fault, writer: asyncio.StreamWriter
    ) -> None:
        hold = fault.holding
        stop = hold.body_bytes if hold is not None and hold.at == "body" else -1
        while len(body) > 0 or stop == 0:
            if stop == 0:
                assert hold is not None
                await hold.stop(recorded)
                stop = -1
            piece = body[: min(_PIECE_BYTES, stop) if stop > 0 else _PIECE_BYTES]
            writer.write(piece.view() if isinstance(piece, Generated) else piece)
            await writer.drain()
            recorded.sent_bytes += len(piece)
            body = body[len(piece) :]
            stop -= len(piece) if stop > 0 else 0
        await writer.drain()


def _error(fault: Fault) -> Answer:
    assert fault.status is not None
    headers = {} if fault.retry_after is None else {"retry-after": fault.retry_after}
    return Refusal(fault.status, fault.code, headers=headers).answer()


def _cut(writer: asyncio.StreamWriter, fault: Fault) -> bool:
    if fault.reset:
        raw_socket = writer.get_extra_info("socket")
        raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return False


async def _read_body(recorded: Recorded, reader: asyncio.StreamReader) -> bytes:
    if recorded.headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(recorded.headers.get("content-length", "0")))
    pieces = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return b"".join(pieces)
