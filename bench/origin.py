"""An S3 origin that is much cheaper than what is measured against it.

Owns: a process that answers GET and HEAD (ranges, If-Match, If-None-Match) of the objects of bench.synthetic by
sendfile from memory, swallows PUTs and multipart uploads, lists nothing, and counts. Does not own: authentication
(none), storing, TLS.

Invariant: one thread, no buffer that grows: a body is sent from the one pattern file, or received into the one buffer.

Run as `python -m bench.origin [--port N]`; prints `origin ready HOST:PORT`. GET /-/counters answers the counters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
from dataclasses import asdict, dataclass
from email.utils import formatdate
from typing import Final

from bench import synthetic

_TURN_BYTES: Final = 1 << 20
_COPY_BYTES: Final = 64 << 10
_HEAD_MAX: Final = 64 << 10
_RANGE: Final = re.compile(r"^bytes=(\d*)-(\d*)$")
_MODIFIED: Final = formatdate(1_700_000_000, usegmt=True)
_EMPTY_LIST: Final = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Name>bench</Name><Prefix></Prefix><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    b"</ListBucketResult>"
)
_XML: Final = b'<?xml version="1.0" encoding="UTF-8"?>\n'
_CREATED: Final = (
    _XML + b"<InitiateMultipartUploadResult><Bucket>bench</Bucket><Key>%b</Key><UploadId>upload</UploadId>"
    b"</InitiateMultipartUploadResult>"
)
_COMPLETED: Final = (
    _XML + b"<CompleteMultipartUploadResult><Bucket>bench</Bucket><Key>%b</Key><ETag>%b</ETag>"
    b"</CompleteMultipartUploadResult>"
)


@dataclass(slots=True)
class Counters:
    """What was asked of the origin since it started."""

    connections: int = 0
    gets: int = 0
    heads: int = 0
    puts: int = 0
    not_modified: int = 0
    refused: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(slots=True)
class Connection:
    """One client: what was read and not parsed, what is being sent, what is still to come in."""

    sock: socket.socket
    inbox: bytes = b""
    out: bytes = b""
    at: int = 0
    left: int = 0
    coming: int = 0
    put_key: str = ""
    document: bytes = b""
    writing: bool = False
    closing: bool = False


class Origin:
    """The server; all state of its one loop."""

    def __init__(self, host: str, port: int) -> None:
        pattern = synthetic.pattern()
        self._fd = os.memfd_create("bench-origin")
        os.truncate(self._fd, len(pattern))
        self._map = mmap.mmap(self._fd, len(pattern))
        self._map[:] = pattern
        self._view = memoryview(self._map)
        self._swallow = bytearray(1 << 20)
        self._listener = socket.create_server((host, port), backlog=1024)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self.counters = Counters()
        self.address = self._listener.getsockname()

    def run(self) -> None:
        """Serve until the process is told to end."""
        listener = self._listener.fileno()
        while True:
            for fd, events in self._epoll.poll():
                if fd == listener:
                    self._accept()
                    continue
                c = self._connections.get(fd)
                if c is None:
                    continue
                try:
                    if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                        self._readable(c)
                    if events & select.EPOLLOUT and fd in self._connections:
                        self._pump(c)
                except (ConnectionError, TimeoutError):
                    self._close(c)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[sock.fileno()] = Connection(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            self.counters.connections += 1

    def _close(self, c: Connection) -> None:
        if self._connections.pop(c.sock.fileno(), None) is not None:
            self._epoll.unregister(c.sock.fileno())
            c.sock.close()

    def _readable(self, c: Connection) -> None:
        if c.coming:
            try:
                n = c.sock.recv_into(self._swallow, min(c.coming, len(self._swallow)))
            except BlockingIOError:
                return
            if not n:
                self._close(c)
                return
            self._received(c, n)
            return
        try:
            got = c.sock.recv(_HEAD_MAX)
        except BlockingIOError:
            return
        if not got:
            self._close(c)
            return
        c.inbox += got
        self._parse(c)

    def _parse(self, c: Connection) -> None:
        """Take complete heads off the inbox, as long as the answer before has gone out."""
        while not c.left and not c.out and not c.coming:
            head, found, rest = c.inbox.partition(b"\r\n\r\n")
            if not found:
                if len(c.inbox) > _HEAD_MAX:
                    self._close(c)
                return
            c.inbox = rest
            self._answer(c, head.decode("latin-1"))
            if c.sock.fileno() < 0:
                return

    def _received(self, c: Connection, n: int) -> None:
        c.coming -= n
        self.counters.bytes_received += n
        if not c.coming:
            etag = "" if c.document else f"ETag: {synthetic.etag_of(c.put_key)}\r\n"
            self._reply(c, 200, etag, c.document)

    def _answer(self, c: Connection, head: str) -> None:
        request, _, block = head.partition("\r\n")
        method, target, _ = request.split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in block.split("\r\n")) if k}
        path, _, query = target.partition("?")
        _, _, key = path[1:].partition("/")
        c.closing = headers.get("connection", "").lower() == "close"
        if path == "/-/counters":
            self._reply(c, 200, "Content-Type: application/json\r\n", json.dumps(asdict(self.counters)).encode())
        elif method in ("GET", "HEAD"):
            if not key:
                listing = method == "GET" and ("list-type" in query or "location" not in query)
                self._reply(c, 200, "Content-Type: application/xml\r\n", _EMPTY_LIST if listing else b"")
            else:
                self._object(c, method, key, headers)
        elif method == "PUT":
            self._put(c, key, headers, b"")
        elif method == "POST" and "uploads" in query:
            self._put(c, key, headers, _CREATED % key.encode())
        elif method == "POST" and "uploadId" in query:
            self._put(c, key, headers, _COMPLETED % (key.encode(), synthetic.etag_of(key).encode()))
        elif method == "DELETE":
            self._reply(c, 204, "")
        else:
            self._refuse(c, 501)

    def _put(self, c: Connection, key: str, headers: dict[str, str], document: bytes) -> None:
        length = headers.get("content-length", "0" if document else "")
        if not length.isdigit():
            c.closing = True
            self._refuse(c, 411)
            return
        self.counters.puts += 1
        c.put_key, c.document = key, document
        c.coming = int(length)
        if headers.get("expect", "").lower() == "100-continue":
            c.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        here = min(len(c.inbox), c.coming)
        c.inbox = c.inbox[here:]
        self._received(c, here)

    def _object(self, c: Connection, method: str, key: str, headers: dict[str, str]) -> None:
        size = synthetic.size_of(key)
        if size is None:
            self._refuse(c, 404)
            return
        etag = synthetic.etag_of(key)
        if method == "GET":
            self.counters.gets += 1
        else:
            self.counters.heads += 1
        if headers.get("if-match", etag) not in (etag, "*"):
            self._refuse(c, 412)
            return
        if headers.get("if-none-match") in (etag, "*"):
            self.counters.not_modified += 1
            self._reply(c, 304, f"ETag: {etag}\r\n", length=None)
            return
        span = _resolve(headers.get("range"), size)
        if span is None:
            self._refuse(c, 416)
            return
        start, stop = span
        partial = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n" if "range" in headers else ""
        validators = f"ETag: {etag}\r\nLast-Modified: {_MODIFIED}\r\n"
        more = f"{validators}Accept-Ranges: bytes\r\n{partial}Content-Type: binary/octet-stream\r\n"
        n = stop - start
        c.at = (synthetic.base_of(key) + start) % synthetic.PERIOD_BYTES
        c.left = n if method == "GET" else 0
        self.counters.bytes_sent += c.left
        self._reply(c, 206 if partial else 200, more, length=n)

    def _refuse(self, c: Connection, status: int) -> None:
        self.counters.refused += 1
        self._reply(c, status, "", b"")

    def _reply(self, c: Connection, status: int, more: str, body: bytes = b"", *, length: int | None = 0) -> None:
        if body:
            length = len(body)
        size = "" if length is None else f"Content-Length: {length}\r\n"
        close = "Connection: close\r\n" if c.closing else ""
        first = f"HTTP/1.1 {status} X\r\nServer: bench-origin\r\nx-amz-request-id: 0000000000000001\r\n"
        head = f"{first}{more}{size}{close}\r\n"
        c.out = head.encode("latin-1") + body
        if 0 < c.left <= _COPY_BYTES and c.at + c.left <= synthetic.PERIOD_BYTES:
            c.out += self._view[c.at : c.at + c.left]
            c.left = 0
        self._pump(c)

    def _pump(self, c: Connection) -> None:
        """Send what can be sent now, at most a turn's worth, so that many connections share the loop."""
        budget = _TURN_BYTES
        try:
            while c.out:
                c.out = c.out[c.sock.send(c.out, socket.MSG_MORE if c.left else 0) :]
            while c.left and budget > 0:
                n = os.sendfile(c.sock.fileno(), self._fd, c.at, min(c.left, budget, synthetic.PERIOD_BYTES - c.at))
                c.left -= n
                budget -= n
                c.at = (c.at + n) % synthetic.PERIOD_BYTES
        except BlockingIOError:
            budget = 0
        unsent = bool(c.left or c.out)
        if unsent != c.writing:
            c.writing = unsent
            self._epoll.modify(c.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if unsent else 0))
        if not unsent:
            if c.closing:
                self._close(c)
            elif c.inbox:
                self._parse(c)


def _resolve(text: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range that is asked for; None: not satisfiable. Anything but one plain range counts as none."""
    asked = _RANGE.match(text) if text else None
    if asked is None or asked.group(0) == "bytes=-":
        return 0, size
    first, last = asked.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    start, stop = int(first), min(size, int(last) + 1) if last else size
    return (start, stop) if start < stop else None


def main() -> None:
    """Entry point of the process."""
    options = argparse.ArgumentParser(prog="python -m bench.origin")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=0)
    asked = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    origin = Origin(asked.host, asked.port)
    print(f"origin ready {origin.address[0]}:{origin.address[1]}", flush=True)
    origin.run()


if __name__ == "__main__":
    main()
