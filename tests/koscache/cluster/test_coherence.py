"""One node's decisions as scripts: what happens to it, and what it then says, marks, passes and trusts, command by command.

What becomes of it among several nodes is in test_interleavings; every order that nobody thought of in
tests/property/test_coherence.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from koscache.cluster import coherence as co
from koscache.cluster import wire
from koscache.cluster.coherence import (
    RATE_SLACK,
    SKIPPED_MAX,
    Coherence,
    Command,
    Ended,
    Left,
    Mark,
    Membership,
    NewEpoch,
    Pass,
    ProtocolBroken,
    Reply,
    Restart,
    Tell,
    Trust,
    Unmark,
)
from koscache.cluster.view import LEAP, Member, View

STATIC, CONTROL = Membership.STATIC, Membership.CONTROL
LEASE_S = 1.0
MEMBER_LEASE_S = 5.0
LONG_S = 2 * MEMBER_LEASE_S
#: What a promise of so long is kept for at the most.
KEPT_S = LEASE_S * (1 + RATE_SLACK) + 0.05
LONG_KEPT_S = LONG_S * (1 + RATE_SLACK) + 0.05
#: The daemons that the others run.
DAEMON = {"a": 101, "h": 102, "x": 103, "w": 104}


def member(name: str, incarnation: int = 1) -> Member:
    return Member(name, incarnation, "", "", 1)


def hello(
    name: str,
    *,
    daemon: int | None = None,
    version: int = 1,
    skipped: tuple[int, ...] | None = (),
    under_way: Iterable[tuple[int, tuple[int, ...]]] = (),
    incarnation: int = 1,
) -> wire.Hello:
    run = DAEMON[name] if daemon is None else daemon
    return wire.Hello(member(name, incarnation), run, version, 0, 0, skipped, tuple(under_way))


def epochs(commands: list[Command]) -> list[str]:
    return [command.reason for command in commands if isinstance(command, NewEpoch)]


def trusts(commands: list[Command]) -> list[float]:
    return [command.until for command in commands if isinstance(command, Trust)]


def told(commands: list[Command]) -> list[tuple[str, Any]]:
    return [(command.member, command.message) for command in commands if isinstance(command, Tell)]


def acks(commands: list[Command]) -> list[Command]:
    """And welcomes."""
    return [command for command in commands if isinstance(command, Reply) and isinstance(command.message, ANSWERS)]


def ends(commands: list[Command]) -> list[tuple[int, bool]]:
    return [(command.number, command.ok) for command in commands if isinstance(command, Ended)]


ANSWERS = wire.Ack | wire.Welcome


class Script:
    """A node "n" among others; `now` goes on by itself only in wait(). What it decides is returned by each call.

    In CONTROL it has just joined, as far as the store is concerned, unless told otherwise.
    """

    def __init__(
        self,
        *others: str,
        membership: Membership = STATIC,
        lines: bool = True,
        stood: bool = True,
        seen: bool = True,
        **options: Any,
    ) -> None:
        self.now = 1000.0
        self.control = membership is CONTROL
        self.version = 1 if self.control else 0
        self.c = Coherence("n", membership, LEASE_S, member_lease_s=MEMBER_LEASE_S, **options)
        self.others = others
        self.serials: dict[str, int] = {}
        if seen:
            self.view(*others)
        if self.control and stood and seen:
            self.stood()
        if lines:
            for name in others:
                self.up(name)
                self.heard(name)

    # --- time and the store

    def wait(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.c.tick(self.now)

    def view(self, *others: str, since: float = -math.inf, version: int | None = None, **back: int) -> list[Command]:
        """back: name=incarnation."""
        self.version = self.version if version is None else version
        members = [member(name, back.get(name, 1)) for name in sorted((*others, "n"))]
        return self.c.viewed(View(self.version, tuple(members)), self.now, since)

    def stood(self, *late: str, until: float | None = None) -> list[Command]:
        return self.c.stood(self.now + 0.9 * MEMBER_LEASE_S if until is None else until, late, self.now)

    # --- our line to a member

    def up(self, name: str) -> list[Command]:
        """It begins and is welcomed."""
        self.c.greet(name)
        return self.c.welcomed(name, self.version, self.now)

    def begin(self, *slots: int) -> tuple[int, list[Command]]:
        return self.c.begin(slots, self.now)

    def end(self, number: int, wait_s: float | None = 40.0) -> list[Command]:
        return self.c.end(number, self.now, wait_s)

    def has_begin(self, name: str, number: int, version: int | None = None) -> list[Command]:
        message = wire.Ack(number, False, self.version if version is None else version)
        return self.c.acknowledged(name, message, self.now)

    def has_end(self, name: str, number: int, version: int | None = None) -> list[Command]:
        message = wire.Ack(number, True, self.version if version is None else version)
        return self.c.acknowledged(name, message, self.now)

    def promise(self, name: str) -> None:
        """The member asks to be waited for."""
        self.c.renew(name, 1, self.now)

    # --- a member's line to us

    def heard(self, name: str, **said: Any) -> list[Command]:
        """Its Hello comes and is answered."""
        commands = self.c.hello(hello(name, version=said.pop("version", self.version), **said), self.now)
        return commands + self.listen(name)

    def listen(self, name: str) -> list[Command]:
        commands = self.c.listening(name, self.now)
        self.remember(commands)
        return commands

    def remember(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Reply) and isinstance(command.message, wire.Renew):
                self.serials[command.member] = command.message.serial

    def renew(self, *names: str) -> list[Command]:
        """All of these grant what was asked of them last."""
        commands: list[Command] = []
        for name in names or self.others:
            commands += self.c.renewed(name, wire.Renewed(self.serials[name], self.version), self.now)
        return commands

    def ask(self) -> list[Command]:
        commands = self.c.tick(self.now)
        self.remember(commands)
        return commands


BEGIN = wire.Begin
END = wire.End


# --- a write of this node ---------------------------------------------------------------------------------------------


def test_no_end_before_all_have_the_begin_and_no_answer_before_all_have_the_end() -> None:
    s = Script("a", "h")
    number, commands = s.begin(5, 6)
    assert commands == [Tell("a", BEGIN(number, (5, 6))), Tell("h", BEGIN(number, (5, 6)))]
    assert s.end(number) == []
    assert s.has_begin("a", number) == []
    # Our own slots pass before anybody hears the End: who has heard it asks us no more for what was before.
    assert s.has_begin("h", number) == [Pass((5, 6)), Tell("a", END(number)), Tell("h", END(number))]
    assert s.has_end("h", number) == []
    assert s.has_end("h", number) == []
    assert s.has_end("a", number) == [Ended(number, True)]
    assert s.c.waiting == 0


def test_the_begin_may_be_acknowledged_before_the_origin_has_answered() -> None:
    s = Script("a")
    number, _ = s.begin(5)
    assert s.has_begin("a", number) == []
    assert s.end(number) == [Pass((5,)), Tell("a", END(number))]


def test_alone_in_the_store_it_answers_while_its_own_row_holds() -> None:
    """Else somebody may have joined, who trusts and does not hear of it."""
    s = Script(membership=CONTROL)
    s.now += 0.9 * MEMBER_LEASE_S
    number, _ = s.begin(5)
    assert ends(s.end(number)) == []
    assert ends(s.wait(1)) == []
    assert ends(s.stood()) == [(number, True)]


def test_alone_it_waits_for_nobody() -> None:
    s = Script()
    number, commands = s.begin(5)
    assert commands == []
    assert s.end(number) == [Pass((5,)), Ended(number, True)]


def test_writes_are_told_apart() -> None:
    s = Script("a", first=7)
    (one, _), (other, _) = s.begin(5), s.begin(5)
    assert (one, other) == (8, 9)
    s.has_begin("a", other)
    assert s.end(one) == []
    assert s.end(other) == [Pass((5,)), Tell("a", END(other))]
    assert s.c.waiting == 2
    assert s.has_end("a", other) == [Ended(other, True)]
    assert s.c.waiting == 1


def test_after_write_wait_it_is_refused_once_and_told_on_nevertheless() -> None:
    s = Script("a", membership=CONTROL)
    number, _ = s.begin(5)
    s.end(number, wait_s=3.0)
    assert ends(s.wait(2.99)) == []
    assert ends(s.wait(0.01)) == [(number, False)]
    assert ends(s.wait(0.01)) == []
    assert told(s.has_begin("a", number)) == [("a", END(number))]
    assert s.has_end("a", number) == []
    assert s.c.greet("a").under_way == ()


def test_what_nobody_waits_for_is_told_all_the_same() -> None:
    s = Script("a")
    number, _ = s.begin(5)
    assert s.end(number, wait_s=None) == []
    assert s.c.waiting == 0
    assert told(s.has_begin("a", number)) == [("a", END(number))]
    assert s.has_end("a", number) == []


def test_an_acknowledgement_of_what_is_over_says_nothing() -> None:
    s = Script("a")
    assert s.has_begin("a", 99) == []
    assert s.has_end("a", 99) == []


def test_of_too_many_that_nobody_waits_for_the_oldest_is_told_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co, "_LEFT_MAX", 2)
    s = Script("a", "h")
    numbers = [s.begin(slot)[0] for slot in range(3)]
    s.has_begin("a", numbers[0])
    s.has_begin("h", numbers[0])
    for number in numbers:
        s.end(number, wait_s=None)
    assert s.has_end("a", numbers[0]) == []
    s.c.lost("h")
    s.c.lost("a")
    assert 0 in (s.c.greet("h").skipped or ())
    assert [number for number, _ in s.c.greet("a").under_way] == numbers[1:]


def test_what_is_kept_for_nobody_is_bounded_in_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co, "_LEFT_SLOTS_MAX", 10)
    s = Script("a")
    numbers = [s.begin(*range(each, each + 4))[0] for each in range(0, 12, 4)]
    for number in numbers:
        s.end(number, wait_s=None)
    assert set(s.c.unfinished()) == set(numbers[1:])
    s.c.lost("a")
    assert s.c.greet("a").skipped == (0, 1, 2, 3)


def test_what_somebody_waits_for_or_is_under_way_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co, "_LEFT_MAX", 0)
    s = Script("a")
    waited, _ = s.begin(1)
    under_way, _ = s.begin(2)
    s.end(waited)
    left, _ = s.begin(3)
    s.end(left, wait_s=None)
    assert s.c.unfinished() == {waited: (1,), under_way: (2,)}


def test_who_has_marked_what_was_given_up_is_greeted_anew_but_not_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co, "_LEFT_MAX", 0)
    s = Script("a", "h", membership=CONTROL)

    def give_up() -> None:
        number, _ = s.begin(1)
        s.has_begin("a", number)
        s.end(number, wait_s=None)

    give_up()
    assert [command for command in s.wait(0) if isinstance(command, Restart)] == [Restart("a")]
    give_up()
    assert [command for command in s.wait(9.9) if isinstance(command, Restart)] == []
    assert [command for command in s.wait(0.1) if isinstance(command, Restart)] == [Restart("a")]
    assert [command for command in s.wait(20) if isinstance(command, Restart)] == []


# --- lines that break under it ----------------------------------------------------------------------------------------


def test_a_listener_that_restarts_between_begin_and_end_is_told_of_the_begin_again() -> None:
    """Its marks went with its daemon: were the first acknowledgement to count, others would hear the End unmarked."""
    s = Script("a", "h")
    number, _ = s.begin(5)
    s.has_begin("a", number)
    s.c.lost("a")
    s.end(number)
    assert s.has_begin("h", number) == []
    assert s.c.greet("a").under_way == ((number, (5,)),)
    assert ends(s.wait(0.01)) == []
    commands = s.c.welcomed("a", 0, s.now)
    assert told(commands) == [("a", END(number)), ("h", END(number))]


def test_a_write_that_begins_while_the_welcome_is_awaited_is_told_behind_the_hello() -> None:
    s = Script("a")
    s.c.lost("a")
    s.c.greet("a")
    number, commands = s.begin(5)
    assert told(commands) == [("a", BEGIN(number, (5,)))]
    s.end(number)
    assert told(s.c.welcomed("a", 0, s.now)) == []  # the Hello did not speak of it
    assert told(s.has_begin("a", number)) == [("a", END(number))]


def test_who_is_not_there_is_told_of_a_write_in_its_hello() -> None:
    s = Script("a", "h")
    s.c.lost("a")
    number, commands = s.begin(5)
    assert told(commands) == [("h", BEGIN(number, (5,)))]
    assert s.c.greet("a").under_way == ((number, (5,)),)


def test_an_end_that_may_not_have_arrived_is_told_as_skipped_and_its_welcome_counts() -> None:
    s = Script("a", "h")
    number, _ = s.begin(5)
    s.end(number)
    s.has_begin("a", number)
    s.has_begin("h", number)
    s.has_end("h", number)
    s.c.lost("a")
    greeting = s.c.greet("a")
    assert (greeting.skipped, greeting.under_way) == ((5,), ())
    assert ends(s.c.welcomed("a", 0, s.now)) == [(number, True)]
    s.c.lost("a")
    assert s.c.greet("a").skipped == ()


def test_an_acknowledged_end_is_not_told_again_when_the_line_breaks() -> None:
    s = Script("a", "h")
    number, _ = s.begin(5)
    s.end(number)
    for name in ("a", "h"):
        s.has_begin(name, number)
    s.has_end("a", number)
    s.c.lost("a")
    assert s.c.greet("a").skipped == ()
    s.c.welcomed("a", 0, s.now)
    assert ends(s.has_end("h", number)) == [(number, True)]


def test_a_welcome_without_a_hello_breaks_the_line() -> None:
    s = Script("a")
    s.c.lost("a")
    with pytest.raises(ProtocolBroken):
        s.c.welcomed("a", 0, s.now)


def test_a_line_that_is_lost_twice_is_lost_once() -> None:
    s = Script("a")
    s.c.lost("a")
    s.c.lost("a")
    s.c.lost("nobody")
    s.c.left("nobody")
    assert s.c.in_trouble(s.now)["a"] == "no line to it"


# --- who is passed over, and when ------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [True, False])
def test_static_who_does_not_answer_is_waited_for_until_no_promise_can_hold(up: bool) -> None:
    s = Script("a")
    s.promise("a")
    if not up:
        s.c.lost("a")
    number, _ = s.begin(5)
    s.end(number)
    assert ends(s.wait(KEPT_S - 0.001)) == []
    commands = s.wait(0.002)
    assert commands[0] == Pass((5,))
    assert ends(commands) == [(number, True)]


def test_a_promise_is_kept_from_when_it_was_asked_for_last() -> None:
    s = Script("a")
    number, _ = s.begin(5)
    s.end(number)
    s.wait(0.9)
    assert told(s.c.renew("a", 17, s.now)) == [("a", wire.Renewed(17, 0))]
    assert ends(s.wait(KEPT_S - 0.001)) == []
    assert ends(s.wait(0.002)) == [(number, True)]


def test_the_daemon_before_may_have_made_promises_until_it_died() -> None:
    s = Script("a", lines=False)
    number, _ = s.begin(5)
    s.end(number)
    assert ends(s.wait(KEPT_S - 0.001)) == []
    assert ends(s.wait(0.002)) == [(number, True)]


def test_slots_passed_without_a_member_are_told_on_its_return_and_forgotten_after_its_welcome() -> None:
    s = Script("a")
    s.c.lost("a")
    for slot in (9, 4):
        number, _ = s.begin(slot)
        assert ends(s.end(number) + s.wait(KEPT_S + 0.01)) == [(number, True)]
    assert s.c.greet("a").skipped == (4, 9)
    s.c.lost("a")  # before the welcome: it may not have heard
    assert s.c.greet("a").skipped == (4, 9)
    s.c.welcomed("a", 0, s.now)
    s.c.lost("a")
    assert s.c.greet("a").skipped == ()


def test_what_is_skipped_while_the_welcome_is_awaited_is_kept_for_the_next_hello() -> None:
    s = Script("a", "h")
    s.c.lost("a")
    s.now += 10
    s.promise("h")
    number, _ = s.begin(4)
    s.end(number)
    s.has_begin("h", number)
    assert ends(s.has_end("h", number)) == [(number, True)]
    assert s.c.greet("a").skipped == (4,)
    number, _ = s.begin(9)
    s.end(number)
    s.has_begin("h", number)
    assert ends(s.has_end("h", number) + s.wait(0)) == [(number, True)]
    s.c.welcomed("a", 0, s.now)
    s.c.lost("a")
    assert s.c.greet("a").skipped == (9,)


def test_what_was_told_on_a_line_that_breaks_before_the_answer_is_told_again() -> None:
    s = Script("a")
    number, _ = s.begin(5)
    s.end(number)
    assert ends(s.wait(KEPT_S + 0.01)) == [(number, True)]  # its line stands, and it says nothing
    s.c.lost("a")
    assert s.c.greet("a").skipped == (5,)


def test_the_late_answer_to_the_end_is_enough_and_that_to_the_begin_is_not() -> None:
    s = Script("a")
    number, _ = s.begin(5)
    s.end(number)
    s.wait(KEPT_S + 0.01)
    s.has_begin("a", number)
    other, _ = s.begin(6)
    s.end(other)
    s.has_begin("a", other)
    s.has_end("a", other)
    s.c.lost("a")
    assert s.c.greet("a").skipped == (5,)


def test_too_many_skipped_slots_are_told_as_none_and_then_counted_anew() -> None:
    s = Script("a")
    s.c.lost("a")
    s.now += 10
    number, _ = s.begin(*range(SKIPPED_MAX))
    assert ends(s.end(number)) == [(number, True)]
    assert len(s.c.greet("a").skipped or ()) == SKIPPED_MAX
    s.c.lost("a")
    number, _ = s.begin(SKIPPED_MAX)
    s.end(number)
    assert s.c.greet("a").skipped is None
    s.c.lost("a")
    assert s.c.greet("a").skipped is None
    s.c.welcomed("a", 0, s.now)
    s.c.lost("a")
    assert s.c.greet("a").skipped == ()


def test_control_who_does_not_answer_is_passed_over_after_the_long_lease() -> None:
    s = Script("a", membership=CONTROL)
    s.promise("a")
    s.c.lost("a")
    number, _ = s.begin(5)
    s.end(number)
    for _ in range(10):
        s.now += LONG_KEPT_S / 10 - 0.0001
        assert ends(s.stood() + s.wait(0)) == []
    assert ends(s.wait(0.01)) == [(number, True)]


def test_control_but_not_when_our_own_membership_has_run_out() -> None:
    """Then we may be the one who is cut off."""
    s = Script("a", membership=CONTROL)
    s.c.lost("a")
    number, _ = s.begin(5)
    s.end(number)
    assert ends(s.wait(LONG_KEPT_S + 1)) == []
    s.stood()  # it holds again, but whoever looked meanwhile may take us for late
    assert ends(s.wait(1)) == []


def test_control_and_not_before_it_has_held_for_longer_than_others_may_take_us_for_late() -> None:
    s = Script("a", membership=CONTROL)
    s.c.lost("a")
    s.wait(LONG_KEPT_S)
    number, _ = s.begin(5)
    s.end(number)
    since = s.now
    s.stood()
    while s.now < since + MEMBER_LEASE_S * (1 + RATE_SLACK):
        assert ends(s.wait(0)) == []
        s.now += 0.25
        s.stood()
    assert ends(s.wait(0.06)) == [(number, True)]


def test_control_one_heartbeat_that_fails_does_not_begin_it_anew() -> None:
    s = Script("a", membership=CONTROL)
    s.c.lost("a")
    number, _ = s.begin(5)
    s.end(number)
    commands: list[Command] = []
    while s.now < 1000 + LONG_KEPT_S:
        s.now += 0.89 * MEMBER_LEASE_S
        commands += s.stood()
    assert ends(commands) == [(number, True)]


def test_who_does_not_let_us_in_counts_as_trusting_as_long_as_it_says_so() -> None:
    """Its list is another one: it does not miss our lease."""
    s = Script("a", lines=False)
    number, _ = s.begin(5)
    s.end(number)
    for _ in range(10):
        s.c.refused("a", s.now)
        assert ends(s.wait(LEASE_S)) == []
    s.c.refused("nobody", s.now)
    assert ends(s.wait(KEPT_S - LEASE_S - 0.001)) == []
    assert ends(s.wait(0.002)) == [(number, True)]


def test_a_daemon_that_died_may_have_let_somebody_trust_who_is_gone_since() -> None:
    """Nobody knows whom: so nothing is answered, and nobody, before a lease of it is over."""
    s = Script("a", membership=CONTROL, after_crash=True)
    number, _ = s.begin(5)
    s.has_begin("a", number)
    assert told(s.end(number)) == []
    assert acks(s.c.begun("a", BEGIN(1, (6,)))) == []
    commands = s.wait(KEPT_S - 0.001)
    assert (told(commands), acks(commands)) == ([], [])
    commands = s.wait(0.002)
    assert told(commands) == [("a", END(number))]
    assert acks(commands) == [Reply("a", wire.Welcome(1)), Reply("a", wire.Ack(1, False, 1))]


def test_one_that_resigned_knows_whom() -> None:
    s = Script("a", membership=CONTROL, before=Left({"a": DAEMON["a"], "x": DAEMON["x"]}))
    number, _ = s.begin(5)
    s.has_begin("a", number)
    assert told(s.end(number)) == []
    assert told(s.wait(KEPT_S - 0.001)) == []
    assert told(s.wait(0.002)) == [("a", END(number))]
    s = Script("a", membership=CONTROL, before=Left({"a": DAEMON["a"]}))
    number, _ = s.begin(5)
    s.has_begin("a", number)
    assert told(s.end(number)) == [("a", END(number))]


# --- members that go and come ----------------------------------------------------------------------------------------


def test_who_is_in_no_view_any_more_holds_up_ends_until_our_promise_to_it_is_over() -> None:
    """It was expelled by somebody to whom it did not speak, and may trust as long as a lease of ours lasts."""
    s = Script("a", "x", membership=CONTROL)
    number, _ = s.begin(5)
    s.has_begin("a", number)
    s.now += 0.5
    s.promise("x")
    s.end(number)
    assert told(s.view("a", version=2)) == []
    assert told(s.wait(KEPT_S - 0.001)) == []
    assert told(s.wait(0.002)) == [("a", END(number))]


def test_and_also_a_write_whose_end_was_told_already() -> None:
    s = Script("a", "x", membership=CONTROL)
    number, _ = s.begin(5)
    s.end(number)
    s.has_begin("a", number)
    s.promise("x")
    s.has_begin("x", number)
    s.view("a", version=2)
    assert s.has_end("a", number) == []
    assert ends(s.wait(KEPT_S - 0.001)) == []
    assert ends(s.wait(0.002)) == [(number, True)]


def test_where_the_store_has_forgotten_members_their_time_in_it_is_waited_for() -> None:
    """Nobody can say who they are; they trust until their next heartbeat, or as long as the last one lets them."""
    s = Script("a", membership=CONTROL, lines=False, forgot=True)
    s.up("a")
    assert acks(s.heard("a")) == []
    number, _ = s.begin(5)
    s.has_begin("a", number)
    s.end(number)
    kept_s = MEMBER_LEASE_S * (1 + RATE_SLACK) + 0.05
    s.now += kept_s - 1
    s.stood()
    commands = s.wait(0.999)
    assert told(commands) == acks(commands) == []
    commands = s.wait(0.002)
    assert told(commands) == [("a", END(number))]
    assert acks(commands) != []


def test_a_view_that_leaps_is_one_of_a_store_that_has_forgotten_members() -> None:
    """However it comes here: the next heartbeat, which notices, may be seconds away."""
    s = Script("a", "x", membership=CONTROL)
    s.renew()
    number, _ = s.begin(5)
    s.has_begin("a", number)
    s.c.lost("x")
    commands = s.view("a", version=1 + LEAP)
    assert trusts(commands) == [0.0]
    assert trusts(s.stood()) == []
    s.end(number)
    kept_s = MEMBER_LEASE_S * (1 + RATE_SLACK) + 0.05
    s.now += kept_s - 1
    s.stood()
    assert told(s.wait(0.999)) == []
    assert told(s.wait(0.002)) == [("a", END(number))]


def test_a_view_that_is_newer_by_less_is_one_like_any_other() -> None:
    s = Script("a", "x", membership=CONTROL)
    s.renew()
    assert 0.0 not in trusts(s.view("a", "x", version=LEAP))


def test_and_nothing_is_trusted_meanwhile() -> None:
    """Whoever is forgotten takes his own row for good, and so passes over us when our lease of him is over."""
    s = Script(membership=CONTROL, forgot=True)
    kept_s = MEMBER_LEASE_S * (1 + RATE_SLACK) + 0.05
    s.now += kept_s - 0.001
    assert s.stood() == []
    s.now += 0.002
    commands = s.stood()
    assert trusts(commands) == [s.now + 0.9 * MEMBER_LEASE_S]
    # What was asked of the origin meanwhile may be from before such a write.
    assert len(epochs(commands)) == 1
    assert isinstance(commands[0], NewEpoch)


def test_who_goes_without_a_promise_of_ours_holds_up_nothing() -> None:
    s = Script("a", "x", membership=CONTROL)
    s.c.lost("x")
    number, _ = s.begin(5)
    s.has_begin("a", number)
    s.now += KEPT_S
    s.stood()
    s.end(number)
    assert told(s.view("a", version=2)) == [("a", END(number))]


def test_others_are_not_answered_either_while_somebody_gone_may_hold_a_lease_of_ours() -> None:
    """x knows that we are there, and not that a is: were a answered, it might pass over x, whom we let trust."""
    s = Script("a", "x", membership=CONTROL)
    s.promise("x")
    s.view("a", version=2)
    assert s.c.begun("a", BEGIN(1, (5,))) == [Mark((5,)), Pass((5,))]
    assert s.c.ended("a", END(1)) == [Pass((5,)), Unmark((5,))]
    assert acks(s.wait(KEPT_S - 0.001)) == []
    assert acks(s.wait(0.002)) == [Reply("a", wire.Ack(1, False, 2)), Reply("a", wire.Ack(1, True, 2))]


def test_what_was_not_answered_on_a_line_is_not_answered_on_the_next_one() -> None:
    """Numbers are those of one daemon: the next one's first write would count as heard."""
    s = Script("a", "x", membership=CONTROL)
    s.promise("x")
    s.view("a", version=2)
    s.c.begun("a", BEGIN(1, (5,)))
    s.c.left("a")
    s.heard("a", daemon=999)
    assert acks(s.wait(KEPT_S + 0.01)) == [Reply("a", wire.Welcome(2))]


def test_a_view_without_a_member_unmarks_what_it_wrote() -> None:
    s = Script("a", "x", membership=CONTROL)
    s.c.begun("x", BEGIN(1, (5, 6)))
    s.c.begun("x", BEGIN(2, (6,)))
    commands = s.view("a", version=2)
    passed = next(command for command in commands if isinstance(command, Pass))
    assert set(passed.slots) == {5, 6}
    assert [command for command in commands if isinstance(command, Unmark)] == [Unmark((5, 6)), Unmark((6,))]
    assert commands.index(passed) < commands.index(Unmark((5, 6)))


def test_views_that_are_not_newer_are_not_listened_to() -> None:
    s = Script("a", membership=CONTROL)
    assert s.view("a", "h", version=1) == []
    assert s.view(version=0) == []
    assert set(s.c.wanted) == {"a"}


def test_one_that_joins_is_waited_for_once_it_has_said_hello_whatever_the_view_says() -> None:
    s = Script("a", membership=CONTROL)
    assert s.c.known("x")
    commands = s.c.hello(hello("x", version=2), s.now, s.now)
    assert epochs(commands) == []  # it joined after our last look, and has had no time to pass over us
    assert s.c.listening("x", s.now)[0] == Reply("x", wire.AskView())
    assert set(s.c.wanted) == {"a", "x"}
    number, _ = s.begin(5)
    s.end(number)
    s.has_begin("a", number)
    assert told(s.view("a", "x", version=2)) == []
    assert s.c.greet("x").under_way == ((number, (5,)),)
    assert told(s.c.welcomed("x", 2, s.now)) == [("a", END(number)), ("x", END(number))]


def test_one_that_said_hello_and_is_in_no_later_view_is_gone() -> None:
    s = Script("a", membership=CONTROL)
    s.heard("x", version=2)
    s.view("a", version=3)
    assert set(s.c.wanted) == {"a"}


def test_who_is_in_no_view_and_has_none_that_is_newer_is_a_stranger() -> None:
    s = Script("a", membership=CONTROL)
    with pytest.raises(ProtocolBroken, match="no member any more"):
        s.heard("x", version=1)
    assert not s.c.known("n")


def test_static_nobody_else_is_known() -> None:
    s = Script("a")
    assert s.c.known("a")
    assert not s.c.known("x")
    assert not s.c.known("n")


# --- views that are out of date ----------------------------------------------------------------------------------------


def test_an_acknowledgement_by_a_newer_view_holds_writes_back_until_it_is_known() -> None:
    """Somebody may have joined who trusts by now, and has not heard of the write."""
    s = Script("a", membership=CONTROL)
    number, _ = s.begin(5)
    s.end(number)
    assert s.has_begin("a", number, version=2) == [Tell("a", wire.AskView())]
    assert s.c.outdated
    assert s.has_begin("a", number, version=2) == []  # it has been asked
    assert ends(s.wait(1)) == []
    commands = s.view("a", "x", version=2)
    assert told(commands) == []
    assert not s.c.outdated
    s.c.greet("x")
    assert told(s.c.welcomed("x", 2, s.now)) == [("a", END(number)), ("x", END(number))]


def test_so_does_the_acknowledgement_of_an_end() -> None:
    s = Script("a", membership=CONTROL)
    number, _ = s.begin(5)
    s.end(number)
    s.has_begin("a", number)
    assert s.has_end("a", number, version=2) == [Tell("a", wire.AskView())]
    assert ends(s.wait(1)) == []
    assert ends(s.view("a", version=2)) == [(number, True)]


@pytest.mark.parametrize("how", ["hello", "renewed", "welcome"])
def test_whoever_shows_a_newer_view_is_asked_for_it(how: str) -> None:
    s = Script("a", membership=CONTROL)
    asks: list[Command]
    if how == "hello":
        asks = [Reply("a", wire.AskView())]
        commands = s.heard("a", version=2)
    elif how == "renewed":
        asks = [Reply("a", wire.AskView())]
        commands = s.c.renewed("a", wire.Renewed(1, 2), s.now)
    else:
        asks = [Tell("a", wire.AskView())]
        s.c.lost("a")
        s.c.greet("a")
        commands = s.c.welcomed("a", 2, s.now)
    assert [c for c in commands if isinstance(c, Tell | Reply) and isinstance(c.message, wire.AskView)] == asks
    assert s.c.outdated


def test_as_long_as_it_is_not_told_it_asks_again_and_not_everybody() -> None:
    s = Script("a", "h", "w", "x", membership=CONTROL)
    assert s.has_end("x", 99, version=2) == [Tell("x", wire.AskView())]
    asks = [Tell(name, wire.AskView()) for name in ("a", "h", "w")]
    assert [command for command in s.wait(0) if command in asks] == asks
    assert [command for command in s.wait(0.9 * LEASE_S) if command in asks] == []
    assert [command for command in s.wait(0.1 * LEASE_S) if command in asks] == asks
    s.view("a", "h", "w", "x", version=2)
    assert [command for command in s.wait(LEASE_S) if command in asks] == []


def test_the_view_is_told_to_who_asks() -> None:
    s = Script("a", membership=CONTROL)
    assert s.c.view_for_asker() == wire.Viewed(View(1, (member("a"), member("n"))))


# --- who has ceased to trust -------------------------------------------------------------------------------------------


def test_a_member_that_has_resigned_is_passed_over_at_once_and_told_later() -> None:
    s = Script("a", "h")
    number, _ = s.begin(5)
    s.end(number)
    s.has_begin("h", number)
    assert told(s.c.resigned("a", s.now)) == [("a", END(number)), ("h", END(number))]
    assert ends(s.has_end("h", number)) == [(number, True)]
    s.c.lost("a")
    other, commands = s.begin(6)
    assert told(commands) == [("h", BEGIN(other, (6,)))]
    s.end(other)
    s.has_begin("h", other)
    assert ends(s.has_end("h", other)) == [(other, True)]
    assert s.c.greet("a").skipped == (5, 6)
    s.c.welcomed("a", 0, s.now)
    number, _ = s.begin(7)
    s.has_begin("h", number)
    assert told(s.end(number)) == []  # it is waited for again


def test_control_it_is_passed_over_only_while_our_own_row_holds() -> None:
    """Its next daemon may be there already, and we be the one who is cut off."""
    s = Script("a", membership=CONTROL)
    s.c.resigned("a", s.now)
    s.c.lost("a")
    s.now += 0.9 * MEMBER_LEASE_S
    number, _ = s.begin(5)
    assert ends(s.end(number)) == []
    assert ends(s.stood()) == [(number, True)]


def test_a_member_that_has_resigned_is_waited_for_from_the_next_hello_on() -> None:
    s = Script("a")
    s.c.resigned("a", s.now)
    s.c.lost("a")
    s.c.greet("a")
    number, _ = s.begin(5)
    assert ends(s.end(number)) == []
    assert ends(s.has_begin("a", number)) == []
    assert ends(s.c.welcomed("a", 0, s.now)) == []
    assert ends(s.has_end("a", number)) == [(number, True)]


def test_who_resigns_trusts_no_more_whatever_it_hears_then() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    left, commands = s.c.resign()
    assert left == Left({"a": DAEMON["a"]}, {})
    assert commands == [Trust(0.0), Reply("a", wire.Resigned())]
    s.wait(LEASE_S)
    later = s.stood() + s.ask() + s.c.renewed("a", wire.Renewed(1, 1), s.now) + s.heard("a") + s.up("a")
    assert trusts(later + s.view(version=2)) == []
    assert s.c.trusted_until() == 0.0


def test_only_those_whose_line_stands_are_told_that_it_resigns() -> None:
    s = Script("a", "h")
    s.c.left("a")
    assert s.c.resign() == (Left({"a": DAEMON["a"], "h": DAEMON["h"]}), [Trust(0.0), Reply("h", wire.Resigned())])


def test_whom_it_has_not_heard_it_leaves_to_the_next_daemon_as_such() -> None:
    s = Script("a", "h", lines=False)
    s.heard("a")
    assert s.c.resign()[0] == Left({"a": DAEMON["a"], "h": 0})


def test_it_leaves_to_the_next_daemon_what_others_may_not_have_heard() -> None:
    s = Script("a", "h", "w")
    s.c.lost("a")
    s.now += 10
    s.promise("w")
    skipped, _ = s.begin(1)
    s.end(skipped)
    s.has_begin("w", skipped)
    assert ends(s.has_end("w", skipped) + s.wait(0)) == [(skipped, True)]  # without h, whose line stands
    s.promise("h")
    ending, _ = s.begin(2)
    s.end(ending)
    s.has_begin("h", ending)
    assert told(s.has_begin("w", ending) + s.wait(0)) == [("h", END(ending)), ("w", END(ending))]
    s.begin(3)
    left = s.c.resign()[0]
    assert left.skipped == {"a": (1, 2, 3), "h": (1, 2, 3), "w": (2, 3)}
    after = Script("a", "h", lines=False, before=left)
    assert after.c.greet("a").skipped == (1, 2, 3)
    assert after.c.greet("h").skipped == (1, 2, 3)
    after.c.welcomed("h", 0, after.now)
    after.c.lost("h")
    assert after.c.greet("h").skipped == ()


def test_and_also_that_it_is_too_much() -> None:
    s = Script("a")
    s.c.lost("a")
    s.now += 10
    number, _ = s.begin(*range(SKIPPED_MAX + 1))
    s.end(number)
    left = s.c.resign()[0]
    assert left.skipped == {"a": None}
    assert Script("a", lines=False, before=left).c.greet("a").skipped is None


# --- writes of others ---------------------------------------------------------------------------------------------------


def test_a_write_of_another_is_marked_from_begin_to_end_and_passed_at_both() -> None:
    s = Script("w")
    assert s.c.begun("w", BEGIN(3, (5, 6))) == [Mark((5, 6)), Pass((5, 6)), Reply("w", wire.Ack(3, False, 0))]
    assert s.c.marked() == [(5, 6)]
    assert s.c.ended("w", END(3)) == [Pass((5, 6)), Unmark((5, 6)), Reply("w", wire.Ack(3, True, 0))]
    assert s.c.marked() == []


def test_what_cannot_be_said_breaks_the_line() -> None:
    s = Script("w")
    s.c.begun("w", BEGIN(3, (5,)))
    with pytest.raises(ProtocolBroken, match="begins twice"):
        s.c.begun("w", BEGIN(3, (5,)))
    with pytest.raises(ProtocolBroken, match="has not begun"):
        s.c.ended("w", END(4))
    with pytest.raises(ProtocolBroken, match="was not asked for"):
        s.c.renewed("w", wire.Renewed(99, 0), s.now)


def test_marks_stay_when_the_line_breaks_and_a_hello_changes_them_without_a_gap() -> None:
    s = Script("w")
    s.c.begun("w", BEGIN(3, (5,)))
    s.c.begun("w", BEGIN(4, (6,)))
    s.c.left("w")
    assert s.c.marked() == [(5,), (6,)]
    commands = s.c.hello(hello("w", version=0, skipped=(9,), under_way=[(4, (6,)), (5, (7,))]), s.now)
    assert commands == [
        Mark((6,)), Mark((7,)), Pass((5, 6, 7, 9)), Unmark((5,)), Unmark((6,)), Reply("w", wire.Welcome(0)),
    ]  # fmt: skip
    assert s.c.marked() == [(6,), (7,)]
    assert s.c.ended("w", END(5))[:2] == [Pass((7,)), Unmark((7,))]


# --- epochs: what may have been missed ----------------------------------------------------------------------------------


def lapsed(s: Script) -> None:
    """Nobody has renewed anything for longer than any lease."""
    s.now += LONG_KEPT_S
    if s.control:
        s.stood()


@pytest.mark.parametrize("membership", list(Membership))
def test_another_daemon_may_have_forgotten_what_it_passed_without_us(membership: Membership) -> None:
    s = Script("a", membership=membership)
    s.renew()
    s.c.left("a")
    lapsed(s)
    assert len(epochs(s.heard("a", daemon=999))) == 1
    assert epochs(s.heard("a", daemon=999)) == []


def test_the_same_daemon_tells_what_it_passed_without_us() -> None:
    s = Script("a")
    s.c.left("a")
    lapsed(s)
    commands = s.heard("a", skipped=(5,))
    assert epochs(commands) == []
    assert Pass((5,)) in commands


def test_as_long_as_a_lease_of_it_holds_nothing_was_passed_without_us() -> None:
    s = Script("a")
    s.renew()
    s.c.left("a")
    s.now += LEASE_S - 0.01
    assert epochs(s.heard("a", daemon=999)) == []


def test_nor_as_long_as_the_trust_of_the_daemon_before_holds() -> None:
    s = Script("a", lines=False, trusted_until=1002.0)
    s.now = 1001.99
    assert epochs(s.heard("a")) == []
    s = Script("a", lines=False, trusted_until=1002.0)
    s.now = 1002.0
    assert len(epochs(s.heard("a"))) == 1


def test_a_daemon_that_goes_on_as_the_one_before_tells_what_that_one_passed_without_us() -> None:
    s = Script("a")
    s.c.left("a")
    lapsed(s)
    assert epochs(s.heard("a", skipped=(5,))) == []


def test_one_who_cannot_say_what_it_passed_makes_all_doubtful() -> None:
    s = Script("a")
    s.renew()
    assert len(epochs(s.heard("a", skipped=None))) == 1


def test_a_daemon_that_follows_one_that_resigned_knows_whom_that_one_had_heard() -> None:
    s = Script("a", "h", lines=False, before=Left({"a": DAEMON["a"], "h": 999}))
    assert epochs(s.heard("a", skipped=(5,))) == []
    assert len(epochs(s.heard("h"))) == 1  # it was started anew meanwhile


def test_a_daemon_that_follows_one_that_died_knows_nothing() -> None:
    s = Script("a", lines=False)
    assert len(epochs(s.heard("a"))) == 1


def test_what_a_member_passed_without_us_is_lost_when_it_is_gone() -> None:
    """It passed over us, remembers what, and dies before it can tell: our records of it are old, and nobody will say so."""
    s = Script("a", "h", membership=CONTROL)
    s.renew()
    s.c.lost("a")
    s.c.left("a")
    while s.now < 1000 + LONG_KEPT_S:
        s.now += 1
        s.stood()
    assert len(epochs(s.view("h", version=2))) == 1


def test_or_is_back_under_another_incarnation() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    while s.now < 1000 + LONG_KEPT_S:
        s.now += 1
        s.stood()
    assert len(epochs(s.view("a", version=3, since=s.now - 1, a=2))) == 1
    assert epochs(s.heard("a", daemon=999, incarnation=2)) == []


def test_or_before_the_daemon_that_follows_one_that_resigned_has_heard_it() -> None:
    s = Script("a", membership=CONTROL, lines=False, before=Left({"a": DAEMON["a"]}))
    assert len(epochs(s.view(version=2))) == 1


@pytest.mark.parametrize("membership", list(Membership))
@pytest.mark.parametrize("before", [Left({"x": DAEMON["x"]}), Left({"x": 0}), None])
def test_or_before_the_next_daemon_had_its_first_view(before: Left | None, membership: Membership) -> None:
    s = Script(membership=membership, before=before, after_crash=before is None, seen=False)
    assert len(epochs(s.view(version=2))) == 1


def test_as_long_as_trust_of_before_holds_who_is_gone_has_passed_nothing_without_us() -> None:
    s = Script(membership=CONTROL, after_crash=True, trusted_until=1000.1, seen=False)
    assert epochs(s.view(version=2)) == []


def test_nor_has_anybody_when_all_are_there_that_the_daemon_before_knew() -> None:
    s = Script(membership=CONTROL, before=Left({"a": DAEMON["a"]}), seen=False)
    assert epochs(s.view("a", version=2)) == []


def test_who_died_while_a_lease_of_it_held_has_passed_nothing_without_us() -> None:
    s = Script("a", "h", membership=CONTROL)
    s.renew()
    s.c.left("a")
    for _ in range(6):
        s.now += 1
        s.stood()
    s.stood("a")
    commands = s.view("h", version=2)
    assert epochs(commands) == []


def test_one_who_went_late_before_its_lease_ran_out_has_passed_nothing_either() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    for _ in range(30):
        s.now += 1
        s.stood(*("a",) if s.now > 1006 else ())
    assert epochs(s.view(version=2)) == []


# --- trust ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["our line", "its line"])
@pytest.mark.parametrize("membership", list(Membership))
def test_nothing_is_trusted_before_every_line_stands_both_ways(membership: Membership, last: str) -> None:
    s = Script("a", "h", membership=membership, lines=False)
    commands = s.up("a") + s.heard("a") + s.renew("a")
    commands += s.up("h") if last == "its line" else s.heard("h") + s.renew("h")
    if membership is CONTROL:
        commands += s.stood()
    assert trusts(commands) == []
    assert not s.c.complete
    commands = s.heard("h") + s.renew("h") if last == "its line" else s.up("h")
    assert s.c.complete
    assert trusts(commands)[-1] == s.now + (LEASE_S if membership is STATIC else 0.9 * MEMBER_LEASE_S)


def test_nothing_is_trusted_before_its_own_hello_was_welcomed() -> None:
    s = Script("a", lines=False)
    s.heard("a")
    s.c.greet("a")
    assert trusts(s.renew()) == []
    assert trusts(s.c.welcomed("a", 0, s.now)) == [s.now + LEASE_S]


def test_complete_it_stays_when_lines_break() -> None:
    s = Script("a")
    s.c.lost("a")
    s.c.left("a")
    assert s.c.complete
    s.up("a")
    s.heard("a")
    assert trusts(s.renew()) == [s.now + LEASE_S]


def test_a_member_that_leaves_before_it_was_met_is_not_waited_for() -> None:
    s = Script("a", "h", membership=CONTROL, lines=False)
    s.up("a")
    s.heard("a")
    s.renew("a")
    assert trusts(s.view("a", version=2)) == [s.now + 0.9 * MEMBER_LEASE_S]


def test_who_joins_when_all_are_known_is_not_waited_for_either() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    assert trusts(s.view("a", "x", version=2, since=s.now)) == []
    s.now += 1
    assert trusts(s.stood()) == [s.now + 0.9 * MEMBER_LEASE_S]


def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    s = Script("a")
    s.now += 0.4  # the answer takes its time
    assert trusts(s.renew()) == [1000 + LEASE_S]
    s.ask()
    s.now += 0.3
    assert trusts(s.renew()) == [1000.4 + LEASE_S]


def test_trust_lasts_as_long_as_the_shortest_lease() -> None:
    s = Script("a", "h", "w")
    s.renew("a", "h")
    s.now += 0.3
    s.ask()
    assert trusts(s.renew("a", "h")) == []  # w has granted nothing yet
    assert trusts(s.c.renewed("w", wire.Renewed(1, 0), s.now)) == [1000 + LEASE_S]
    assert trusts(s.renew("w")) == [1000.3 + LEASE_S]


def test_an_answer_to_an_older_question_takes_nothing_back() -> None:
    s = Script("a")
    s.now += 0.3
    s.ask()
    assert trusts(s.renew()) == [1000.3 + LEASE_S]
    assert trusts(s.c.renewed("a", wire.Renewed(1, 0), s.now)) == []


def test_an_answer_from_a_line_before_says_nothing() -> None:
    """What was said on it behind the question may not have been heard."""
    s = Script("a")
    s.c.left("a")
    s.now += 0.1
    s.heard("a")
    assert s.c.renewed("a", wire.Renewed(1, 0), s.now) == []
    assert trusts(s.renew()) == [1000.1 + LEASE_S]


def test_of_more_questions_than_are_remembered_the_oldest_says_nothing() -> None:
    s = Script("a")
    for _ in range(co._RENEWALS_MAX):
        s.now += 0.25 * LEASE_S
        s.ask()
    assert trusts(s.c.renewed("a", wire.Renewed(1, 0), s.now)) == []
    assert trusts(s.c.renewed("a", wire.Renewed(2, 0), s.now)) == [1000.25 + LEASE_S]


def renewals(commands: list[Command]) -> int:
    return sum(isinstance(c, Reply) and isinstance(c.message, wire.Renew) for c in commands)


def asked_in(s: Script, seconds: float, step_s: float = 0.05) -> int:
    count = 0
    until = s.now + seconds
    while s.now < until:
        s.now += step_s
        count += renewals(s.ask())
    return count


def test_static_leases_are_asked_for_when_a_quarter_is_over() -> None:
    s = Script("a")
    assert asked_in(s, 10 * LEASE_S) in range(33, 41)


def test_control_long_leases_at_their_own_pace_while_the_store_answers() -> None:
    s = Script("a", membership=CONTROL)
    count = 0
    for _ in range(20):
        s.stood()
        count += asked_in(s, LONG_S / 20)
    assert count in (3, 4)


def test_control_and_at_the_short_ones_when_it_does_not() -> None:
    s = Script("a", membership=CONTROL)
    assert asked_in(s, 0.3 * MEMBER_LEASE_S) == 0
    s.now = 1000 + 0.41 * MEMBER_LEASE_S
    assert renewals(s.ask()) == 1
    assert asked_in(s, 4 * LEASE_S) in range(13, 17)


def test_nobody_is_asked_on_a_line_that_does_not_stand() -> None:
    s = Script("a")
    s.c.left("a")
    assert asked_in(s, 10 * LEASE_S) == 0
    assert renewals(s.heard("a")) == 1


def test_control_trust_lasts_as_long_as_own_membership_and_every_long_lease() -> None:
    s = Script("a", membership=CONTROL)
    assert trusts(s.renew()) == [1000 + 0.9 * MEMBER_LEASE_S]
    asked = s.now
    for _ in range(7):
        s.now += 1
        s.stood()
    assert s.c.trusted_until() == asked + LONG_S  # a has not renewed since, and may pass over us from then on
    s.stood(until=s.now + 1)
    assert s.c.trusted_until() == asked + LONG_S
    s.ask()
    assert trusts(s.renew()) == [asked + 7 + 0.9 * MEMBER_LEASE_S]


def test_control_without_the_store_short_leases_hold() -> None:
    s = Script("a", "h", membership=CONTROL)
    s.renew()
    for _ in range(20):
        s.now += 0.5
        s.ask()
        s.renew()
    assert s.c.trusted_until() == s.now + LEASE_S
    s.now += 0.5
    s.ask()
    s.renew("a")
    assert s.c.trusted_until() == s.now - 0.5 + LEASE_S


def test_control_who_was_late_at_the_last_heartbeat_does_not_pass_over_us() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    for _ in range(15):
        s.now += 1
        s.stood(*("a",) if s.now > 1006 else ())
        assert s.c.trusted_until() == s.now + 0.9 * MEMBER_LEASE_S if s.now > 1006 else s.now < s.c.trusted_until()
    s.now += 1
    s.stood()  # it is back with the store, and may
    assert s.c.trusted_until() < s.now


def test_control_being_late_does_not_cover_for_a_lease_that_had_run_out() -> None:
    """From 1011.05 on it may pass over us; its time in the store runs out at 1012, and we look at 1012.5."""
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    for _ in range(9):
        s.now += 1
        s.stood()
    s.now = 1012.5
    s.stood("a")
    assert s.c.trusted_until() <= 1000 + LONG_S
    assert len(epochs(s.view(version=2))) == 1


def test_control_nor_for_what_it_did_while_we_did_not_look() -> None:
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    s.now = 1006.0
    s.stood("a")
    s.now = 1040.0  # it was back with the store for long enough to pass over us, and has died since
    s.stood("a")
    assert s.c.trusted_until() <= s.now
    assert len(epochs(s.view(version=2))) == 1


def test_control_nor_for_what_it_did_after_we_looked_last() -> None:
    """Others tell of the view; our own look at who is late is from long ago."""
    s = Script("a", "h", membership=CONTROL)
    s.renew()
    s.c.left("a")
    s.now = 1006.0
    s.stood("a")
    s.now = 1040.0
    assert len(epochs(s.view("h", version=2))) == 1


def test_control_one_that_came_back_cannot_have_passed_over_us_since_we_looked_last() -> None:
    """It waits for a long lease before it does, and was not there when we looked."""
    s = Script("a", membership=CONTROL)
    s.renew()
    s.c.left("a")
    s.now += 4
    s.view("a", version=3, since=s.now - 2, a=2)
    while s.now < 1016:
        s.now += 1
        s.stood()
    assert s.c.trusted_until() == 1002 + LONG_S


def test_alone_in_the_store_it_trusts_as_long_as_it_is_a_member() -> None:
    """Somebody may join of whom it hears nothing."""
    s = Script(membership=CONTROL)
    assert s.c.trusted_until() == 1000 + 0.9 * MEMBER_LEASE_S


def test_alone_in_a_list_it_trusts_for_ever() -> None:
    s = Script()
    assert s.c.trusted_until() == math.inf


def test_trust_is_said_only_when_it_changes() -> None:
    s = Script("a", membership=CONTROL)
    until = s.now + 4.0
    assert trusts(s.stood(until=until) + s.renew()) == [1000 + 0.9 * MEMBER_LEASE_S]
    assert s.stood(until=until) == []


# --- what is told to operators ---------------------------------------------------------------------------------------


def test_who_is_in_trouble_and_how() -> None:
    s = Script("a", "h", "w", "x", lines=False)
    for name in ("a", "h"):
        s.up(name)
    for name in ("a", "w"):
        s.heard(name)
        s.renew(name)
    assert s.c.in_trouble(s.now) == {"h": "no line from it", "w": "no line to it", "x": "no line"}
    s.now += LEASE_S + 0.01
    assert s.c.in_trouble(s.now)["a"] == "does not renew"


def test_only_one_without_any_line_may_be_put_out() -> None:
    s = Script("a", "h", "w", membership=CONTROL, lines=False)
    s.up("a")
    s.heard("h")
    assert [s.c.silent(name) for name in ("a", "h", "w", "nobody")] == [False, False, True, True]
    s.c.lost("a")
    s.c.left("h")
    assert s.c.silent("a")
    assert s.c.silent("h")
