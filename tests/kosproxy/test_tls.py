"""TLS of a worker's clients: handshakes that come about and those that do not, and what an open connection owes.

What both schemes have in common is in test_server.py, which runs over both.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kos import metrics, tls
from kos.config import Listen
from kosproxy.copying import PIECE_BYTES, Copier
from kosproxy.server import Connection
from kosproxy.tls import Secured
from tests.conditions import until
from tests.fakes import certificates
from tests.fakes.edge import BODY, Served, read_answer, serving
from tests.fakes.records import RecordClient

GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"


def counted(result: str) -> float:
    return float(metrics.TLS_HANDSHAKES.labels(result)._value.get())


@pytest.fixture
async def quiet(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Nothing that a client does is an event for the operator's log, let alone a traceback."""
    caplog.set_level(logging.INFO)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    yield
    await asyncio.sleep(0)
    assert not failures and not caplog.records


async def plain(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 24)


@pytest.mark.usefixtures("quiet")
async def test_plain_http_is_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, secure=True) as served:
        before = counted("not_tls")
        reader, writer = await plain(served)
        writer.write(GET % b"slow")
        assert await read_answer(reader) == b"not tls" and await reader.read() == b""
        writer.close()
        assert counted("not_tls") == before + 1 and not served.lanes.seen and not served.edge.handshakes


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "sent", [b"\0" * 100, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 600, b"SSH-2.0-x\r\n"]
)
async def test_what_is_no_handshake_is_closed(tmp_path: Path, sent: bytes) -> None:
    async with serving(tmp_path, secure=True) as served:
        before = counted("failed")
        reader, writer = await plain(served)
        writer.write(sent)
        said = await reader.read()
        assert len(said) < 100, "an alert at most"
        writer.close()
        assert counted("failed") == before + 1
        await until(lambda: not served.edge.handshakes)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"], ids=["nothing", "a beginning"])
async def test_a_handshake_that_does_not_go_on_is_ended_and_counts_until_then(tmp_path: Path, sent: bytes) -> None:
    async with serving(tmp_path, secure=True, header_timeout_s=0.3, connections=2) as served:
        before = counted("timeout"), counted("turned_away")
        slow = [await plain(served) for _ in range(2)]
        for _, writer in slow:
            writer.write(sent)
        await until(lambda: len(served.edge.handshakes) == 2)
        with pytest.raises(ConnectionError):
            await served.open()
        assert counted("turned_away") == before[1] + 1
        for reader, writer in slow:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        assert counted("timeout") == before[0] + 2
        reader, writer = await served.open()
        writer.write(GET % b"fast")
        assert await read_answer(reader) == b"fast"
        writer.close()


@pytest.mark.usefixtures("quiet")
async def test_a_client_that_leaves_in_the_handshake(tmp_path: Path) -> None:
    async with serving(tmp_path, secure=True) as served:
        before = counted("lost")
        _, writer = await plain(served)
        await until(lambda: served.edge.handshakes)
        writer.transport.abort()
        await until(lambda: not served.edge.handshakes)
        assert counted("lost") == before + 1


async def test_draining_does_not_wait_for_handshakes(tmp_path: Path) -> None:
    async with serving(tmp_path, secure=True) as served:
        reader, writer = await plain(served)
        await until(lambda: served.edge.handshakes)
        async with asyncio.timeout(5):
            await served.edge.drain(60)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.usefixtures("quiet")
async def test_bytes_one_at_a_time(tmp_path: Path) -> None:
    """Every record, those of the handshake included, arrives in pieces."""
    async with serving(tmp_path, secure=True) as served:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = certificates.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", served.port)) as wire:
            wire.setblocking(False)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            async def pump() -> None:
                for byte in outgoing.read():
                    await loop.sock_sendall(wire, bytes((byte,)))
                    await asyncio.sleep(0)

            async def step(action: object, *arguments: object) -> object:
                while True:
                    try:
                        result = action(*arguments)  # type: ignore[operator]
                    except ssl.SSLWantReadError:
                        await pump()
                        incoming.write(await loop.sock_recv(wire, 65536))
                    else:
                        await pump()
                        return result

            await step(client.do_handshake)
            await step(client.write, GET % b"fast")
            assert b"fast" in bytes(await step(client.read, 65536))  # type: ignore[call-overload]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("how", ["reset", "fin", "close_notify"])
@pytest.mark.parametrize("path", [b"file", b"slow"])
async def test_a_client_that_goes_away(tmp_path: Path, how: str, path: bytes) -> None:
    async with serving(tmp_path, secure=True) as served:
        served.lanes.go.clear()
        reader, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(GET % path)
        await until(lambda: served.lanes.seen or served.lanes.begun)
        if how == "reset":
            writer.transport.abort()
        elif how == "fin":
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as raw:
                raw.shutdown(socket.SHUT_WR)
        else:
            writer.close()
        # A client that has closed takes no more, so that what it was being sent never ends.
        await until(lambda: not served.edge.connections)
        assert len(served.lanes.errors) <= 1
        writer.close()
        del reader


@pytest.mark.usefixtures("quiet")
async def test_a_record_that_was_tampered_with_breaks_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path, secure=True) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as wire:
            client = await asyncio.to_thread(
                certificates.client_context().wrap_socket, wire, server_hostname="localhost"
            )
            await until(lambda: served.edge.connections)
            # A record as the connection expects it next, but not encrypted with its key.
            raw = socket.socket(fileno=client.detach())
            with raw:
                raw.sendall(b"\x17\x03\x03\x00\x40" + b"x" * 64)
                await until(lambda: not served.edge.connections)
        assert not served.lanes.seen


@pytest.mark.usefixtures("quiet")
async def test_records_that_are_odd_but_right(tmp_path: Path) -> None:
    """Empty ones, changes of keys between the bytes of a head, a byte in a record: all of it is one request."""
    async with serving(tmp_path, secure=True) as served:
        client = await asyncio.to_thread(RecordClient, served.port)
        with client.socket as wire:
            sent = b"".join(
                client.change_keys() + client.record(b"") + client.record(bytes((byte,))) for byte in GET % b"slow"
            )
            await asyncio.to_thread(wire.sendall, sent)
            await until(lambda: served.lanes.seen == ["GET /slow 0"])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("between", [b"", b"x"], ids=["and nothing else", "between the bytes of a body"])
async def test_changes_of_keys_without_end(tmp_path: Path, between: bytes) -> None:
    """Each costs the node a thousand times what it costs the client's line, and an answer that may never be taken."""
    async with serving(tmp_path, secure=True, kernel_bytes=4096) as served:
        served.lanes.go.clear()
        client = await asyncio.to_thread(RecordClient, served.port)
        with client.socket as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = b"PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
            await asyncio.to_thread(wire.sendall, client.record(head))
            await until(lambda: served.lanes.begun)

            def flood() -> None:
                for _ in range(200_000):
                    wire.sendall(client.change_keys() + client.record(between))

            with pytest.raises(ConnectionError):
                await asyncio.to_thread(flood)
            await until(lambda: not served.edge.connections)


async def test_a_slow_reader_is_told_from_one_that_takes_nothing(tmp_path: Path) -> None:
    """Within send_timeout it takes less than one piece that was encrypted for it: that is slow, not silent."""
    async with serving(tmp_path, secure=True, kernel_bytes=4096, send_timeout_s=0.4) as served:
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.settimeout(10)
            wire.connect(("127.0.0.1", served.port))
            client = await asyncio.to_thread(
                certificates.client_context().wrap_socket, wire, server_hostname="localhost"
            )
            with client:
                await asyncio.to_thread(client.sendall, GET % b"file")
                loop = asyncio.get_running_loop()
                began, taken = loop.time(), 0
                while loop.time() - began < 1.5:
                    taken += len(await asyncio.to_thread(client.recv, 2048))
                    await asyncio.sleep(0.03)
                assert served.edge.connections, f"dropped after {taken} bytes"
                assert taken < 3 * PIECE_BYTES
                await until(lambda: not served.edge.connections, 10)
    assert served.lanes.errors == ["RelayFailed"]


async def test_a_stalled_client_costs_a_piece_of_memory(tmp_path: Path) -> None:
    async with serving(tmp_path, secure=True) as served:
        _, writer = await served.open()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(GET % b"file")
        await until(lambda: served.lanes.seen)
        (connection,) = served.edge.connections
        assert isinstance(connection, Connection) and connection.transport is not None
        relay, given = connection.relay(), -1

        async def stalled() -> bool:
            nonlocal given
            before, given = given, relay.sent_bytes
            await asyncio.sleep(0.05)
            return connection.writing_paused and given == before

        await until(stalled)
        assert relay.sent_bytes < len(BODY)
        assert 0 < connection.transport.get_write_buffer_size() <= PIECE_BYTES + 1024
        writer.transport.abort()


async def test_nothing_is_left_of_a_connection_for_the_collector_to_find(tmp_path: Path) -> None:
    """A worker's collector seldom looks at what has lived as long as a connection does."""

    def there() -> int:
        return sum(isinstance(each, Secured | Connection | Copier) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        async with serving(tmp_path, secure=True) as served:
            before = there()
            for path in (b"file", b"fast", b"slow"):
                reader, writer = await served.open()
                writer.write(GET % path)
                await read_answer(reader)
                assert there() > before
                writer.close()
                await until(lambda: not served.edge.connections)
            await until(lambda: there() == before)
    finally:
        gc.enable()


@pytest.mark.parametrize(("least", "works"), [("1.2", True), ("1.3", False)])
def test_versions_and_ciphers(least: str, works: bool) -> None:
    pair = certificates.server()
    listen = Listen(
        s3_tls="127.0.0.1:0",
        tls_cert_file=str(pair.cert_file),
        tls_key_file=str(pair.key_file),
        tls_min_version=least,  # type: ignore[arg-type]
    )
    server = tls.load(listen).context
    client = certificates.client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_alpn_protocols(["h2", "http/1.1"])
    if works:
        seen = shake(server, client)
        assert seen.version() == "TLSv1.2" and seen.selected_alpn_protocol() == "http/1.1"
        assert seen.cipher()[0].startswith("ECDHE-") and "GCM" in seen.cipher()[0]  # type: ignore[index]
        for old in ("AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA256"):
            client.set_ciphers(old)
            with pytest.raises(ssl.SSLError):
                shake(server, client)
    else:
        with pytest.raises(ssl.SSLError):
            shake(server, client)
    client = certificates.client_context()
    assert shake(server, client).version() == "TLSv1.3"
    with pytest.warns(DeprecationWarning):
        client.minimum_version = ssl.TLSVersion.TLSv1
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        shake(server, client)


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(back, there, server_hostname="localhost")
    answering = server.wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for side in (asking, answering):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return asking
