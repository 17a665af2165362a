"""Requests as they reach the origin, and what comes of an origin that fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import aiohttp.abc
import pytest
from prometheus_client import REGISTRY

from kos.config import Origin
from kos.errors import OriginBroken, OriginUnavailable, S3Error
from kos.origin.breaker import State
from kos.origin.credentials import StaticCredentials
from kos.origin.lane import OriginLane
from kos.origin.observer import Metrics
from tests.fakes.origin import FakeOrigin

from .conftest import KEYS, QuickClock, Seen

MakeLane = Callable[..., Awaitable[OriginLane]]

ODD_KEYS = [
    "plain/key.bin",
    "//a//b//",
    "a/../b/./c",
    "..",
    "space and+plus",
    "é/ü/日本",
    "100%/%2F/%",
    "q?x=1&y#z",
    "~!*'()@:$,;=",
    '\\back"slash<>',
    "new\nline\ttab",
]


class Loopback(aiohttp.abc.AbstractResolver):
    """Every name is this machine."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        return [
            {
                "hostname": host,
                "host": "127.0.0.1",
                "port": port,
                "family": socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
        ]

    async def close(self) -> None:
        return


@pytest.mark.parametrize("key", ODD_KEYS)
async def test_odd_keys_go_out_as_they_were_signed(lane: OriginLane, origin: FakeOrigin, key: str) -> None:
    async with await lane.request("PUT", "b", key, body=b"body") as response:
        assert response.status == 200, await response.read(10_000)
    async with await lane.request("GET", "b", key, query=[("response-content-type", "a+b &=é")]) as response:
        assert await response.read(100) == b"body"
        assert response.headers["content-type"].encode("utf-8", "surrogateescape").decode() == "a+b &=é"
    assert origin.get("b", key) is not None
    assert origin.requests[0].raw_path.startswith("/b/")
    assert origin.requests[0].raw_path.count("/") == 2 + key.count("/")


async def test_the_path_is_not_tidied_up(lane: OriginLane, origin: FakeOrigin) -> None:
    async with await lane.request("HEAD", "b", "a//../é+b", query="versionId=null&prefix=a%2fb+c&empty"):
        assert origin.requests[0].target == "/b/a//../%C3%A9%2Bb?empty=&prefix=a%2Fb%20c&versionId=null"


async def test_virtual_hosted_addressing(seen: Seen) -> None:
    async with FakeOrigin(secrets={KEYS.access_key: KEYS.secret_key}, domain="s3.test") as origin:
        config = Origin(endpoint=f"http://s3.test:{origin.port}", addressing="virtual")
        lane = OriginLane(config, StaticCredentials(KEYS), QuickClock(), observer=seen, resolver=Loopback())
        await lane.start()
        origin.put("my-bucket", "/a/b", b"body")
        async with await lane.request("GET", "my-bucket", "/a/b") as response:
            assert await response.read(10) == b"body"
        assert origin.requests[0].headers["host"] == f"my-bucket.s3.test:{origin.port}"
        assert origin.requests[0].target == "//a/b"
        async with await lane.request("GET", "my-bucket", None, query="list-type=2") as response:
            assert b"<Key>/a/b</Key>" in await response.read(10_000)
        async with await lane.request("GET", None, None) as response:
            assert b"<Name>my-bucket</Name>" in await response.read(10_000)
        await lane.close()


@pytest.mark.parametrize("bucket", ["Data", "a_b", "a..b", "a.-b", "x" * 64, "a-"])
async def test_a_bucket_that_no_host_can_name_is_asked_by_path(seen: Seen, bucket: str) -> None:
    async with FakeOrigin(secrets={KEYS.access_key: KEYS.secret_key}, domain="s3.test") as origin:
        config = Origin(endpoint=f"http://s3.test:{origin.port}", addressing="virtual")
        lane = OriginLane(config, StaticCredentials(KEYS), QuickClock(), observer=seen, resolver=Loopback())
        await lane.start()
        origin.put(bucket, "k", b"body")
        async with await lane.request("GET", bucket, "k") as response:
            assert (response.status, await response.read(10)) == (200, b"body")
        assert origin.requests[0].headers["host"] == f"s3.test:{origin.port}"
        await lane.close()


class OneBucket(Loopback):
    """Only one bucket's name is known."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        if not host.startswith("known."):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return await super().resolve(host, port, family)


async def test_hosts_that_are_not_there_keep_nobody_from_others(seen: Seen) -> None:
    async with FakeOrigin(secrets={KEYS.access_key: KEYS.secret_key}, domain="s3.test") as origin:
        config = Origin(endpoint=f"http://s3.test:{origin.port}", addressing="virtual", breaker_failures=2)
        lane = OriginLane(config, StaticCredentials(KEYS), QuickClock(), observer=seen, resolver=OneBucket())
        await lane.start()
        origin.put("known", "k", b"body")
        for n in range(4):
            with pytest.raises(OriginUnavailable, match="cannot connect"):
                await lane.request("GET", f"typo-{n}", "k")
        async with await lane.request("GET", "known", "k") as response:
            assert await response.read(10) == b"body"
        await lane.close()


async def test_only_what_was_asked_for_is_sent(lane: OriginLane, origin: FakeOrigin) -> None:
    theirs = {
        "Content-Type": "x/y",
        "x-amz-meta-Note": "été",
        "Authorization": "theirs",
        "Host": "kos:9000",
        "Content-Length": "7",
        "Transfer-Encoding": "chunked",
        "Expect": "100-continue",
        "X-Amz-Date": "20000101T000000Z",
    }
    async with await lane.request("PUT", "b", "k", headers=theirs, body=b"12345") as response:
        assert response.status == 200
    sent = origin.requests[0]
    assert sorted(name.lower() for name, _ in sent.raw_headers) == [
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "host",
        "user-agent",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-meta-note",
    ]
    assert sent.headers["content-length"] == "5" and sent.headers["accept-encoding"] == "identity"
    assert sent.headers["host"] == f"127.0.0.1:{origin.port}" and sent.headers["x-amz-meta-note"] == "été"
    async with await lane.request("PUT", "b", "k2", body=b""):
        assert "content-type" not in origin.requests[1].headers
        assert origin.requests[1].headers["content-length"] == "0"
    async with await lane.request("DELETE", "b", "k2"):
        assert "content-type" not in origin.requests[2].headers


async def test_a_header_that_cannot_be_sent_is_the_clients_fault(lane: OriginLane, origin: FakeOrigin) -> None:
    with pytest.raises(S3Error, match="not valid UTF-8"):
        await lane.request("PUT", "b", "k", headers={"x-amz-meta-a": "caf\udce9"}, body=b"1")
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 404


async def test_answers_are_left_as_they_are(lane: OriginLane, origin: FakeOrigin) -> None:
    origin.put("b", "zipped", b"\x1f\x8bnot really", {"content-encoding": "gzip"})
    async with await lane.request("GET", "b", "zipped") as response:
        assert await response.read(100) == b"\x1f\x8bnot really"
    origin.fault(status=307, code="TemporaryRedirect", headers={"location": "http://elsewhere/"})
    async with await lane.request("GET", "b", "zipped") as response:
        assert response.status == 307 and response.headers["location"] == "http://elsewhere/"
    origin.fault(headers={"set-cookie": "a=b"})
    async with await lane.request("HEAD", "b", "zipped"):
        pass
    async with await lane.request("HEAD", "b", "zipped"):
        assert "cookie" not in origin.requests[-1].headers
    async with await lane.request("GET", "b", "missing") as response:
        assert response.status == 404 and b"NoSuchKey" in await response.read(10_000)
    assert origin.connections == 1


async def test_bodies_come_in_pieces_or_whole_and_bounded(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    origin.put("b", "k", big)
    async with await lane.request("GET", "b", "k") as response:
        assert b"".join([piece async for piece in response.pieces()]) == big
    assert origin.connections == 1
    with pytest.raises(OriginBroken, match="longer than 1000 bytes"):
        async with await lane.request("GET", "b", "k") as response:
            await response.read(1000)
    origin.fault(body_cut=1_000_000)
    with pytest.raises(OriginBroken, match="after 1000000 bytes"):
        async with await lane.request("GET", "b", "k") as response:
            await response.read(len(big))


# -- retries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_passing_troubles_are_sat_out(make_lane: MakeLane, origin: FakeOrigin, seen: Seen, status: int) -> None:
    clock = QuickClock()
    lane = await make_lane(clock, retry_base_s=0.1)
    origin.put("b", "k", b"body")
    for method, body in (("GET", None), ("HEAD", None), ("PUT", b"new"), ("DELETE", None)):
        origin.forget()
        origin.fault(2, status=status)
        async with await lane.request(method, "b", "k", body=body) as response:
            assert response.status in (200, 204)
        assert origin.count() == 3
    assert len(clock.slept) == 8 and all(0 <= s <= 0.2 for s in clock.slept)
    assert origin.connections == 1, "a short error's body is read, so its connection stays"
    assert seen.answers[:3] == [("GET", status), ("GET", status), ("GET", 200)]


async def test_the_last_answer_is_given_when_attempts_are_used_up(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(retries=2)
    origin.fault(None, status=503, code="SlowDown")
    async with await lane.request("GET", "b", "k") as response:
        assert response.status == 503 and b"SlowDown" in await response.read(10_000)
    assert origin.count() == 3


async def test_retry_after_is_respected(make_lane: MakeLane, origin: FakeOrigin) -> None:
    clock = QuickClock()
    lane = await make_lane(clock, retry_max_s=3.0)
    origin.put("b", "k", b"")
    for wish in ("2", "3600"):
        origin.fault(status=503, retry_after=wish)
        async with await lane.request("GET", "b", "k") as response:
            assert response.status == 200
    assert clock.slept == [2.0, 3.0]


@pytest.mark.parametrize(
    ("method", "headers", "options"),
    [
        ("POST", {}, {"body": b"x", "query": "uploads"}),
        ("PUT", {"If-None-Match": "*"}, {"body": b"x"}),
        ("PUT", {}, {"body": b"x", "retry": False}),
        ("GET", {}, {"retry": False}),
    ],
)
@pytest.mark.parametrize("fault", [{"status": 500}, {"close": True}])
async def test_what_must_not_be_done_twice_is_not(
    lane: OriginLane,
    origin: FakeOrigin,
    method: str,
    headers: dict[str, str],
    options: dict[str, object],
    fault: dict[str, object],
) -> None:
    async with await lane.request("HEAD", "b", None):  # so that the fault meets a kept connection
        pass
    origin.fault(None, method=method, **fault)
    if "status" in fault:
        async with await lane.request(method, "b", "k", headers=headers, **options) as response:  # type: ignore[arg-type]
            assert response.status == 500
    else:
        with pytest.raises(OriginUnavailable, match="closed the connection"):
            await lane.request(method, "b", "k", headers=headers, **options)  # type: ignore[arg-type]
    assert origin.count(method=method) == 1


async def test_a_closed_connection_is_tried_again(lane: OriginLane, origin: FakeOrigin, seen: Seen) -> None:
    origin.put("b", "k", b"body")
    for fault in ({"close": True}, {"close": True, "after": "head"}, {"close": True, "reset": True}):
        origin.fault(**fault)
        async with await lane.request("GET", "b", "k") as response:
            assert await response.read(10) == b"body"
    assert seen.failures == ["disconnected"] * 3
    await origin.drop_connections()
    async with await lane.request("GET", "b", "k") as response:
        assert await response.read(10) == b"body"


async def test_no_origin_at_all(make_lane: MakeLane, origin: FakeOrigin, seen: Seen) -> None:
    lane = await make_lane()
    await origin.down()
    with pytest.raises(OriginUnavailable, match="cannot connect"):
        await lane.request("GET", "b", "k")
    assert seen.failures == ["connect"] * 4
    await origin.up()
    async with await lane.request("HEAD", "b", None) as response:
        assert response.status == 200


async def test_an_origin_that_does_not_answer(make_lane: MakeLane, origin: FakeOrigin, seen: Seen) -> None:
    lane = await make_lane(read_timeout_s=0.05, retries=1)
    hold = origin.hold(None, at="answer")
    with pytest.raises(OriginUnavailable, match="did not answer in time"):
        await lane.request("GET", "b", "k")
    assert len(hold.held) == 1 and seen.failures == ["answer_timeout"]  # a silent origin is not asked twice


async def test_the_deadline_ends_the_attempts(make_lane: MakeLane, origin: FakeOrigin) -> None:
    clock = QuickClock()
    lane = await make_lane(clock, retries=20, retry_base_s=4.0, request_timeout_s=30.0, breaker_failures=100)
    origin.fault(None, status=503, retry_after="4")
    async with await lane.request("GET", "b", "k") as response:
        assert response.status == 503
    assert 24.0 <= sum(clock.slept) < 30.0
    assert origin.count() == len(clock.slept) + 1


async def test_what_is_no_http_is_said_to_be_none(lane: OriginLane, origin: FakeOrigin) -> None:
    origin.fault(None, raw=b"220 mail.example.com ESMTP\r\n\r\n")
    with pytest.raises(OriginBroken, match="no proper HTTP"):
        await lane.request("GET", "b", "k")
    assert origin.count() == 4


# -- breaker -----------------------------------------------------------------------------------------------------


async def test_the_breaker_answers_quickly_and_finds_the_origin_again(
    make_lane: MakeLane, origin: FakeOrigin, seen: Seen
) -> None:
    clock = QuickClock()
    lane = await make_lane(clock, breaker_failures=8, breaker_open_s=60.0)
    await origin.down()
    for _ in range(2):
        with pytest.raises(OriginUnavailable):
            await lane.request("GET", "b", "k")
    seen.failures.clear()
    with pytest.raises(OriginUnavailable, match=r"origin unavailable \(connect\)") as refused:
        await lane.request("GET", "b", "k")
    assert seen.failures == ["breaker"] and 50 < refused.value.retry_after_s < 61
    await origin.up()
    clock.move(60)
    async with await lane.request("HEAD", "b", None) as response:
        assert response.status == 200
    assert seen.states == [State.CLOSED, State.OPEN, State.HALF_OPEN, State.CLOSED]


async def test_refusals_of_the_origin_never_open_it(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(breaker_failures=1)
    for status in (400, 403, 404, 409, 412, 416, 429, 500, 501):
        origin.fault(status=status)
        async with await lane.request("GET", "b", "k", retry=False) as response:
            assert response.status == status
    assert lane.breaker.state is State.CLOSED


async def test_a_cancelled_probe_leaves_the_way_free(make_lane: MakeLane, origin: FakeOrigin) -> None:
    clock = QuickClock()
    lane = await make_lane(clock, breaker_failures=1, retries=0)
    origin.fault(status=503)
    async with await lane.request("HEAD", "b", None):
        clock.move(60)
    hold = origin.hold(at="answer")
    probe = asyncio.ensure_future(lane.request("HEAD", "b", None))
    await hold.reached()
    with pytest.raises(OriginUnavailable, match="being tried again"):
        await lane.request("HEAD", "b", None)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    async with await lane.request("HEAD", "b", None) as response:
        assert response.status == 200
    assert lane.breaker.state is State.CLOSED


# -- connections -------------------------------------------------------------------------------------------------


async def test_connections_are_bounded(make_lane: MakeLane, origin: FakeOrigin, big: bytes) -> None:
    lane = await make_lane(connections=3)
    origin.put("b", "k", big)

    async def take() -> None:
        async with await lane.request("GET", "b", "k") as response:
            assert len(await response.read(len(big))) == len(big)

    await asyncio.gather(*(take() for _ in range(30)))
    assert origin.busiest <= 3 and origin.connections <= 3


async def test_waiting_for_a_connection_is_bounded_and_not_the_origins_fault(
    make_lane: MakeLane, origin: FakeOrigin, big: bytes, seen: Seen
) -> None:
    lane = await make_lane(connections=1, read_timeout_s=0.05, breaker_failures=1)
    origin.put("b", "k", big * 8)
    async with await lane.request("GET", "b", "k") as response:
        with pytest.raises(OriginUnavailable, match="busy"):
            await lane.request("HEAD", "b", "k")
        waiting = [asyncio.ensure_future(lane.request("HEAD", "b", "k")) for _ in range(17)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [str(each.exception()) for each in done] == ["too many requests wait for a connection to the origin"]
        await asyncio.wait(waiting)
        assert response.status == 200
    assert lane.breaker.state is State.CLOSED and set(seen.failures) == {"busy"}


async def test_a_cancelled_request_gives_its_connection_up(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(connections=1)
    hold = origin.hold(at="answer")
    asking = asyncio.ensure_future(lane.request("GET", "b", "k"))
    await hold.reached()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    async with await lane.request("HEAD", "b", None) as response:
        assert response.status == 200


async def test_metrics_are_counted(origin: FakeOrigin) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    config = Origin(endpoint=origin.endpoint, retries=0)
    lane = OriginLane(config, StaticCredentials(KEYS), QuickClock(), observer=Metrics())
    await lane.start()
    before = value("kos_origin_requests_total", operation="HeadObject", status="404")
    errors = value("kos_origin_errors_total", reason="disconnected")
    async with await lane.request("HEAD", "b", "k", operation="HeadObject"):
        pass
    origin.fault(close=True)
    with pytest.raises(OriginUnavailable):
        await lane.request("HEAD", "b", "k", operation="HeadObject")
    assert value("kos_origin_requests_total", operation="HeadObject", status="404") == before + 1
    assert value("kos_origin_errors_total", reason="disconnected") == errors + 1
    await lane.close()
