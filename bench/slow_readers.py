"""Many clients that read slowly, in one process.

Owns: N connections with a small receive buffer, each having sent one GET, each taking a few KiB in turn for a while.
Does not own: the requests (read as lines from a file).

Invariant: bounded in connections and in seconds; no connection reads more than its share in a turn.

Run as `python -m bench.slow_readers --to HOST:PORT --targets FILE --connections N --seconds S`; prints `readers open`
once every answer has begun, and a JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from pathlib import Path
from typing import Final

from bench.client import Address, address, parse_answer
from bench.signing import plain_get

_TURN_BYTES: Final = 8 << 10
_RECEIVE_BUFFER: Final = 8 << 10
_OPEN_WITHIN_S: Final = 60.0


def _open(to: Address, request: bytes) -> socket.socket:
    sock = socket.socket()
    # Before connecting: the window is agreed on in the handshake.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    sock.settimeout(_OPEN_WITHIN_S)
    sock.connect((to.host, to.port))
    sock.sendall(request)
    return sock


def _status(sock: socket.socket) -> int:
    head = sock.recv(_TURN_BYTES)
    return parse_answer(head.partition(b"\r\n\r\n")[0]).status


def read_slowly(to: Address, requests: list[bytes], seconds: float, turn_s: float) -> dict[str, float]:
    """Open all, then let each take a little every `turn_s`, for `seconds`."""
    socks = [_open(to, request) for request in requests]
    good = sum(_status(sock) == 200 for sock in socks)
    print("readers open", flush=True)
    for sock in socks:
        sock.setblocking(False)
    taken = broken = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        for sock in socks:
            try:
                n = len(sock.recv(_TURN_BYTES))
            except BlockingIOError:
                continue
            except OSError:
                n = 0
            taken += n
            broken += not n
        time.sleep(max(0.0, began + turn_s - time.monotonic()))
    for sock in socks:
        sock.close()
    return {"connections": len(socks), "answered_200": good, "bytes": taken, "broken": broken}


def main() -> None:
    """Entry point of the process."""
    options = argparse.ArgumentParser(prog="python -m bench.slow_readers")
    options.add_argument("--to", required=True)
    options.add_argument("--targets", required=True)
    options.add_argument("--connections", type=int, required=True)
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--turn-s", type=float, default=0.5)
    asked = options.parse_args()
    to = address(asked.to)
    targets = Path(asked.targets).read_text().split()
    requests = [plain_get(to, targets[i % len(targets)]) for i in range(asked.connections)]
    print("SUMMARY " + json.dumps(read_slowly(to, requests, asked.seconds, asked.turn_s)), flush=True)


if __name__ == "__main__":
    main()
