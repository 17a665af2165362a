"""Files to sockets: every byte, in order, with backpressure, and `done` exactly once."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kosproxy import relay as relay_module
from kosproxy.relay import Relay, RelayFailed, resident
from tests.conditions import until


class Piece(NamedTuple):
    fd: int
    offset: int
    length: int


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def file_of(path: Path, body: bytes) -> int:
    path.write_bytes(body)
    return os.open(path, os.O_RDONLY)


async def read_all(theirs: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < count:
        data = await loop.sock_recv(theirs, 100_000)
        if not data:
            break
        received += data
    return bytes(received)


async def test_head_and_slices_arrive_in_order(
    pair: tuple[socket.socket, socket.socket], threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    body = random.Random(1).randbytes(9_000_001)
    fd = file_of(tmp_path / "f", body)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    head = b"head" * 100
    slices = [Piece(fd, 0, 0), Piece(fd, 5_000_000, 4_000_001), Piece(fd, 17, 3), Piece(fd, 0, 2_500_000)]
    wanted = head + body[5_000_000:] + body[17:20] + body[:2_500_000]
    sending = asyncio.ensure_future(relay.send(head, slices))
    assert await read_all(pair[1], len(wanted)) == wanted
    await sending
    assert not relay.busy and relay.sent_bytes == len(wanted)
    sending = asyncio.ensure_future(relay.send(b"again", []))
    assert await read_all(pair[1], 5) == b"again"
    await sending
    relay.close()
    os.close(fd)


async def test_what_is_not_in_memory_is_sent_from_a_thread(
    pair: tuple[socket.socket, socket.socket],
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = random.Random(2).randbytes(5_000_000)
    fd = file_of(tmp_path / "f", body)
    chance = random.Random(3)
    monkeypatch.setattr(relay_module, "resident", lambda fd, offset: chance.random() < 0.5)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    sending = asyncio.ensure_future(relay.send(b"", [Piece(fd, 0, len(body))]))
    assert await read_all(pair[1], len(body)) == body
    await sending
    relay.close()
    os.close(fd)


async def test_a_cancelled_send_lets_go_of_the_file_before_it_ends(
    pair: tuple[socket.socket, socket.socket],
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd = file_of(tmp_path / "f", b"x" * 1000)
    inside, go = threading.Event(), threading.Event()

    def hanging(out_fd: int, fd: int, offset: int, count: int) -> int:
        inside.set()
        go.wait()
        return os.sendfile(out_fd, fd, offset, count)

    monkeypatch.setattr(relay_module, "resident", lambda fd, offset: False)
    monkeypatch.setattr(relay_module, "_send_waiting_for_disk", hanging)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    sending = asyncio.ensure_future(relay.send(b"", [Piece(fd, 0, 1000)]))
    await asyncio.to_thread(inside.wait)
    sending.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not sending.done(), "the thread still reads"
    relay.close()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert not relay.busy
    os.close(fd)


async def test_a_client_that_goes_away_while_a_thread_sends_is_no_news(
    pair: tuple[socket.socket, socket.socket],
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd = file_of(tmp_path / "f", b"x" * 1000)
    inside, go = threading.Event(), threading.Event()

    def hanging(out_fd: int, fd: int, offset: int, count: int) -> int:
        inside.set()
        go.wait()
        raise BrokenPipeError

    monkeypatch.setattr(relay_module, "resident", lambda fd, offset: False)
    monkeypatch.setattr(relay_module, "_send_waiting_for_disk", hanging)
    loop = asyncio.get_running_loop()
    told: list[Any] = []
    loop.set_exception_handler(lambda loop, context: told.append(context))
    relay, outcomes = Relay(loop, pair[0], threads), list[Any]()
    relay.start(b"", [Piece(fd, 0, 1000)], outcomes.append)
    await asyncio.to_thread(inside.wait)
    relay.close()
    assert not outcomes, "the thread still reads"
    go.set()
    await until(lambda: outcomes)
    gc.collect()
    assert isinstance(outcomes[0], RelayFailed) and not told
    os.close(fd)


async def test_a_client_that_goes_away_ends_it(
    pair: tuple[socket.socket, socket.socket], threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    fd = file_of(tmp_path / "f", b"x" * 20_000_000)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    sending = asyncio.ensure_future(relay.send(b"", [Piece(fd, 0, 20_000_000)]))
    assert len(await read_all(pair[1], 100_000)) >= 100_000
    pair[1].close()
    with pytest.raises(RelayFailed):
        await sending
    relay.close()
    os.close(fd)


async def test_a_file_that_is_too_short_fails_and_does_not_spin(
    pair: tuple[socket.socket, socket.socket], threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    fd = file_of(tmp_path / "f", b"x" * 10)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    with pytest.raises(RelayFailed, match="ended early"):
        await relay.send(b"", [Piece(fd, 0, 11)])
    relay.close()
    os.close(fd)


async def test_done_is_called_once_when_closed_in_the_middle(
    pair: tuple[socket.socket, socket.socket], threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    fd = file_of(tmp_path / "f", b"x" * 20_000_000)
    relay = Relay(asyncio.get_running_loop(), pair[0], threads)
    outcomes: list[Any] = []
    relay.start(b"", [Piece(fd, 0, 20_000_000)], outcomes.append)
    assert outcomes == [] and relay.busy
    relay.close()
    relay.close()
    assert len(outcomes) == 1 and isinstance(outcomes[0], RelayFailed)
    relay.start(b"x", [], outcomes.append)
    assert len(outcomes) == 2 and isinstance(outcomes[1], RelayFailed)
    os.close(fd)


def test_residency(tmp_path: Path) -> None:
    fd = file_of(tmp_path / "f", b"x" * 100_000)
    assert resident(fd, 0) and resident(fd, 99_999) and resident(fd, 100_000)
    os.close(fd)
    assert not resident(fd, 0)
