"""Bodies received into a sink, over both event loops and over TLS, and what is relied on in aiohttp."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import client_proto, streams

from kos.config import Origin
from kos.errors import OriginBroken
from kos.origin.credentials import StaticCredentials
from kos.origin.lane import OriginLane
from tests.fakes.clock import FakeClock
from tests.fakes.origin import FakeOrigin

from .conftest import KEYS, Buffer, Seen

MakeLane = Callable[..., Awaitable[OriginLane]]


def test_what_is_used_of_aiohttp_is_still_there() -> None:
    assert callable(streams.StreamReader.feed_eof)
    assert callable(streams.StreamReader.is_eof)
    assert callable(streams.StreamReader.exception)
    assert callable(streams.StreamReader.read_nowait)
    assert isinstance(client_proto.ResponseHandler.read_timeout, property)
    assert client_proto.ResponseHandler.read_timeout.fset is not None
    assert callable(client_proto.ResponseHandler.start_timeout)
    assert issubclass(client_proto.ResponseHandler, asyncio.Protocol)


async def test_aiohttp_still_has_a_switch_for_its_own_retries() -> None:
    async with aiohttp.ClientSession() as session:
        assert session._retry_connection is True


@pytest.mark.parametrize("size", [1, 100, 65_536, 262_144, 1_000_003])
async def test_the_body_lands_whole_and_the_connection_is_kept(
    lane: OriginLane, origin: FakeOrigin, big: bytes, size: int
) -> None:
    origin.put("b", "k", big[:size])
    for _ in range(3):
        sink = Buffer(size)
        async with await lane.request("GET", "b", "k") as response:
            assert response.content_length == size
            await response.into(sink, size)
        assert bytes(sink.bytes) == big[:size]
    assert origin.connections == 1
    assert origin.count(method="GET", status=200) == 3


async def test_other_requests_use_the_connection_afterwards(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    origin.put("b", "k", big)
    for _ in range(2):
        sink = Buffer(len(big))
        async with await lane.request("GET", "b", "k") as response:
            await response.into(sink, len(big))
        async with await lane.request("GET", "b", "k", headers={"range": "bytes=10-19"}) as response:
            assert (response.status, await response.read(100)) == (206, big[10:20])
        async with await lane.request("HEAD", "b", "k") as response:
            assert response.content_length == len(big)
        async with await lane.request("PUT", "b", "other", body=big[:100_000]) as response:
            assert response.status == 200
    assert origin.connections == 1


async def test_an_empty_body_needs_no_room(lane: OriginLane, origin: FakeOrigin) -> None:
    origin.put("b", "k", b"")
    async with await lane.request("GET", "b", "k") as response:
        await response.into(Buffer(0), 0)
    async with await lane.request("GET", "b", "k") as response:
        assert await response.read(10) == b""
    assert origin.connections == 1


async def test_room_that_is_larger_than_the_body_is_not_overrun(
    lane: OriginLane, origin: FakeOrigin, big: bytes
) -> None:
    origin.put("b", "k", big)
    sink = Buffer(2 * len(big), room=2 * len(big))
    async with await lane.request("GET", "b", "k") as response:
        await response.into(sink, len(big))
    assert sink.at == len(big) and bytes(sink.bytes[: len(big)]) == big and not any(sink.bytes[len(big) :])


async def test_part_of_a_body_closes_the_connection(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    origin.put("b", "k", big)
    for wanted in (1000, 1_000_000):
        sink = Buffer(wanted)
        async with await lane.request("GET", "b", "k") as response:
            await response.into(sink, wanted)
        assert bytes(sink.bytes) == big[:wanted]
    async with await lane.request("GET", "b", "k", headers={"range": "bytes=0-0"}) as response:
        assert await response.read(1) == big[:1]
    assert origin.connections == 3


async def test_what_came_with_the_head_and_was_held_back_comes_first(
    lane: OriginLane, origin: FakeOrigin, big: bytes
) -> None:
    """A reader that is late finds aiohttp's stream full and its connection paused."""
    origin.put("b", "k", big)
    response = await lane.request("GET", "b", "k")
    stream = response._response.content
    for _ in range(100_000):
        if stream._size > stream.get_read_buffer_limits()[1]:
            break
        await asyncio.sleep(0)
    assert stream._size > stream.get_read_buffer_limits()[1]
    sink = Buffer(len(big), room=10_000)
    async with response:
        await response.into(sink, len(big))
    assert bytes(sink.bytes) == big
    async with await lane.request("HEAD", "b", "k"):
        assert origin.connections == 1


@pytest.mark.parametrize("pause_after", [1, 300_000, 2_000_000])
async def test_a_sink_that_is_full_holds_the_origin_back(
    lane: OriginLane, origin: FakeOrigin, big: bytes, pause_after: int
) -> None:
    body = big * 8  # more than the socket buffers of both sides
    origin.put("b", "k", body)
    sink = Buffer(len(body), pause_after=pause_after)
    async with await lane.request("GET", "b", "k") as response:
        taking = asyncio.ensure_future(response.into(sink, len(body)))
        await sink.paused.wait()
        at = sink.at
        for _ in range(200):
            await asyncio.sleep(0)
        assert sink.at == at and not taking.done()
        sink.paused.clear()
        response.resume()
        await taking
    assert bytes(sink.bytes) == body


async def test_a_body_cut_short_says_how_much_came(
    lane: OriginLane, origin: FakeOrigin, big: bytes, seen: Seen
) -> None:
    origin.put("b", "k", big)
    for cut, reset in ((0, False), (1000, False), (1_000_000, False), (1_000_000, True)):
        origin.fault(body_cut=cut, reset=reset)
        sink = Buffer(len(big))
        with pytest.raises(OriginBroken) as broken:
            async with await lane.request("GET", "b", "k") as response:
                await response.into(sink, len(big))
        assert sink.at <= cut and (reset or sink.at == cut)
        assert f"after {sink.at} of {len(big)} bytes" in broken.value.reason
        assert bytes(sink.bytes[: sink.at]) == big[: sink.at]
    assert seen.failures == ["body"] * 4
    async with await lane.request("GET", "b", "k") as response:
        assert await response.read(len(big)) == big


async def test_a_body_shorter_than_wanted_is_refused_at_once(lane: OriginLane, origin: FakeOrigin) -> None:
    origin.put("b", "k", b"12345")
    with pytest.raises(OriginBroken, match="announced 5 bytes where 6 were wanted"):
        async with await lane.request("GET", "b", "k") as response:
            await response.into(Buffer(6), 6)


async def test_more_than_was_announced_does_not_reach_sink_or_next_answer(
    lane: OriginLane, origin: FakeOrigin, big: bytes
) -> None:
    origin.put("b", "k", big)
    origin.fault(body_length=-1000, headers={"connection": "keep-alive"})
    wanted = len(big) - 1000
    sink = Buffer(len(big))
    async with await lane.request("GET", "b", "k") as response:
        await response.into(sink, wanted)
    assert sink.at == wanted and bytes(sink.bytes[:wanted]) == big[:wanted]
    async with await lane.request("GET", "b", "k", headers={"range": "bytes=5-9"}) as response:
        assert await response.read(10) == big[5:10]


async def test_an_origin_that_stands_still_is_given_up(make_lane: MakeLane, origin: FakeOrigin, big: bytes) -> None:
    lane = await make_lane(read_timeout_s=0.05)
    origin.put("b", "k", big)
    hold = origin.hold(at="body", body_bytes=1_000_000)
    sink = Buffer(len(big))
    with pytest.raises(OriginBroken, match=r"nothing from the origin for 0.05 s \(after 1000000 of"):
        async with await lane.request("GET", "b", "k") as response:
            await response.into(sink, len(big))
    hold.release()
    assert bytes(sink.bytes[: sink.at]) == big[: sink.at]


async def test_a_sink_that_stands_still_is_not_the_origins_fault(
    make_lane: MakeLane, origin: FakeOrigin, big: bytes
) -> None:
    lane = await make_lane(read_timeout_s=0.02)
    origin.put("b", "k", big)
    for pause_after in (1, 1_000_000):
        sink = Buffer(len(big), pause_after=pause_after)
        async with await lane.request("GET", "b", "k") as response:
            taking = asyncio.ensure_future(response.into(sink, len(big)))
            await sink.paused.wait()
            done, _ = await asyncio.wait([taking], timeout=0.1)  # five times the origin's patience
            assert not done
            sink.paused.clear()
            response.resume()
            await taking
        assert bytes(sink.bytes) == big


async def test_a_cancelled_reader_closes_the_connection(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    origin.put("b", "k", big)
    hold = origin.hold(at="body", body_bytes=1_000_000)
    sink = Buffer(len(big))

    async def take() -> None:
        async with await lane.request("GET", "b", "k") as response:
            await response.into(sink, len(big))

    taking = asyncio.ensure_future(take())
    await hold.reached()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    at = sink.at
    hold.release()
    async with await lane.request("HEAD", "b", "k"):
        pass
    assert origin.connections == 2 and sink.at == at


async def test_what_the_sink_raises_comes_out_as_it_is(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    class Full(Buffer):
        def received(self, n: int) -> bool:
            super().received(n)
            if self.at > 1_000_000:
                raise OSError(28, "No space left on device")
            return True

    origin.put("b", "k", big)
    with pytest.raises(OSError, match="No space left"):
        async with await lane.request("GET", "b", "k") as response:
            await response.into(Full(len(big)), len(big))
    async with await lane.request("HEAD", "b", "k") as response:
        assert response.status == 200


async def test_a_chunked_body_goes_into_a_sink_too(lane: OriginLane, origin: FakeOrigin) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    origin.fault(raw=head + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
    sink = Buffer(11)
    async with await lane.request("GET", "b", "k") as response:
        await response.into(sink, 11)
    assert bytes(sink.bytes) == b"hello world"
    origin.fault(raw=head + b"5\r\nhello\r\n0\r\n\r\n")
    with pytest.raises(OriginBroken, match="after 5 of 11 bytes"):
        async with await lane.request("GET", "b", "k") as response:
            await response.into(Buffer(11), 11)


async def test_many_at_once_do_not_mix(lane: OriginLane, origin: FakeOrigin, big: bytes) -> None:
    for number in range(20):
        origin.put("b", str(number), big[number * 1000 :])

    async def take(number: int) -> bool:
        length = len(big) - number * 1000
        sink = Buffer(length, room=100_000)
        async with await lane.request("GET", "b", str(number)) as response:
            await response.into(sink, length)
        return bytes(sink.bytes) == big[number * 1000 :]

    assert all(await asyncio.gather(*(take(number) for number in range(20))))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake origin")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "origin.pem"
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(encoding)
    )
    return path


@pytest.mark.parametrize("trusted", ["ca_file", "unverified"])
async def test_over_tls(certificate: Path, big: bytes, trusted: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with FakeOrigin(tls=context) as origin:
        origin.put("b", "k", big)
        options = {"ca_file": str(certificate)} if trusted == "ca_file" else {"verify_tls": False}
        config = Origin(endpoint=origin.endpoint, **options)  # type: ignore[arg-type]
        lane = OriginLane(config, StaticCredentials(KEYS), FakeClock(), observer=Seen())
        await lane.start()
        for room in (7_000, 262_144, len(big)):
            sink = Buffer(len(big), room=room, pause_after=1_500_000)
            async with await lane.request("GET", "b", "k") as response:
                taking = asyncio.ensure_future(response.into(sink, len(big)))
                await sink.paused.wait()
                sink.paused.clear()
                response.resume()
                await taking
            assert bytes(sink.bytes) == big
        origin.fault(body_cut=1_000_000)
        with pytest.raises(OriginBroken, match="after 1000000 of"):
            async with await lane.request("GET", "b", "k") as response:
                await response.into(Buffer(len(big)), len(big))
        assert origin.connections == 1
        await lane.close()
