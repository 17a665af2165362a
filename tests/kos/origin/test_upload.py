"""Bodies on their way to the origin: whole and right, or no object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kos.errors import OriginBroken, OriginUnavailable, S3Error
from kos.origin.lane import OriginLane
from tests.fakes.origin import FakeOrigin

MakeLane = Callable[..., Awaitable[OriginLane]]


async def pieces(*given: bytes, error: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece
    if error is not None:
        raise error


@pytest.mark.parametrize(
    "given", [(b"x",), (b"ab", b"c"), (b"", b"abc", b"", b""), (b"abc", b"d"), (b"x" * 300_000, b"y" * 300_000)]
)
async def test_a_whole_body_becomes_an_object(lane: OriginLane, origin: FakeOrigin, given: tuple[bytes, ...]) -> None:
    whole = b"".join(given)
    for _ in range(2):
        async with await lane.request("PUT", "b", "k", body=pieces(*given), content_length=len(whole)) as response:
            assert response.status == 200
    stored = origin.get("b", "k")
    assert stored is not None and stored.body == whole
    assert origin.requests[0].headers["content-length"] == str(len(whole))
    assert "transfer-encoding" not in origin.requests[0].headers
    assert origin.connections == 1


async def test_memoryviews_will_do(lane: OriginLane, origin: FakeOrigin) -> None:
    async def views() -> AsyncIterator[memoryview]:
        yield memoryview(b"-hello-")[1:6]
        yield memoryview(b" world")

    async with await lane.request("PUT", "b", "k", body=views(), content_length=11) as response:
        assert response.status == 200
    stored = origin.get("b", "k")
    assert stored is not None and stored.body == b"hello world"


@pytest.mark.parametrize(
    ("given", "length", "error"),
    [
        ((b"abc",), 4, None),
        ((), 4, None),
        ((b"abc", b"de"), 4, None),
        ((b"abcd", b"e"), 4, None),
        ((b"x" * 500_000,), 500_001, None),
        ((b"e",), 0, None),
        ((b"abcd",), 4, S3Error("BadDigest")),
        ((b"x" * 500_000, b"y" * 500_000), 1_000_000, S3Error("XAmzContentSHA256Mismatch")),
        ((b"x" * 500_000,), 1_000_000, S3Error("SignatureDoesNotMatch")),
        ((), 4, RuntimeError("the client went away")),
        ((), 0, S3Error("BadDigest")),
    ],
)
async def test_a_body_that_is_not_right_becomes_none(
    lane: OriginLane, origin: FakeOrigin, given: tuple[bytes, ...], length: int, error: Exception | None
) -> None:
    """Also when it turns out wrong only after its last byte: the checksum of a trailer comes after everything."""
    with pytest.raises(Exception) as raised:
        await lane.request("PUT", "b", "k", body=pieces(*given, error=error), content_length=length)
    if error is None:
        assert isinstance(raised.value, S3Error) and raised.value.code == "IncompleteBody"
    else:
        assert raised.value is error
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 404
    assert origin.get("b", "k") is None
    assert not any(request.body_complete for request in origin.requests if request.method == "PUT")


async def test_the_clients_fault_tells_the_breaker_nothing(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(breaker_failures=1)
    for _ in range(3):
        with pytest.raises(S3Error):
            await lane.request("PUT", "b", "k", body=pieces(b"a"), content_length=2)
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 404


async def test_an_early_refusal_is_noticed_while_sending(lane: OriginLane, origin: FakeOrigin) -> None:
    given = 0
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        try:
            while True:
                given += 1
                yield b"x" * 65_536
                await asyncio.sleep(0)
        finally:
            ended.set()

    for again in range(2):
        origin.fault(status=403, code="AccessDenied", early=True)
        ended.clear()
        async with await lane.request("PUT", "b", "k", body=endless(), content_length=1 << 40) as response:
            assert response.status == 403 and b"AccessDenied" in await response.read(10_000)
        await ended.wait()
        assert origin.connections == again + 1
    at = given
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 404
    assert given == at


async def test_a_refusal_while_the_client_says_nothing(lane: OriginLane, origin: FakeOrigin) -> None:
    never = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await never.wait()

    origin.fault(status=403, early=True)
    async with await lane.request("PUT", "b", "k", body=silent(), content_length=10) as response:
        assert response.status == 403


async def test_success_before_the_body_was_sent_is_none(lane: OriginLane, origin: FakeOrigin) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    origin.fault(status=200, early=True)
    with pytest.raises(OriginBroken, match="before the body was sent"):
        await lane.request("PUT", "b", "k", body=silent(), content_length=10)


async def test_a_body_in_pieces_is_not_sent_twice(lane: OriginLane, origin: FakeOrigin) -> None:
    origin.fault(None, status=503)
    async with await lane.request("PUT", "b", "k", body=pieces(b"abc"), content_length=3) as response:
        assert response.status == 503
    origin.heal()
    origin.fault(close=True)
    with pytest.raises(OriginUnavailable):
        await lane.request("PUT", "b", "k", body=pieces(b"abc"), content_length=3)
    assert origin.count(method="PUT") == 2


async def test_a_long_body_that_is_all_there_is_sent_again(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    origin.fault(status=503)
    origin.fault(status=500, early=True)
    async with await lane.request("PUT", "b", "k", body=big) as response:
        assert response.status == 200
    stored = origin.get("b", "k")
    assert stored is not None and stored.body == big and origin.count(method="PUT") == 3


async def test_a_body_in_pieces_that_was_not_begun_may_be(lane: OriginLane, origin: FakeOrigin) -> None:
    """No connection, no piece taken: nothing stands against another attempt."""
    await origin.down()
    up = asyncio.ensure_future(origin.up())
    async with await lane.request("PUT", "b", "k", body=pieces(b"abc"), content_length=3) as response:
        assert response.status == 200
    await up
    stored = origin.get("b", "k")
    assert stored is not None and stored.body == b"abc"


async def test_an_origin_that_takes_no_bytes_is_given_up(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(read_timeout_s=0.05)
    hold = origin.hold(at="head")

    async def much() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1_000_000

    with pytest.raises(OriginUnavailable, match="did not answer in time"):
        await lane.request("PUT", "b", "k", body=much(), content_length=1 << 40)
    hold.release()


async def test_a_slow_client_is_not_the_origins_fault(make_lane: MakeLane, origin: FakeOrigin) -> None:
    lane = await make_lane(read_timeout_s=0.02, connect_timeout_s=0.02)
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"abc"
        await go_on.wait()
        yield b"def"

    sending = asyncio.ensure_future(lane.request("PUT", "b", "k", body=slow(), content_length=6))
    done, _ = await asyncio.wait([sending], timeout=0.1)  # five times the origin's patience
    assert not done
    go_on.set()
    async with await sending as response:
        assert response.status == 200


async def test_a_cancelled_upload_becomes_no_object(lane: OriginLane, origin: FakeOrigin) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            begun.set()
            await asyncio.sleep(0)

    sending = asyncio.ensure_future(lane.request("PUT", "b", "k", body=endless(), content_length=1 << 40))
    await begun.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 404
