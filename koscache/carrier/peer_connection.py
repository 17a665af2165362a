"""One connection to a peer: a socket of our own, a question on it, the head of the answer.

Owns: watching the socket, sending a question, a strict and bounded parser of heads. Does not own: the answer's body
(koscache.carrier.peer_response), how many connections there are (koscache.carrier.peer_pool).

A raw socket and no transport of the loop's, because bodies go on to clients in the kernel: a transport would read them.

Invariant: the socket is read by at most one at a time, and not a byte further than the head and what came along with it
before whoever takes the body has come.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

from multidict import CIMultiDict

from koscache.carrier.peer_wire import HEAD_BYTES_MAX, PeerBroken

_HEAD_END: Final = b"\r\n\r\n"
_STATUS_LINE: Final = re.compile(r"HTTP/1\.1 ([2-5][0-9]{2}) [\x20-\x7e]{0,100}", re.ASCII)
_LENGTH: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", re.ASCII)
_PRINTABLE: Final = bytes(range(0x20, 0x7F))
#: Read at once of a head that is longer than the first read.
_MORE_BYTES: Final = 16 * 1024


class Head(NamedTuple):
    """Of an answer. length: of the body that follows. keep_alive: whether the connection may be used again."""

    status: int
    headers: CIMultiDict[str]
    length: int
    keep_alive: bool


def parse_head(data: bytes) -> Head:
    """data: up to and with the blank line. Raises PeerBroken for whatever a peer would not send."""
    text = data[:-4].decode("latin-1")
    lines = text.split("\r\n")
    # Printable ASCII and the line ends just split at, and nothing else: no bare CR or LF, no NUL.
    if data.translate(None, _PRINTABLE) != b"\r\n" * (len(lines) + 1):
        raise PeerBroken("a head with other characters than a peer sends")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise PeerBroken(f"not an answer of HTTP/1.1: {lines[0][:40]!r}")
    headers: CIMultiDict[str] = CIMultiDict()
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or _TOKEN.fullmatch(name) is None or name in headers:
            raise PeerBroken(f"a header that is none, or is there twice: {name[:40]!r}")
        headers[name] = value.strip()
    status = int(match[1])
    length = headers.get("content-length", "0" if status == 204 else "")
    if "transfer-encoding" in headers or _LENGTH.fullmatch(length) is None or (status == 204 and int(length)):
        raise PeerBroken("a body of unknown length")
    return Head(status, headers, int(length), headers.get("connection", "").lower() != "close")


class PeerConnection:
    """A connected socket, watched by callbacks. closed: told once when it is closed, by whomever."""

    __slots__ = (
        "_callback",
        "_closed_told",
        "_expected",
        "_fd",
        "_loop",
        "_watching",
        "closed",
        "idle_since",
        "socket",
        "used",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, closed: Callable[[PeerConnection], None]
    ) -> None:
        self._loop = loop
        self._fd = sock.fileno()
        self._callback: Callable[[], None] | None = None
        self._watching = False
        self._expected = 1
        self._closed_told = closed
        self.socket = sock
        self.closed = False
        #: whether it has carried an answer: then its other end may have closed it in this very moment
        self.used = False
        #: loop time at which it was given back
        self.idle_since = 0.0

    def watch(self, readable: Callable[[], None] | None) -> None:
        """Call it whenever there is something to read, or the end, and once when the connection is closed here. None: no
        more, which costs nothing as long as nothing arrives."""
        self._callback = readable
        if readable is not None and not self._watching and not self.closed:
            self._watching = True
            self._loop.add_reader(self._fd, self._ready)

    def expect(self, count: int) -> None:
        """Call only when so many bytes are there, or the end: for whoever knows that they are under way."""
        if count != self._expected and not self.closed:
            self._expected = count
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def rest(self) -> None:
        """Nothing is expected of it: whatever it says now ends it."""
        self.expect(1)
        self.used = True
        self.idle_since = self._loop.time()
        self.watch(self.close)

    def close(self) -> None:
        """Whatever is on the way is dropped. Idempotent."""
        if self.closed:
            return
        self.closed = True
        callback, self._callback = self._callback, None
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._fd)
        self.socket.close()
        self._closed_told(self)
        if callback is not None and callback != self.close:
            self._loop.call_soon(callback)  # it finds the socket closed

    def _ready(self) -> None:
        if self._callback is None:
            self._watching = False
            self._loop.remove_reader(self._fd)
        else:
            self._callback()


class Asking:
    """A question on its way, until the head of its answer is here. ended is called once, unless close() came first."""

    __slots__ = (
        "_ended", "_first_bytes", "_loop", "_received", "_silent", "_timeout_s", "_timer", "_unsent", "_writing",
        "connection", "early", "failure", "head",
    )  # fmt: skip

    def __init__(
        self,
        connection: PeerConnection,
        request: bytes,
        first_bytes: int,
        timeout_s: float,
        ended: Callable[[], None],
    ) -> None:
        """first_bytes: how many are read at first. Little where much follows, which is to stay in the socket."""
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._first_bytes = first_bytes
        self._timeout_s = timeout_s
        self._received = b""
        self._silent = False
        self._unsent = memoryview(request)
        self._writing = False
        self._timer: asyncio.TimerHandle | None = None
        self.connection = connection
        #: the answer's head and the bytes of its body that came along, or why there is none
        self.head: Head | None = None
        self.early = memoryview(b"")
        self.failure = ""

    @property
    def unheard(self) -> bool:
        """Whether it failed because the other end was gone already, most likely."""
        return not self._received and not self._silent

    def start(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s, self._time_out)
        self._send()
        if not self.failure:
            self.connection.watch(self._receive)

    def close(self) -> None:
        """No longer wanted. The connection is closed if the answer is still to come."""
        if self.head is None and not self.failure:
            self._let_go()
            self.connection.close()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.connection.watch(None)
        self._write_more(False)

    def _write_more(self, wanted: bool) -> None:
        if wanted and not self._writing:
            self._loop.add_writer(self.connection.socket.fileno(), self._send)
        elif self._writing and not wanted:
            self._loop.remove_writer(self.connection.socket.fileno())
        self._writing = wanted

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self.connection.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self._write_more(len(self._unsent) > 0)

    def _receive(self) -> None:
        if self.connection.closed:
            self._fail("the connection was closed")
            return
        try:
            data = self.connection.socket.recv(_MORE_BYTES if self._received else self._first_bytes)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        if not data:
            self._fail("closed the connection before it had answered")
            return
        seen = max(0, len(self._received) - 3)
        self._received = received = self._received + data if self._received else data
        end = received.find(_HEAD_END, seen)
        if end > HEAD_BYTES_MAX or (end < 0 and len(received) > HEAD_BYTES_MAX):
            self._fail(f"a head of more than {HEAD_BYTES_MAX} bytes")
        elif end >= 0:
            self._answered(received[: end + 4], memoryview(received)[end + 4 :])

    def _answered(self, head_bytes: bytes, early: memoryview) -> None:
        try:
            head = parse_head(head_bytes)
        except PeerBroken as broken:
            self._fail(str(broken))
            return
        if len(early) > head.length:
            self._fail("more than it had announced")
        elif self._unsent:
            self._fail("answered before it had heard the question")
        else:
            self._let_go()
            self.head, self.early = head, early
            self._ended()

    def _time_out(self) -> None:
        self._silent = True
        self._fail(f"no answer for {self._timeout_s:g} s")

    def _fail(self, reason: str) -> None:
        if self.head is not None or self.failure:
            return
        self._let_go()
        self.failure = reason
        self.connection.close()
        self._ended()
