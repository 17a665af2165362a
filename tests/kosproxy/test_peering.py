"""The peer port over a real carrier, daemon and store: what other nodes get, what they are told, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from kos import config, metrics
from kos.errors import OriginBroken
from kos.tasks import Tasks
from koscache.carrier import peer_wire as wire
from koscache.carrier.peer_response import PeerResponse
from koscache.carrier.peer_wire import AskAhead, AskBlock, AskObject, AskTake, Failed, Said
from koscache.carrier.peers import Peers, failed_of
from koscache.cluster.view import Member, View
from koscache.content import Record, body_checksum
from koscache.ipc import OpenOutcome
from kosproxy.parts import Parts
from kosproxy.peering import edge_of
from kosproxy.server import Edge
from tests.conditions import until
from tests.fakes.cache_node import KIB, CacheNode, ShiftedClock
from tests.fakes.proxy import Lines

SECRET = "a secret of the whole cluster"
BLOCK = 64 * KIB
BODY = random.Random(31).randbytes(3 * BLOCK + 1000)


class Home:
    """A node with its peer port, and who asks it."""

    def __init__(self, node: CacheNode, edge: Edge, port: int, peers: Peers, clock: ShiftedClock) -> None:
        self.node = node
        self.edge = edge
        self.port = port
        self.peers = peers
        self.clock = clock
        self.carrier = node.workers[0].carrier
        self.origin = node.origin

    async def fill(self, key: str = "k", body: bytes = BODY) -> Record:
        """Has all of the object in the store."""
        self.origin.put("b", key, body)
        await self.node.read("b", key)
        await self.node.settled()
        return self.record(key)

    def record(self, key: str = "k") -> Record:
        record = self.node.workers[0].reader.record("b", key)
        assert record is not None
        return record

    async def known(self, key: str = "k", body: bytes = BODY) -> Record:
        """The version is known, none of its blocks is here."""
        self.origin.put("b", key, body)
        (await self.ask(AskObject("b", key, head_only=True))).release()
        await self.node.settled()
        return self.record(key)

    async def ask(self, ask: wire.Ask, path: str = "") -> PeerResponse:
        paths: dict[Any, str] = {
            AskObject: wire.OBJECT, AskBlock: wire.BLOCK, AskAhead: wire.AHEAD, AskTake: wire.TAKE,
        }  # fmt: skip
        return await self.peers.ask(["home"], path or paths[type(ask)], ask)

    async def get(self, ask: wire.Ask, path: str = "") -> tuple[PeerResponse, bytes]:
        response = await self.ask(ask, path)
        assert response.status == 200, await failed_of(response)
        body = await response.read(len(BODY))
        response.release()
        return response, body

    async def told(self, ask: wire.Ask, path: str = "") -> tuple[int, Failed]:
        response = await self.ask(ask, path)
        return response.status, await failed_of(response)

    async def raw(self, request: bytes) -> tuple[int, Failed]:
        """Status of the answer to just these bytes, and what it says."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return int(head.split()[1]), wire.decode(await reader.readexactly(length), Failed)
        finally:
            writer.close()


def said_of(response: PeerResponse) -> Said:
    return wire.decode(response.headers[wire.SAID_HEADER].encode(), Said)


def answered(path: str, status: int, lane: str) -> float:
    return metrics.PEER_ANSWER_COUNTS._counts.get((path, str(status), lane), 0)


@contextlib.asynccontextmanager
async def home_of(
    path: Path, *, rules: tuple[config.Rule, ...] = (), patience_s: float = 10.0, **limits: Any
) -> AsyncIterator[Home]:
    """patience_s: for so long a failure can still be told; then the head has left."""
    clock = ShiftedClock()
    async with CacheNode(path, block_bytes=BLOCK, clock=clock, rules=rules) as node:
        settings = msgspec.structs.replace(
            node.config,
            cluster=config.Cluster(membership="static", name="home", secret=SECRET, hedge_least_s=2 * patience_s),
            limits=config.Limits(**limits),
        )
        tasks = Tasks("home")
        worker = node.workers[0]
        with ThreadPoolExecutor(2) as threads:
            parts = Parts(
                settings,
                {},
                worker.carrier,
                worker.origin,
                clock,
                tasks,
                Lines(),
                threads,
                threads,  # type: ignore[arg-type]
            )
            edge = edge_of(parts)
            server = await asyncio.get_running_loop().create_server(edge, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            peers = Peers(settings.cluster, "me", SECRET.encode(), clock, tasks, None)
            peers.update(View(0, (Member("home", 1, f"127.0.0.1:{port}", "127.0.0.1:1", 1),)))
            try:
                yield Home(node, edge, port, peers, clock)
            finally:
                peers.close()
                server.close()
                await edge.drain(1.0)
                await tasks.close()
        await node.settled()
        reader = worker.reader
        assert all(reader._held[segment].borrows == 0 for segment in reader.held()), "every descriptor was given back"


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    async with home_of(tmp_path) as home:
        yield home


@pytest.fixture(autouse=True)
async def no_descriptor_is_left_open() -> AsyncIterator[None]:
    here = psutil.Process(os.getpid())
    with contextlib.closing(await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)):
        pass  # what the loop opens for itself when it first listens
    before = here.num_fds()
    yield
    await until(lambda: here.num_fds() <= before)


# --- blocks that are here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "start", "stop"),
    [(0, 0, BLOCK), (0, 0, 1), (1, 5, 40_000), (2, BLOCK - 1, BLOCK), (3, 0, 1000), (3, 999, 1000)],
)
async def test_a_slice_of_a_block_is_answered_at_once(home: Home, number: int, start: int, stop: int) -> None:
    record = await home.fill()
    asked, fast = len(home.origin.requests), answered("block", 200, "fast")
    for _ in range(2):
        response, body = await home.get(AskBlock("b", "k", record, number, start, stop, block_bytes=BLOCK))
        begin = number * BLOCK
        assert body == BODY[begin + start : begin + stop]
        assert int(response.headers["x-kos-checksum"], 16) == body_checksum(BODY[begin : begin + BLOCK])
    assert len(home.origin.requests) == asked and answered("block", 200, "fast") == fast + 2


async def test_both_lanes_answer_alike(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await home.fill()
    ask = AskBlock("b", "k", record, 1, 0, BLOCK)
    first, body = await home.get(ask)
    lanes: Any = home.edge.lanes
    for connection in home.edge.connections:
        connection.force_close()
    monkeypatch.setattr(lanes, "fast", lambda connection, data: False)
    slow = answered("block", 200, "slow")
    await until(lambda: not home.edge.connections)
    second, again = await home.get(ask)
    assert again == body and dict(second.headers) == dict(first.headers)
    assert answered("block", 200, "slow") == slow + 1


async def test_bytes_sent_to_peers_are_counted_as_such(home: Home) -> None:
    record = await home.fill()
    sent = metrics.BYTE_COUNTS._counts.get(("peer_out",), 0)
    hits = metrics.BYTE_COUNTS._counts.get(("hit",), 0)
    received = metrics.BYTE_COUNTS._counts.get(("peer",), 0)
    requests = dict(metrics.REQUEST_COUNTS._counts)
    await home.get(AskBlock("b", "k", record, 0, 0, BLOCK))
    await until(lambda: metrics.BYTE_COUNTS._counts.get(("peer_out",), 0) == sent + BLOCK)
    assert metrics.BYTE_COUNTS._counts["peer",] == received + BLOCK
    assert metrics.BYTE_COUNTS._counts.get(("hit",), 0) == hits
    assert dict(metrics.REQUEST_COUNTS._counts) == requests, "they are no S3 requests"


# --- blocks that are not ----------------------------------------------------------------------------------------------


async def test_a_cold_block_is_filled_once_for_all_who_ask(home: Home) -> None:
    record = await home.known()
    asked = len(home.origin.requests)
    ask = AskBlock("b", "k", record, 1, 0, BLOCK, fill=True)
    got = await asyncio.gather(*[home.get(ask) for _ in range(4)])
    assert {body for _, body in got} == {BODY[BLOCK : 2 * BLOCK]}
    assert len(home.origin.requests) == asked + 1
    await home.node.settled()
    fast = answered("block", 200, "fast")
    await home.get(ask)
    assert answered("block", 200, "fast") == fast + 1


async def test_the_head_does_not_wait_for_the_origin(tmp_path: Path) -> None:
    async with home_of(tmp_path, patience_s=0.01) as home:
        record = await home.known()
        hold = home.origin.hold(at="answer")
        response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
        assert (response.status, response.content_length) == (200, BLOCK)
        assert "x-kos-checksum" not in response.headers
        reading = asyncio.ensure_future(response.read(BLOCK))
        await hold.reached()
        hold.release()
        assert await reading == BODY[:BLOCK]
        response.release()


async def test_bytes_are_passed_on_as_they_come(home: Home) -> None:
    record = await home.known()
    hold = home.origin.hold(at="body", body_bytes=40 * KIB)
    response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    await hold.reached()
    got = b""
    while len(got) < 32 * KIB:
        got += await response.receive(BLOCK)
    hold.release()
    while len(got) < BLOCK:
        got += await response.receive(BLOCK)
    assert got == BODY[:BLOCK]
    response.release()


async def test_only_if_it_is_here(home: Home) -> None:
    record = await home.known()
    asked = len(home.origin.requests)
    status, failed = await home.told(AskBlock("b", "k", record, 1, 0, BLOCK, cached=True))
    assert (status, failed.outcome) == (404, OpenOutcome.LEADER_GAVE_UP)
    assert len(home.origin.requests) == asked
    record = await home.fill("other")
    _, body = await home.get(AskBlock("b", "other", record, 1, 0, BLOCK, cached=True))
    assert body == BODY[BLOCK : 2 * BLOCK]


async def test_what_has_changed_at_the_origin_is_said(home: Home) -> None:
    record = await home.known()
    home.origin.put("b", "k", os.urandom(3 * BLOCK))
    status, failed = await home.told(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    assert status == 409 and failed.changed


async def test_the_origins_refusal_is_passed_on(home: Home) -> None:
    record = await home.known()
    home.origin.fault(status=403, code="AccessDenied", times=None, method="GET")
    status, failed = await home.told(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    assert (status, failed.outcome) == (422, OpenOutcome.REFUSED)
    assert failed.refusal is not None and failed.refusal.status == 403 and b"AccessDenied" in failed.refusal.body


async def test_an_origin_that_is_down_is_said(home: Home) -> None:
    record = await home.known()
    await home.origin.down()
    status, failed = await home.told(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    assert (status, failed.outcome) == (503, OpenOutcome.UNAVAILABLE) and failed.retry_after_s > 0


async def test_a_failure_behind_the_head_breaks_the_connection_off(home: Home) -> None:
    """The head has left because the origin took its time; then there is no other way to say that nothing will come."""
    record = await home.known()
    hold = home.origin.hold(at="body", body_bytes=10 * KIB)
    response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    await hold.reached()
    home.origin.put("b", "k", os.urandom(BLOCK))
    await home.origin.drop_connections()
    with pytest.raises(OriginBroken, match="home: "):
        await response.read(BLOCK)
    hold.release()


async def test_an_asker_that_goes_takes_no_fill_with_it(home: Home) -> None:
    record = await home.known()
    asked = len(home.origin.requests)
    hold = home.origin.hold(at="body", body_bytes=40 * KIB)
    response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    await hold.reached()
    response.close()
    await until(lambda: not home.edge.connections)
    hold.release()
    await home.node.settled()
    assert len(home.origin.requests) == asked + 1
    fast = answered("block", 200, "fast")
    assert (await home.get(AskBlock("b", "k", record, 0, 0, BLOCK)))[1] == BODY[:BLOCK]
    assert answered("block", 200, "fast") == fast + 1


async def test_a_block_that_is_to_be_kept_is_kept_here_too_however_short(home: Home) -> None:
    """A short read does not fill a cold block at first touch; of a last block that is short, all of it is one."""
    record = await home.known()
    asked = len(home.origin.requests)
    ask = AskBlock("b", "k", record, 3, 0, 1000, fill=True)
    for _ in range(2):
        assert (await home.get(ask))[1] == BODY[3 * BLOCK :]
        await home.node.settled()
    assert len(home.origin.requests) == asked + 1


# --- objects ------------------------------------------------------------------------------------------------------------


SLICES = [
    (AskObject("b", "k"), 0, BLOCK),
    (AskObject("b", "k", head_only=True), 0, 0),
    (AskObject("b", "k", conditional=True), 0, 0),
    (AskObject("b", "k", ranged=True, first=10, last=19), 10, 20),
    (AskObject("b", "k", ranged=True, first=10, last=19, whole_block=True), 0, BLOCK),
    (AskObject("b", "k", ranged=True, first=60_000, last=70_000), 60_000, BLOCK),
    (AskObject("b", "k", ranged=True, first=BLOCK, last=BLOCK + 9, whole_block=True), 0, 0),
    (AskObject("b", "k", ranged=True, last=10), 0, 0),
    (AskObject("b", "k", ranged=True, first=len(BODY)), 0, 0),
    (AskObject("b", "k", whole_block=True), 0, BLOCK),
]


@pytest.mark.parametrize(("ask", "start", "stop"), SLICES)
@pytest.mark.parametrize("warm", [False, True])
async def test_a_version_and_the_part_of_it_that_is_in_its_first_block(
    home: Home, ask: AskObject, start: int, stop: int, warm: bool
) -> None:
    if warm:
        await home.fill()
        home.clock.ahead_s += 5
    else:
        home.origin.put("b", "k", BODY)
    fast = answered("object", 200, "fast")
    response, body = await home.get(ask)
    said = said_of(response)
    await home.node.settled()
    assert (said.start, said.stop, body) == (start, stop, BODY[start:stop])
    assert said.record == home.record() and said.storable
    assert (said.phase, said.origin_requests == 0) == ("hit" if warm else "miss", warm)
    assert 5 <= said.age_s < 25 if warm else 0 <= said.age_s < 20
    assert answered("object", 200, "fast") - fast == warm
    if warm and stop:
        assert int(response.headers["x-kos-checksum"], 16) == body_checksum(BODY[:BLOCK])


async def test_small_and_empty_objects(home: Home) -> None:
    for key, body in (("small", b"small"), ("empty", b""), ("middle", BODY[:20_000])):
        home.origin.put("b", key, body)
        for _ in range(3):
            response, got = await home.get(AskObject("b", key, whole_block=True))
            assert got == body and said_of(response).record.size == len(body)
            await home.node.settled()


async def test_a_record_that_may_not_be_vouched_for_is_good_for_one_question(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    await home.fill()
    monkeypatch.setattr(home.carrier, "vouches", lambda bucket, key, record: False)
    slow = answered("object", 200, "slow")
    response, body = await home.get(AskObject("b", "k"))
    assert body == BODY[:BLOCK] and not said_of(response).storable
    assert answered("object", 200, "slow") == slow + 1


async def test_what_is_gone_is_not_said_at_once(home: Home) -> None:
    record = await home.fill()
    slow = answered("object", 200, "slow")
    (await home.ask(AskObject("b", "k", head_only=True, gone=record.etag))).release()
    assert answered("object", 200, "slow") == slow + 1


async def test_what_is_not_stored_is_left_to_the_asker(home: Home) -> None:
    home.origin.put("b", "k", BODY, {"cache-control": "no-store"})
    status, failed = await home.told(AskObject("b", "k"))
    assert (status, failed.outcome, failed.reason) == (409, OpenOutcome.NOT_STORED, "no_store")


async def test_a_missing_object_is_the_origins_answer(home: Home) -> None:
    for ask in (AskObject("b", "none"), AskObject("b", "none", head_only=True)):
        status, failed = await home.told(ask)
        assert status == 422 and failed.refusal is not None and failed.refusal.status == 404


async def test_stale_only_where_it_is_wanted(tmp_path: Path) -> None:
    rule = config.Rule(match="b/*", freshness=10.0, stale_if_error_s=1000.0)
    async with home_of(tmp_path, rules=(rule,)) as home:
        record = await home.fill()
        home.clock.ahead_s += 60
        home.origin.fault(status=503, times=None)
        status, failed = await home.told(AskObject("b", "k"))
        assert (status, failed.outcome) == (503, OpenOutcome.UNAVAILABLE)
        response, body = await home.get(AskObject("b", "k", stale=True))
        said = said_of(response)
        assert (said.phase, said.storable, said.record, body) == ("stale", False, record, BODY[:BLOCK])
        assert said.age_s >= 60


# --- checksums and hints --------------------------------------------------------------------------------------------------


async def test_the_checksum_of_a_block_that_is_being_filled_is_waited_for(home: Home) -> None:
    record = await home.known()
    ask = AskBlock("b", "k", record, 0, 0, BLOCK, fill=True)
    hold = home.origin.hold(at="body", body_bytes=40 * KIB)
    response = await home.ask(ask)
    await hold.reached()
    asking = asyncio.ensure_future(home.get(ask, wire.CHECKSUM))
    hold.release()
    await response.read(BLOCK)
    response.release()
    answer, body = await asking
    assert body == b"" and int(answer.headers["x-kos-checksum"], 16) == body_checksum(BODY[:BLOCK])


async def test_there_is_no_checksum_of_what_is_not_here(home: Home) -> None:
    record = await home.known()
    status, failed = await home.told(AskBlock("b", "k", record, 2, 0, 1), wire.CHECKSUM)
    assert (status, failed.outcome) == (404, OpenOutcome.LEADER_GAVE_UP)


async def test_hints_reach_the_carrier(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await home.known()
    hints: list[Any] = []
    monkeypatch.setattr(home.carrier, "ahead", lambda *hint: hints.append(hint))
    response = await home.ask(AskAhead("b", "k", record, (1, 2)))
    assert (response.status, response.content_length) == (204, 0)
    response.release()
    assert hints == [("b", "k", record, (1, 2))]


async def test_what_a_node_that_drains_hands_over_is_brought(home: Home) -> None:
    record = await home.known()
    response = await home.ask(AskTake("b", "k", record, (0, 2), "leaving"))
    assert (response.status, response.content_length) == (204, 0)
    response.release()
    await home.node.settled()
    reader = home.node.workers[0].reader
    assert sorted(number for number, _ in reader.blocks(record.content)) == [0, 2]


async def test_what_is_here_is_not_brought_again(home: Home) -> None:
    record = await home.fill()
    before = len(home.origin.requests)
    (await home.ask(AskTake("b", "k", record, (0, 1, 2, 3), "leaving"))).release()
    await home.node.settled()
    assert len(home.origin.requests) == before


async def test_no_more_is_taken_over_at_a_time_than_there_is_room_for(home: Home) -> None:
    """The draining node asks again; what clients read goes first."""
    large = BODY * 6
    record = await home.known(body=large)
    hold = home.origin.hold(at="head", method="GET", times=None)
    numbers = tuple(range(18))
    (await home.ask(AskTake("b", "k", record, numbers, "leaving"))).release()
    await until(lambda: home.carrier.stats().fills >= 16)
    status, failed = await home.told(AskTake("b", "k", record, (18,), "leaving"))
    assert (status, failed.outcome) == (503, OpenOutcome.UNAVAILABLE)
    hold.release()
    await home.node.settled()
    (await home.ask(AskTake("b", "k", record, (18,), "leaving"))).release()
    await home.node.settled()
    assert len(list(home.node.workers[0].reader.blocks(record.content))) >= 17


# --- who is let in ----------------------------------------------------------------------------------------------------------


def request_of(path: str, ask: bytes, auth: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: kos", f"x-kos-auth: {auth}", f"x-kos-ask: {ask.decode()}"]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"


async def test_nothing_is_answered_that_is_not_signed(home: Home) -> None:
    record = await home.fill()
    ask, other = (wire.encode(AskBlock("b", "k", record, number, 0, BLOCK)) for number in (0, 1))
    secret, now = SECRET.encode(), home.clock.now()
    right = wire.sign(secret, "me", "home", wire.BLOCK, ask, now)
    opens = len(home.origin.requests)
    for auth in (
        wire.sign(b"another secret", "me", "home", wire.BLOCK, ask, now),
        wire.sign(secret, "me", "home", wire.CHECKSUM, ask, now),
        wire.sign(secret, "me", "home", wire.BLOCK, other, now),
        wire.sign(secret, "me", "home", wire.BLOCK, ask, now - wire.SKEW_S - 2),
        wire.sign(secret, "me", "home", wire.BLOCK, ask, now + wire.SKEW_S + 2),
        right.replace("me", "you"),
        right[:-1],
        right.upper(),
        "me",
        "",
        "me ² ",
        "mé 1 0000",
        f"me {int(now * 1000)} \udc80",
    ):
        status, failed = await home.raw(request_of(wire.BLOCK, ask, auth))
        assert status == 401 and failed.reason, auth
    assert len(home.origin.requests) == opens


@pytest.mark.parametrize("path", [wire.AHEAD, wire.TAKE])
async def test_what_makes_a_node_work_is_signed_for_that_node(home: Home, path: str) -> None:
    """So that who has heard it sets no other to work by it."""
    record = await home.known()
    asks = {wire.AHEAD: AskAhead("b", "k", record, (1,)), wire.TAKE: AskTake("b", "k", record, (1,), "leaving")}
    ask, now = wire.encode(asks[path]), home.clock.now()
    for to, expected in (("another", 401), ("", 401)):
        auth = wire.sign(SECRET.encode(), "me", to, path, ask, now)
        assert (await home.raw(request_of(path, ask, auth)))[0] == expected
    assert not home.carrier.stats().fills
    (await home.ask(asks[path])).release()
    await home.node.settled()
    assert [number for number, _ in home.node.workers[0].reader.blocks(record.content)] == [1]


async def test_a_question_holds_for_as_long_as_clocks_may_differ(home: Home) -> None:
    record = await home.fill()
    ask = wire.encode(AskBlock("b", "k", record, 9, 0, 1))  # which there is not: so that it says something
    auth = wire.sign(SECRET.encode(), "me", "home", wire.BLOCK, ask, home.clock.now())
    for _ in range(2):
        assert (await home.raw(request_of(wire.BLOCK, ask, auth)))[0] == 400
    home.clock.ahead_s += wire.SKEW_S + 1
    status, failed = await home.raw(request_of(wire.BLOCK, ask, auth))
    assert status == 401 and "another time" in failed.reason


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        (wire.BLOCK, b"no msgpack"),
        (wire.BLOCK, b""),
        (wire.BLOCK, wire.encode(AskObject("b", "k"))),
        (wire.OBJECT, wire.encode(wire.not_here("no"))),
        ("/kos/1/else", wire.encode(AskObject("b", "k"))),
        ("/kos/2/object", wire.encode(AskObject("b", "k"))),
        ("/", wire.encode(AskObject("b", "k"))),
    ],
)
async def test_what_is_no_question(home: Home, path: str, ask: bytes) -> None:
    auth = wire.sign(SECRET.encode(), "me", "home", path, ask, home.clock.now())
    status, failed = await home.raw(request_of(path, ask, auth))
    assert status == 400 and failed.outcome is OpenOutcome.LEADER_GAVE_UP


async def test_another_method_is_no_question(home: Home) -> None:
    ask = wire.encode(AskObject("b", "k"))
    auth = wire.sign(SECRET.encode(), "me", "home", wire.OBJECT, ask, home.clock.now())
    for method in ("PUT", "DELETE"):
        assert (await home.raw(request_of(wire.OBJECT, ask, auth, method)))[0] == 400


@pytest.mark.parametrize(
    "request_bytes", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nA : b\r\n\r\n", b"GET /" + b"x" * 70_000]
)
async def test_what_is_no_http(home: Home, request_bytes: bytes) -> None:
    status, failed = await home.raw(request_bytes)
    assert status == 400 and "not a question" in failed.reason


@pytest.mark.parametrize(
    ("number", "start", "stop"),
    [(0, 0, BLOCK + 1), (0, 5, 5), (0, 6, 5), (0, -1, 5), (3, 0, 1001), (4, 0, 1), (-1, 0, 1)],
)
async def test_there_are_no_such_bytes(home: Home, number: int, start: int, stop: int) -> None:
    record = await home.fill()
    ask = wire.encode(AskBlock("b", "k", record, number, start, stop))
    auth = wire.sign(SECRET.encode(), "me", "home", wire.BLOCK, ask, home.clock.now())
    status, failed = await home.raw(request_of(wire.BLOCK, ask, auth))
    assert status == 400 and "no bytes" in failed.reason


async def test_blocks_of_another_size_are_other_blocks(home: Home) -> None:
    record = await home.fill()
    for path in (wire.BLOCK, wire.CHECKSUM):
        status, failed = await home.told(AskBlock("b", "k", record, 1, 0, 10, block_bytes=2 * BLOCK), path)
        assert (status, failed.outcome) == (409, OpenOutcome.NOT_STORED) and "block_size" in failed.reason
    assert (await home.told(AskAhead("b", "k", record, (1,), block_bytes=2 * BLOCK)))[0] == 409
    assert (await home.told(AskTake("b", "k", record, (1,), "leaving", block_bytes=2 * BLOCK)))[0] == 409


async def test_a_long_question_and_a_long_answer(home: Home) -> None:
    """The most that a record may hold: its question does not fit into one read, nor its answer."""
    home.origin.put("b", "k", BODY, {"x-amz-meta-long": "v" * 7000, "cache-control": "max-age=5, " + "x" * 5000})
    await home.node.read("b", "k")
    await home.node.settled()
    record = home.record()
    long = msgspec.structs.replace(record, headers=(*record.headers, ("x-amz-meta-more", "w" * 18_000)))
    for _ in range(2):
        _, body = await home.get(AskBlock("b", "k", long, 1, 0, BLOCK))
        assert body == BODY[BLOCK : 2 * BLOCK]
        response, body = await home.get(AskObject("b", "k"))
        assert said_of(response).record == record and body == BODY[:BLOCK]


# --- connections --------------------------------------------------------------------------------------------------------------


async def test_one_connection_too_many(tmp_path: Path) -> None:
    async with home_of(tmp_path, connections=1) as home:
        record = await home.fill()
        response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK))
        status, failed = await home.told(AskBlock("b", "k", record, 1, 0, BLOCK))
        assert status == 503 and "limits.connections" in failed.reason
        assert await response.read(BLOCK) == BODY[:BLOCK]
        response.release()


async def test_many_questions_over_few_connections(home: Home) -> None:
    record = await home.fill()
    chance = random.Random(4)

    async def one() -> None:
        number = chance.randrange(3)
        start = chance.randrange(BLOCK)
        stop = chance.randrange(start, BLOCK) + 1
        _, body = await home.get(AskBlock("b", "k", record, number, start, stop))
        assert body == BODY[number * BLOCK + start : number * BLOCK + stop]

    for _ in range(10):
        await asyncio.gather(*[one() for _ in range(20)])
    assert len(home.edge.connections) <= 20


async def test_what_is_under_way_is_finished_while_draining(home: Home) -> None:
    record = await home.known()
    hold = home.origin.hold(at="body", body_bytes=40 * KIB)
    response = await home.ask(AskBlock("b", "k", record, 0, 0, BLOCK, fill=True))
    await hold.reached()
    draining = asyncio.ensure_future(home.edge.drain(10.0))
    await until(lambda: home.edge.draining)
    hold.release()
    assert await response.read(BLOCK) == BODY[:BLOCK]
    response.release()
    await draining
