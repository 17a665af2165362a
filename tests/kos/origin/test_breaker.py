"""The breaker's states, and the interleavings that could fool it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kos.origin.breaker import Breaker, Refused, State, Ticket


def admitted(breaker: Breaker, now: float) -> Ticket:
    ticket = breaker.admit(now)
    assert isinstance(ticket, Ticket)
    return ticket


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(3, 5.0, 30.0)
    for _ in range(3):
        breaker.failed(admitted(breaker, now), now, "connect")
    assert breaker.state is State.OPEN
    return breaker


def test_it_opens_after_a_run_of_failures_only() -> None:
    breaker = Breaker(3, 5.0, 30.0)
    for _ in range(10):
        breaker.failed(admitted(breaker, 0), 0, "connect")
        breaker.failed(admitted(breaker, 0), 0, "connect")
        breaker.succeeded(admitted(breaker, 0))
    assert breaker.state is State.CLOSED


def test_open_refuses_and_says_why_and_until_when() -> None:
    breaker = opened(10.0)
    assert breaker.admit(11.0) == Refused("origin unavailable (connect)", 4.0)


def test_a_refusal_can_be_asked_for_beforehand_and_takes_no_probe_away() -> None:
    assert Breaker(3, 5.0, 30.0).refusal(0.0) is None
    breaker = opened(10.0)
    assert breaker.refusal(11.0) == breaker.admit(11.0)
    assert breaker.refusal(15.0) is None and breaker.state is State.OPEN
    assert admitted(breaker, 15.0).probe
    assert breaker.refusal(16.0) == breaker.admit(16.0)
    assert breaker.refusal(45.0) is None and breaker.state is State.HALF_OPEN


def test_one_probe_decides() -> None:
    breaker = opened()
    probe = admitted(breaker, 5.0)
    assert probe.probe and breaker.state is State.HALF_OPEN
    assert isinstance(breaker.admit(5.0), Refused)
    breaker.succeeded(probe)
    assert breaker.state is State.CLOSED
    assert not admitted(breaker, 5.0).probe

    breaker = opened()
    breaker.failed(admitted(breaker, 5.0), 6.0, "answer_timeout")
    assert breaker.state is State.OPEN
    assert breaker.admit(10.0) == Refused("origin unavailable (answer_timeout)", 1.0)


def test_a_probe_that_tells_nothing_makes_room_for_the_next() -> None:
    breaker = opened()
    breaker.abandoned(admitted(breaker, 5.0), 6.0)
    assert admitted(breaker, 6.0).probe


def test_a_probe_that_lasts_does_not_keep_the_others_out() -> None:
    """An upload waits for its client, for an hour if it likes."""
    breaker = opened()
    upload = admitted(breaker, 5.0)
    assert isinstance(breaker.admit(34.9), Refused)
    probe = admitted(breaker, 35.0)
    assert probe.probe and isinstance(breaker.admit(35.0), Refused)
    breaker.failed(upload, 36.0, "answer_timeout")
    assert breaker.state is State.HALF_OPEN
    breaker.succeeded(probe)
    assert breaker.state is State.CLOSED


def test_late_news_from_before_it_opened_change_nothing() -> None:
    breaker = Breaker(3, 5.0, 30.0)
    late = [admitted(breaker, 0) for _ in range(4)]
    for _ in range(3):
        breaker.failed(admitted(breaker, 0), 0, "connect")
    breaker.succeeded(late[0])
    assert breaker.state is State.OPEN
    probe = admitted(breaker, 5.0)
    breaker.failed(late[1], 5.0, "connect")
    breaker.succeeded(late[2])
    breaker.abandoned(late[3], 5.0)
    assert breaker.state is State.HALF_OPEN
    breaker.succeeded(probe)
    assert breaker.state is State.CLOSED


class Histories(RuleBasedStateMachine):
    """Whatever happens in whatever order: at most one probe, and an origin that is back is found to be back."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(3, 5.0, 30.0)
        self.now = 0.0
        self.out: list[Ticket] = []

    @rule(seconds=st.one_of(st.floats(0, 6), st.floats(0, 60)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def admit(self) -> None:
        ticket = self.breaker.admit(self.now)
        if isinstance(ticket, Ticket):
            self.out.append(ticket)
        else:
            assert ticket.retry_after_s > 0

    @rule(index=st.integers(0, 100), how=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, index: int, how: str) -> None:
        if not self.out:
            return
        ticket = self.out.pop(index % len(self.out))
        if how == "succeeded":
            self.breaker.succeeded(ticket)
        elif how == "failed":
            self.breaker.failed(ticket, self.now, "connect")
        else:
            self.breaker.abandoned(ticket, self.now)

    @invariant()
    def at_most_one_probe_of_this_life(self) -> None:
        probes = [t for t in self.out if t.probe and t.life == self.breaker._life]
        assert len(probes) == (1 if self.breaker.state is State.HALF_OPEN else 0)

    def teardown(self) -> None:
        for ticket in self.out:
            self.breaker.abandoned(ticket, self.now)
        for _ in range(2):
            ticket = self.breaker.admit(self.now + 100)
            assert isinstance(ticket, Ticket)
            self.breaker.succeeded(ticket)
        assert self.breaker.state is State.CLOSED


Histories.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
