"""Object reads in the slow lane when something goes wrong: never a wrong body, never a hang, everything given back."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kos.errors import OriginBroken, OriginRefused, OriginUnavailable, S3Error
from kos.s3.object_response import ObjectMeta
from kos.s3.sigv4 import sign_headers
from koscache.carrier import Freshness
from tests.fakes.carrier import BLOCK, Changed, FakeCarrier
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY, Proxy

BODY = bytes(range(251)) * 2000


@pytest.fixture
def proxy(tmp_path: Any) -> Iterator[Proxy]:
    carrier = FakeCarrier(tmp_path / "store")
    for key, hidden in (("here", False), ("filling", True)):
        stored = carrier.put("bucket", key, BODY, ObjectMeta('"e"', len(BODY), "", ()))
        stored.hidden = hidden
        stored.freshness = Freshness.EXPIRED
    with Proxy(carrier).running() as one:
        yield one
    assert (carrier.borrowed, carrier.open_bodies, carrier.open_opened) == (0, 0, 0)
    carrier.close_file()


def head_for(key: str, method: str, connection: str) -> bytes:
    headers = {"host": "kos.test", "connection": connection}
    common: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1", "now": NOW}
    headers |= sign_headers(method, f"/bucket/{key}", "", {"host": "kos.test"}, session_token=None, **common)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} /bucket/{key} HTTP/1.1\r\n{lines}\r\n".encode()


def get(proxy: Proxy, key: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status (0: closed without an answer), headers, and all bytes until the connection ended."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(head_for(key, method, "close"))
        received = b""
        with contextlib.suppress(ConnectionResetError):  # an aborted response may end in a reset
            while piece := connection.recv(1 << 20):
                received += piece
    if not received:
        return 0, {}, b""
    raw_head, _, body = received.partition(b"\r\n\r\n")
    lines = [line.partition(": ") for line in raw_head.decode().split("\r\n")]
    return int(lines[0][0].split()[1]), {name.lower(): value for name, _, value in lines[1:]}, body


@pytest.mark.parametrize("key", ["here", "filling"])
def test_a_whole_body(proxy: Proxy, key: str) -> None:
    status, headers, body = get(proxy, key)
    assert (status, body) == (200, BODY) and headers["connection"] == "close"
    (line,) = proxy.lines
    assert (line.bytes, line.phase, line.lane) == (len(BODY), "miss", "slow")


@pytest.mark.parametrize("key", ["here", "filling"])
@pytest.mark.parametrize("failure", [Changed("x"), OriginBroken("x"), OriginUnavailable("x"), ValueError("a bug")])
def test_what_fails_after_the_head_breaks_off(
    proxy: Proxy, key: str, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.carrier.body_fails.append((2, failure))
    status, headers, body = get(proxy, key)
    assert status == 200 and int(headers["content-length"]) == len(BODY)
    assert body == BODY[: 2 * BLOCK]
    assert proxy.lines[0].error == type(failure).__name__ and proxy.lines[0].bytes == 2 * BLOCK
    # What must be expected of the world is told in a line; a traceback is for what is ours.
    assert any(record.exc_info for record in caplog.records) == isinstance(failure, ValueError)


def test_a_change_before_the_first_byte_starts_over(proxy: Proxy) -> None:
    proxy.carrier.body_fails += [(0, Changed("x")), (0, Changed("x"))]
    assert get(proxy, "filling")[2] == BODY
    assert proxy.carrier.opens == 3


def test_an_object_that_changes_all_the_time_is_given_up(proxy: Proxy) -> None:
    proxy.carrier.body_fails += [(0, Changed("x"))] * 100
    status, headers, body = get(proxy, "filling")
    assert status == 503 and b"SlowDown" in body and headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (S3Error("ServiceUnavailable", headers={"Retry-After": "7"}), 503, b"ServiceUnavailable"),
        (OriginUnavailable("x", retry_after_s=2.5), 503, b"ServiceUnavailable"),
        (OriginBroken("x"), 503, b"ServiceUnavailable"),
        (OriginRefused(403, [("x-amz-request-id", "theirs")], b"<Theirs/>"), 403, b"<Theirs/>"),
        (ValueError("a bug"), 500, b"InternalError"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_fails_before_the_head_is_answered(
    proxy: Proxy, failure: Exception, status: int, code: bytes, method: str
) -> None:
    proxy.carrier.open_fails.append(failure)
    got, headers, body = get(proxy, "here", method)
    assert got == status and re.fullmatch("[0-9A-F]{16}", headers["x-amz-request-id"])
    assert (code in body) if method == "GET" else body == b""
    if status == 503:
        assert int(headers["retry-after"]) >= 1


def test_a_client_that_leaves_gives_everything_back(proxy: Proxy) -> None:
    for key in ("here", "filling"):
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            connection.sendall(b"GET /bucket/%b HTTP/1.1\r\n" % key.encode())
    assert get(proxy, "here")[0] == 200


def test_what_is_pipelined_behind_unread_answers_is_answered(proxy: Proxy) -> None:
    """The fast lane fills the socket; the slow lane's sendfile has to wait until the transport has let go of it all."""
    small = BODY[:30_000]
    proxy.carrier.put("bucket", "small", small, ObjectMeta('"s"', len(small), "", ()))
    sent = 0
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        assert proxy.edge is not None
        while not any(one._paused for one in proxy.edge.connections):
            connection.sendall(head_for("small", "GET", "keep-alive"))
            sent += 1
            while len(proxy.lines) < sent:
                time.sleep(0.0005)
        assert {line.lane for line in proxy.lines} == {"fast"}
        connection.sendall(head_for("here", "GET", "keep-alive"))
        connection.sendall(head_for("small", "GET", "close"))
        received = b""
        while piece := connection.recv(1 << 20):
            received += piece
    assert received.count(b"HTTP/1.1 200 OK") == sent + 2
    assert received.count(BODY) == 1 and received.endswith(small)
