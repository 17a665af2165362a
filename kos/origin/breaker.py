"""The circuit breaker of one origin: a state machine without I/O.

Owns: when requests are let through, refused, or let through one by one to see whether the origin is back.
Does not own: what counts as unavailable (the lane says so: connect errors, timeouts, broken connections, 502, 503,
504; never 4xx and 500, which are answers to one request), or what callers do when refused.

    CLOSED ──`failures` in a row──▶ OPEN ──open_s later, one request──▶ HALF_OPEN ──it succeeds──▶ CLOSED
                                     ▲                                        │
                                     └────────────────it fails────────────────┘

Invariant: in HALF_OPEN one request counts, and only its own outcome changes the state. Requests that began in an
earlier life of the breaker (before it opened) change nothing when they end:

    A sent · breaker opens · A answered late with 200        A's ticket is old: the breaker stays open until its probe

A probe may last for reasons of its own: an upload waits for its client, a completion for the joining of its parts. One
that has not ended after probe_s is no longer waited for; the next request is the probe then.

Times are monotonic seconds, given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to send one request; give it back with succeeded, failed or abandoned, exactly once."""

    life: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """No leave; retry_after_s: seconds until a probe will be let through."""

    reason: str
    retry_after_s: float


class Breaker:
    """failures: how many in a row open it. open_s: how long it then refuses everything. probe_s: how long a probe
    keeps others out; as long as an ordinary request may take to its answer."""

    __slots__ = (
        "_failures_max",
        "_life",
        "_open_s",
        "_opened_at",
        "_probe_s",
        "_probed_at",
        "_run",
        "_state",
        "reason",
    )

    def __init__(self, failures: int, open_s: float, probe_s: float) -> None:
        self._failures_max = failures
        self._open_s = open_s
        self._probe_s = probe_s
        self._probed_at = 0.0
        self._state = State.CLOSED
        self._run = 0
        self._life = 0
        self._opened_at = 0.0
        self.reason = ""

    @property
    def state(self) -> State:
        return self._state

    def admit(self, now: float) -> Ticket | Refused:
        """A ticket, or why not."""
        if self._state is State.CLOSED:
            return Ticket(self._life)
        return self.refusal(now) or self._probe(now)

    def refusal(self, now: float) -> Refused | None:
        """Why admit() would give no ticket now; None if it would. Changes nothing."""
        if self._state is State.OPEN:
            wait_s = self._opened_at + self._open_s - now
            return Refused(f"origin unavailable ({self.reason})", wait_s) if wait_s > 0 else None
        if self._state is State.HALF_OPEN and now - self._probed_at < self._probe_s:
            # The probe usually ends well before; a second is a fair time to ask again.
            return Refused(f"origin is being tried again ({self.reason})", 1.0)
        return None

    def succeeded(self, ticket: Ticket) -> None:
        """The origin answered, with whatever below 500."""
        if ticket.life != self._life:
            return
        self._run = 0
        if self._state is State.HALF_OPEN:
            self._state = State.CLOSED
            self._life += 1
            self.reason = ""

    def failed(self, ticket: Ticket, now: float, reason: str) -> None:
        """The origin was not available; reason goes into what the refused are told."""
        if ticket.life != self._life:
            return
        self._run += 1
        if self._state is State.HALF_OPEN or self._run >= self._failures_max:
            self._open(now, reason)

    def abandoned(self, ticket: Ticket, now: float) -> None:
        """The request ended without telling anything (cancelled, or its client's body broke off)."""
        if ticket.life == self._life and self._state is State.HALF_OPEN:
            # No probe is under way any more: back to open, and due at once, so that the next request is the probe.
            self._state = State.OPEN
            self._life += 1
            self._opened_at = now - self._open_s

    def _probe(self, now: float) -> Ticket:
        self._state = State.HALF_OPEN
        self._life += 1
        self._probed_at = now
        return Ticket(self._life, probe=True)

    def _open(self, now: float, reason: str) -> None:
        self._state = State.OPEN
        self._opened_at = now
        self._run = 0
        self._life += 1
        self.reason = reason
