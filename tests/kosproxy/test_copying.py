"""Files onto a transport, piece by piece: every byte, in order, no further than the client takes, `done` exactly once."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kosproxy import copying
from kosproxy.copying import PIECE_BYTES, TURN_BYTES, Copier
from kosproxy.relay import RelayFailed
from tests.conditions import until


class Piece(NamedTuple):
    fd: int
    offset: int
    length: int


class FakeTransport:
    """Takes `room` bytes, then pauses whoever writes."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.room = 1 << 40
        self.closing = False

    def write(self, data: bytes | memoryview) -> None:
        self.written += data
        self.room -= len(data)

    def is_closing(self) -> bool:
        return self.closing


class FakeOutlet:
    def __init__(self) -> None:
        self.fake = FakeTransport()
        self.transport: Any = self.fake

    @property
    def writing_paused(self) -> bool:
        return self.fake.room <= 0


class Copying(NamedTuple):
    copier: Copier
    outlet: FakeOutlet
    fd: int
    body: bytes


BODY = random.Random(7).randbytes(3_000_001)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
async def copying_of(tmp_path: Path, threads: ThreadPoolExecutor) -> Any:
    (tmp_path / "f").write_bytes(BODY)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    outlet = FakeOutlet()
    yield Copying(
        Copier(asyncio.get_running_loop(), outlet, threads, memoryview(bytearray(PIECE_BYTES))), outlet, fd, BODY
    )
    os.close(fd)


@pytest.mark.parametrize("head", [b"", b"head" * 100, b"h" * (PIECE_BYTES - 1), b"h" * 200_000])
async def test_head_and_slices_arrive_in_order(copying_of: Copying, head: bytes) -> None:
    copier, outlet, fd, body = copying_of
    slices = [Piece(fd, 0, 0), Piece(fd, 500_000, 2_500_001), Piece(fd, 17, 3), Piece(fd, 0, 1_500_000)]
    wanted = head + body[500_000:] + body[17:20] + body[:1_500_000]
    await copier.send(head, slices)
    assert outlet.fake.written == wanted and copier.sent_bytes == len(wanted) and not copier.busy
    await copier.send(b"again", [])
    assert outlet.fake.written == wanted + b"again"


async def test_others_have_their_turn(copying_of: Copying) -> None:
    copier, outlet, fd, body = copying_of
    copier.start(b"", [Piece(fd, 0, len(body))], lambda failure: None)
    assert TURN_BYTES <= len(outlet.fake.written) < TURN_BYTES + PIECE_BYTES
    await until(lambda: not copier.busy)
    assert outlet.fake.written == body


async def test_it_stops_where_the_client_does(copying_of: Copying) -> None:
    copier, outlet, fd, body = copying_of
    outlet.fake.room = 100_000
    sending = asyncio.ensure_future(copier.send(b"head", [Piece(fd, 0, len(body))]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert 100_000 <= len(outlet.fake.written) <= 100_000 + PIECE_BYTES and not sending.done()
    while not sending.done():
        outlet.fake.room = 300_000
        copier.resume()
        await asyncio.sleep(0)
    assert outlet.fake.written == b"head" + body
    copier.resume()


async def test_what_is_not_in_memory_is_read_by_a_thread(copying_of: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    copier, outlet, fd, body = copying_of
    chance, really = random.Random(3), os.preadv
    refused = 0

    def preadv(fd: int, buffers: Any, offset: int, flags: int) -> int:
        nonlocal refused
        assert flags == os.RWF_NOWAIT
        if chance.random() < 0.3:
            refused += 1
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        # As much as is in memory, which may be less than was asked for.
        short = [memoryview(buffers[0])[: chance.randint(1, len(buffers[0]))]]
        return really(fd, short, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    await copier.send(b"head", [Piece(fd, 0, len(body))])
    assert outlet.fake.written == b"head" + body and refused > 5


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_the_file_is_let_go_of_before_it_ends(
    copying_of: Copying, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    copier, outlet, fd, _ = copying_of
    inside, go = threading.Event(), threading.Event()

    def hanging(fd: int, offset: int, count: int, ahead: int) -> bytes:
        inside.set()
        go.wait()
        return os.pread(fd, count, offset)

    def not_in_memory(*_: Any) -> int:
        raise BlockingIOError(errno.EAGAIN, "not in memory")

    monkeypatch.setattr(os, "preadv", not_in_memory)
    monkeypatch.setattr(copying, "_read_waiting_for_disk", hanging)
    sending = asyncio.ensure_future(copier.send(b"", [Piece(fd, 0, 1000)]))
    await asyncio.to_thread(inside.wait)
    if how == "cancelled":
        sending.cancel()
    else:
        copier.close()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not sending.done(), "the thread still reads"
    go.set()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else RelayFailed):
        await sending
    assert not copier.busy and not outlet.fake.written


async def test_a_file_that_is_too_short_fails_and_does_not_spin(copying_of: Copying) -> None:
    copier, _, fd, body = copying_of
    with pytest.raises(RelayFailed, match="ended early"):
        await copier.send(b"", [Piece(fd, len(body) - 5, 6)])


async def test_done_is_called_once_when_closed_in_the_middle(copying_of: Copying) -> None:
    copier, outlet, fd, body = copying_of
    outlet.fake.room = 1
    outcomes: list[Any] = []
    copier.start(b"", [Piece(fd, 0, len(body))], outcomes.append)
    assert outcomes == [] and copier.busy
    copier.close()
    copier.close()
    copier.resume()
    assert len(outcomes) == 1 and isinstance(outcomes[0], RelayFailed)
    copier.start(b"x", [], outcomes.append)
    assert len(outcomes) == 2 and isinstance(outcomes[1], RelayFailed)


@pytest.mark.parametrize("gone", ["closing", "lost"])
async def test_a_client_that_is_gone_ends_it(copying_of: Copying, gone: str) -> None:
    copier, outlet, fd, body = copying_of
    outlet.fake.room = 1
    outcomes: list[Any] = []
    copier.start(b"", [Piece(fd, 0, len(body))], outcomes.append)
    if gone == "closing":
        outlet.fake.closing = True
    else:
        outlet.transport = None
    outlet.fake.room = 1 << 30
    copier.resume()
    assert len(outcomes) == 1 and isinstance(outcomes[0], RelayFailed) and len(outlet.fake.written) == PIECE_BYTES
