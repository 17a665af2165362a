"""Clients that send slowly, stop half-way, stop reading, or come in thousands, against a real node: the others notice
nothing, and what such a client may cost is bounded."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conditions import eventually
from tests.fakes.node import Node, client, node
from tests.fakes.origin import FakeOrigin

LIMITS = {
    "connections": 6000,
    "header_timeout": "2s",
    "body_timeout": "2s",
    "send_timeout": "2s",
    "keepalive": "2m",
}
IDLE = 10_000
BODY = random.Random(5).randbytes(24 << 20)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, FakeOrigin]]:
    origin = FakeOrigin()
    overrides: dict[str, Any] = {"limits": LIMITS, "rules": [{"match": "*", "freshness": "immutable"}]}
    with origin.in_thread():
        origin.create_bucket("b")
        origin.put("b", "large", BODY)
        origin.put("b", "small", b"small")
        origin.put("b", "cold", b"cold")
        with node(tmp_path_factory.mktemp("abused"), origin.endpoint, overrides) as one:
            yield one, origin


@pytest.fixture(params=["http", "https"])
def wire(request: pytest.FixtureRequest, own: tuple[Node, FakeOrigin]) -> Wire:
    return Wire(own[0], request.param == "https")


class Wire:
    """Connections to a node as bytes, and a well-behaved client beside them."""

    def __init__(self, one: Node, tls: bool) -> None:
        self.node = one
        self.url = one.s3_tls_url if tls else one.s3_url
        self.tls = ssl.create_default_context(cafile=one.ca_file) if tls else None
        self.s3 = client(self.url, signature_version="s3v4", **({"verify": str(one.ca_file)} if tls else {}))
        self.s3.get_object(Bucket="b", Key="small")["Body"].read()

    def open(self) -> socket.socket:
        split = urllib.parse.urlsplit(self.url)
        plain = socket.create_connection(("127.0.0.1", split.port or 0), timeout=30)
        return plain if self.tls is None else self.tls.wrap_socket(plain, server_hostname="127.0.0.1")

    def get(self, key: str, tail: str = "") -> bytes:
        """A signed GET as bytes, which may be sent any number of times."""
        url = self.s3.generate_presigned_url("get_object", {"Bucket": "b", "Key": key}, ExpiresIn=600)
        split = urllib.parse.urlsplit(url)
        return f"GET {split.path}?{split.query} HTTP/1.1\r\nHost: {split.netloc}\r\n{tail}\r\n".encode()

    def serves(self) -> bool:
        return bool(self.s3.get_object(Bucket="b", Key="small")["Body"].read() == b"small")


def read_answer(stream: Any) -> tuple[int, bytes]:
    """Status and body of the next answer on a connection."""
    status = int(stream.readline().split()[1])
    length = 0
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, stream.read(length)


def ended(connection: socket.socket) -> bool:
    """Whether the peer has closed, after whatever it still said."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65536):
            pass
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return True


def rss_bytes(one: Node) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in one.worker_pids())


def test_heads_that_come_a_byte_at_a_time(wire: Wire) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(wire.open()) for _ in range(100)]
        head = wire.get("small")
        begun = time.monotonic()
        left, at = list(slow), 0
        while left and time.monotonic() - begun < 20:
            for connection in list(left):
                with contextlib.suppress(OSError):
                    connection.send(head[at : at + 1])
                if ended(connection):
                    left.remove(connection)
            at = min(at + 1, len(head) - 2)  # never the last one
            assert wire.serves()
        assert not left, f"{len(left)} of {len(slow)} may go on for ever"


def test_a_body_that_stops(wire: Wire) -> None:
    url = wire.s3.generate_presigned_url("put_object", {"Bucket": "b", "Key": "stopped"}, ExpiresIn=600)
    split = urllib.parse.urlsplit(url)
    head = f"PUT {split.path}?{split.query} HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Length: 1000000\r\n\r\n"
    with wire.open() as connection:
        connection.sendall(head.encode() + b"x" * 500_000)
        with connection.makefile("rb") as stream:
            status, body = read_answer(stream)
        assert status == 400 and b"RequestTimeout" in body
        eventually(lambda: ended(connection), "the connection was closed")
    with pytest.raises(wire.s3.exceptions.ClientError):
        wire.s3.head_object(Bucket="b", Key="stopped")


@pytest.mark.parametrize("key", ["large", "cold"])
def test_a_client_that_closes_its_side_is_taken_for_gone(wire: Wire, own: tuple[Node, FakeOrigin], key: str) -> None:
    """A client that ended looks the same, and most that look so have ended: what it asked for is broken off."""
    hold = own[1].hold(key="cold", at="head", times=None) if key == "cold" else None
    pids = wire.node.worker_pids()
    if key == "large":
        # Connections to the origin are kept for a while: none of them is to be counted as a client's.
        wire.s3.get_object(Bucket="b", Key="large")["Body"].read()
    before = sum(_descriptors(pid) for pid in pids)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                connection = stack.enter_context(wire.open())
                connection.sendall(wire.get(key))
                if wire.tls is None:
                    connection.shutdown(socket.SHUT_WR)
                else:
                    connection.setblocking(False)
                    with contextlib.suppress(ssl.SSLError):  # the answer comes nevertheless, or nothing yet
                        connection.unwrap()
            assert wire.serves()
            eventually(lambda: sum(_descriptors(pid) for pid in pids) < before + 10, "all of them were let go of")
    finally:
        if hold is not None:
            hold.release()
    assert wire.s3.get_object(Bucket="b", Key="large")["Body"].read() == BODY


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    heads = [wire.get("small"), wire.get("large", "Range: bytes=0-99999\r\n"), wire.get("absent"), wire.get("small")]
    answers = [(200, b"small"), (206, BODY[:100_000]), (404, None), (200, b"small")]
    with wire.open() as connection:
        connection.sendall(b"".join(heads * 25))
        with connection.makefile("rb") as stream:
            for number in range(100):
                status, body = read_answer(stream)
                wanted_status, wanted = answers[number % 4]
                assert status == wanted_status and (wanted is None or body == wanted), number


def test_clients_that_stop_reading(wire: Wire) -> None:
    wire.s3.get_object(Bucket="b", Key="large")["Body"].read()
    before = rss_bytes(wire.node)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(wire.open()) for _ in range(60)]
        for connection in idle:
            connection.sendall(wire.get("large"))
        most = 0
        deadline = time.monotonic() + 30
        waiting = list(idle)
        while waiting and time.monotonic() < deadline:
            assert wire.serves()
            most = max(most, rss_bytes(wire.node) - before)
            waiting = [each for each in waiting if not _reset(each)]
        assert not waiting, f"{len(waiting)} are still being waited for"
        # A relay buffer each, what TLS keeps, and what the allocator does with it.
        assert most < 60 * (1 << 20), f"{most >> 20} MiB for 60 clients that read nothing"


def _reset(connection: socket.socket) -> bool:
    """Whether the peer has given up: nothing is read, as that would let it go on."""
    poll = select.poll()
    poll.register(connection, select.POLLERR | select.POLLHUP | select.POLLRDHUP)
    return bool(poll.poll(0))


def test_ten_thousand_idle_connections(own: tuple[Node, FakeOrigin], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 500:
        pytest.skip(f"only {hard} open files are allowed")
    wire = Wire(own[0], tls=False)
    pids = wire.node.worker_pids()
    before = rss_bytes(wire.node)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(IDLE + 5000, hard), hard))
    try:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(wire.open()) for _ in range(IDLE)]
            eventually(lambda: sum(_descriptors(pid) for pid in pids) > IDLE, "the workers have them all")
            assert wire.serves()
            grown = rss_bytes(wire.node) - before
            assert grown < IDLE * 40 * 1024, f"{grown / IDLE / 1024:.0f} KiB for an idle connection"
            # They are not forgotten: any of them may ask.
            for connection in random.Random(1).sample(connections, 50):
                connection.sendall(wire.get("small"))
                with connection.makefile("rb") as stream:
                    assert read_answer(stream) == (200, b"small")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    eventually(lambda: sum(_descriptors(pid) for pid in pids) < 1000, "the workers have let go of them")
    assert wire.node.worker_pids() == pids


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
