"""The floor of a cold read: one process that does nothing but recv_into, pwrite and sendfile.

Owns: a server that fetches each object from the origin over one connection, writes it into a preallocated file and
sends it on from there, in blocking calls on one thread. Does not own: HTTP beyond passing heads on, signatures, an
index, checksums, a second client.

Invariant: every byte passes recv_into -> pwrite -> sendfile once; what kos costs more than this is what kos adds.

Run as `python -m bench.floor --to HOST:PORT --file PATH`; prints `floor ready HOST:PORT`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from typing import Final

from bench.client import parse_answer

#: Of 64 KiB to 1 MiB this measured cheapest: it stays in the second-level cache between recv_into and pwrite.
PIECE_BYTES: Final = 256 << 10


def _head(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read up to a blank line; returns the head with it, and what came behind it."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = sock.recv(16 << 10)
        if not piece:
            raise ConnectionError("closed within a head")
        got += piece
    head, blank, rest = got.partition(b"\r\n\r\n")
    return head + blank, rest


def _send(client: socket.socket, fd: int, start: int, stop: int) -> None:
    while start < stop:
        start += os.sendfile(client.fileno(), fd, start, stop - start)


def relay(client: socket.socket, to: tuple[str, int], fd: int, piece_bytes: int = PIECE_BYTES) -> None:
    """Answer one GET: the body goes through the file."""
    request, _ = _head(client)
    view = memoryview(bytearray(piece_bytes))
    with socket.create_connection(to) as origin:
        origin.sendall(request)
        head, rest = _head(origin)
        length = parse_answer(head[:-4]).length
        os.posix_fallocate(fd, 0, length)
        client.sendall(head)
        at = os.pwrite(fd, rest, 0) if rest else 0
        _send(client, fd, 0, at)
        while at < length:
            n = origin.recv_into(view, min(piece_bytes, length - at))
            if not n:
                raise ConnectionError("origin closed within a body")
            os.pwrite(fd, view[:n], at)
            _send(client, fd, at, at + n)
            at += n


def main() -> None:
    """Entry point of the process."""
    options = argparse.ArgumentParser(prog="python -m bench.floor")
    options.add_argument("--to", required=True, help="HOST:PORT of the origin")
    options.add_argument("--file", required=True, help="where the bytes go; made anew for every request")
    options.add_argument("--piece", type=int, default=PIECE_BYTES, help="bytes per recv_into")
    asked = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    host, _, port = asked.to.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print("floor ready {}:{}".format(*listener.getsockname()), flush=True)
        while True:
            client, _ = listener.accept()
            fd = os.open(asked.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                relay(client, (host, int(port)), fd, asked.piece)
            except ConnectionError as error:
                print(f"floor: {error}", flush=True)
            finally:
                os.unlink(asked.file)
                os.close(fd)
                client.close()


if __name__ == "__main__":
    main()
