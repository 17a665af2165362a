"""Frames: one sample fed whole, byte by byte, and together with others; limits; junk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from koscache import ipc
from koscache.content import Extent, Record
from tests.conditions import until

RECORD = Record('"e"', 5, "", (("a", "é"),), (), False, b"c" * 16, 1.5, 7)
SAMPLES: list[ipc.Message] = [
    ipc.Hello(7),
    ipc.AskOpen(1, "b", "k/é", 2**64 - 1),
    ipc.OpenDone(2, 3, ipc.OpenOutcome.STORED, "cold", RECORD, b"c" * 16, 1, 2**64 - 1, b"body"),
    ipc.OpenDone(2, 3, ipc.OpenOutcome.REFUSED, "", None, refusal=ipc.Refusal(404, ((b"a", b"\xff"),), b"<x/>")),
    ipc.AskBlock(4, "b", "k", b"c" * 16, 1, 2, True, False, RECORD),
    ipc.BlockDone(5, 6, 2**64 - 1, b"body"),
    ipc.BlockFailed(6, ipc.BlockOutcome.CHANGED, "why"),
    ipc.Touches([(b"c" * 16, 1), (b"d" * 16, 2)]),
    ipc.WriteBegin(1, [2, 3]),
]


def fed(unframer: ipc.Unframer, pieces: list[bytes]) -> list[Any]:
    return [message for piece in pieces for message in unframer.feed(piece)]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_frame_whole_byte_by_byte_and_twice(message: ipc.Message) -> None:
    framed = ipc.frame(message)
    assert fed(ipc.Unframer(ipc.ToDaemon, 1 << 20), [framed]) == [message]
    assert fed(ipc.Unframer(ipc.ToDaemon, 1 << 20), [framed[at : at + 1] for at in range(len(framed))]) == [message]
    assert fed(ipc.Unframer(ipc.ToDaemon, 1 << 20), [framed + framed[:7], framed[7:]]) == [message, message]


def test_messages_to_workers() -> None:
    extent = Extent(1, 2, 3, "/p")
    for message in (ipc.BlockLead(1, 2, extent), ipc.BlockLead(1, 2, None), ipc.Evicted([1, 2**63]), ipc.Done(1, True)):
        assert fed(ipc.Unframer(ipc.ToWorker, 1 << 20), [ipc.frame(message)]) == [message]


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x10\x00" + b"x",
        b"\x01\x00\x00\x00\xc1",
        b"\x02\x00\x00\x00\x91\x63",
        ipc.frame(ipc.Evicted([1])),
        b"\x05\x00\x00\x00" + b"\x92\x01\xa2no",
    ],
)
def test_junk_ends_the_connection(junk: bytes) -> None:
    with pytest.raises(ipc.IpcError):
        ipc.Unframer(ipc.ToDaemon, 1 << 20).feed(junk)


class Ear:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.reason: str | None = None
        self.connection: ipc.Connection | None = None
        self.gone = asyncio.Event()

    def connected(self, connection: ipc.Connection) -> None:
        self.connection = connection

    def received(self, connection: ipc.Connection, message: Any) -> None:
        self.heard.append(message)

    def lost(self, connection: ipc.Connection, reason: str) -> None:
        self.reason = reason
        self.gone.set()


async def pair(directory: Path, queue_bytes: int = 1 << 16) -> tuple[Ear, Ear, asyncio.Server]:
    loop = asyncio.get_running_loop()
    here, there = Ear(), Ear()
    with ipc.socket_address(str(directory)) as path:
        server = await loop.create_unix_server(
            lambda: ipc.Connection(lambda: there, ipc.ToDaemon, 1 << 16, queue_bytes), path
        )
        await loop.create_unix_connection(
            lambda: ipc.Connection(lambda: here, ipc.ToWorker, 1 << 16, queue_bytes), path
        )
    return here, there, server


async def test_a_connection_carries_messages_and_tells_its_end(tmp_path: Path) -> None:
    here, there, server = await pair(tmp_path)
    assert here.connection is not None
    assert here.connection.send(ipc.Hello(1))
    await here.connection.close()
    await there.gone.wait()
    assert there.heard == [ipc.Hello(1)]
    assert not here.connection.send(ipc.Hello(2))
    server.close()


async def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    here, there, server = await pair(tmp_path)
    await until(lambda: there.connection is not None)
    assert there.connection is not None
    there.connection.pause_reading()
    assert here.connection is not None
    message = ipc.Touches([(b"c" * 16, each) for each in range(1000)])
    sent = 0
    while here.connection.send(message):
        sent += 1
        assert sent < 10_000
    await here.gone.wait()
    assert here.reason is not None
    assert "unread" in here.reason
    there.connection.abort("end")
    server.close()


async def test_a_message_above_the_limit_is_not_sent(tmp_path: Path) -> None:
    here, _, server = await pair(tmp_path)
    assert here.connection is not None
    assert not here.connection.send(ipc.BlockDone(1, 2, 3, b"x" * (1 << 17)))
    await here.gone.wait()
    server.close()


async def test_a_directory_with_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    os.mkdir(directory)
    here, there, server = await pair(directory)
    assert here.connection is not None
    here.connection.send(ipc.Hello(1))
    await here.connection.close()
    await there.gone.wait()
    assert there.heard == [ipc.Hello(1)]
    assert (directory / ipc.SOCKET_NAME).exists()
    server.close()
