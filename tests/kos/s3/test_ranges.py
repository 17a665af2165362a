"""Ranges as S3 takes them: what counts, what is ignored, what is refused."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3.ranges import parse, resolve


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("bytes=0-0", 10, (0, 1)),
        ("bytes=0-9", 10, (0, 10)),
        ("bytes=2-5", 10, (2, 6)),
        ("bytes=2-", 10, (2, 10)),
        ("bytes=9-", 10, (9, 10)),
        ("bytes=5-99999999999999999999", 10, (5, 10)),
        ("bytes=-1", 10, (9, 10)),
        ("bytes=-10", 10, (0, 10)),
        ("bytes=-11", 10, (0, 10)),
        ("BYTES = 2 - 5 ", 10, (2, 6)),
        ("bytes=00002-0005", 10, (2, 6)),
    ],
)
def test_a_range_and_its_slice(header: str, size: int, expected: tuple[int, int]) -> None:
    spec = parse(header)
    assert spec is not None
    assert resolve(spec, size) == expected


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=33-10",
        "bytes=1-0",
        "bytes=0-1,3-4",
        "bytes=0-1,",
        "bytes=+1-2",
        "bytes=1--2",
        "bytes=--2",
        "bytes=1.0-2",
        "bytes=0x1-0x2",
        "bytes=٣-٤",
        "items=0-1",
        "0-1",
        "bytes=0-1;x",
        "bytes=0-1x",
        "bytes=" + "1" * 5000 + "-",
    ],
)
def test_what_s3_ignores(header: str | None) -> None:
    assert parse(header) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=10-20", 10), ("bytes=-0", 10), ("bytes=0-0", 0), ("bytes=-5", 0)]
)
def test_a_range_outside_of_the_object(header: str, size: int) -> None:
    spec = parse(header)
    assert spec is not None
    with pytest.raises(S3Error) as caught:
        resolve(spec, size)
    error = caught.value
    assert (error.code, error.status) == ("InvalidRange", 416)
    assert error.extra == {"RangeRequested": header, "ActualObjectSize": str(size)}
    assert error.headers == {"Content-Range": f"bytes */{size}"}
