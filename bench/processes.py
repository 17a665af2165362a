"""The processes of a run: started, pinned, measured, and ended by their pid.

Owns: starting a server and waiting for its line, CPU time and memory of a process tree, the share-out of cores.
Does not own: what the servers are.

Invariant: whatever was started here has ended when its `with` block is left, however it is left.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from bench.results import BenchFailed

#: CPUCLOCK_SCHED of include/linux/posix-timers.h: the clock of the whole process in ns, ended threads included.
_PROCESS_CLOCK: Final = 2
_TAIL_LINES: Final = 40
STOP_S: Final = 15.0
FAVOURED_NICE: Final = -10
#: Set by `--favour`, for a machine that has other work to do.
FAVOUR: Final = "KOS_BENCH_FAVOUR"


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core carries the servers under test and which everything else; None where there is just one."""

    server: int | None
    others: int | None


def cores() -> Cores:
    """The last two cores of this machine (the first one often carries the interrupts)."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[-1], usable[-2]) if len(usable) >= 2 else Cores(None, None)


def children(pid: int) -> list[int]:
    """All living descendants of a process, found by parent pid."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{name}/stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time, user and system, of these processes so far; one that has gone counts as nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | _PROCESS_CLOCK)
    return total


def favour(pids: Iterable[int]) -> None:
    """Let these processes go before others on this machine, as far as we may: other work then moves the figures less.

    Under autogroup scheduling, where nice counts within a session only, it is the session that is favoured.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, FAVOURED_NICE)
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(FAVOURED_NICE))


def memory_bytes(pid: int) -> dict[str, int]:
    """VmHWM (peak), VmRSS, RssAnon, RssFile of /proc/PID/status and Pss of smaps_rollup, in bytes."""
    found: dict[str, int] = {}
    for name in ("status", "smaps_rollup"):
        text = Path(f"/proc/{pid}/{name}").read_text()
        for key, kib in re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile|Pss):\s+(\d+) kB", text, re.MULTILINE):
            found[key] = int(kib) * 1024
    return found


def command_line(pid: int) -> str:
    """The command of a process, blank-separated; "" where it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


class Server:
    """A child process that says on stdout when it is ready, and is ended by pid.

    argv: the command; ready: regular expression searched in each line of its output; core: the one core it and its
    children may use. Everything it prints goes to `log`. Raises BenchFailed where it ends or stays silent instead.
    """

    def __init__(
        self,
        argv: Sequence[str],
        ready: str,
        log: Path,
        *,
        core: int | None = None,
        env: Mapping[str, str] | None = None,
        within_s: float = 30.0,
    ) -> None:
        pinned = ["taskset", "-c", str(core), *argv] if core is not None else list(argv)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._ready = re.compile(ready)
        self._seen = threading.Event()
        self.match: re.Match[str] | None = None
        self._log = log
        self._process = subprocess.Popen(
            pinned,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"log-{self.pid}", daemon=True)
        self._reader.start()
        if not self._seen.wait(within_s) or self.match is None:
            self.stop()
            raise BenchFailed(f"{' '.join(argv)} did not say it was ready:\n" + "\n".join(self._tail))
        if os.environ.get(FAVOUR):
            favour(self.pids())

    @property
    def pid(self) -> int:
        return self._process.pid

    def pids(self) -> list[int]:
        """The process and all its descendants."""
        return [self.pid, *children(self.pid)]

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pids())

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("ab") as log:
            for raw in self._process.stdout:
                log.write(raw)
                if self.match is None:
                    text = raw.decode(errors="replace").rstrip()
                    self._tail.append(text)
                    self.match = self._ready.search(text)
                    if self.match is not None:
                        self._seen.set()
        self._seen.set()

    def stop(self) -> int:
        """SIGTERM, wait, then SIGKILL for what is left of the tree; returns the exit status."""
        tree = children(self.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        for pid in [*tree, *children(self.pid)]:
            # Only where it is still ours: a pid whose session is that of the server we started.
            with contextlib.suppress(OSError):
                if os.getsid(pid) == self.pid:
                    os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
        status = self._process.wait(STOP_S)
        self._reader.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Keep the calling thread (a client) on one core for the time being."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
