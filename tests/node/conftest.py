"""A node with a programmable origin behind it, for tests that count what the origin is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.node import Node, client, node
from tests.fakes.origin import FakeOrigin


@pytest.fixture(scope="session")
def shared_origin() -> Iterator[FakeOrigin]:
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b")
        yield origin


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory, shared_origin: FakeOrigin) -> Iterator[Node]:
    overrides: dict[str, Any] = {
        "origin": {"retries": 2, "retry_base": "20ms", "breaker_open": "200ms", "read_timeout": "3s"},
        "rules": [
            {"match": "b/short/*", "freshness": "300ms", "stale_if_error": "1h"},
            {"match": "b/always/*", "freshness": "always", "stale_if_error": "0s"},
            {"match": "b/stale/*", "freshness": "always", "stale_if_error": "1h"},
            {"match": "*", "freshness": "immutable"},
        ],
    }
    with node(tmp_path_factory.mktemp("node"), shared_origin.endpoint, overrides) as one:
        yield one


@pytest.fixture
def origin(shared_origin: FakeOrigin) -> Iterator[FakeOrigin]:
    """The origin with an empty log and no faults; keys are the tests' own, so that they do not meet."""
    shared_origin.heal()
    shared_origin.forget()
    yield shared_origin
    shared_origin.heal()


@pytest.fixture
def kos(shared_node: Node, origin: FakeOrigin) -> Any:
    """A boto3 client of the node."""
    return client(shared_node.s3_url, max_pool_connections=128)


@pytest.fixture
def own_origin() -> Iterator[FakeOrigin]:
    """An origin of this test's own, for tests that stop or restart things."""
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b")
        yield origin


@pytest.fixture
def own_directory(tmp_path: Path) -> Path:
    return tmp_path
