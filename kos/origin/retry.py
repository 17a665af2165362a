"""Whether a request to the origin is tried again, and when: decisions without I/O.

Owns: which outcomes are worth another attempt, the back-off, Retry-After, the bounds of both.
Does not own: sending (kos.origin.lane), holding load back from a dead origin (kos.origin.breaker).

Invariant: only a request that may be carried out twice without harm, and whose body can be sent again from its first
byte, is ever repeated; and never once a byte of an answer's body was handed out.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html (timeouts and
retries), RFC 9110 sections 9.2.2 (idempotent methods) and 10.2.3 (Retry-After).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE"})
#: 500, 502, 503 (SlowDown among them) and 504 are S3's passing troubles; 429 is how other stores say SlowDown.
RETRIED_STATUS: Final = frozenset({429, 500, 502, 503, 504})


class Failure(Enum):
    """How an attempt ended without an answer's head."""

    CONNECT = "connect"
    CONNECT_TIMEOUT = "connect_timeout"
    ANSWER_TIMEOUT = "answer_timeout"
    DISCONNECTED = "disconnected"
    NOT_HTTP = "not_http"


_TIMEOUTS: Final = frozenset({Failure.CONNECT_TIMEOUT, Failure.ANSWER_TIMEOUT})


class Reason(Enum):
    """Why a request is tried again, or is not."""

    RETRY = "retry"
    RETRY_AFTER = "retry_after"
    NOT_RETRYABLE = "not_retryable"
    ANSWERED = "answered"
    ATTEMPTS = "attempts_used_up"
    DEADLINE = "deadline"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Policy:
    """retries: attempts after the first. base_s, max_s: the first and the longest wait, before jitter."""

    retries: int
    base_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    again: bool
    reason: Reason
    delay_s: float = 0.0


def decide(
    outcome: Failure | int,
    *,
    attempt: int,
    replayable: bool,
    policy: Policy,
    remaining_s: float,
    jitter: Callable[[float, float], float],
    retry_after_s: float | None = None,
) -> Decision:
    """What follows an attempt. outcome: a Failure, or the status of an answer. attempt: 1 for the first.

    remaining_s: what is left of the request's time. jitter(low, high): a random number between the two. retry_after_s:
    what the origin asked for; honoured up to policy.max_s, so that no origin can park a request.
    """
    if isinstance(outcome, int) and outcome not in RETRIED_STATUS:
        return Decision(False, Reason.ANSWERED)
    if not replayable:
        return Decision(False, Reason.NOT_RETRYABLE)
    if outcome in _TIMEOUTS:
        # The client has waited a whole timeout already, and a silent origin is mostly silent again: tell it now, so that
        # it hears within one timeout and the breaker within a few.
        return Decision(False, Reason.TIMED_OUT)
    if attempt > policy.retries:
        return Decision(False, Reason.ATTEMPTS)
    reason = Reason.RETRY
    delay_s = backoff_s(attempt, policy, jitter)
    if retry_after_s is not None:
        reason = Reason.RETRY_AFTER
        delay_s = max(delay_s, min(retry_after_s, policy.max_s))
    if delay_s >= remaining_s:
        return Decision(False, Reason.DEADLINE)
    return Decision(True, reason, delay_s)


def backoff_s(attempt: int, policy: Policy, jitter: Callable[[float, float], float]) -> float:
    """Seconds before the attempt after this one: anywhere up to base * 2^(attempt-1), capped ("full jitter").

    The whole interval and not its upper half, because the waiters of one broken origin would come back together.
    """
    ceiling = min(policy.max_s, policy.base_s * 2.0 ** min(attempt - 1, 30))
    return jitter(0.0, ceiling)


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date; now: epoch seconds); None if it says nothing."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


#: With one of these a write is carried out only if the object, its source or its end is as expected, which the write
#: itself may change; x-amz-copy-source-if-* are among them because an object may be copied onto itself.
_CONDITIONS: Final = (
    "if-match", "if-modified-since", "if-none-match", "if-unmodified-since", "x-amz-copy-source-if-match",
    "x-amz-copy-source-if-modified-since", "x-amz-copy-source-if-none-match", "x-amz-copy-source-if-unmodified-since",
    "x-amz-if-match-initiated-time", "x-amz-if-match-last-modified-time", "x-amz-if-match-size",
    "x-amz-write-offset-bytes",
)  # fmt: skip


def may_repeat(method: str, header_names: Container[str]) -> bool:
    """Whether carrying out a request twice does what carrying it out once does. header_names: any
    container that finds lower-case names.

    A conditional write does not: had the first attempt succeeded and its answer been lost, the second would be told
    that the precondition failed, for an object that it wrote itself. The client hears of the failure and decides. What
    no header shows (that an upload can be aborted once only) is the caller's to say, who knows the operation.
    """
    if method not in IDEMPOTENT:
        return False
    if method in ("PUT", "DELETE"):
        return not any(name in header_names for name in _CONDITIONS)
    return True
