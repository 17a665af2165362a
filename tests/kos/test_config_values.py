"""Single values: every accepted one survives being written and read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos import config_values as v


@given(st.integers(0, 1 << 50))
def test_sizes_round(size_bytes: int) -> None:
    assert v.parse_size(v.show_size(size_bytes)) == size_bytes


@given(st.one_of(st.integers(0, 10**8).map(float), st.integers(1, 10**6).map(lambda ms: ms / 1000)))
def test_durations_round(seconds: float) -> None:
    assert v.parse_duration(v.show_duration(seconds)) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("512", 512), ("4KiB", 4096), ("1.5MiB", 3 << 19), ("2 GiB", 2 << 30), ("1TiB", 1 << 40), ("7B", 7)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert v.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1GB", "1gib", "1Gi", "1e3", "0.3KiB", "٣KiB", "-1", "+1", "1 2KiB", "0x10"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        v.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("0s", 0.0), ("200ms", 0.2), ("30s", 30.0), ("5m", 300.0), ("2h", 7200), ("1d", 86400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert v.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1w", "1M", "inf", "1m30s", "1 h 2"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError):
        v.parse_duration(text)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:9000", "[::1]:9000", "localhost:0", "node-1.example.org:65535", "0.0.0.0:1"]
)
def test_addresses(text: str) -> None:
    assert v.join_address(*v.split_address(text)) == text


@pytest.mark.parametrize(
    "text", ["", ":9000", "::1:9000", "[::1]9000", "[::1]", "a b:1", "h:", "h:x", "h:-1", "1.2.3:1"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError):
        v.split_address(text)


@pytest.mark.parametrize("text", ["*", "data", "data/*", "a?c/[abc]*", "b/[!x]", "b/[]]", "b/x]"])
def test_globs(text: str) -> None:
    assert v.GLOB.parse(text) == text


@pytest.mark.parametrize("text", ["", "/x", " x", "a[", "a[]", "a/[!]", "a[b/c]"])
def test_no_globs(text: str) -> None:
    with pytest.raises(ValueError):
        v.GLOB.parse(text)
