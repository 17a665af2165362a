"""The values that a configuration is made of: sizes, durations, addresses, choices, and how they are written.

Owns: turning one scalar's text into a value and back, and the words that say what is allowed.
Does not own: which options exist (kos.config) or where in a file they stand (kos.config_file).

Invariant: `kind.parse(kind.show(value)) == value` for every value that a Kind accepts.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

#: freshness of a record that is never asked for again, and of one that is asked for each time; seconds
IMMUTABLE: Final = math.inf
ALWAYS: Final = 0.0
#: stands for `auto` until the struct replaces it by what it works out
AUTO: Final = -1.0

_SIZE_UNITS: Final = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_UNIT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of scalar: parse raises ValueError for what is not allowed; allowed says so to the operator."""

    allowed: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


@dataclass(frozen=True, slots=True)
class Key:
    """Annotation of a struct's field: the option's name in the file (None: the field's) and its kind."""

    kind: Kind
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Secret:
    """Annotation of a struct's field that may come from NAME, NAME_file or NAME_env."""

    name: str


@dataclass(frozen=True, slots=True)
class Outside(Secret):
    """A Secret that is none: it differs from node to node while the file is the same, and is checked and shown."""

    kind: Kind


def show_size(size_bytes: int) -> str:
    """The shortest exact text of a size: 8388608 -> 8MiB."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"
    return str(size_bytes)


def show_duration(seconds: float) -> str:
    """The shortest exact text of a duration: 3600.0 -> 1h, 0.2 -> 200ms."""
    if seconds and seconds == int(seconds):
        for unit in ("d", "h", "m"):
            if seconds % _DURATION_UNITS[unit] == 0:
                return f"{int(seconds // _DURATION_UNITS[unit])}{unit}"
    if seconds == int(seconds):
        return f"{int(seconds)}s"
    thousandths = seconds * 1000
    return f"{round(thousandths) if math.isclose(thousandths, round(thousandths)) else thousandths}ms"


def show_freshness(seconds: float) -> str:
    if seconds == IMMUTABLE:
        return "immutable"
    return "always" if seconds == ALWAYS else show_duration(seconds)


def show_freshness_or_auto(seconds: float) -> str:
    return "auto" if seconds == AUTO else show_freshness(seconds)


def parse_size(text: str) -> int:
    """Bytes from `100GiB`, `1.5MiB` or a plain number of bytes."""
    match = _NUMBER_UNIT.fullmatch(text)
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError(text)
    amount = float(match[1]) * _SIZE_UNITS[match[2]] if "." in match[1] else int(match[1]) * _SIZE_UNITS[match[2]]
    if amount != int(amount):
        raise ValueError(text)
    return int(amount)


def parse_duration(text: str) -> float:
    """Seconds from `200ms`, `30s`, `5m`, `2h`, `1d`; the unit may be left out of 0 alone."""
    if text == "0":
        return 0.0
    match = _NUMBER_UNIT.fullmatch(text)
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError(text)
    return float(match[1]) * _DURATION_UNITS[match[2]]


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 host stands in brackets, which are not part of the result. ValueError."""
    if text.startswith("["):
        host, closing, port = text[1:].partition("]:")
        if not closing:
            raise ValueError(text)
        ipaddress.IPv6Address(host)
    else:
        host, _, port = text.rpartition(":")
        if not _HOST.fullmatch(host):
            raise ValueError(text)
        if re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(text)
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of split_address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _within(parse: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    def bounded(text: str) -> float:
        number = parse(text)
        if not low <= number <= high:
            raise ValueError(text)
        return number

    return bounded


def size(low: int, high: int = 1024 * TIB) -> Kind:
    limits = f"from {show_size(low)} to {show_size(high)}"
    return Kind(f"bytes with unit KiB MiB GiB TiB, e.g. 100GiB, {limits}", _within(parse_size, low, high), show_size)


def size_or_auto(low: int, high: int = 1024 * TIB) -> Kind:
    """As size; `auto` stands for 0, which the struct replaces by what it works out."""
    inner = size(low, high)
    return Kind(
        f"auto, or {inner.allowed}",
        lambda text: 0 if text == "auto" else inner.parse(text),
        lambda size_bytes: show_size(size_bytes) if size_bytes else "auto",
    )


def count_or_auto(low: int, high: int) -> Kind:
    """As count; `auto` stands for 0, which whoever reads it replaces by what is worked out."""
    inner = count(low, high)
    return Kind(
        f"auto, or {inner.allowed}",
        lambda text: 0 if text == "auto" else inner.parse(text),
        lambda number: str(number) if number else "auto",
    )


def duration(low_s: float, high_s: float) -> Kind:
    limits = f"from {show_duration(low_s)} to {show_duration(high_s)}"
    return Kind(
        f"a time with unit ms s m h d, e.g. 30s, {limits}", _within(parse_duration, low_s, high_s), show_duration
    )


def count(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]+", text):
            raise ValueError(text)
        return int(text)

    return Kind(f"a whole number from {low} to {high}", _within(parse, low, high))


def choice(*names: str) -> Kind:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return Kind(" | ".join(names), parse)


def _parse_boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(text)
        return text

    return parse


def _parse_address(text: str) -> str:
    split_address(text)
    return text


def _parse_host(text: str) -> str:
    split_address(f"[{text}]:0" if ":" in text else f"{text}:0")
    return text


def _parse_endpoint(text: str) -> str:
    """scheme://host[:port] and nothing more: a path, a query or a password in it would be silently ignored."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(text)
    if parts.path not in ("", "/") or re.search(r"\s", text) or parts.port == 0:
        raise ValueError(text)
    return text.rstrip("/")


def _parse_domain(text: str) -> str:
    if not _HOST.fullmatch(text) or len(text) > 253:
        raise ValueError(text)
    return text.lower()


def _parse_control_url(text: str) -> str:
    if not text.startswith(("sqlite:///", "postgresql://", "postgresql+")):
        raise ValueError(text)
    return text


def _parse_freshness(text: str) -> float:
    if text == "immutable":
        return IMMUTABLE
    if text == "always":
        return ALWAYS
    seconds = parse_duration(text)
    if seconds > 365 * 86400:
        raise ValueError(text)
    return seconds


def _parse_glob(text: str) -> str:
    """A glob over a bucket, or over bucket/key. Refused: empty, no bucket, blanks around it, a `[` never closed."""
    if not text or text != text.strip() or text.startswith("/"):
        raise ValueError(text)
    rest = text
    while "[" in rest:
        _, _, rest = rest.partition("[")
        # A `]` right after `[` or `[!` stands for itself, as everywhere in globs.
        closing = rest.find("]", 2 if rest.startswith("!") else 1)
        if closing < 0 or "/" in rest[:closing]:
            raise ValueError(text)
        rest = rest[closing + 1 :]
    return text


BOOLEAN: Final = Kind("true | false", _parse_boolean, lambda flag: "true" if flag else "false")
TEXT: Final = Kind("a text that is not empty", _matching(re.compile(r"\S(.*\S)?")))
NAME: Final = Kind("a name of letters, digits, . _ -, at most 63 long", _matching(_NAME))
PATH: Final = Kind("an absolute path, e.g. /var/lib/kos", _matching(re.compile(r"/[^\0]*")))
LOG_TARGET: Final = Kind("off | stdout | an absolute path", _matching(re.compile(r"off|stdout|/[^\0]+")))
HOST: Final = Kind("a host name or IP address that other nodes reach, without a port", _parse_host)
ADDRESS: Final = Kind("HOST:PORT, an IPv6 host in brackets, e.g. 127.0.0.1:9000 or [::1]:9000", _parse_address)
ADDRESS_OR_NONE: Final = Kind(
    f"{ADDRESS.allowed}; or none",
    lambda text: None if text == "none" else _parse_address(text),
    lambda address: "none" if address is None else str(address),
)
ENDPOINT: Final = Kind("http://HOST[:PORT] or https://HOST[:PORT], without a path", _parse_endpoint)
DOMAIN: Final = Kind("a host name, e.g. s3.example.org", _parse_domain)
CONTROL_URL: Final = Kind("sqlite:///PATH or postgresql://HOST/NAME", _parse_control_url)
FRESHNESS: Final = Kind("immutable | always | a time with unit ms s m h d, e.g. 30s", _parse_freshness, show_freshness)
FRESHNESS_OR_AUTO: Final = Kind(
    f"auto | {FRESHNESS.allowed}",
    lambda text: AUTO if text == "auto" else _parse_freshness(text),
    show_freshness_or_auto,
)
GLOB: Final = Kind("a glob over bucket or bucket/key, e.g. datasets/*; [ must be closed", _parse_glob)
ACCESS_KEY: Final = Kind(
    "an access key: letters, digits, . _ -, at most 128", _matching(re.compile(r"[A-Za-z0-9_.-]{1,128}"))
)
