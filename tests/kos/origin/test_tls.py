"""Origins over https: whom the lane trusts, what it says when it does not, names of buckets in the host."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kos.config import Origin
from kos.errors import ConfigError, OriginUnavailable
from kos.origin.credentials import Credentials, StaticCredentials
from kos.origin.lane import OriginLane
from tests.fakes import certificates
from tests.fakes.clock import FakeClock
from tests.fakes.origin import FakeOrigin


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

    async def close(self) -> None: ...


def lane_to(origin: FakeOrigin, host: str, clock: FakeClock, **options: Any) -> OriginLane:
    options = {"ca_file": str(certificates.ca_file()), "retries": 0, **options}
    config = Origin(endpoint=f"https://{host}:{origin.port}", **options)
    return OriginLane(config, StaticCredentials(Credentials("AKORIGIN", "origin-secret")), clock, resolver=Loopback())


async def test_the_bucket_in_the_name() -> None:
    async with FakeOrigin(tls=certificates.server().context(), domain="s3.kos.test") as origin:
        origin.put("photos", "a/b c", b"virtual")
        lane = lane_to(origin, "s3.kos.test", FakeClock(), addressing="virtual")
        await lane.start()
        async with await lane.request("GET", "photos", "a/b c") as response:
            assert await response.read(100) == b"virtual"
        # A wildcard stands for one label, and the name of such a bucket would have two: it is asked for in the path.
        origin.put("my.photos", "k", b"path")
        async with await lane.request("GET", "my.photos", "k") as response:
            assert await response.read(100) == b"path"
        assert origin.requests[-1].headers["host"] == f"s3.kos.test:{origin.port}"
        await lane.close()


async def test_a_name_that_the_certificate_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    async with FakeOrigin(tls=certificates.server().context()) as origin:
        lane = lane_to(origin, "other.example", clock, breaker_failures=1000)
        await lane.start()
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                with pytest.raises(OriginUnavailable, match="certificate"):
                    await lane.request("GET", "b", "k")
            assert len(caplog.records) == 1, "said once"
            assert "certificate is not valid for 'other.example'" in caplog.records[0].__dict__["reason"]
            clock.move(61)
            with pytest.raises(OriginUnavailable):
                await lane.request("GET", "b", "k")
            assert len(caplog.records) == 2, "and again a minute later"
        await lane.close()
    assert not origin.requests


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_authorities_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    async with FakeOrigin() as origin:
        lane = lane_to(origin, "s3.kos.test", FakeClock(), ca_file=str(path))
        with pytest.raises(ConfigError, match=r"origin\.ca_file: .*ca\.pem: found .*, allowed: certificates in PEM"):
            await lane.start()
