"""Keeps the child processes of a node running, and stops them in order.

Owns: starting, watching, restarting with back-off, readiness of the whole, drain and stop. Does not own: what the
children do, which they are (kos.node.role), or the admin port (kos.node.admin).

How a child lives:

    start ──▶ starting ──"ready"──▶ ready ──▶ (exits) ──▶ dead ──back-off──▶ start
                 │ "failed", EXIT_CONFIG, or start_attempts used up, while the node was never ready: the node gives up
                 └ not ready within start_timeout: killed, counts as an exit

Before the node was ready for the first time a failing child ends it with a clear word and a non-zero code: an operator
is looking. After that it restarts forever: nobody is looking, and the other children still serve.

Invariant: when run() returns, no child is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kos import config, metrics
from kos.clock import Clock
from kos.node.status import EXIT_CONFIG, PARENT_PID, STATUS_FD, Report
from kos.tasks import Tasks

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_BAD_CONFIG: Final = 2

#: how long the kernel may take to end a process after SIGKILL before we say so and leave
KILL_WAIT_S: Final = 5.0
#: how long after a child's exit its last words on the pipe are waited for
LAST_WORDS_S: Final = 1.0
STATUS_LINE_BYTES_MAX: Final = 4096

_log: Final = logging.getLogger("kos.node")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child: its name (stable over restarts), command, and manners.

    serves: its readiness means that requests are answered. stop_rank: lower ranks are stopped, and gone, first.
    stop_s: from SIGTERM to SIGKILL. forward_hangup: SIGHUP means something to it.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    serves: bool = True
    stop_rank: int = 0
    stop_s: float = 10.0
    forward_hangup: bool = False


@dataclass(slots=True)
class Child:
    """What is known of a child now."""

    spec: ChildSpec
    report: Report = field(default_factory=lambda: Report(state="starting"))
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    exits_in_a_row: int = 0

    @property
    def ready(self) -> bool:
        return self.report.state == "ready"

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def backoff_s(exits_in_a_row: int, settings: config.Supervisor, clock: Clock) -> float:
    """Seconds to wait before the next start: doubling up to the limit, then between half of that and all of it."""
    longest = min(settings.restart_max_s, settings.restart_base_s * 2.0 ** min(exits_in_a_row - 1, 32))
    return clock.jitter(longest / 2, longest)


class Supervisor:
    """Runs the children until told to stop.

    on_ready: called once, when every child has been ready at the same time.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        settings: config.Supervisor,
        clock: Clock,
        on_ready: Callable[[], None] = lambda: None,
        on_exit: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.children = [Child(spec) for spec in specs]
        self.was_ready = False
        self.failure = ""
        self._settings = settings
        self._clock = clock
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._tasks = Tasks("supervisor")
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._exit_code = EXIT_OK

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def ready(self) -> bool:
        """Requests will succeed: at first that takes every child, later one that serves."""
        if self.stopping or not self.was_ready:
            return False
        serving = [child for child in self.children if child.spec.serves] or self.children
        return any(child.ready for child in serving)

    def stop(self) -> None:
        """Begin an orderly stop; a second call kills what is left."""
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()

    def hangup(self) -> None:
        """Pass SIGHUP on to the children that know it."""
        for child in self.children:
            if child.spec.forward_hangup and child.report.state in ("ready", "draining"):
                child.send(signal.SIGHUP)

    async def run(self) -> int:
        """Run until stop() or failure; the exit code of the node."""
        try:
            for child in self.children:
                self._loops[child.spec.name] = self._tasks.spawn(self._keep(child), child.spec.name)
            await self._stop.wait()
            for rank in sorted({child.spec.stop_rank for child in self.children}):
                await self._stop_rank([child for child in self.children if child.spec.stop_rank == rank])
        finally:
            for child in self.children:
                child.send(signal.SIGKILL)
            await self._tasks.close()
        return EXIT_FAILED if self._at_once.is_set() and self._exit_code == EXIT_OK else self._exit_code

    async def _stop_rank(self, children: Sequence[Child]) -> None:
        for child in children:
            child.send(signal.SIGTERM)
        loops = {self._loops[child.spec.name] for child in children}
        at_once = self._tasks.spawn(self._at_once.wait(), "at_once")
        until = self._clock.monotonic() + max(child.spec.stop_s for child in children)
        while (left := {loop for loop in loops if not loop.done()}) and not at_once.done():
            timeout_s = until - self._clock.monotonic()
            if timeout_s <= 0:
                break
            await asyncio.wait({*left, at_once}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        left = {loop for loop in loops if not loop.done()}
        if not left:
            return
        for child in children:
            if not self._loops[child.spec.name].done():
                _log.warning("child did not stop in time and is killed", extra={"child": child.spec.name})
                child.send(signal.SIGKILL)
        await asyncio.wait(left, timeout=KILL_WAIT_S)

    def _give_up(self, reason: str, code: int) -> None:
        if not self.failure and not self.stopping:
            self.failure, self._exit_code = reason, code
            self._stop.set()

    async def _keep(self, child: Child) -> None:
        """Start a child again and again until the node stops."""
        name = child.spec.name
        while not self.stopping:
            started = self._clock.monotonic()
            last = child.report = Report(state="starting")
            try:
                code, last = await self._live_once(child)
            except OSError as error:
                code, last = EXIT_CONFIG, Report(state="failed", reason=f"{child.spec.argv[0]}: {error.strerror}")
            child.report = Report(state="dead", reason=last.reason or _exit_text(code))
            self._on_exit(name)
            if self.stopping:
                return
            if self._clock.monotonic() - started >= self._settings.stable_s:
                child.exits_in_a_row = 0
            child.exits_in_a_row += 1
            if not self.was_ready and self._hopeless(child, code, last):
                return
            delay_s = backoff_s(child.exits_in_a_row, self._settings, self._clock)
            _log.error(
                "child exited and will be restarted",
                extra={"child": name, "reason": child.report.reason, "exit": _exit_text(code), "delay_s": delay_s},
            )
            child.restarts += 1
            metrics.WORKERS_RESTARTS.labels(name).inc()
            await self._sleep_or_stop(delay_s)

    def _hopeless(self, child: Child, code: int, last: Report) -> bool:
        name = child.spec.name
        if code == EXIT_CONFIG or last.state == "failed":
            self._give_up(f"{name} cannot start: {child.report.reason}", EXIT_BAD_CONFIG)
            return True
        if child.exits_in_a_row >= self._settings.start_attempts:
            times = f"{child.exits_in_a_row} times"
            self._give_up(f"{name} failed to start {times}; the last time: {child.report.reason}", EXIT_FAILED)
            return True
        return False

    async def _sleep_or_stop(self, seconds: float) -> None:
        waits = {
            self._tasks.spawn(self._clock.sleep(seconds), "backoff"),
            self._tasks.spawn(self._stop.wait(), "stop"),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _live_once(self, child: Child) -> tuple[int, Report]:
        """One life of a child: its exit code and the last it said. OSError: its command cannot be run."""
        read_fd, write_fd = os.pipe()
        try:
            reader = asyncio.StreamReader(limit=STATUS_LINE_BYTES_MAX)
            pipe = os.fdopen(read_fd, "rb", buffering=0)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                child.process = await asyncio.create_subprocess_exec(
                    *child.spec.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(write_fd,),
                    # Out of the terminal's group: ^C is for the supervisor, which then stops children in order.
                    start_new_session=True,
                    env={**os.environ, **child.spec.env, STATUS_FD: str(write_fd), PARENT_PID: str(os.getpid())},
                )
            except BaseException:
                transport.close()
                raise
        finally:
            os.close(write_fd)
        process = child.process
        listening = self._tasks.spawn(self._listen(child, reader), f"{child.spec.name}.status")
        watching = self._tasks.spawn(self._watch_start(child, process), f"{child.spec.name}.start")
        try:
            if self.stopping:
                child.send(signal.SIGTERM)
            code = await process.wait()
            # A grandchild may hold the pipe open: the end of it is not waited for any longer than this.
            await asyncio.wait({listening}, timeout=LAST_WORDS_S)
            return code, child.report
        finally:
            watching.cancel()
            listening.cancel()
            transport.close()

    async def _watch_start(self, child: Child, process: asyncio.subprocess.Process) -> None:
        await self._clock.sleep(self._settings.start_timeout_s)
        if child.report.state == "starting" and process is child.process:
            reason = f"not ready within {self._settings.start_timeout_s:g} s"
            child.report = msgspec.structs.replace(child.report, reason=reason)
            child.send(signal.SIGKILL)

    async def _listen(self, child: Child, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
                report = msgspec.json.decode(line, type=Report) if line else None
            except (msgspec.DecodeError, ValueError) as error:
                _log.error("child said nonsense", extra={"child": child.spec.name, "reason": str(error)})
                continue
            if report is None:
                return
            self._heard(child, report)

    def _heard(self, child: Child, report: Report) -> None:
        before, child.report = child.report, report
        if before != report:
            _log.info(
                "child status",
                extra={
                    "child": child.spec.name,
                    "state": report.state,
                    "caching": report.caching,
                    "reason": report.reason,
                },
            )
        if not self.was_ready and not self.stopping and all(child.ready for child in self.children):
            self.was_ready = True
            self._on_ready()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
