"""The list of all cases: functions that take a Scene, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from tests.contract.s3.scene import Scene

CASES: Final[dict[str, Callable[[Scene], None]]] = {}

V = TypeVar("V")


def case(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """Adds one case, named after its module and function."""
    _add(_name(function), function)
    return function


def each(variants: Mapping[str, V]) -> Callable[[Callable[[Scene, V], None]], Callable[[Scene, V], None]]:
    """Adds a case for each of the named values, which the function takes as its second argument."""

    def add(function: Callable[[Scene, V], None]) -> Callable[[Scene, V], None]:
        for label, value in variants.items():
            _add(f"{_name(function)}[{label}]", lambda scene, value=value: function(scene, value))
        return function

    return add


def _add(name: str, function: Callable[[Scene], None]) -> None:
    assert name not in CASES, f"two cases are called {name}"
    CASES[name] = function


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
