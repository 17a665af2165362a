"""What a child process and its supervisor have to say to each other.

Owns: the states of a child, the pipe on which it tells them, its exit code for a start that no retry can mend, and that
it does not outlive its supervisor. Does not own: what the supervisor does about it (kos.node.supervisor).

Each line on the pipe is one Report as JSON, shorter than PIPE_BUF, so lines are never mixed or torn.

Invariant: telling a status never blocks and never fails: without a supervisor, or with one that does not read, nothing
happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final, Literal

import msgspec

STATUS_FD: Final = "KOS_STATUS_FD"
PARENT_PID: Final = "KOS_PARENT_PID"

#: a child's exit code for "do not start me again as I am" (EX_CONFIG of sysexits.h): bad configuration, port taken
EXIT_CONFIG: Final = 78

#: PIPE_BUF is 4096; what a reason may take of it
REASON_CHARS_MAX: Final = 500

_PR_SET_PDEATHSIG: Final = 1

State = Literal["starting", "ready", "draining", "failed", "dead"]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One status. state "failed" comes before an exit that no restart can mend; "dead" is the supervisor's own word."""

    state: State
    caching: Literal["on", "off"] = "on"
    reason: str = ""


class ChildStatus:
    """The child's end. Use ChildStatus.from_env() at the very start of a child."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last: Report | None = None
        if fd is not None:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    @classmethod
    def from_env(cls) -> ChildStatus:
        """The pipe that the supervisor gave, or a status that goes nowhere; ties this process to the supervisor."""
        die_with_parent()
        fd = os.environ.pop(STATUS_FD, "")
        return cls(int(fd) if fd.isdigit() else None)

    def starting(self, reason: str = "") -> None:
        """Not yet able to answer; reason says what takes its time."""
        self.report(Report(state="starting", reason=reason))

    def ready(self, caching: bool = True, reason: str = "") -> None:
        """Able to answer. caching False: the reason why nothing new is stored."""
        self.report(Report(state="ready", caching="on" if caching else "off", reason=reason))

    def draining(self) -> None:
        """Takes nothing new, finishes what is open."""
        self.report(Report(state="draining"))

    def failed(self, reason: str) -> None:
        """About to exit with EXIT_CONFIG; reason is what an operator must mend."""
        self.report(Report(state="failed", reason=reason))

    def report(self, report: Report) -> None:
        """Tell a status, if it differs from the last one told."""
        if self._fd is None or report == self._last:
            return
        self._last = report
        short = msgspec.structs.replace(report, reason=report.reason[:REASON_CHARS_MAX])
        # A supervisor that died closes the pipe, one that hangs lets it fill: neither is this process's to mend.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, msgspec.json.encode(short) + b"\n")


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its supervisor dies, however that happens. Linux only.

    Between the fork and this call the parent may have gone already: no signal would ever come, so it is sent here.
    """
    parent = os.environ.pop(PARENT_PID, "")
    if not parent.isdigit():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)
