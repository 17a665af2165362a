"""What kos says: JSON lines on stderr for operators, and the access log, one JSON line a request.

Owns: the form of both, where the access log goes, how it is buffered. Does not own: what is worth saying, or which
fields an access line has (kosproxy.access_log).

Invariant: a log that cannot be written never holds up a request: its queue is bounded, what does not fit is dropped and
counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from typing import Any, Final, TextIO

import msgspec

from kos import config, metrics
from kos.clock import Clock
from kos.errors import ConfigError
from kos.tasks import Tasks

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
CLOSE_TIMEOUT_S: Final = 5.0
_log: Final = logging.getLogger("kos.log")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, then whatever `extra` gave; an exception as text."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in record.__dict__.items() if name not in _STANDARD})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = repr(record.exc_info[1])
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, default=str, ensure_ascii=False)


def timestamp(epoch_s: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    millis = int(epoch_s * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millis // 1000)) + f".{millis % 1000:03d}Z"


def setup(level: str, process: str | None = None, stream: TextIO | None = None) -> None:
    """Send the log of this process to stderr. process: its name in each line (default: the supervisor's for it)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process or os.environ.get(metrics.PROCESS, "kos")))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries at info tell their own story, not ours.
    for noisy in ("aiohttp.access", "asyncio", "botocore", "aiobotocore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Seldom:
    """For what others can cause as often as they like: lets one be said in `every_s`.

    if (left_out := seldom.left_out()) is not None:
        _log.warning("…", extra={"more": left_out})
    """

    def __init__(self, clock: Clock, every_s: float = 1.0) -> None:
        self._clock = clock
        self._every_s = every_s
        self._next = 0.0
        self._left_out = 0

    def left_out(self) -> int | None:
        """How many were not said before this one; None: neither is this one."""
        now = self._clock.monotonic()
        if now < self._next:
            self._left_out += 1
            return None
        self._next = now + self._every_s
        left_out, self._left_out = self._left_out, 0
        return left_out


class AccessLog:
    """The access log: write() takes microseconds and never waits; a thread does the writing.

    Lines are gathered and written every access_flush_s or when access_batch_bytes are there. At most
    access_queue_bytes wait, writing included; what comes beyond is dropped and counted.
    """

    def __init__(self, settings: config.Log) -> None:
        self._settings = settings
        self._encoder = msgspec.json.Encoder()
        self._lines = bytearray()
        self._writing_bytes = 0
        self._fd: int | None = None
        self._reopen = False
        self._closing = False
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._tasks = Tasks("access_log")
        self._writer: asyncio.Task[None] | None = None
        self._failed = False
        self.enabled = settings.access != "off"

    async def start(self) -> None:
        """Open the log. Raises ConfigError if its file cannot be opened."""
        if not self.enabled:
            return
        try:
            self._fd = await asyncio.to_thread(self._open)
        except OSError as error:
            raise ConfigError(f"log.access: {self._settings.access}: {error.strerror}") from error
        self._writer = self._tasks.spawn(self._run(), "write")

    def write(self, line: msgspec.Struct | dict[str, Any] | bytes) -> None:
        """Queue one line; bytes are JSON already."""
        if self._fd is None:
            return
        lines = self._lines
        if len(lines) + self._writing_bytes >= self._settings.access_queue_bytes:
            metrics.ACCESS_LOG_DROPPED.inc()
            return
        if not lines:
            self._some.set()
        if isinstance(line, bytes):
            lines += line
        else:
            self._encoder.encode_into(line, lines, -1)
        lines += b"\n"
        if len(lines) >= self._settings.access_batch_bytes:
            self._full.set()

    def reopen(self) -> None:
        """Go on in a new file of the same name, after rotation (SIGHUP); lines so far go to the old one."""
        self._reopen = True
        self._some.set()
        self._full.set()

    async def close(self) -> None:
        """Write what waits and close, within CLOSE_TIMEOUT_S; a disk that hangs longer keeps the rest."""
        if self._writer is None:
            return
        self._closing = True
        self._some.set()
        self._full.set()
        done, _ = await asyncio.wait({self._writer}, timeout=CLOSE_TIMEOUT_S)
        await self._tasks.close()
        # A thread that still writes must not find its descriptor belonging to somebody else.
        if done and self._fd is not None and self._settings.access != "stdout":
            os.close(self._fd)
        self._fd = self._writer = None

    def _open(self) -> int:
        if self._settings.access == "stdout":
            return sys.stdout.fileno()
        return os.open(self._settings.access, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    async def _run(self) -> None:
        while not self._closing or self._lines:
            await self._some.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.access_flush_s):
                    await self._full.wait()
            self._some.clear()
            self._full.clear()
            await self._flush()
            if self._reopen:
                self._reopen = False
                await self._open_anew()

    async def _flush(self) -> None:
        if not self._lines or self._fd is None:
            return
        batch, self._lines = self._lines, bytearray()
        self._writing_bytes = len(batch)
        try:
            await asyncio.to_thread(_write_all, self._fd, batch)
            self._failed = False
        except OSError as error:
            # A full disk: say it once, drop, try again with the next batch.
            metrics.ACCESS_LOG_DROPPED.inc(batch.count(b"\n"))
            if not self._failed:
                _log.error(
                    "access log cannot be written", extra={"path": self._settings.access, "reason": error.strerror}
                )
            self._failed = True
        finally:
            self._writing_bytes = 0

    async def _open_anew(self) -> None:
        if self._settings.access == "stdout" or self._fd is None:
            return
        try:
            fd = await asyncio.to_thread(self._open)
        except OSError as error:
            _log.error("access log cannot be reopened", extra={"path": self._settings.access, "reason": error.strerror})
            return
        os.close(self._fd)
        self._fd = fd


def _write_all(fd: int, batch: bytearray) -> None:
    rest = memoryview(batch)
    while rest:
        rest = rest[os.write(fd, rest) :]
