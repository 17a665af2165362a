"""A link in user space: a TCP relay that adds delay and takes rate away, cheap enough to share two cores with the run.

Owns: one process that relays every connection to one address; per direction a serializer (rate of the connection, rate
of all) and a delay line. Does not own: loss, reordering, slow start.

How: bytes are spliced from the source socket into a pipe when the serializers have room, noted with the time at which
their last byte would come out of a link of that rate and delay, and spliced on at that time. So bytes stay in the
kernel. What the serializers have no room for is left in the socket, where TCP holds the sender back. A new connection's
first bytes wait one round trip more, as for a handshake.

Invariant: no direction holds more than its pipe: rate x (delay + ahead), the bandwidth-delay product.

Run as `python -m bench.shaper --to HOST:PORT --delay-ms 15 --rate 25e6 --total 250e6`; prints `shaper ready HOST:PORT`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import math
import os
import select
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

#: How far a serializer may be booked in advance, at least: a wake-up later than this costs rate.
_AHEAD_MIN_S: Final = 0.003
#: Bytes that travel together. The first after a pause are few (they make the time to first byte), a stream's are many.
_FIRST_PIECE: Final = 8 << 10
_PIECE_MIN_S: Final = 0.0005
#: Wake-ups this close together are one.
_TOGETHER_S: Final = 0.00005
_PIPE_MIN: Final = 128 << 10
_EDGE: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_SPLICE: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE if hasattr(os, "splice") else 0


@dataclass(frozen=True, slots=True)
class Link:
    """What is modelled. delay_s: one way; rates in bytes per second and direction, math.inf for none."""

    delay_s: float
    rate: float
    total: float = math.inf

    @property
    def ahead_s(self) -> float:
        return max(_AHEAD_MIN_S, self.delay_s / 2)

    @property
    def piece_bytes(self) -> int:
        return int(min(self.rate * max(_PIECE_MIN_S, self.delay_s / 4), 1 << 20))


NEAR: Final = Link(0.0005, 200e6)
LONG: Final = Link(0.015, 25e6, 250e6)


@dataclass(slots=True)
class Serializer:
    """When the last byte booked so far will have left; of a shared link also who waits for room on it, in order."""

    rate: float
    free_at: float = 0.0
    waiting: deque[tuple[Pair, Direction]] = field(default_factory=deque)

    def book(self, n: int, now: float) -> float:
        self.free_at = max(self.free_at, now) + n / self.rate
        return self.free_at


class Direction:
    """One way of one connection: source socket -> pipe -> target socket."""

    __slots__ = (
        "blocked", "due", "ended", "held", "line", "not_before", "pipe_in", "pipe_out", "readable", "room",
        "serializer", "shared", "shut", "source", "target", "waits", "writable",
    )  # fmt: skip

    def __init__(self, link: Link, shared: Serializer, source: socket.socket, target: socket.socket, not_before: float):
        self.source, self.target, self.shared = source, target, shared
        self.serializer = Serializer(link.rate)
        self.not_before = not_before
        self.pipe_out, self.pipe_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        rate = min(link.rate, link.total)
        wanted = 1 << 20 if math.isinf(rate) else int(rate * (link.delay_s + 2 * link.ahead_s))
        self.room = _pipe_size(self.pipe_in, wanted)
        self.line: deque[tuple[float, int]] = deque()
        self.held = 0
        self.due = math.inf
        self.readable = self.blocked = self.ended = self.shut = self.waits = False
        self.writable = True

    def close(self) -> None:
        os.close(self.pipe_in)
        os.close(self.pipe_out)


@dataclass(slots=True, eq=False)
class Pair:
    """Both directions of one relayed connection."""

    client: socket.socket
    server: socket.socket
    up: Direction
    down: Direction


class Shaper:
    """The relay; all state of its one loop."""

    def __init__(self, link: Link, to: tuple[str, int], host: str = "127.0.0.1", port: int = 0) -> None:
        self._link, self._to = link, to
        self._listener = socket.create_server((host, port), backlog=1024)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._pairs: dict[int, Pair] = {}
        self._all_up, self._all_down = Serializer(link.total), Serializer(link.total)
        self._wakes: list[tuple[float, int, Pair, Direction]] = []
        self._turn = count()
        self.address = self._listener.getsockname()

    def run(self) -> None:
        """Relay until the process is told to end."""
        listener, epoll, pairs = self._listener.fileno(), self._epoll, self._pairs
        up, down = self._all_up, self._all_down
        while True:
            wake = min(self._wakes[0][0] if self._wakes else math.inf, self._room_at(up), self._room_at(down))
            wait = None if math.isinf(wake) else max(0.0, wake - time.monotonic())
            # epoll's own timeout is in whole milliseconds, a round trip of the near link; select's is in microseconds.
            select.select([epoll.fileno()], [], [], wait)
            for fd, events in epoll.poll(0):
                if fd == listener:
                    self._accept()
                elif (pair := pairs.get(fd)) is not None:
                    self._event(pair, fd, events)
            now = time.monotonic() + _TOGETHER_S
            while self._wakes and self._wakes[0][0] <= now:
                at, _, pair, way = heapq.heappop(self._wakes)
                if at == way.due:
                    way.due = math.inf
                    self._move(pair, way)
            for shared in (up, down):
                while self._room_at(shared) <= now:
                    pair, way = shared.waiting.popleft()
                    way.waits = False
                    self._move(pair, way)

    def _room_at(self, shared: Serializer) -> float:
        """When those who wait for the shared link can go on; infinite where nobody waits."""
        return shared.free_at - self._link.ahead_s / 2 if shared.waiting else math.inf

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            shaken = time.monotonic() + 2 * self._link.delay_s
            try:
                server = socket.create_connection(self._to, timeout=5)
            except OSError:
                client.close()
                return
            for sock in (client, server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = Pair(
                client,
                server,
                Direction(self._link, self._all_up, client, server, shaken),
                Direction(self._link, self._all_down, server, client, 0.0),
            )
            for sock in (client, server):
                self._pairs[sock.fileno()] = pair
                self._epoll.register(sock.fileno(), _EDGE)

    def _event(self, pair: Pair, fd: int, events: int) -> None:
        from_here, to_here = (pair.up, pair.down) if fd == pair.client.fileno() else (pair.down, pair.up)
        # Every segment that arrives gives an event; where the socket is known to be readable, a wake-up is due already.
        news = not from_here.readable or from_here.blocked
        if events & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR) and news:
            from_here.readable, from_here.blocked = True, False
            self._move(pair, from_here)
        if events & select.EPOLLOUT and pair.client.fileno() in self._pairs and not to_here.writable:
            to_here.writable = True
            self._move(pair, to_here)

    def _move(self, pair: Pair, way: Direction) -> None:
        """Bring one direction as far as it can go now, and say when to look again."""
        if pair.client.fileno() not in self._pairs:
            return
        try:
            # The same allowance in all comparisons: what was woken a little early must find that its time has come.
            now = time.monotonic() + _TOGETHER_S
            self._deliver(way, now)
            self._take(pair, way, now)
            if way.ended and not way.held and not way.shut:
                way.shut = True
                way.target.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(pair)
            return
        if pair.up.shut and pair.down.shut:
            self._close(pair)
            return
        wake = self._next(way)
        if wake < way.due:
            way.due = wake
            heapq.heappush(self._wakes, (wake, next(self._turn), pair, way))

    def _next(self, way: Direction) -> float:
        """When time alone will let this direction go on."""
        wake = math.inf
        if way.line and way.writable:
            wake = way.line[0][0]
        if way.readable and not way.blocked and not way.ended and not way.waits and way.held < way.room:
            wake = min(wake, way.serializer.free_at - self._link.ahead_s / 2)
        return wake

    def _deliver(self, way: Direction, now: float) -> None:
        """Pass on what has travelled long enough."""
        line = way.line
        ready = 0
        while line and line[0][0] <= now:
            ready += line.popleft()[1]
        while ready:
            try:
                n = os.splice(way.pipe_out, way.target.fileno(), ready, flags=_SPLICE)
            except BlockingIOError:
                way.writable = False
                line.appendleft((0.0, ready))
                return
            ready -= n
            way.held -= n
            way.blocked = False

    def _take(self, pair: Pair, way: Direction, now: float) -> None:
        """Let in what the serializers have room for, and note when each piece of it comes out."""
        own, shared, link = way.serializer, way.shared, self._link
        while way.readable and not way.blocked and not way.ended and not way.waits:
            if own.free_at - now > link.ahead_s / 2:
                return
            if shared.free_at - now > link.ahead_s / 2:
                way.waits = True
                shared.waiting.append((pair, way))
                return
            booked = max(own.free_at, shared.free_at, now)
            room = int(min((now + link.ahead_s - booked) * min(own.rate, shared.rate), way.room - way.held, 1 << 20))
            if room < 1:
                return
            try:
                n = os.splice(way.source.fileno(), way.pipe_in, room, flags=_SPLICE)
            except BlockingIOError:
                way.blocked = way.readable = way.held > 0
                return
            except ConnectionResetError:
                n = 0
            if not n:
                way.ended = True
                return
            # Less than asked for: the socket is empty, or the pipe has no slot left (small pieces use them up). The
            # next segment to arrive tries again, and so does the next delivery, which makes room.
            way.blocked = n < room
            piece = link.piece_bytes if way.line else _FIRST_PIECE
            way.held += n
            while n:
                piece = min(n, piece)
                out = max(own.book(piece, now), shared.book(piece, now), way.not_before)
                way.line.append((out + link.delay_s, piece))
                n -= piece
                piece = link.piece_bytes

    def _close(self, pair: Pair) -> None:
        for sock in (pair.client, pair.server):
            if self._pairs.pop(sock.fileno(), None) is not None:
                self._epoll.unregister(sock.fileno())
        for sock in (pair.client, pair.server):
            sock.close()
        pair.up.close()
        pair.down.close()


def _pipe_size(fd: int, wanted: int) -> int:
    """Make the pipe at least this big, as far as the system lets us; returns its size in bytes."""
    size = max(_PIPE_MIN, 1 << (max(wanted, 1) - 1).bit_length())
    while size >= _PIPE_MIN:
        with contextlib.suppress(PermissionError):
            return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        size //= 2
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def main() -> None:
    """Entry point of the process."""
    options = argparse.ArgumentParser(prog="python -m bench.shaper")
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--to", required=True, help="HOST:PORT")
    options.add_argument("--delay-ms", type=float, required=True, help="one way")
    options.add_argument("--rate", type=float, default=math.inf, help="bytes per second, connection and direction")
    options.add_argument(
        "--total", type=float, default=math.inf, help="bytes per second and direction, all connections"
    )
    asked = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # A link does not wait for the processes it connects; where we may not, the rate falls under load, for all alike.
    with contextlib.suppress(OSError):
        os.nice(-10)
        # Under autogroup scheduling nice counts within a session only; this process has one of its own.
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text("-10")
    host, _, port = asked.to.rpartition(":")
    shaper = Shaper(Link(asked.delay_ms / 1e3, asked.rate, asked.total), (host, int(port)), port=asked.port)
    print(f"shaper ready {shaper.address[0]}:{shaper.address[1]}", flush=True)
    shaper.run()


if __name__ == "__main__":
    main()
