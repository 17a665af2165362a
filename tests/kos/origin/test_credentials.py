"""Where the keys come from, and that looking for them stops nobody."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kos.config import Origin
from kos.errors import ConfigError, OriginUnavailable
from kos.origin.credentials import (
    ChainCredentials,
    Credentials,
    Found,
    StaticCredentials,
    from_config,
    resolve_chain,
    resolve_endpoint,
)
from tests.fakes.clock import FakeClock


class Chain:
    """A chain whose keys end at a time on a fake clock."""

    def __init__(self, clock: FakeClock, life_s: float | None = 3600.0) -> None:
        self.clock, self.life_s = clock, life_s
        self.lookups = 0
        self.error: Exception | None = None
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, profile: str | None) -> Found:
        assert threading.current_thread() is not threading.main_thread()
        self.lookups += 1
        assert self.may_go.wait(10)
        if self.error is not None:
            raise self.error
        ends_at = None if self.life_s is None else self.clock.monotonic() + self.life_s
        return Found(
            Credentials(f"key{self.lookups}", "secret", "token"),
            lambda seconds: ends_at is not None and self.clock.monotonic() + seconds >= ends_at,
        )


async def test_configured_keys_need_no_chain() -> None:
    source = from_config(Origin(endpoint="http://o", access_key="a", secret_key="s", session_token="t"), FakeClock())
    assert isinstance(source, StaticCredentials)
    assert await source.get() == Credentials("a", "s", "t")
    assert isinstance(from_config(Origin(endpoint="http://o"), FakeClock()), ChainCredentials)


def test_configured_keys_do_not_import_botocore() -> None:
    program = (
        "import sys; from kos.origin.lane import OriginLane; from kos.origin import credentials;"
        "assert not [m for m in sys.modules if 'botocore' in m]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])


async def test_everybody_waits_for_one_lookup() -> None:
    clock = FakeClock()
    chain = Chain(clock)
    source = ChainCredentials(clock, resolve=chain)
    got = await asyncio.gather(*(source.get() for _ in range(50)))
    assert {keys.access_key for keys in got} == {"key1"} and chain.lookups == 1
    await source.close()


async def test_keys_are_refreshed_beside_the_requests() -> None:
    clock = FakeClock()
    chain = Chain(clock)
    source = ChainCredentials(clock, resolve=chain)
    await source.get()
    clock.move(3600 - 800)  # within 15 minutes of the end, not within 10
    chain.may_go.clear()
    assert (await source.get()).access_key == "key1"
    chain.may_go.set()
    assert source._refresh is not None
    await source._refresh
    assert (await source.get()).access_key == "key2"
    clock.move(3600 - 300)  # within 10 minutes: wait for the new ones
    assert (await source.get()).access_key == "key3"
    assert chain.lookups == 3
    await source.close()


async def test_a_failed_refresh_leaves_the_old_keys_and_is_not_repeated_at_once() -> None:
    clock = FakeClock()
    chain = Chain(clock)
    source = ChainCredentials(clock, resolve=chain)
    await source.get()
    clock.move(3500)
    chain.error = OSError("the instance's metadata does not answer")
    for _ in range(5):
        assert (await source.get()).access_key == "key1"
    assert chain.lookups == 2
    chain.error = None
    clock.move(31)
    assert (await source.get()).access_key == "key3"
    await source.close()


async def test_no_keys_at_all_is_said_and_tried_again_later() -> None:
    clock = FakeClock()
    chain = Chain(clock)
    chain.error = ConfigError("nothing found")
    source = ChainCredentials(clock, resolve=chain)
    for _ in range(3):
        with pytest.raises(OriginUnavailable, match="no credentials"):
            await source.get()
    assert chain.lookups == 1
    chain.error = None
    clock.move(31)
    assert (await source.get()).access_key == "key2"
    await source.close()


async def test_a_waiter_that_goes_away_does_not_end_the_lookup() -> None:
    clock = FakeClock()
    chain = Chain(clock)
    chain.may_go.clear()
    source = ChainCredentials(clock, resolve=chain)
    first, second = asyncio.ensure_future(source.get()), asyncio.ensure_future(source.get())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    chain.may_go.set()
    assert (await second).access_key == "key1" and chain.lookups == 1
    await source.close()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An AWS environment of this test's own."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def test_the_chain_reads_environment_and_profiles(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="found no keys"):
        resolve_chain(None)
    (aws / "credentials").write_text("[train]\naws_access_key_id = P\naws_secret_access_key = S\n")
    found = resolve_chain("train")
    assert found.credentials == Credentials("P", "S", None) and not found.ends_within(3600)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    assert resolve_chain(None).credentials == Credentials("E", "S", "T")


def test_keys_with_an_end_are_known_to_end(aws: Path) -> None:
    (aws / "answer.json").write_text(
        '{"Version": 1, "AccessKeyId": "R", "SecretAccessKey": "S", "SessionToken": "T",'
        ' "Expiration": "2100-01-01T00:00:00Z"}'
    )
    (aws / "config").write_text(f"[profile role]\ncredential_process = cat {aws / 'answer.json'}\n")
    found = resolve_chain("role")
    assert found.credentials == Credentials("R", "S", "T")
    assert not found.ends_within(3600) and found.ends_within(200 * 365 * 86400)


async def test_an_endpoint_is_found_for_a_region(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await resolve_endpoint("eu-central-1") == "https://s3.eu-central-1.amazonaws.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store:9000/")
    assert await resolve_endpoint("eu-central-1") == "http://store:9000"


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Credentials("a", "hidden", "hidden too"))
