"""One moto origin and one node for all client tests; a bucket for each test, made through kos."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node, client, moto_origin, node

_numbers = itertools.count()


@pytest.fixture(scope="session")
def origin_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_origin(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def kos_node(tmp_path_factory: pytest.TempPathFactory, origin_url: str) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), origin_url) as one:
        yield one


@pytest.fixture
def s3(kos_node: Node) -> Any:
    return client(kos_node.s3_url)


@pytest.fixture
def origin(origin_url: str) -> Any:
    """The same store without kos: what it holds is what a client of the origin would see."""
    return client(origin_url)


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"bucket-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def client_env(tmp_path: Path) -> dict[str, str]:
    """Environment of a client process: these credentials and nothing of this machine's."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
