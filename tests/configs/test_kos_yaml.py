"""configs/kos.yaml documents every option, with the default that the code has, and a reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from kos import config, config_file
from kos.config_file import Option

FILE = Path(__file__).parents[2] / "configs" / "kos.yaml"
OPTIONS = {option.path: option for option in config_file.options(config.Config)}

_SECTION = re.compile(r"(?P<key>[a-z0-9_]+):( \[\])?")
_OPTION = re.compile(
    r"(?P<indent> *)(?P<off># )?(?P<dash>- )?(?P<key>[a-z0-9_]+): +(?P<value>\S.*?)  # (?P<note>required|default: .+)"
)


@dataclass(frozen=True)
class Documented:
    path: str
    value: str
    note: str
    off: bool
    reason: bool


def documented() -> list[Documented]:
    found: list[Documented] = []
    section, in_list, line_before = "", False, ""
    for line in FILE.read_text().splitlines():
        if match := _SECTION.fullmatch(line):
            section, in_list = match["key"], False
        elif match := _OPTION.fullmatch(line):
            in_list = in_list or bool(match["dash"])
            prefix = "" if not match["indent"] and not match["off"] else f"{section}{'[]' if in_list else ''}."
            key = match["key"]
            if f"{prefix}{key}" not in OPTIONS:
                key = key.removesuffix("_env").removesuffix("_file")
            value = match["value"].strip('"')
            found.append(
                Documented(
                    f"{prefix}{key}", value, match["note"], bool(match["off"]), line_before.lstrip().startswith("#")
                )
            )
        line_before = line
    return found


DOCUMENTED = {each.path: each for each in documented()}


def test_every_option_is_there_once_and_no_other() -> None:
    assert sorted(each.path for each in documented()) == sorted(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.path)
def test_default_and_reason(option: Option) -> None:
    said = DOCUMENTED[option.path]
    assert said.note == (option.default_text if option.required else f"default: {option.default_text}")
    assert said.reason, "a comment above it says why"
    if not option.required and not said.off and "[]" not in option.path:
        assert said.value == option.default_text, "the file shows the default itself"


def test_the_file_is_good_and_holds_the_defaults() -> None:
    loaded = config.load(FILE, {})
    for section in ("listen", "control", "limits", "supervisor", "log"):
        assert getattr(loaded, section) == type(getattr(loaded, section))()
    assert loaded.workers == 2
    assert loaded.origin == config.Origin(endpoint=loaded.origin.endpoint)
    assert loaded.cache == config.Cache(dir=loaded.cache.dir, size_bytes=loaded.cache.size_bytes)


@pytest.mark.parametrize(
    "option", [each for each in OPTIONS.values() if each.kind and not each.required], ids=lambda option: option.path
)
def test_every_default_would_be_accepted(option: Option) -> None:
    assert option.kind is not None
    if option.default is not None:
        assert option.kind.parse(option.kind.show(option.default)) == option.default


def test_every_struct_of_the_schema_is_frozen() -> None:
    for value in vars(config).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct:
            assert value.__struct_config__.frozen
