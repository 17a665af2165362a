"""The link: nothing is lost or changed, and delay and rate are about what was asked for.

Bounds are wide where a busy machine could move them (too slow), and tight where the model itself would be wrong (faster
than the link, sooner than its delay).
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import links, synthetic
from bench.client import Address, get, put
from bench.shaper import Link
from bench.signing import Object, plain_get, signed_put

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="splice, epoll")
BUCKET = synthetic.BUCKET


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[links.Far]:
    with links.far_origin(Path(tmp_path_factory.mktemp("far")), None) as running:
        yield running


def _read(to: Address, size: int, name: str = "link") -> float:
    key = synthetic.key_of(size, name)
    return get(to, plain_get(to, Object(BUCKET, key).path), verify_key=key).mb_s


def test_one_connection_gets_its_rate_and_no_more(far: links.Far, tmp_path: Path) -> None:
    with links.through(Link(0.001, 40e6), far.at, tmp_path) as to:
        assert 10 < _read(to, 16 << 20) < 42


def test_all_together_get_no_more_than_the_link(far: links.Far, tmp_path: Path) -> None:
    with links.through(Link(0.001, 40e6, 60e6), far.at, tmp_path) as to:
        rates: list[float] = []
        threads = [
            threading.Thread(target=lambda i=i: rates.append(_read(to, 6 << 20, f"together-{i}"))) for i in range(4)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        seconds = time.monotonic() - began
    assert len(rates) == 4
    assert 15 < 4 * (6 << 20) / seconds / 1e6 < 63


def test_a_new_connection_and_a_request_take_two_round_trips(far: links.Far, tmp_path: Path) -> None:
    with links.through(Link(0.02, 100e6), far.at, tmp_path) as to:
        key = synthetic.key_of(1000, "late")
        first = get(to, plain_get(to, Object(BUCKET, key).path), verify_key=key).first_s
        assert 0.079 < first < 1.0


def test_uploads_are_shaped_too_and_arrive_whole(far: links.Far, tmp_path: Path) -> None:
    body = synthetic.pattern()[: 8 << 20]
    before = far.counters()["bytes_received"]
    with links.through(Link(0.001, 40e6), far.at, tmp_path) as to:
        seen = put(to, signed_put(to, Object(BUCKET, "1/up"), len(body)), body)
    assert far.counters()["bytes_received"] - before == len(body)
    assert 5 < seen.mb_s < 43


def test_a_client_that_leaves_takes_its_connection_to_the_origin_along(far: links.Far, tmp_path: Path) -> None:
    with links.through(Link(0.001, 5e6), far.at, tmp_path) as to:
        for _ in range(20):
            with socket.create_connection((to.host, to.port), timeout=10) as sock:
                sock.sendall(plain_get(to, Object(BUCKET, synthetic.key_of(64 << 20, "left")).path))
                assert sock.recv(1000)
        # Still relaying, at full rate: nothing of those who left is in the way.
        assert _read(to, 2 << 20, "after") > 1
