"""The log and the access log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kos import config, log, metrics
from kos.errors import ConfigError
from tests.conditions import until


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
def test_lines_are_json_with_what_extra_gave() -> None:
    stream = io.StringIO()
    log.setup("info", "worker-0", stream)
    logging.getLogger("kos.test").info("hello %s", "you", extra={"bucket": "b", "path": Path("/x")})
    logging.getLogger("kos.test").debug("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("kos.test").exception("failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "hello you"
    assert (first["level"], first["process"], first["bucket"], first["path"]) == ("info", "worker-0", "b", "/x")
    assert second["error"] == "ValueError('why')"
    assert "Traceback" in second["traceback"]


def test_timestamps() -> None:
    assert log.timestamp(1893456000.0429) == "2030-01-01T00:00:00.042Z"


async def opened(path: Path, **settings: float) -> log.AccessLog:
    access = log.AccessLog(config.Log(access=str(path), **settings))  # type: ignore[arg-type]
    await access.start()
    return access


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_lines_arrive_in_order_soon_and_at_close(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    access = await opened(path, access_flush_s=0.01)
    access.write({"n": 0})
    await until(lambda: lines(path) == [{"n": 0}])
    for number in range(1, 50):
        access.write({"n": number})
    await access.close()
    assert lines(path) == [{"n": number} for number in range(50)]
    access.write({"n": "late"})


async def test_a_full_batch_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    access = await opened(path, access_flush_s=3600.0, access_batch_bytes=100)
    for number in range(20):
        access.write({"n": number})
    await until(lambda: len(lines(path)) >= 12)
    await access.close()
    assert len(lines(path)) == 20


async def test_what_does_not_fit_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    before = metrics.ACCESS_LOG_DROPPED._value.get()
    access = await opened(path, access_queue_bytes=100)
    for number in range(100):
        access.write({"n": number})
    await access.close()
    kept = len(lines(path))
    assert 5 < kept < 20
    assert metrics.ACCESS_LOG_DROPPED._value.get() - before == 100 - kept


async def test_reopened_after_rotation(tmp_path: Path) -> None:
    path, rotated = tmp_path / "access.log", tmp_path / "access.log.1"
    access = await opened(path, access_flush_s=0.01)
    access.write({"n": 1})
    path.rename(rotated)
    access.reopen()
    await until(path.exists)
    access.write({"n": 2})
    await access.close()
    assert (lines(rotated), lines(path)) == ([{"n": 1}], [{"n": 2}])


async def test_off_writes_nothing_and_a_bad_path_is_a_config_error(tmp_path: Path) -> None:
    access = log.AccessLog(config.Log())
    await access.start()
    access.write({"n": 1})
    await access.close()
    with pytest.raises(ConfigError, match=r"log\.access: .*: No such file"):
        await opened(tmp_path / "none" / "access.log")


async def test_a_full_disk_drops_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    access = await opened(Path("/dev/full"), access_flush_s=0.01)
    access.write({"n": 1})
    await until(lambda: len(caplog.records) == 1)
    assert caplog.records[0].__dict__["reason"] == "No space left on device"
    access.write({"n": 2})
    await access.close()
    assert len(caplog.records) == 1
