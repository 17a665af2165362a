"""For the tests of clusters: what this machine cannot do is skipped with the reason."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.fakes.network import Unavailable


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except Unavailable as missing:
        pytest.skip(str(missing))
