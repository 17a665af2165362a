"""Child processes for a demonstration or a test: started, watched until they are ready, and ended for certain.

Owns: the life of one child and the reading of its output. Does not own: what the child is.

Invariant: a child never outlives the block that started it, and its output pipe never fills up.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_STOP_TIMEOUT_S = 20.0


@contextlib.contextmanager
def running(name: str, command: list[str], *, stderr: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop in {_STOP_TIMEOUT_S:.0f} s, killing it", file=sys.stderr)
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def saw_line(stream: IO[str], start: str, timeout_s: float) -> bool:
    """Read lines on a thread (it goes on draining the pipe, so that the writer never blocks) until one begins so."""
    lines: queue.Queue[str | None] = queue.Queue(maxsize=1000)

    def drain() -> None:
        with contextlib.suppress(ValueError):  # the stream is closed under us at the end
            for line in stream:
                with contextlib.suppress(queue.Full):
                    lines.put_nowait(line)
        with contextlib.suppress(queue.Full):
            lines.put_nowait(None)

    threading.Thread(target=drain, name="node-stdout", daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            return False
        if line is None:
            return False
        if line.startswith(start):
            return True
    return False


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
