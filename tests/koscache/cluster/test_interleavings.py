"""Races among several nodes, written down step by step: those that docs/consistency.md draws, and those that were found.

The nodes are those of tests/property/coherence_model, with nothing left to chance: a message arrives when the script says so.
"""

from __future__ import annotations

import math

import pytest

from koscache.cluster.coherence import RATE_SLACK, Membership
from koscache.cluster.view import Member
from tests.property.coherence_model import LEASE_S, MEMBER_LEASE_S, RATES, SLOTS, Model, Node, Read, Violation, Write

STATIC, CONTROL = Membership.STATIC, Membership.CONTROL
SLOW, _, FAST = RATES
LONG_S = 2 * MEMBER_LEASE_S
K, OTHER = 0, 1


class Script(Model):
    """Nodes by name; all are up and trust, unless they are added later."""

    def __init__(self, membership: Membership, *names: str, **rates: float) -> None:
        super().__init__(0, membership, 0, calm=True)
        for name in names:
            self.add(name, rates.get(name, 1.0))
        for name in names:
            self.start(name)
        self.go_on(2.0)
        assert all(self.trusted(node) for node in self.nodes.values())

    def add(self, name: str, rate: float = 1.0) -> None:
        if self.static:
            self.rows[name] = (Member(name, 0, "", "", 1), math.inf)
        self.nodes[name] = Node(name, rate, [next(self.fresh) for _ in range(SLOTS)], [0] * SLOTS)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # --- time

    def go_on(self, seconds: float) -> None:
        """Everybody who can does what is due, and every message arrives."""
        until = self.now + seconds
        while self.now < until:
            self.round(0.05)

    def until_answered(self, write: Write, seconds: float) -> float:
        """Goes on until then; how long it took."""
        began = self.now
        while write in self.writes:
            assert self.now - began < seconds, f"not answered within {seconds} s"
            self.go_on(0.05)
        return self.now - began

    # --- messages

    def down(self, writer: str, listener: str) -> None:
        """What the writer has told arrives at the listener."""
        while (writer, listener) in self.lines and self.queue((writer, listener), False):
            self.deliver(writer, listener, upstream=False)

    def back(self, writer: str, listener: str) -> None:
        """What the listener has replied arrives at the writer."""
        while (writer, listener) in self.lines and self.queue((writer, listener), True):
            self.deliver(writer, listener, upstream=True)

    def part(self, one: str, *others: str) -> None:
        """It can reach these no more, nor they it."""
        for other in others:
            self.parted.add(frozenset((one, other)))
            self.cut(one, other)
            self.cut(other, one)

    # --- writes and reads

    def end(self, write: Write) -> None:
        """The origin has answered; the client waits as long as it takes."""
        node = self.nodes[write.node]
        self.bump(node, (write.key,))
        write.ending = write.asked = True
        self.do(node, node.c.end(write.number, self.clock(node), 1000.0))

    def write(self, name: str, key: int = K) -> Write:
        """All of it but the answer; nothing has arrived anywhere."""
        write = self.begin(name, key)
        self.carry_out(write)
        self.end(write)
        return write

    def look(self, name: str, key: int = K, home: str = "") -> Read:
        """A read's first step: a record of its own, or the fence's value is taken down and the home, or the origin, is asked."""
        read = Read(name, key, self.answered[key])
        self.reads.append(read)
        if self.fresh_version(self.nodes[name], key) is None:
            read.value = self.value(self.nodes[name], key)
            read.home, read.step = home, "home" if home else "origin"
        return read

    def finish_read(self, read: Read) -> str:
        """Its other steps. hit, origin, vouched, or for once."""
        before = dict(self.counts)
        while read in self.reads:
            self.step_read(read)
        return next(how for how in ("hit", "origin", "vouched", "for once") if self.counts.get(how) != before.get(how))

    def read(self, name: str, key: int = K, home: str = "") -> str:
        return self.finish_read(self.look(name, key, home))

    def knows(self, name: str, key: int = K) -> int | None:
        """The version that it would answer from its own record."""
        return self.fresh_version(self.nodes[name], key)


# --- why there are marks ------------------------------------------------------------------------------------------------


def test_who_has_not_heard_the_end_vouches_for_nothing_that_is_being_written() -> None:
    s = Script(STATIC, "a", "h", "w")
    assert s.read("h") == "origin"
    write = s.begin("w", K)
    for name in ("a", "h"):
        s.down("w", name)
        s.back("w", name)
    assert s.read("h") == "origin"  # before the origin carries it out
    assert s.knows("h") == 0
    s.carry_out(write)
    s.end(write)
    s.down("w", "a")
    # A has heard the End and asks H, who has not.
    assert s.read("a", home="h") == "for once"
    assert s.knows("a") is None
    s.down("w", "h")
    s.back("w", "a")
    s.back("w", "h")
    assert write not in s.writes
    assert s.read("a", home="h") == "vouched"
    assert s.knows("a") == 1


def test_without_them_the_old_version_is_kept_under_the_new_value_for_ever() -> None:
    s = Script(STATIC, "a", "h", "w")
    write = s.begin("w", K)
    for name in ("a", "h"):
        s.down("w", name)
        s.back("w", name)
    s.read("h")
    s.carry_out(write)
    s.end(write)
    marks, s["h"].marks = s["h"].marks, [0] * SLOTS
    s.down("w", "a")
    assert s.read("a", home="h") == "vouched"
    s["h"].marks = marks
    s.go_on(0.1)
    with pytest.raises(Violation):
        s.read("a")


def test_no_end_is_said_while_somebody_may_vouch_without_a_mark() -> None:
    s = Script(STATIC, "a", "h", "w")
    s.read("h")
    write = s.write("w")
    s.down("w", "a")
    s.back("w", "a")
    assert not s.queue(("w", "a"), False)  # h has not acknowledged the Begin
    assert s.read("a", home="h") == "vouched"  # the old version, and no write has been answered
    s.down("w", "h")
    s.back("w", "h")
    for name in ("a", "h"):
        s.down("w", name)
        s.back("w", name)
    assert write not in s.writes
    assert s.knows("a") is None
    assert s.knows("h") is None


def test_what_was_asked_of_the_origin_before_the_end_is_not_kept_for_after_it() -> None:
    s = Script(STATIC, "a", "w")
    write = s.begin("w", K)
    s.down("w", "a")
    s.back("w", "a")
    reading = s.look("a")  # the request is on its way, and the answer is the old version
    s.keep(s["a"], K, s.origin[K], reading.value)
    assert s.knows("a") == 0
    s.carry_out(write)
    s.end(write)
    s.down("w", "a")
    s.back("w", "a")
    assert write not in s.writes
    assert s.knows("a") is None


def test_a_listener_that_restarts_between_begin_and_end_is_marked_again_before_anybody_hears_the_end() -> None:
    s = Script(STATIC, "a", "h", "w")
    write = s.begin("w", K)
    for name in ("a", "h"):
        s.down("w", name)
        s.back("w", name)
    s.read("h")
    s.end_daemon(s["h"])
    s.start("h")  # its fence is as it was, and nothing is marked
    s.carry_out(write)
    for notice in list(s.notices):
        s.notice(notice)
    s.end(write)
    assert not s.queue(("w", "a"), False)
    assert s["h"].vouch_until == 0.0
    s.connect("w", "h")
    s.down("w", "h")
    assert s["h"].marks[K] == 1
    s.until_answered(write, 3.0)
    assert s["h"].marks[K] == 0
    s.go_on(1.0)
    assert s.read("h") == "origin"
    assert s.read("a", home="h") == "vouched"


# --- who does not answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "w"), [(SLOW, FAST), (FAST, SLOW), (1.0, 1.0)])
def test_static_a_write_is_answered_without_a_node_only_when_its_workers_trust_no_more(a: float, w: float) -> None:
    """Its daemon hangs, its workers do not; its clock is the slowest that may be, or the fastest."""
    s = Script(STATIC, "a", "w", a=a, w=w)
    s.read("a")
    s["a"].stopped = True
    write = s.write("w")
    took = s.until_answered(write, 2 * LEASE_S)
    assert took > 0.7 * LEASE_S
    assert not s.trusted(s["a"])
    assert s.read("a") == "origin"
    s["a"].stopped = False
    s.go_on(2.0)
    assert s.trusted(s["a"])
    assert s.counts.get("epochs", 0) == 2  # those of the start
    s.read("a")


@pytest.mark.parametrize(("a", "w"), [(SLOW, FAST), (FAST, SLOW)])
def test_control_a_dead_daemon_holds_up_writes_until_it_is_put_out_and_its_workers_trust_no_more(
    a: float, w: float
) -> None:
    s = Script(CONTROL, "a", "h", "w", a=a, w=w)
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.read("h")
    s.end_daemon(s["a"])
    write = s.write("w")
    took = s.until_answered(write, 2 * MEMBER_LEASE_S)
    assert took > 0.8 * MEMBER_LEASE_S
    assert "a" not in s.rows
    assert not s.trusted(s["a"])
    # The others have gone on all the while, and nothing of theirs is in doubt but what was written.
    assert s.trusted(s["h"])
    assert s.counts.get("expelled") == 1
    s.start("a")
    s.go_on(1.0)
    assert s.knows("a", K) is None
    assert s.trusted(s["a"])


def test_control_two_that_are_cut_off_from_each_other_alone_wait_for_the_long_lease() -> None:
    s = Script(CONTROL, "a", "h", "w", a=SLOW, w=FAST)
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a", OTHER)
    s.read("a")
    s.part("a", "w")
    write = s.write("w")
    s.go_on(MEMBER_LEASE_S)
    assert write in s.writes
    assert s.trusted(s["a"])
    s.until_answered(write, 3 * LONG_S)
    assert not s.trusted(s["a"])
    assert "a" in s.rows
    epochs = s.counts["epochs"]
    s.parted.clear()
    s.go_on(1.0)
    assert s.trusted(s["a"])
    assert s.counts["epochs"] == epochs  # w has told what it passed
    assert s.knows("a") is None
    assert s.knows("a", OTHER) == 0


def test_control_with_the_store_away_for_all_everybody_is_waited_for() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    for node in s.nodes.values():
        node.store_away = True
    s.go_on(3 * LONG_S)
    assert all(s.trusted(node) for node in s.nodes.values())
    write = s.write("w")
    assert s.until_answered(write, 0.2) < 0.2
    s.end_daemon(s["a"])
    write = s.write("w")
    s.go_on(3 * LONG_S)
    assert write in s.writes
    assert not s.trusted(s["h"])
    for node in s.nodes.values():
        node.store_away = False
    s.until_answered(write, 3 * MEMBER_LEASE_S)
    assert s.trusted(s["h"])


def test_control_one_that_has_lost_the_store_alone_goes_on_by_short_leases() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s["a"].store_away = True
    s.go_on(3 * LONG_S)
    assert "a" in s.rows
    assert s.trusted(s["a"])
    assert s.trusted(s["h"])
    assert s["a"].trust_until - s.now < LEASE_S
    write = s.write("w")
    assert s.until_answered(write, 0.2) < 0.2


# --- who comes and goes -------------------------------------------------------------------------------------------------


def test_a_view_that_became_smaller_counts_when_the_leases_of_who_is_gone_are_over() -> None:
    """A has lost the store and is put out by X, who does not hear it. It trusts on by leases of W, who hears it and by then
    knows better."""
    s = Script(CONTROL, "a", "w", "x", a=SLOW, w=FAST)
    s.go_on(MEMBER_LEASE_S + 1)
    for name in ("a", "w"):
        s[name].store_away = True
    s.go_on(0.9 * MEMBER_LEASE_S)
    s.part("a", "x")
    s.read("a")
    while "a" in s.rows:
        s.go_on(0.05)
    s.cut("w", "a")
    s.cut("a", "w")
    s.part("a", "w")
    s.go_on(0.2)
    write = s.write("w")
    s.until_answered(write, 2 * LONG_S)
    assert not s.trusted(s["a"])


def test_one_that_joins_trusts_nothing_before_all_know_it_and_it_has_heard_what_is_under_way() -> None:
    s = Script(CONTROL, "a", "w")
    write = s.begin("w", K)
    s.add("j")
    s.part("j", "w")
    s.start("j")
    s.go_on(1.0)
    assert "j" in s["a"].c.wanted
    assert not s.trusted(s["j"])
    s.read("j")  # the old version, under its value of now
    s.carry_out(write)
    s.end(write)
    s.go_on(2.0)
    assert write in s.writes  # it is waited for
    s.parted.clear()
    s.until_answered(write, 1.0)
    s.go_on(0.5)
    assert s.trusted(s["j"])
    assert s.read("j") == "origin"


def test_a_rolling_restart_costs_no_epoch_and_holds_up_no_write() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a", K)
    s.read("a", OTHER)
    epochs = s.counts["epochs"]
    s.retire(s["a"], leave=False)
    assert not s.trusted(s["a"])
    s.go_on(0.2)
    write = s.write("w")
    assert s.until_answered(write, 0.3) < 0.3
    s.start("a")
    s.go_on(1.0)
    assert s.trusted(s["a"])
    assert s.counts["epochs"] == epochs
    assert s.knows("a", K) is None
    assert s.knows("a", OTHER) == 0


def test_a_rolling_restart_of_the_writer_forgets_nothing_of_what_others_missed() -> None:
    s = Script(STATIC, "a", "w")
    s.read("a", K)
    s.read("a", OTHER)
    s["a"].stopped = True
    s.until_answered(s.write("w"), 2.0)
    epochs = s.counts["epochs"]
    for _ in range(3):
        s.retire(s["w"], leave=False)
        s.start("w")
        s.go_on(2.0)
    s["a"].stopped = False
    s.go_on(2.0)
    assert s.trusted(s["a"])
    assert s.counts["epochs"] == epochs
    assert s.knows("a", K) is None
    assert s.knows("a", OTHER) == 0


def test_but_a_daemon_that_died_between_may_have_and_that_is_an_epoch() -> None:
    s = Script(STATIC, "a", "w")
    s.read("a", K)
    s["a"].stopped = True
    s.until_answered(s.write("w"), 2.0)
    s.retire(s["w"], leave=False)
    s.start("w")
    s.end_daemon(s["w"])
    s.start("w")
    s["a"].stopped = False
    s.go_on(2.0)
    assert s.trusted(s["a"])
    assert s.knows("a", K) is None


def test_a_daemon_that_dies_takes_no_write_with_it_that_its_workers_know_of() -> None:
    s = Script(STATIC, "a", "w")
    s.read("a")
    write = s.begin("w", K)
    s.end_daemon(s["w"])
    s.carry_out(write)
    write.ending = True
    s.start("w")
    s.go_on(0.3)
    s.step_write(write)  # its worker finds the new daemon
    s.ask_end(s["w"], write)
    s.until_answered(write, 2.0)
    assert s.knows("a") is None


# --- what a member knew that is no more ---------------------------------------------------------------------------------


def test_who_was_passed_over_by_one_that_died_then_doubts_all_it_knows() -> None:
    """A stops for a moment, and W for ever, before it could tell what A missed."""
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.retire(s["a"], leave=False)
    s.go_on(0.2)
    s.until_answered(s.write("w"), 0.3)
    s.end_daemon(s["w"])
    s.start("a")
    s.go_on(3 * MEMBER_LEASE_S)
    assert "w" not in s.rows
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_and_also_when_it_was_cut_off_from_it_before() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.part("a", "w")
    s.until_answered(s.write("w"), 3 * LONG_S)
    s.end_daemon(s["w"])
    s.go_on(3 * MEMBER_LEASE_S)
    assert "w" not in s.rows
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_and_when_it_is_back_as_another_before_anybody_noticed() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.retire(s["a"], leave=False)
    s.go_on(0.2)
    s.until_answered(s.write("w"), 0.3)
    s.end_daemon(s["w"])
    del s.rows["w"]
    s.store_version += 1
    s.start("w")
    s.go_on(0.3)
    s.start("a")
    s.go_on(2.0)
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_one_that_goes_late_does_not_hide_what_it_did_before() -> None:
    """W's lease runs out, it passes over A, and dies; when A looks at the store next, W is late."""
    s = Script(CONTROL, "a", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.part("a", "w")
    renewed_at = s["a"].c._ins["w"].renewed_at
    s.go_on(renewed_at + 0.8 * LONG_S - s.now)
    s["w"].store_away = True  # its row lasts long enough to pass over A
    write = s.write("w")
    s.go_on(renewed_at + 0.99 * LONG_S - s.now)
    s["a"].store_away = True
    s.until_answered(write, LONG_S)
    s.end_daemon(s["w"])
    assert not s.trusted(s["a"])
    s.go_on(renewed_at + 1.42 * LONG_S - s.now)
    s["a"].store_away = False
    s.go_on(1.0)
    assert "w" not in s.rows
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_one_that_was_late_passes_over_nobody_who_may_count_on_that() -> None:
    """A trusts without W's lease because W was late when A looked last; W is back, and might pass over A at once."""
    s = Script(CONTROL, "a", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.part("a", "w")
    s["w"].store_away = True
    # Others hear w, so nobody puts it out.
    s["a"].c.silent = lambda name: False  # type: ignore[method-assign]
    s.go_on(1.5 * LONG_S)
    assert s.trusted(s["a"])
    s["a"].store_away = True
    s["w"].store_away = False
    s.go_on(0.2)
    write = s.write("w")
    s.until_answered(write, 2 * MEMBER_LEASE_S)
    assert not s.trusted(s["a"])
    s["a"].store_away = False
    s.go_on(0.5)
    assert s["w"].coherence is not None
    assert not s.trusted(s["a"])
    s.parted.clear()
    s.go_on(0.5)
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_an_expelled_node_keeps_nothing_of_what_it_knew() -> None:
    s = Script(CONTROL, "a", "h", "w")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s["a"].stopped = True
    s.part("a", "h", "w")  # its pings are not answered
    write = s.write("w")
    s.until_answered(write, 3 * MEMBER_LEASE_S)
    s.parted.clear()
    assert "a" not in s.rows
    assert not s.trusted(s["a"])
    before = s["a"].epoch
    s["a"].stopped = False
    s.go_on(1.0)
    assert s["a"].epoch != before
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_the_one_member_that_is_left_is_not_alone_for_ever() -> None:
    """Its daemon dies, another joins and puts it out; its workers have heard of nothing."""
    s = Script(CONTROL, "a")
    s.go_on(MEMBER_LEASE_S + 1)
    s.read("a")
    s.end_daemon(s["a"])
    s.add("w")
    s.start("w")
    s.go_on(0.5)
    write = s.write("w")
    s.until_answered(write, 3 * MEMBER_LEASE_S)
    assert not s.trusted(s["a"])


def test_a_limit_who_has_lost_the_store_does_not_know_who_joins_where_it_cannot_reach() -> None:
    """docs/consistency.md, limits: a and b go on by each other's leases, and see what j writes within the rule's time."""
    s = Script(CONTROL, "a", "b")
    s.read("a")
    for name in ("a", "b"):
        s[name].store_away = True
    s.add("j")
    s.part("j", "a", "b")
    s.start("j")
    s.go_on(MEMBER_LEASE_S + 1)
    write = s.write("j")
    s.until_answered(write, 3 * LONG_S)
    assert s.trusted(s["a"])
    assert s.knows("a") == 0
    s.read("a")
    assert s.counts["limit"] == 1
    s["a"].store_away = False
    s.parted.clear()
    s.go_on(1.0)
    assert s.trusted(s["a"])
    assert s.read("a") == "origin"


def test_a_slack_is_more_than_clocks_differ() -> None:
    assert FAST / SLOW < 1 + RATE_SLACK
