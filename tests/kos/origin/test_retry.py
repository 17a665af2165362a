"""The decisions about another attempt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos.origin.retry import Decision, Failure, Policy, Reason, backoff_s, decide, may_repeat, parse_retry_after

POLICY = Policy(retries=3, base_s=0.1, max_s=5.0)


def most(low: float, high: float) -> float:
    return high


def decided(outcome: Failure | int, **changed: object) -> Decision:
    arguments = {"attempt": 1, "replayable": True, "policy": POLICY, "remaining_s": 100.0, "jitter": most}
    return decide(outcome, **{**arguments, **changed})  # type: ignore[arg-type]


TIMEOUTS = (Failure.CONNECT_TIMEOUT, Failure.ANSWER_TIMEOUT)


@pytest.mark.parametrize("outcome", TIMEOUTS)
def test_a_silent_origin_is_not_asked_twice_by_one_request(outcome: Failure) -> None:
    assert decided(outcome) == Decision(False, Reason.TIMED_OUT)


@pytest.mark.parametrize("outcome", [*[each for each in Failure if each not in TIMEOUTS], 429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again(outcome: Failure | int) -> None:
    assert decided(outcome) == Decision(True, Reason.RETRY, 0.1)
    assert decided(outcome, attempt=3) == Decision(True, Reason.RETRY, 0.4)
    assert decided(outcome, attempt=4) == Decision(False, Reason.ATTEMPTS)
    assert decided(outcome, replayable=False) == Decision(False, Reason.NOT_RETRYABLE)
    assert decided(outcome, remaining_s=0.1) == Decision(False, Reason.DEADLINE)


@pytest.mark.parametrize("status", [200, 206, 301, 304, 400, 403, 404, 412, 416, 501])
def test_answers_are_answers(status: int) -> None:
    assert decided(status) == Decision(False, Reason.ANSWERED)


def test_the_origins_wish_is_honoured_within_bounds() -> None:
    assert decided(503, retry_after_s=2.0) == Decision(True, Reason.RETRY_AFTER, 2.0)
    assert decided(503, retry_after_s=3600.0) == Decision(True, Reason.RETRY_AFTER, 5.0)
    assert decided(503, retry_after_s=0.0) == Decision(True, Reason.RETRY_AFTER, 0.1)
    assert decided(503, retry_after_s=2.0, remaining_s=1.5) == Decision(False, Reason.DEADLINE)


@given(st.integers(1, 10_000), st.floats(0.001, 60), st.floats(0.001, 300), st.floats(0, 1))
def test_the_wait_is_bounded(attempt: int, base_s: float, max_s: float, chance: float) -> None:
    delay_s = backoff_s(attempt, Policy(20, base_s, max_s), lambda low, high: low + chance * (high - low))
    assert 0 <= delay_s <= max_s


def test_retry_after_is_read_as_number_or_date() -> None:
    assert parse_retry_after("7", 0) == 7
    assert parse_retry_after(" 0 ", 0) == 0
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 20) == 40
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 100) == 0
    for nothing in (None, "", "soon", "-1", "1.5", "²"):
        assert parse_retry_after(nothing, 0) is None


def test_only_what_can_be_done_twice_is_repeated() -> None:
    nothing: frozenset[str] = frozenset()
    assert all(may_repeat(method, nothing) for method in ("GET", "HEAD", "PUT", "DELETE"))
    assert not may_repeat("POST", nothing)
    assert may_repeat("GET", frozenset({"if-none-match"}))
    assert not may_repeat("PUT", frozenset({"if-none-match"}))
    assert not may_repeat("DELETE", frozenset({"if-match"}))
    assert not may_repeat("DELETE", frozenset({"x-amz-if-match-size"}))
    assert not may_repeat("PUT", frozenset({"x-amz-copy-source", "x-amz-copy-source-if-unmodified-since"}))
    assert may_repeat("PUT", frozenset({"x-amz-copy-source", "x-amz-meta-if-match"}))
