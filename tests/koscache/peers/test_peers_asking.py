"""Asking members: one after another, two at a time, backed off, over connections that are kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from kos.clock import Clock
from koscache.carrier import peer_wire as wire
from koscache.carrier.peers import Peers, PeerUnavailable, failed_of
from koscache.cluster.view import View
from koscache.ipc import OpenOutcome
from tests.conditions import until
from tests.fakes.clock import FakeClock
from tests.fakes.peer import SECRET, FakePeer, block, hangs, head, peers_of, says, sends

NEVER_HEDGES = {"hedges": 0}
#: p99 is between these before there are latencies: hedges at once
HEDGES_AT_ONCE = {"hedge_least_s": 0.001, "hedge_most_s": 0.001, "hedges": 100}


async def ask(peers: Peers, *members: str, length: int = 4, hedge: bool = True) -> tuple[str, bytes]:
    response = await peers.ask(members, wire.BLOCK, block(length), hedge=hedge)
    try:
        return response.member, await response.read(1 << 20)
    finally:
        response.release()


async def test_a_question_is_signed_and_says_what_is_asked() -> None:
    async with FakePeer("a", says(b"body")) as a, peers_of(a) as peers:
        assert await ask(peers, "a") == ("a", b"body")
        question = a.questions[0]
        asked = question.headers["x-kos-ask"].encode()
        assert wire.decode(asked, wire.AskBlock) == block(4)
        assert wire.signer(SECRET, question.headers["x-kos-auth"], "a", question.path, asked, Clock().now()) == "me"


async def test_a_connection_is_used_again() -> None:
    async with FakePeer("a") as a, peers_of(a) as peers:
        for _ in range(5):
            a.plan(says(b"body"))
            assert await ask(peers, "a") == ("a", b"body")
        assert a.connections == 1


async def test_the_next_member_is_asked_when_one_fails() -> None:
    async with FakePeer("a", sends(b"")) as a, FakePeer("b", says(b"from b")) as b, peers_of(a, b) as peers:
        assert await ask(peers, "a", "b") == ("b", b"from b")
        assert not peers.well("a") and peers.well("b") and not peers.well("nobody")


async def test_nobody_listens() -> None:
    async with FakePeer("a") as a, FakePeer("b", says(b"from b")) as b, peers_of(a, b) as peers:
        await a.down()
        assert await ask(peers, "a", "b") == ("b", b"from b")
        await b.down()
        with pytest.raises(PeerUnavailable, match="b: "):
            await ask(peers, "a", "b")


async def test_no_such_member() -> None:
    async with peers_of() as peers:
        with pytest.raises(PeerUnavailable):
            await ask(peers, "a")


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_one_that_has_it_not_is_passed_over_without_a_grudge(status: int) -> None:
    no = wire.encode(wire.not_here("not in the store"))
    async with FakePeer("a") as a, FakePeer("b") as b, peers_of(a, b, **NEVER_HEDGES) as peers:
        for _ in range(2):
            a.plan(says(no, status))
            b.plan(says(b"from b"))
            assert await ask(peers, "a", "b") == ("b", b"from b")
        assert peers.well("a") and a.connections == 1, "its connection is as good as before"


async def test_if_nobody_has_it_that_is_said_and_the_better_reason_counts() -> None:
    no = wire.encode(wire.not_here("not in the store"))
    down = wire.encode(wire.unavailable("the origin is down", 3.0))
    async with FakePeer("a", says(no, 404)) as a, FakePeer("b", says(down, 503)) as b, peers_of(a, b) as peers:
        response = await peers.ask(["a", "b"], wire.BLOCK, block(4))
        assert (response.status, response.member) == (503, "b")
        failed = await failed_of(response)
        assert (failed.outcome, failed.retry_after_s) == (OpenOutcome.UNAVAILABLE, 3.0)


async def test_changed_and_refused_are_answers() -> None:
    async with FakePeer("a", says(wire.encode(wire.changed("other ETag")), 409)) as a, peers_of(a) as peers:
        failed = await failed_of(await peers.ask(["a", "b"], wire.BLOCK, block(4)))
        assert failed.changed
        a.plan(says(b"no Failed at all", 409))
        failed = await failed_of(await peers.ask(["a", "b"], wire.BLOCK, block(4)))
        assert failed.outcome is OpenOutcome.LEADER_GAVE_UP and "409" in failed.reason
        assert a.connections == 1


async def test_a_member_that_does_not_believe_us_is_as_good_as_down() -> None:
    no = wire.encode(wire.not_here("the signature is wrong"))
    async with FakePeer("a", says(no, 401)) as a, peers_of(a) as peers:
        with pytest.raises(PeerUnavailable, match="401"):
            await ask(peers, "a")
        assert not peers.well("a")


# --- hedging --------------------------------------------------------------------------------------------------------


async def test_a_slow_one_is_hedged_and_let_go_of() -> None:
    async with (
        FakePeer("a", hangs()) as a,
        FakePeer("b", says(b"from b")) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        assert await ask(peers, "a", "b") == ("b", b"from b")
        assert len(a.questions) == len(b.questions) == 1
        await until(lambda: a.open == 0)
        assert b.open == 1 and peers.well("a"), "slow is not failed"


async def test_the_first_one_wins_after_all() -> None:
    now = asyncio.Event()
    async with (
        FakePeer("a", says(b"from a", after=now)) as a,
        FakePeer("b", hangs()) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: b.questions)
        now.set()
        assert await asking == ("a", b"from a")
        await until(lambda: b.open == 0)


async def test_slow_first_failing_second() -> None:
    now = asyncio.Event()
    async with (
        FakePeer("a", says(b"from a", after=now)) as a,
        FakePeer("b", sends(b"")) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: not peers.well("b"))
        now.set()
        assert await asking == ("a", b"from a")


async def test_both_fail() -> None:
    now = asyncio.Event()
    async with (
        FakePeer("a", sends(now)) as a,
        FakePeer("b", sends(now)) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: a.questions and b.questions)
        now.set()
        with pytest.raises(PeerUnavailable, match=r"(?s)a: .*b: |b: .*a: "):
            await asking


async def test_who_declines_first_waits_for_the_hedge() -> None:
    no, now, later = wire.encode(wire.not_here("no")), asyncio.Event(), asyncio.Event()
    async with (
        FakePeer("a", says(no, 404, after=now)) as a,
        FakePeer("b", says(b"from b", after=later)) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: b.questions)
        now.set()
        await asyncio.sleep(0)
        later.set()
        assert await asking == ("b", b"from b")


async def test_no_hedge_where_none_is_wanted_or_budgeted() -> None:
    for settings, hedge in ((HEDGES_AT_ONCE, False), (HEDGES_AT_ONCE | NEVER_HEDGES, True)):
        now = asyncio.Event()
        async with (
            FakePeer("a", says(b"from a", after=now)) as a,
            FakePeer("b") as b,
            peers_of(a, b, **settings) as peers,
        ):
            asking = asyncio.ensure_future(ask(peers, "a", "b", hedge=hedge))
            await until(lambda: a.questions)
            await asyncio.sleep(0.02)
            now.set()
            assert await asking == ("a", b"from a")
            assert not b.questions


async def test_hedges_are_a_share_of_the_questions() -> None:
    """Of a hundred questions at most 5, and the burst, whatever happens."""
    no = wire.encode(wire.not_here("no"))
    settings = HEDGES_AT_ONCE | {"hedges": 5}
    async with FakePeer("a") as a, FakePeer("b", default=says(no, 404)) as b, peers_of(a, b, **settings) as peers:
        for count in range(1, 101):
            now = asyncio.Event()
            a.plan(says(b"a", after=now))
            asking = asyncio.ensure_future(ask(peers, "a", "b"))
            await until(lambda: len(a.questions) == count)  # noqa: B023
            await asyncio.sleep(0.002)
            now.set()
            assert await asking == ("a", b"a")
        assert 0 < len(b.questions) <= 8 + 5


async def test_one_that_never_answers_is_backed_off_although_others_are_faster() -> None:
    """It accepts connections and says nothing, as a stopped process does: no question may go on costing a hedge."""
    async with (
        FakePeer("a", default=hangs()) as a,
        FakePeer("b", default=says(b"b")) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        for _ in range(5):
            assert await ask(peers, "a", "b") == ("b", b"b")
        assert not peers.well("a")
        asked = len(a.questions)
        assert await ask(peers, "a", "b") == ("b", b"b")
        assert len(a.questions) == asked


# --- backing off ------------------------------------------------------------------------------------------------------


async def test_back_off_doubles_and_lets_one_probe_at_a_time_through() -> None:
    clock = FakeClock()
    now = asyncio.Event()
    async with (
        FakePeer("a", sends(b"")) as a,
        FakePeer("b", default=says(b"b")) as b,
        peers_of(a, b, clock=clock, **NEVER_HEDGES) as peers,
    ):
        assert await ask(peers, "a", "b") == ("b", b"b")
        assert not peers.well("a")
        assert await ask(peers, "a", "b") == ("b", b"b")
        assert len(a.questions) == 1, "passed over while it backs off"
        clock.move(0.2)
        assert peers.well("a")
        a.plan(sends(now))
        probing = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: len(a.questions) == 2)
        assert not peers.well("a")
        assert await ask(peers, "a", "b") == ("b", b"b")
        assert len(a.questions) == 2, "one at a time"
        now.set()
        assert await probing == ("b", b"b")
        clock.move(0.19)
        assert not peers.well("a"), "the second pause is between 0.2 and 0.4 s"
        clock.move(0.21)
        a.plan(says(b"a"))
        assert await ask(peers, "a", "b") == ("a", b"a")
        assert peers.well("a")


async def test_all_are_asked_when_all_back_off() -> None:
    async with FakePeer("a", sends(b"")) as a, FakePeer("b", sends(b"")) as b, peers_of(a, b) as peers:
        with pytest.raises(PeerUnavailable):
            await ask(peers, "a", "b")
        assert not peers.well("a") and not peers.well("b")
        b.plan(says(b"b"))
        a.plan(sends(b""))
        assert await ask(peers, "a", "b") == ("b", b"b")


async def test_many_failures_at_once_are_one() -> None:
    clock = FakeClock()
    now = asyncio.Event()
    async with FakePeer("a", default=sends(now)) as a, peers_of(a, clock=clock) as peers:
        asking = [asyncio.ensure_future(ask(peers, "a")) for _ in range(10)]
        await until(lambda: len(a.questions) == 10)
        now.set()
        assert all(isinstance(each, PeerUnavailable) for each in await asyncio.gather(*asking, return_exceptions=True))
        clock.move(0.2)
        assert peers.well("a")


# --- connections ------------------------------------------------------------------------------------------------------


async def test_an_idle_connection_that_its_other_end_closes_is_noticed() -> None:
    async with FakePeer("a", says(b"1"), says(b"2")) as a, peers_of(a) as peers:
        await ask(peers, "a")
        a.cut()
        await until(lambda: a.open == 0)
        assert await ask(peers, "a") == ("a", b"2")
        assert a.connections == 2


async def test_a_connection_that_dies_under_a_question_is_replaced_once() -> None:
    """Closed by the other end in the moment in which the question was sent: it was not heard, and not the member's fault."""
    async with FakePeer("a", says(b"1"), sends(b""), says(b"3"), sends(b""), sends(b"")) as a, peers_of(a) as peers:
        assert await ask(peers, "a") == ("a", b"1")
        assert await ask(peers, "a") == ("a", b"3")
        assert peers.well("a")
        with pytest.raises(PeerUnavailable):
            await ask(peers, "a")
        assert len(a.questions) == 5


async def test_what_is_said_unasked_ends_an_idle_connection() -> None:
    more = asyncio.Event()
    async with (
        FakePeer("a", sends(head(1) + b"1", more, b"HTTP/1.1 200 OK\r\n", close=False)) as a,
        peers_of(a) as peers,
    ):
        assert await ask(peers, "a") == ("a", b"1")
        more.set()
        await until(lambda: a.open == 0)
        a.plan(says(b"2"))
        assert await ask(peers, "a") == ("a", b"2")


async def test_an_answer_that_closes_is_not_waited_for() -> None:
    async with FakePeer("a", says(b"1", 200, "Connection: close"), says(b"2")) as a, peers_of(a) as peers:
        assert await ask(peers, "a") == ("a", b"1")
        assert await ask(peers, "a") == ("a", b"2")
        assert a.connections == 2


async def test_connections_are_limited_and_waited_for() -> None:
    async with FakePeer("a") as a, peers_of(a, connections=2, **NEVER_HEDGES) as peers:
        now = asyncio.Event()
        a.plan(*[says(b"x", after=now)] * 6)
        asking = [asyncio.ensure_future(ask(peers, "a")) for _ in range(6)]
        await until(lambda: len(a.questions) == 2)
        now.set()
        assert await asyncio.gather(*asking) == [("a", b"x")] * 6
        assert a.connections == 2


async def test_waiting_for_a_connection_ends_and_is_not_the_members_fault() -> None:
    async with (
        FakePeer("a", hangs(), hangs()) as a,
        peers_of(a, connections=1, connect_timeout_s=0.05, **NEVER_HEDGES) as peers,
    ):
        first = asyncio.ensure_future(ask(peers, "a"))
        await until(lambda: a.questions)
        with pytest.raises(PeerUnavailable, match="in use"):
            await ask(peers, "a")
        assert peers.well("a")
        first.cancel()
        await asyncio.wait([first])
        a.plan(says(b"x"))
        await until(lambda: a.open == 0)


async def test_no_head_in_time() -> None:
    async with FakePeer("a", hangs(b"HTTP/1.1 200")) as a, peers_of(a, read_timeout_s=0.05) as peers:
        with pytest.raises(PeerUnavailable, match=r"0\.05 s"):
            await ask(peers, "a")
        await until(lambda: a.open == 0)


@pytest.fixture
def full_backlog() -> Iterator[int]:
    """A port that answers no SYN: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
            waiting.append(each)
        yield listener.getsockname()[1]
        for each in waiting:
            each.close()


async def test_connecting_takes_no_longer_than_it_may(full_backlog: int) -> None:
    a = FakePeer("a")
    a.port = full_backlog
    async with peers_of(a, connect_timeout_s=0.05) as peers:
        with pytest.raises(PeerUnavailable, match=r"no connection within 0\.05 s"):
            await ask(peers, "a")


async def test_who_is_gone_is_let_go_of() -> None:
    async with (
        FakePeer("a", says(b"1"), hangs(), hangs(head(4) + b"bo")) as a,
        FakePeer("b") as b,
        peers_of(a, b, **NEVER_HEDGES) as peers,
    ):
        assert await ask(peers, "a") == ("a", b"1")
        asking = asyncio.ensure_future(ask(peers, "a"))
        await until(lambda: len(a.questions) == 2)
        response = await peers.ask(["a"], wire.BLOCK, block(4))
        assert a.open == 2
        peers.update(View(1, (b.member,)))
        with pytest.raises(PeerUnavailable, match="no member any more"):
            await asking
        with pytest.raises(PeerUnavailable):
            await ask(peers, "a")
        await until(lambda: a.open == 1)
        response.release()
        await until(lambda: a.open == 0)


async def test_a_member_that_comes_back_elsewhere_is_asked_there() -> None:
    async with FakePeer("a", says(b"1")) as old, FakePeer("a", says(b"2")) as new, peers_of(old) as peers:
        assert await ask(peers, "a") == ("a", b"1")
        peers.update(View(1, (new.member,)))
        await until(lambda: old.open == 0)
        assert await ask(peers, "a") == ("a", b"2")


@pytest.mark.parametrize("source", ["127.0.0.2", "localhost", "::1"])
async def test_names_are_resolved_and_connections_come_from_where_they_should(source: str) -> None:
    sources: list[str] = []

    async def notes(peer: object, reader: object, writer: asyncio.StreamWriter, question: object) -> bool:
        sources.append(writer.get_extra_info("peername")[0])
        writer.write(head(0))
        return True

    async with FakePeer("a", notes) as a, peers_of() as peers:
        peers._local_host = source
        member = a.member
        peers.update(View(1, (type(member)("a", 2, f"localhost:{a.port}", member.cluster, 1),)))
        assert await ask(peers, "a") == ("a", b"")
        assert sources == ["127.0.0.2" if source == "127.0.0.2" else "127.0.0.1"], (
            "of another family: the kernel's choice"
        )


# --- cancellation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(12))
async def test_a_question_can_be_cancelled_at_any_moment(turns: int) -> None:
    """Whenever it is: nothing goes on, and the connections that are left can be used."""
    async with (
        FakePeer("a", default=says(b"x")) as a,
        FakePeer("b", default=hangs()) as b,
        peers_of(a, b, connections=2, **HEDGES_AT_ONCE) as peers,
    ):
        if turns % 2:
            await ask(peers, "a", hedge=False)
        asking = asyncio.ensure_future(ask(peers, "b", "a"))
        for _ in range(turns):
            await asyncio.sleep(0 if turns < 8 else 0.0005)
        asking.cancel()
        await asyncio.wait([asking])
        await until(lambda: b.open == 0)
        assert not peers._asker.running
        for _ in range(3):
            assert await ask(peers, "a", hedge=False) == ("a", b"x")
        assert a.open <= 2


async def test_closing_gives_up_what_is_asked() -> None:
    async with FakePeer("a", hangs()) as a, peers_of(a) as peers:
        asking = asyncio.ensure_future(ask(peers, "a"))
        await until(lambda: a.questions)
        peers.close()
        with pytest.raises(PeerUnavailable):
            await asking
        await until(lambda: a.open == 0)


# --- alive or not -----------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koscache.carrier.peers._PATIENCE_LEAST_S", 0.05)


async def test_a_hedge_asks_for_no_more_than_what_is_at_hand() -> None:
    now = asyncio.Event()
    async with (
        FakePeer("a", says(b"from a", after=now)) as a,
        FakePeer("b", says(wire.encode(wire.not_here("not in the store")), 404)) as b,
        peers_of(a, b, **HEDGES_AT_ONCE) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: b.questions and b.open == 1)
        now.set()
        assert await asking == ("a", b"from a")
        asked = [each.headers[wire.ASK_HEADER].encode() for each in (*a.questions, *b.questions)]
        assert [wire.decode(each, wire.AskBlock).cached for each in asked] == [False, True]


@pytest.mark.usefixtures("impatient")
async def test_one_that_says_nothing_at_all_is_given_up_for_the_next() -> None:
    async with (
        FakePeer("a", default=hangs()) as a,
        FakePeer("b", default=says(b"from b")) as b,
        peers_of(a, b, **NEVER_HEDGES) as peers,
    ):
        assert await ask(peers, "a", "b") == ("b", b"from b")
        assert [each.path for each in a.questions] == [wire.BLOCK, wire.AHEAD]
        assert not peers.well("a")


@pytest.mark.usefixtures("impatient")
async def test_one_that_lives_may_take_its_time() -> None:
    now = asyncio.Event()
    async with (
        FakePeer("a", says(b"from a", after=now), default=says(b"", 204)) as a,
        FakePeer("b") as b,
        peers_of(a, b, **NEVER_HEDGES) as peers,
    ):
        asking = asyncio.ensure_future(ask(peers, "a", "b"))
        await until(lambda: len(a.questions) >= 3)
        now.set()
        assert await asking == ("a", b"from a")
        assert not b.questions
        assert peers.well("a")
