"""What a reader may be told in a cluster: nothing older than the last write that was answered, whoever is asked by whom."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kos.config import Rule
from kos.errors import OriginRefused, S3Error
from koscache.carrier import Changed, Freshness, Phase, Want, version_name
from koscache.carrier import peer_wire as wire
from koscache.content import Record
from tests.conditions import until
from tests.fakes.peering import BLOCK, PeerCluster, PeerNode, take_into

OLD = random.Random(63).randbytes(4 * BLOCK + 99)
NEW = random.Random(64).randbytes(4 * BLOCK + 99)
SMALL = OLD[:1000]
SOON_S = 10.0
POLICIES = ["never", "always"]


def rules(policy: str, freshness: float = 1000.0) -> tuple[Rule, ...]:
    return (Rule(match="*", local_copy=policy, freshness=freshness, stale_if_error_s=1000.0),)  # type: ignore[arg-type]


def record_of(node: PeerNode, key: str = "k") -> Record:
    record = node.record(key)
    assert record is not None
    return record


async def heads(them: PeerCluster, key: str = "k") -> None:
    """All nodes know the version; its blocks are nowhere."""
    for node in them.nodes:
        await node.read("b", key, want=Want(head_only=True))
    await them.settled()


# --- changed behind kos's back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("patience_s", [10.0, 0.0002])
async def test_a_change_that_the_home_has_not_noticed(tmp_path: Path, policy: str, patience_s: float) -> None:
    """The blocks are gone at the origin, every record says that they are there: no loop, the new bytes, few requests.

    patience_s: a peer has the time to say that it changed, or can only break off."""
    async with PeerCluster(tmp_path, rules=rules(policy), patience_s=patience_s) as them:
        for node in them.nodes:
            key = f"k-{node.name}"
            them.origin.put("b", key, OLD)
            await heads(them, key)
            them.origin.put("b", key, NEW)
            them.origin.forget()
            async with asyncio.timeout(SOON_S):
                got = await node.read("b", key)
            assert got.body == NEW and got.opens <= 3
            await them.settled()
            assert sum(each.status == 412 for each in them.origin.requests) <= 6
            assert len(them.origin.requests) <= 6 + 5 + 2
            for other in them.nodes:
                assert (await other.read("b", key)).body == NEW


@pytest.mark.parametrize("policy", POLICIES)
async def test_an_object_that_is_gone_behind_the_homes_back(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        them.origin.put("b", "k", OLD)
        await heads(them)
        them.origin.remove("b", "k")
        for node in reversed(them.order("b", "k")):
            async with asyncio.timeout(SOON_S):
                with pytest.raises(OriginRefused) as refused:
                    await node.read("b", "k")
            assert refused.value.status == 404


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_version_that_comes_back(tmp_path: Path, policy: str) -> None:
    """Old, new, old again, and the home is told each time what is gone: it does not refuse what has come back."""
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        *_, other = them.order("b", "k")
        for round_number in range(4):
            body = (OLD, NEW)[round_number % 2]
            if round_number:
                them.origin.put("b", "k", body)
                for node in them.nodes:
                    node.carrier._context.forget("b", "k", record_of(node))
            else:
                them.origin.put("b", "k", body)
            async with asyncio.timeout(SOON_S):
                assert (await other.read("b", "k")).body == body
                assert all(each.body == body for each in await them.read_all("b", "k"))
            await them.settled()
        them.origin.forget()
        them.clock.ahead_s += 1001
        for _ in range(3):
            assert (await other.read("b", "k")).body == NEW
            await them.settled()
        assert len(them.origin.requests) <= 1


@pytest.mark.parametrize("count", [1, 3])
async def test_trust_that_comes_back_while_a_reader_waits_for_one_that_came_before(tmp_path: Path, count: int) -> None:
    """Then what is known will do, and he must not be sent from one to the other until he gives up."""
    async with PeerCluster(tmp_path, count, rules=rules("always")) as them:
        them.origin.put("b", "k", OLD)
        home, *_ = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        home.trust(False)
        hold = them.origin.hold(at="head")
        first = asyncio.ensure_future(home.read("b", "k"))
        await hold.reached()
        second = asyncio.ensure_future(home.read("b", "k"))
        await asyncio.sleep(0)
        home.trust()
        hold.release()
        assert (await first).body == (await second).body == OLD


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_change_in_the_middle_of_a_body_breaks_off_and_never_mixes(tmp_path: Path, policy: str) -> None:
    async with PeerCluster(tmp_path, rules=rules(policy), fill_ahead_bytes=0) as them:
        for node in them.nodes:
            key = f"k-{node.name}"
            them.origin.put("b", key, OLD)
            opened = await node.carrier.open("b", key, Want())
            body = node.carrier.body(opened, 0, len(OLD))
            got: list[bytes] = []
            while sum(map(len, got)) < BLOCK:
                await take_into(got, await anext(body))
            them.origin.put("b", key, NEW)
            with pytest.raises(Changed):
                while True:
                    await take_into(got, await anext(body))
            assert OLD.startswith(b"".join(got))
            await body.aclose()
            opened.close()
            assert (await node.read("b", key)).body == NEW


# --- a fence that is not trusted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_without_trust_every_read_is_confirmed_by_the_home(tmp_path: Path, policy: str) -> None:
    """By its own record as long as the home trusts that, else by the origin: a confirmation, and no body."""
    async with PeerCluster(tmp_path, rules=rules(policy)) as them:
        for key, body in (("small", SMALL), ("k", OLD)):
            them.origin.put("b", key, body)
            await them.read_all("b", key)
            await them.settled()
            home, *_, other = them.order("b", key)
            other.trust(False)
            home.questions.clear()
            them.origin.forget()
            for count in range(1, 4):
                assert (await other.read("b", key)).body == body
                await them.settled()
                assert home.count(wire.OBJECT) == count
                assert other.carrier.peek("b", key).freshness is not Freshness.FRESH
            assert not them.origin.requests
            home.trust(False)
            for count in range(1, 4):
                assert (await other.read("b", key)).body == body
                await them.settled()
                assert [each.status for each in them.origin.requests] == [304] * count
            changed = body[::-1]
            them.origin.put("b", key, changed)
            assert (await other.read("b", key)).body == changed
            home.trust()
            other.trust()
            await them.settled()
            assert (await other.read("b", key)).body == changed


async def test_without_trust_nothing_is_served_stale(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always", 10.0), origin_retries=0) as them:
        them.origin.put("b", "k", SMALL)
        await them.read_all("b", "k")
        await them.settled()
        await them.origin.down()
        *_, other = them.order("b", "k")
        other.trust(False)
        assert (await other.read("b", "k")).body == SMALL, "the home may trust it, and its time is not over"
        for node in them.nodes:
            node.trust(False)
        for ahead in (0.0, 11.0):
            them.clock.ahead_s += ahead
            with pytest.raises(S3Error) as refused:
                await other.read("b", "k")
            assert refused.value.status == 503
        other.trust()
        assert (await other.read("b", "k")).phase == Phase.STALE


async def test_a_home_without_trust_has_each_question_confirmed_and_vouches_for_nothing(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", SMALL)
        home, _, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        home.trust(False)
        them.origin.forget()
        for count in range(1, 4):
            assert (await other.read("b", "k")).body == SMALL
            await them.settled()
            assert len(them.origin.requests) == count
            assert other.carrier.peek("b", "k").freshness is Freshness.FENCED
        home.trust()
        assert (await other.read("b", "k")).body == SMALL
        await them.settled()
        assert other.carrier.peek("b", "k").freshness is Freshness.FRESH
        assert len(them.origin.requests) <= 4


async def test_without_trust_no_refusal_from_before_is_believed(tmp_path: Path) -> None:
    """A write that nobody told this node of is answered while an older question is still on its way."""
    async with PeerCluster(tmp_path, 2, rules=rules("hot")) as them:
        for node in them.nodes:
            key = them.key_at(node)
            node.trust(False)
            hold = them.origin.hold(at="answer", key=key)
            first = asyncio.ensure_future(node.read("b", key))
            await hold.reached()
            them.origin.put("b", key, b"new")
            second = asyncio.ensure_future(node.read("b", key))
            other = next(each for each in them.nodes if each is not node)
            through = asyncio.ensure_future(other.read("b", key))
            await until(lambda node=node: node.count(wire.OBJECT))
            hold.release()
            with pytest.raises(OriginRefused):
                await first
            assert (await second).body == b"new"
            assert (await through).body == b"new"
            node.trust()
            node.questions.clear()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("body", [SMALL, OLD, b""])
async def test_without_trust_no_answer_of_the_home_from_before_is_believed(
    tmp_path: Path, workers: int, body: bytes
) -> None:
    """The home's answer is late; a write that the home hears of, and this node does not, is answered meanwhile."""
    async with PeerCluster(tmp_path, rules=rules("always"), workers=workers) as them:
        them.origin.put("b", "k", body)
        await them.read_all("b", "k")
        await them.settled()
        home, _, other = them.order("b", "k")
        other.trust(False)
        fault = home.fault(path=wire.OBJECT, late=True)
        first = asyncio.ensure_future(other.read("b", "k"))
        await fault.met()
        them.origin.put("b", "k", b"new")
        home.reader.fence.bump(home.reader.fence.slot("b", "k"))
        second = [asyncio.ensure_future(other.read("b", "k", worker=at)) for at in range(workers) for _ in range(3)]
        await asyncio.sleep(0)
        fault.end()
        assert (await first).body in (body, b"new")
        assert {each.body for each in await asyncio.gather(*second)} == {b"new"}


async def test_what_came_without_trust_is_not_used_when_it_is_back(tmp_path: Path) -> None:
    """Unless nothing was missed: then the slot is as it was, and says so."""
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", SMALL)
        home, _, other = them.order("b", "k")
        other.trust(False)
        assert (await other.read("b", "k")).body == SMALL
        await them.settled()
        them.origin.put("b", "k", b"new")
        for node in them.nodes:
            # What a daemon does when it hears of what it has missed.
            node.reader.fence.bump(node.reader.fence.slot("b", "k"))
        other.trust()
        assert all(each.body == b"new" for each in await them.read_all("b", "k"))
        assert home.record("k") is not None


async def test_a_write_that_is_heard_of_while_the_home_answers(tmp_path: Path) -> None:
    """A reader who comes after it gets an answer of his own, from a home that has heard of it as well."""
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        for key, body in (("small", SMALL), ("k", OLD)):
            them.origin.put("b", key, body)
            home, _, other = them.order("b", key)
            await home.read("b", key)
            await them.settled()
            fault = home.fault(path=wire.OBJECT, late=True)
            first = asyncio.ensure_future(other.read("b", key))
            await fault.met()
            them.origin.put("b", key, body[::-1])
            for node in them.nodes:
                node.reader.fence.bump(node.reader.fence.slot("b", key))
            second = asyncio.ensure_future(other.read("b", key))
            assert (await second).body == body[::-1]
            fault.end()
            assert (await first).body in (body, body[::-1])
            await them.settled()
            got = await other.read("b", key)
            assert got.body == body[::-1], "what the first one was told is not kept"


async def test_without_trust_no_page_of_a_listing_counts(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, 2) as them:
        node = them.nodes[0]
        values = node.carrier.listing_values("b", "a/")
        assert node.carrier.listing_values("b", "a/") == values
        node.trust(False)
        found = [node.carrier.listing_values("b", "a/") for _ in range(3)]
        assert len({*values, *(value for pair in found for value in pair)}) == 8
        node.trust()
        assert node.carrier.listing_values("b", "a/") == values


# --- what another node may keep -------------------------------------------------------------------------------------------


async def test_a_record_of_a_marked_slot_is_good_for_one_question(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        for key, body in (("small", SMALL), ("k", OLD)):
            them.origin.put("b", key, body)
            home, _, other = them.order("b", key)
            await home.read("b", key)
            await them.settled()
            fence = home.reader.fence
            slot = fence.slot("b", key)
            fence.mark([slot])
            for _ in range(3):
                home.questions.clear()
                assert (await other.read("b", key)).body == body
                await them.settled()
                assert home.count(wire.OBJECT) == 1
                assert other.carrier.peek("b", key).freshness is Freshness.FENCED
                assert not other.carrier.vouches("b", key, record_of(other, key))
            fence.unmark([slot])
            await other.read("b", key)
            await them.settled()
            home.questions.clear()
            assert (await other.read("b", key)).phase == Phase.HIT
            assert home.questions == []


async def test_what_a_marked_record_says_is_not_served_stale(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always", 10.0), origin_retries=0) as them:
        them.origin.put("b", "k", SMALL)
        home, second, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        home.reader.fence.mark([home.reader.fence.slot("b", "k")])
        await other.read("b", "k")
        await them.settled()
        await them.origin.down()
        await home.gone()
        await second.gone()
        them.clock.ahead_s += 11
        with pytest.raises(S3Error):
            await other.read("b", "k")


async def test_a_record_that_was_passed_while_it_came_is_not_used(tmp_path: Path) -> None:
    """The asker's own fence: a write is heard of between the question to the home and its answer."""
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", SMALL)
        home, _, other = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        fault = home.fault(path=wire.OBJECT, stall=-1)
        reading = asyncio.ensure_future(other.read("b", "k"))
        await fault.met()
        other.reader.fence.bump(other.reader.fence.slot("b", "k"))
        after = asyncio.ensure_future(other.read("b", "k"))
        assert (await after).body == SMALL, "it does not wait for the question from before"
        fault.end()
        assert (await reading).body == SMALL
        await them.settled()
        record = record_of(other)
        assert other.carrier.peek(
            "b", "k"
        ).freshness is Freshness.FENCED or record.fence == other.reader.fence.value_of("b", "k")


async def test_a_record_is_vouched_for_only_while_it_is_what_the_fence_says(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, 2) as them:
        node = them.nodes[0]
        them.origin.put("b", "k", SMALL)
        await node.read("b", "k")
        await them.settled()
        record, carrier, fence = record_of(node), node.carrier, node.reader.fence
        assert carrier.vouches("b", "k", record)
        node.trust(True, vouches=False)
        assert not carrier.vouches("b", "k", record)
        node.trust()
        fence.mark([fence.slot("b", "k")])
        assert not carrier.vouches("b", "k", record)
        fence.unmark([fence.slot("b", "k")])
        assert carrier.vouches("b", "k", record)
        assert not carrier.vouches("b", "k", record.revalidated(record.validated_at, 0))
        fence.bump(fence.slot("b", "k"))
        assert not carrier.vouches("b", "k", record)


# --- who waits for whom -----------------------------------------------------------------------------------------------------


async def test_a_question_of_a_peer_does_not_wait_for_one_to_the_home(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), cluster={"read_timeout_s": 30.0}) as them:
        them.origin.put("b", "k", SMALL)
        home, second, _ = them.order("b", "k")
        fault = home.fault(path=wire.OBJECT, stall=-1)
        waiting = asyncio.ensure_future(second.read("b", "k"))
        await fault.met()
        async with asyncio.timeout(SOON_S):
            opened = await second.carrier.open("b", "k", Want(), direct=True)
        opened.close()
        assert not waiting.done()
        fault.end()
        assert (await waiting).body == SMALL


async def test_a_question_to_the_home_does_not_wait_for_one_of_a_peer(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always")) as them:
        them.origin.put("b", "k", SMALL)
        home, second, _ = them.order("b", "k")
        await home.read("b", "k")
        await them.settled()
        hold = them.origin.hold(at="answer")
        waiting = asyncio.ensure_future(second.carrier.open("b", "k", Want(), direct=True))
        await hold.reached()
        async with asyncio.timeout(SOON_S):
            assert (await second.read("b", "k")).body == SMALL
        hold.release()
        (await waiting).close()


# --- writes -----------------------------------------------------------------------------------------------------------------


async def write(node: PeerNode, them: PeerCluster, key: str, body: bytes) -> None:
    async with node.carrier.writing("b", [key]):
        them.origin.put("b", key, body)


async def test_a_write_through_one_node_is_seen_by_the_next_read_on_every_other(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        for number in range(9):
            body = OLD[number : number + 50 + number * 9000]
            pages = [node.carrier.listing_values("b", "a/b/") for node in them.nodes]
            await write(them.nodes[number % 3], them, "a/b/k", body)
            assert all(each.body == body for each in await them.read_all("b", "a/b/k"))
            for node, before in zip(them.nodes, pages, strict=True):
                assert node.carrier.listing_values("b", "a/b/") != before
        await them.settled()
        them.origin.forget()
        for _ in range(2):
            await them.read_all("b", "a/b/k")
        assert them.origin.requests == [], "and then it is kept again"


async def test_readers_on_all_nodes_while_others_write(tmp_path: Path) -> None:
    """Whoever begins to read after a write was answered sees it, or a later one."""
    async with PeerCluster(tmp_path, rules=rules("hot"), hub=True) as them:
        written = [0]
        bodies = [b"%06d" % number * (20 if number % 2 else 12_000) for number in range(25)]
        them.origin.put("b", "k", bodies[0])

        async def read(node: PeerNode) -> None:
            number = 0
            while number < len(bodies) - 1:
                least = written[0]
                try:
                    got = await node.read("b", "k")
                except Changed:
                    continue  # under way when it was overwritten, and not completed wrongly
                number = int(got.body[:6])
                assert number >= least and got.body == bodies[number]

        reading = [asyncio.ensure_future(read(node)) for node in them.nodes]
        for number in range(1, len(bodies)):
            await write(them.nodes[number % 3], them, "k", bodies[number])
            written[0] = number
        await asyncio.gather(*reading)


async def test_a_write_of_versions_passes_them_on_every_node(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        them.origin.create_bucket("b", versioned=True)
        old = them.origin.put("b", "k", SMALL)
        name = version_name("k", old.version_id)
        assert all(each.body == SMALL for each in await them.read_all("b", name))
        writer, *_, reader = them.nodes
        async with writer.carrier.writing("b", ["k"], versions=["k"]):
            them.origin.remove("b", "k", old.version_id)
        with pytest.raises(OriginRefused):
            await reader.read("b", name)


async def test_a_write_whose_end_is_unknown_is_heard_of_before_it_is_answered(tmp_path: Path) -> None:
    """The origin was asked twice: it has answered the second time, and nobody knows of the first. The client has its answer."""
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        them.origin.put("b", "k", SMALL)
        await them.read_all("b", "k")
        await them.settled()
        writer, *others = them.nodes
        async with writer.carrier.writing("b", ["k"]) as writing:
            them.origin.put("b", "k", b"new")
            writing.end_known = False
        assert all([(await node.read("b", "k")).body == b"new" for node in (*others, writer)])
        # And it goes on: whoever has kept it is asked again when it must be over.
        assert writer.carrier._unsettled


async def test_a_write_that_one_node_cannot_hear_of_waits_for_its_lease_and_is_answered(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        them.origin.put("b", "k", SMALL)
        await them.read_all("b", "k")
        await them.settled()
        writer, reader, lost = them.nodes
        for name in (writer.name, reader.name):
            lost.daemon._hub._lines.cut(name, "a test")  # type: ignore[union-attr]
        await lost.stop_daemon()
        async with asyncio.timeout(SOON_S):
            await write(writer, them, "k", b"new")
        assert (await reader.read("b", "k")).body == b"new"
        assert not lost.reader.fence.trusted()
        assert (await lost.read("b", "k")).body == b"new", "its worker goes on, and believes nothing unasked"
        await lost.start_daemon()
        await until(lambda: lost.carrier.caching)


async def test_a_write_that_not_all_can_be_told_of_in_time_is_answered_503(tmp_path: Path) -> None:
    """And seen by all when they have been told, however old what they were told of it meanwhile."""
    settings = {"lease_s": 1.0, "write_wait_s": 0.1}
    async with PeerCluster(tmp_path, 2, rules=rules("always"), hub=True, cluster=settings) as them:
        writer, other = them.nodes
        key = them.key_at(other)
        them.origin.put("b", key, SMALL)
        await them.read_all("b", key)
        await them.settled()
        lines = writer.daemon._hub._lines  # type: ignore[union-attr]
        tell, held = lines.tell, []
        lines.tell = lambda name, message: held.append((name, message)) or True  # type: ignore[method-assign, func-returns-value]
        async with asyncio.timeout(SOON_S):
            with pytest.raises(S3Error) as refused:
                await write(writer, them, key, b"new")
        assert refused.value.code == "ServiceUnavailable" and "Retry-After" in refused.value.headers
        await them.read_all("b", key)
        await them.settled()
        lines.tell = tell  # type: ignore[method-assign]
        for name, message in held:
            tell(name, message)

        async def seen() -> bool:
            return all(each.body == b"new" for each in await them.read_all("b", key))

        await until(seen)


async def test_a_writers_daemon_that_is_restarted_under_a_write_tells_of_it_all_the_same(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        them.origin.put("b", "k", SMALL)
        await them.read_all("b", "k")
        await them.settled()
        writer, *others = them.nodes
        async with asyncio.timeout(SOON_S):
            async with writer.carrier.writing("b", ["k"]):
                await writer.stop_daemon()
                await until(lambda: not writer.carrier.caching)
                them.origin.put("b", "k", b"new")
                await writer.start_daemon()
            for node in (*others, writer):
                assert (await node.read("b", "k")).body == b"new"
        await until(lambda: writer.carrier.caching)


async def test_a_client_that_leaves_while_its_write_is_told_takes_nothing_back(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, rules=rules("always"), hub=True) as them:
        writer, reader, _ = them.nodes
        for turns in range(12):
            body = b"%d" % turns
            done = asyncio.Event()

            async def writing(body: bytes = body, done: asyncio.Event = done) -> None:
                async with writer.carrier.writing("b", ["k"]):
                    them.origin.put("b", "k", body)
                    done.set()

            task = asyncio.ensure_future(writing())
            await done.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await write(writer, them, "other", b"")  # what was told before has been heard by now
            assert (await reader.read("b", "k")).body == body


async def test_reads_are_counted_for_the_daemon(tmp_path: Path) -> None:
    async with PeerCluster(tmp_path, 2, hub=True) as them:
        node = them.nodes[0]
        operations = node.daemon._operations
        assert operations is not None
        counted: list[tuple[int, int]] = []
        operations.counted = lambda reads, hits: counted.append((reads, hits))  # type: ignore[method-assign]
        node.carrier.counted(10, 7)
        node.carrier.counted(0, 0)
        node.carrier.counted(1, 0)
        await until(lambda: len(counted) == 2)
        assert counted == [(10, 7), (1, 0)]
