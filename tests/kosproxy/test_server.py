"""The edge by itself, with lanes that say what they were asked: framing, limits, clocks, draining, malformed requests.

Everything is tried over http and over https.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from kosproxy.server import Connection
from tests.conditions import until
from tests.fakes import edge
from tests.fakes.edge import BODY, Served, read_answer


class Scheme:
    secure = False


@pytest.fixture(params=["http", "https"], autouse=True)
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheme, "secure", request.param == "https")


def serving(tmp_path: Path, **limits: Any) -> contextlib.AbstractAsyncContextManager[Served]:
    return edge.serving(tmp_path, secure=Scheme.secure, **limits)


async def test_both_lanes_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        for _ in range(2):
            writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_answer(reader) == b"fast"
            writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_answer(reader) == BODY
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_answer(reader) == b""
            writer.write(b"PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
            assert await read_answer(reader) == b"hello"
            # The parser had a body: whether it stands between two requests is known again after one more.
            writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_answer(reader) == b""
        assert served.lanes.seen == ["fast", "file", "GET /slow 0", "PUT /slow 5", "GET /fast 0"] * 2
        writer.close()


async def test_the_raw_target_reaches_the_lanes(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        target = "/b//../%2e%41/./a%20b+c;x=1?q=%zz&a=b+c"
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await read_answer(reader)
        assert served.lanes.seen == [f"GET {target} 0"]
        writer.close()


async def test_a_head_in_pieces_takes_the_slow_lane(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        for piece in (b"GET /fa", b"st HTTP/1.1\r\nHo", b"st: x\r\n\r\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        assert await read_answer(reader) == b""
        assert served.lanes.seen == ["GET /fast 0"]
        writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_answer(reader) in (b"", b"fast")
        writer.close()


async def test_half_a_head_that_looks_like_a_request_is_not_taken_for_one(tmp_path: Path) -> None:
    """The second read begins with GET and ends like a head, but is the value of a header."""
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\nX-Odd: ")
        await until(lambda: served.edge.connections and not served.edge.connections[0]._clean)  # type: ignore[attr-defined]
        writer.write(b"GET /fast HTTP/1.1\r\nY: z\r\n\r\n")
        assert await read_answer(reader) == b""
        assert served.lanes.seen == ["GET /slow 0"]
        writer.close()


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"


async def test_an_upgrade_that_nobody_speaks_is_declined_and_the_connection_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        for _ in range(2):
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n%b\r\n" % UPGRADE)
            assert await read_answer(reader) == b""
            writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_answer(reader) == b"fast"
        writer.close()


@pytest.mark.parametrize("body", [b"", b"hello"])
async def test_nothing_behind_an_upgrade_is_taken_for_what_it_is_not(tmp_path: Path, body: bytes) -> None:
    """The parser drops what comes along in the same read: here half a head, whose rest is the head of another request."""
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        head = b"PUT /asked HTTP/1.1\r\nHost: x\r\n%b%b\r\n" % (length, UPGRADE)
        writer.write(head + body + b"GET /slow HTTP/1.1\r\nHost: x\r\nX-Odd: ")
        await until(lambda: served.lanes.begun)
        writer.write(b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_answer(reader) == body
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert served.lanes.seen == [f"PUT /asked {len(body)}"]
        writer.close()


@pytest.mark.parametrize("first", ["/file", "/fast", "/slow"])
async def test_what_is_pipelined_is_answered_in_order(tmp_path: Path, first: str) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        writer.write(f"GET {first} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: served.lanes.seen or served.lanes.begun)
        rest = b"".join(
            b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % name for name in (b"slow", b"file", b"fast", b"fast", b"slow")
        )
        writer.write(rest)
        assert await read_answer(reader) == {"/file": BODY, "/fast": b"fast", "/slow": b""}[first]
        for _ in range(5):
            assert await read_answer(reader) in (b"", b"fast", BODY)
        writer.close()


async def test_pipelining_without_end_is_held_back_by_the_kernel(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: served.lanes.seen)
        one = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(100):
            writer.write(one * 2000)
        await asyncio.sleep(0.1)
        (connection,) = served.edge.connections
        assert isinstance(connection, Connection)
        assert len(connection._held) < 1 << 20
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await read_answer(reader) == BODY
        assert await read_answer(reader) == b""
        writer.close()


async def test_a_client_that_goes_away_during_a_file(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        fds_before = len(os.listdir("/proc/self/fd"))
        reader, writer = await served.open()
        writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readexactly(1000)
        writer.transport.abort()
        await until(lambda: not served.edge.connections)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= fds_before)
        assert len(served.lanes.errors) <= 1


async def test_a_client_that_stops_reading_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, send_timeout_s=0.2) as served:
        _, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.lanes.seen)
        async with asyncio.timeout(5):
            await until(lambda: not served.edge.connections)
        assert served.lanes.errors == ["RelayFailed"]
        writer.close()


async def test_a_client_that_takes_nothing_gets_nothing_more_from_the_fast_lane(tmp_path: Path) -> None:
    """Else each of its small requests would leave an answer in memory."""
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /copy HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.lanes.seen)
        writer.write(b"GET /copy HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.lanes.begun)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await read_answer(reader), await read_answer(reader)) == (BODY, b"")
        assert served.lanes.seen == ["copy", "GET /copy 0"]
        writer.close()


@pytest.mark.parametrize("keepalive_s", [0.1, 75.0])
async def test_a_client_that_never_takes_the_end_of_an_answer_is_dropped(tmp_path: Path, keepalive_s: float) -> None:
    async with serving(tmp_path, send_timeout_s=0.3, keepalive_s=keepalive_s) as served:
        _, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /copy HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.lanes.seen)
        async with asyncio.timeout(5):
            await until(lambda: not served.edge.connections)
        writer.close()


async def test_a_head_that_never_ends_is_answered_and_closed(tmp_path: Path) -> None:
    async with serving(tmp_path, header_timeout_s=0.2) as served:
        reader, writer = await served.open()
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n")
        assert await read_answer(reader) == b"RequestTimeout"
        writer.close()
        assert served.lanes.errors == ["RequestTimeout"]


async def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    async with serving(tmp_path, keepalive_s=0.2) as served:
        reader, writer = await served.open()
        writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_answer(reader) == b"fast"
        assert await reader.read() == b""
        writer.close()


async def test_a_slow_reader_outlives_the_keepalive(tmp_path: Path) -> None:
    async with serving(tmp_path, keepalive_s=0.1) as served:
        reader, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.4)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await read_answer(reader) == BODY
        writer.close()


async def send_much(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(data), 65536):
            writer.write(data[at : at + 65536])
            await writer.drain()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\n" + b"x-junk: %s\r\n" % (b"j" * 1000) * 10_000 + b"\r\n", "RequestHeaderSectionTooLarge"),
        (b"GET / HTTP/1.1\r\nx: " + b"j" * 10_000_000 + b"\r\n\r\n", "RequestHeaderSectionTooLarge"),
        (b"GET /" + b"j" * 10_000_000 + b" HTTP/1.1\r\n\r\n", "RequestHeaderSectionTooLarge"),
        (b"NONSENSE\r\n\r\n", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),
        (b"GET / HTTP/9.9\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\n\r\n", None),
    ],
)
async def test_what_is_no_request_is_refused_clearly(tmp_path: Path, sent: bytes, code: str | None) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.open()
        sending = asyncio.ensure_future(send_much(writer, sent))
        said = (await read_answer(reader)).decode()
        assert served.lanes.errors == [said] and (code is None or said == code)
        await sending
        assert await reader.read() == b""
        writer.close()
        assert served.lanes.seen == []


async def test_one_connection_too_many(tmp_path: Path) -> None:
    async with serving(tmp_path, connections=1) as served:
        reader, writer = await served.open()
        writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_answer(reader) == b"fast"
        if served.secure:
            # There is no saying why before a handshake.
            with pytest.raises(ConnectionError):
                await served.open()
        else:
            reader2, writer2 = await served.open()
            assert await read_answer(reader2) == b"full" and await reader2.read() == b""
            writer2.close()
        writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_answer(reader) == b"fast"
        writer.close()


async def test_draining_finishes_what_is_open_and_closes_what_is_idle(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        idle, idle_writer = await served.open()
        idle_writer.write(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_answer(idle)
        file, file_writer = await served.open()
        file_writer.write(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        served.lanes.go.clear()
        slow, slow_writer = await served.open()
        slow_writer.write(b"PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        await until(lambda: "file" in served.lanes.seen and served.lanes.begun)
        draining = asyncio.ensure_future(served.edge.drain(10))
        assert await idle.read() == b""
        assert await read_answer(file) == BODY and await file.read() == b""
        slow_writer.write(b"cd")
        served.lanes.go.set()
        assert await read_answer(slow) == b"abcd"
        slow_writer.close()
        async with asyncio.timeout(5):
            await draining
        for writer in (idle_writer, file_writer):
            writer.close()


async def test_draining_ends_in_time(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.lanes.go.clear()
        reader, writer = await served.open()
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: served.edge.connections)
        async with asyncio.timeout(5):
            await served.edge.drain(0.1)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
