"""Clients that cost little: one blocking stream, and many requests over a few connections.

Owns: HTTP/1.1 as far as a benchmark needs it (Content-Length bodies, keep-alive), timing, checks of status and bytes.
Does not own: signatures (bench.signing gives request heads ready to send).

Invariant: a wrong status, a short body or a wrong byte is BenchFailed, never a faster figure.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench import synthetic
from bench.results import BenchFailed

_HEAD_MAX: Final = 64 << 10
TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer; names in lower case."""

    status: int
    headers: dict[str, str]
    length: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: to the first byte of the body (of the head, where there is none) and to the last, in seconds."""

    first_s: float
    total_s: float
    size: int
    answer: Answer

    @property
    def mb_s(self) -> float:
        return self.size / self.total_s / 1e6


def address(text: str) -> Address:
    """Parse HOST:PORT, a scheme before it allowed."""
    host, _, port = text.rpartition("://")[2].rstrip("/").rpartition(":")
    return Address(host, int(port))


def parse_answer(head: bytes) -> Answer:
    """Parse a complete answer head without its blank line."""
    status, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    return Answer(int(status.split(" ", 2)[1]), headers, int(headers.get("content-length", "0")))


def _head(sock: socket.socket, buffer: bytearray) -> tuple[Answer, int, int]:
    """Read one answer head (100 Continue skipped); returns it and where in the buffer the first body bytes lie."""
    view = memoryview(buffer)
    have = 0
    while True:
        n = sock.recv_into(view[have:_HEAD_MAX])
        if not n:
            raise BenchFailed(f"connection closed within the head: {bytes(buffer[:have])!r}")
        have += n
        end = buffer.find(b"\r\n\r\n", 0, have)
        if end >= 0:
            answer = parse_answer(bytes(buffer[:end]))
            if answer.status != 100:
                return answer, end + 4, have
            buffer[: have - end - 4] = buffer[end + 4 : have]
            have -= end + 4
        elif have == _HEAD_MAX:
            raise BenchFailed("the answer's head does not end")


def _expect(answer: Answer, sock: socket.socket, wanted: Sequence[int], rest: bytes) -> None:
    if answer.status not in wanted:
        sock.settimeout(1)
        raise BenchFailed(f"answered {answer.status}: {answer.headers} {rest[:500]!r}")


def get(
    to: Address, request: bytes, *, verify_key: str | None = None, buffer_bytes: int = 1 << 20, status: int = 200
) -> Timing:
    """Send a GET on a connection of its own, read the body and throw it away; with verify_key check every byte of it.

    Raises BenchFailed where status, length or bytes are not what they should be.
    """
    buffer = bytearray(buffer_bytes)
    view = memoryview(buffer)
    start = time.perf_counter()
    with socket.create_connection((to.host, to.port), timeout=TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(request)
        answer, begin, have = _head(sock, buffer)
        _expect(answer, sock, (status,), bytes(view[begin:have]))
        got = have - begin
        first = time.perf_counter() if got or not answer.length else 0.0
        if verify_key is not None and not synthetic.matches(verify_key, 0, view[begin:have]):
            raise BenchFailed(f"{verify_key}: wrong bytes at 0")
        while got < answer.length:
            n = sock.recv_into(view, min(buffer_bytes, answer.length - got))
            if not n:
                raise BenchFailed(f"body ended after {got} of {answer.length} bytes")
            first = first or time.perf_counter()
            if verify_key is not None and not synthetic.matches(verify_key, got, view[:n]):
                raise BenchFailed(f"{verify_key}: wrong bytes within {n} from {got}")
            got += n
        end = time.perf_counter()
    return Timing(first - start, end - start, got, answer)


def put(to: Address, head: bytes, body: bytes | memoryview) -> Timing:
    """Send a PUT with its body on a connection of its own and wait for 200; raises BenchFailed otherwise."""
    start = time.perf_counter()
    with socket.create_connection((to.host, to.port), timeout=TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(head)
        sock.sendall(body)
        answer, begin, have = _head(sock, buffer := bytearray(_HEAD_MAX))
        _expect(answer, sock, (200,), bytes(buffer[begin:have]))
        end = time.perf_counter()
    return Timing(end - start, end - start, len(body), answer)


def answer_of(sock: socket.socket) -> Answer:
    """The answer to a request that was sent on a socket of the caller's; raises BenchFailed unless it is a 200."""
    answer, begin, have = _head(sock, buffer := bytearray(_HEAD_MAX))
    _expect(answer, sock, (200,), bytes(buffer[begin:have]))
    return answer


@dataclass(frozen=True, slots=True)
class Many:
    """What a batch of requests took."""

    seconds: float
    requests: int
    size: int
    latencies_s: tuple[float, ...]

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    def quantile_ms(self, q: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3


class _Lane:
    """One keep-alive connection of `get_many`."""

    __slots__ = ("buffer", "left", "sent_at", "sock")

    def __init__(self, to: Address) -> None:
        self.sock = socket.create_connection((to.host, to.port), timeout=TIMEOUT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.left = -1
        self.sent_at = 0.0

    def received(self, piece: bytes) -> Answer | None:
        """Account for bytes; the answer when its last byte is here (or its head, then with left > 0 to come)."""
        if self.left > 0:
            self.left -= len(piece)
            return None
        self.buffer += piece
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        answer = parse_answer(self.buffer[:end])
        self.left = answer.length - (len(self.buffer) - end - 4)
        if answer.status != 200:
            raise BenchFailed(f"answered {answer.status}: {self.buffer[:600]!r}")
        self.buffer = b""
        return answer


def get_many(to: Address, requests: Sequence[bytes], connections: int) -> Many:
    """Send all requests, each once, over `connections` keep-alive connections.

    Every answer must be a 200 with all its bytes, else BenchFailed.
    """
    poll = select.epoll()
    lanes: dict[int, _Lane] = {}
    waiting = iter(requests)
    latencies: list[float] = []
    size = 0
    start = time.perf_counter()
    try:
        for request in (r for _, r in zip(range(connections), waiting, strict=False)):
            lane = _Lane(to)
            lanes[lane.sock.fileno()] = lane
            poll.register(lane.sock.fileno(), select.EPOLLIN)
            lane.sent_at = time.perf_counter()
            lane.sock.sendall(request)
        while len(latencies) < len(requests):
            events = poll.poll(TIMEOUT_S)
            if not events:
                raise BenchFailed(f"no answer within {TIMEOUT_S} s, {len(latencies)} of {len(requests)} done")
            for fd, _ in events:
                lane = lanes[fd]
                piece = lane.sock.recv(256 << 10)
                if not piece:
                    raise BenchFailed("connection closed in the middle")
                answer = lane.received(piece)
                size += answer.length if answer else 0
                if lane.left:
                    continue
                now = time.perf_counter()
                latencies.append(now - lane.sent_at)
                lane.left = -1
                if (request_next := next(waiting, None)) is not None:
                    lane.sent_at = now
                    lane.sock.sendall(request_next)
    finally:
        for lane in lanes.values():
            lane.sock.close()
        poll.close()
    return Many(time.perf_counter() - start, len(latencies), size, tuple(latencies))
