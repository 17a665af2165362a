"""Reads a YAML file into a tree of structs, and says exactly where a file is wrong.

Owns: lines, unknown and duplicate keys, missing options, secrets from files and the environment, the form of messages.
Does not own: the options (kos.config) or the values (kos.config_values); it knows any msgspec.Struct whose fields are
annotated with Key or Secret, are structs, or are tuples of structs.

Invariant: a secret never appears in a message.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml

from kos.config_values import Key, Kind, Outside, Secret
from kos.errors import ConfigError

#: a configuration is read whole; nobody writes a megabyte of it by hand
FILE_BYTES_MAX: Final = 1 << 20
SECRET_BYTES_MAX: Final = 4096
COMPLAINTS_MAX: Final = 20

#: user and password of a URL
_PASSWORD: Final = re.compile(r"//[^/]*@")

S = TypeVar("S", bound=msgspec.Struct)
Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that is wrong: at which option, what was found, what is allowed."""

    place: Place
    found: str
    allowed: str


@dataclass(frozen=True, slots=True)
class Option:
    """One option of the schema: its path (lists as `rules[]`), its kind, whether it must be there, its default."""

    path: str
    kind: Kind | None  # None: a secret
    required: bool
    default: Any

    @property
    def default_text(self) -> str:
        if self.required:
            return "required"
        if self.default is None or self.kind is None:
            return "none"
        return self.kind.show(self.default)


@dataclass(slots=True)
class _Reading:
    """What has been found so far of one file."""

    environ: Mapping[str, str]
    base: Path
    lines: dict[Place, int] = field(default_factory=dict)
    complaints: list[Complaint] = field(default_factory=list)

    def complain(self, place: Place, found: str, allowed: str) -> None:
        self.complaints.append(Complaint(place, found, allowed))

    def line(self, place: Place) -> int:
        """Of the option, or of the nearest thing around it that is in the file."""
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place, 1)


class _Missing:
    """Marks what could not be read; the complaint about it has been made."""


_MISSING: Final = _Missing()


def load(
    path: Path, schema: type[S], check: Callable[[S], Iterable[Complaint]], environ: Mapping[str, str] | None = None
) -> S:
    """Read path into schema, then run check over it. Raises ConfigError that lists everything found wrong."""
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: found more than {FILE_BYTES_MAX} bytes, allowed: {FILE_BYTES_MAX}")
    root = _compose(path, text)
    reading = _Reading(os.environ if environ is None else environ, path.parent)
    reading.lines[()] = 1
    value = _read_struct(reading, (), root, schema)
    if not reading.complaints and isinstance(value, schema):
        reading.complaints.extend(check(value))
        if not reading.complaints:
            return value
    raise ConfigError(_message(path, reading))


def options(schema: type[msgspec.Struct], prefix: str = "") -> Iterator[Option]:
    """Every option of the schema, in order; lists once with `[]`."""
    for name, hint, required, default in _fields(schema):
        key = _key_of(name, hint)
        inner = _struct_in(hint)
        if inner is not None:
            is_list = typing.get_origin(hint) is tuple
            yield from options(inner, f"{prefix}{key}{'[]' if is_list else ''}.")
            continue
        mark = _mark(hint)
        kind = mark.kind if isinstance(mark, Key | Outside) else None
        yield Option(f"{prefix}{key}", kind, required, default)


def _compose(path: Path, text: bytes) -> yaml.Node | None:
    try:
        return yaml.compose(text.decode("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: found a byte that is not UTF-8 at offset {error.start}, allowed: UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.decode("utf-8")[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: a character that is not allowed") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply, or not one document") from error


def _message(path: Path, reading: _Reading) -> str:
    located = sorted(
        ((reading.line(c.place), c) for c in reading.complaints[:COMPLAINTS_MAX]), key=lambda pair: pair[0]
    )
    text = [f"{path}:{line}: {_dotted(c.place)}: found {c.found}, allowed: {c.allowed}" for line, c in located]
    if len(reading.complaints) > COMPLAINTS_MAX:
        text.append(f"{path}: and {len(reading.complaints) - COMPLAINTS_MAX} more")
    return "\n".join(text)


def _dotted(place: Place) -> str:
    text = ""
    for step in place:
        name = f"[{step}]" if isinstance(step, int) else step if step.isidentifier() else repr(step[:100])
        text += f".{name}" if text and isinstance(step, str) else name
    return text or "(file)"


def _fields(schema: type[msgspec.Struct]) -> Iterator[tuple[str, Any, bool, Any]]:
    hints = typing.get_type_hints(schema, include_extras=True)
    for described in msgspec.structs.fields(schema):
        default = described.default
        if described.default_factory is not msgspec.NODEFAULT:
            default = described.default_factory()
        yield described.name, hints[described.name], described.required, default


def _mark(hint: Any) -> Key | Secret:
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, (Key, Secret))]
    assert len(marks) == 1, f"an option needs one Key or Secret: {hint}"
    return marks[0]


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None


def _key_of(name: str, hint: Any) -> str:
    if _struct_in(hint) is not None:
        return name
    return _mark(hint).name or name


def _read_struct(reading: _Reading, place: Place, node: yaml.Node | None, schema: type[msgspec.Struct]) -> Any:
    """The struct, or _MISSING when anything in it was wrong."""
    members = _members(reading, place, node, schema)
    if members is None:
        return _MISSING
    values: dict[str, Any] = {}
    whole = True
    for name, hint, required, default in _fields(schema):
        key = _key_of(name, hint)
        inner = _struct_in(hint)
        here = (*place, key)
        value: Any = default
        if inner is not None:
            if key in members:
                reader = _read_list if typing.get_origin(hint) is tuple else _read_struct
                value = reader(reading, here, members[key], inner)
        elif isinstance(mark := _mark(hint), Secret):
            value = _read_secret(reading, place, members, mark, required, default)
        elif key in members:
            value = _read_scalar(reading, here, members[key], mark.kind)
        if value is msgspec.NODEFAULT:
            reading.complain(here, "nothing", _allowed(hint))
            value = _MISSING
        whole = whole and value is not _MISSING
        values[name] = value
    return schema(**values) if whole else _MISSING


def _allowed(hint: Any) -> str:
    if _struct_in(hint) is not None:
        return "a list" if typing.get_origin(hint) is tuple else "a mapping of options"
    mark = _mark(hint)
    return _secret_keys_text(mark) if isinstance(mark, Secret) else mark.kind.allowed


def _members(
    reading: _Reading, place: Place, node: yaml.Node | None, schema: type[msgspec.Struct]
) -> dict[str, yaml.Node] | None:
    """The mapping's nodes by key; complains about keys that are unknown or stand there twice."""
    if not isinstance(node, yaml.MappingNode):
        reading.complain(place, _kind_of(node), "a mapping of options")
        return None
    known = _known_keys(schema)
    members: dict[str, yaml.Node] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(not a name)"
        here = (*place, key)
        line = key_node.start_mark.line + 1
        if key in members:
            reading.complain(here, f"the key a second time (first on line {reading.lines[here]})", "each key once")
            reading.lines[here] = line
            continue
        reading.lines[here] = line
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"{nearest[0]} (perhaps meant); " if nearest else ""
            reading.complain(here, "an unknown key", f"{hint}{' '.join(sorted(known))}")
            continue
        members[key] = value_node
    return members


def _known_keys(schema: type[msgspec.Struct]) -> set[str]:
    known: set[str] = set()
    for name, hint, _, _ in _fields(schema):
        if _struct_in(hint) is None and isinstance(mark := _mark(hint), Secret):
            known.update(_secret_keys(mark))
        else:
            known.add(_key_of(name, hint))
    return known


def _read_list(reading: _Reading, place: Place, node: yaml.Node, schema: type[msgspec.Struct]) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        reading.complain(place, _kind_of(node), "a list")
        return _MISSING
    values = []
    for index, item in enumerate(node.value):
        here = (*place, index)
        reading.lines[here] = item.start_mark.line + 1
        values.append(_read_struct(reading, here, item, schema))
    return _MISSING if _MISSING in values else tuple(values)


def _kind_of(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"{node.value!r}" if node.value else "nothing"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if node is not None else "nothing"


def _read_scalar(reading: _Reading, place: Place, node: yaml.Node, kind: Kind) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
        reading.complain(place, _kind_of(node), kind.allowed)
        return _MISSING
    try:
        return kind.parse(node.value)
    except ValueError:
        shown = _PASSWORD.sub("//…@", node.value)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
        reading.complain(place, repr(shown), kind.allowed)
        return _MISSING


def _secret_keys(mark: Secret) -> tuple[str, str, str]:
    return mark.name, f"{mark.name}_file", f"{mark.name}_env"


def _secret_keys_text(mark: Secret) -> str:
    return "one of " + " ".join(_secret_keys(mark))


def _read_secret(
    reading: _Reading, place: Place, members: Mapping[str, yaml.Node], mark: Secret, required: bool, default: Any
) -> Any:
    """The secret from the file itself, from a file it names (relative to it), or from the environment."""
    given = [key for key in _secret_keys(mark) if key in members]
    if not given:
        return msgspec.NODEFAULT if required else default
    here = (*place, given[0])
    if len(given) > 1:
        reading.complain((*place, given[1]), " and ".join(given), _secret_keys_text(mark))
        return _MISSING
    node = members[given[0]]
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        reading.complain(here, "nothing" if isinstance(node, yaml.ScalarNode) else _kind_of(node), "a text")
        return _MISSING
    if given[0] == mark.name:
        secret: str | None = node.value
    elif given[0].endswith("_file"):
        secret = _secret_file(reading, here, node.value)
    else:
        secret = reading.environ.get(node.value)
        if not secret:
            reading.complain(here, f"no environment variable {node.value!r}, or an empty one", "the name of one set")
    if not secret:
        return _MISSING
    if isinstance(mark, Outside):
        try:
            return mark.kind.parse(secret)
        except ValueError:
            reading.complain(here, repr(secret[:100]), mark.kind.allowed)
            return _MISSING
    if not secret.isprintable() or not secret.isascii():
        reading.complain(here, "a secret with unprintable characters", "printable ASCII")
        return _MISSING
    return secret


def _secret_file(reading: _Reading, place: Place, name: str) -> str | None:
    try:
        with (reading.base / name).open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1)
        text = content.decode("ascii").strip()
    except OSError as error:
        reading.complain(place, f"{name!r}: {error.strerror}", "a file that can be read")
        return None
    except UnicodeDecodeError:
        text = ""
    if not text or len(content) > SECRET_BYTES_MAX:
        reading.complain(place, f"{name!r}: empty, too long or not text", f"1 to {SECRET_BYTES_MAX} printable bytes")
        return None
    return text
