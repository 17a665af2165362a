"""The fast parser takes what it understands wholly, and nothing else."""

from __future__ import annotations

import pytest

from kos.s3 import head
from kos.s3.head import RequestHead, headers_from_raw, parse_head

PLAIN = b"GET /b/k?x=1 HTTP/1.1\r\nHost: h:9000\r\nRange: bytes=0-9 \r\nX-Amz-Date:20130524T000000Z\r\n\r\n"


def with_line(line: bytes) -> bytes:
    return PLAIN[:-2] + line + b"\r\n\r\n"


def test_a_plain_request() -> None:
    assert parse_head(PLAIN) == RequestHead(
        "GET", "/b/k", "x=1", {"host": "h:9000", "range": "bytes=0-9", "x-amz-date": "20130524T000000Z"}
    )


def test_path_and_query_are_left_as_they_are() -> None:
    parsed = parse_head(b"HEAD //a/../%2F+%zz??&=? HTTP/1.1\r\nhost: h\r\n\r\n")
    assert parsed is not None and parsed[:3] == ("HEAD", "//a/../%2F+%zz", "?&=?")
    parsed = parse_head(b"GET /? HTTP/1.1\r\nhost: h\r\n\r\n")
    assert parsed is not None and parsed.raw_query == ""


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: Keep-Alive",
        b"Content-Length: 0",
        b"X-Empty:",
        b"X-Colons: a:b: c",
        b"X-$!#%&'*+-.^_`|~9: token",
        b"x" * 64 + b": longest name that is remembered",
    ],
)
def test_ordinary_lines(line: bytes) -> None:
    parsed = parse_head(with_line(line))
    name, _, value = line.decode().partition(":")
    assert parsed is not None and parsed.headers[name.lower()] == value.strip()


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Length: 1",
        b"Content-Length: +0",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Upgrade: h2c",
        b"Connection: close",
        b"Connection: keep-alive, upgrade",
        b"HOST: other",
        b"range: bytes=1-2",
        b"X-Amz-Date : 20130524T000000Z",
        b"X Y: 1",
        b": no name",
        b"no colon",
        b"Host",
        b" folded: 1",
        b"\tfolded",
        b"X-A: 1\nX-B: 2",
        b"X-A: 1\rX-B: 2",
        b"X-A: 1\r\r\nX-B: 2",
        b"X-A: \x00",
        b"X-A: a\tb",
        b"X-A: \xc3\xa9",
        b"X-\xc3\xa9: 1",
        b"X-A: \x7f",
        b"X(a): 1",
        b"",
        b"X-A: 1\r\n\r\nGET / HTTP/1.1\r\nHost: h",
        b"y" * 65 + b": name longer than is remembered",
        b"X-A: " + b"a" * head.HEAD_MAX_BYTES,
    ],
)
def test_lines_that_are_not_for_the_fast_lane(line: bytes) -> None:
    assert parse_head(with_line(line)) is None
    assert parse_head(with_line(line)) is None


@pytest.mark.parametrize(
    "line",
    [
        b"POST / HTTP/1.1",
        b"get / HTTP/1.1",
        b"GET / HTTP/1.0",
        b"GET / http/1.1",
        b"GET /",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b" GET / HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET http://h/ HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET /a#b HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET /\t HTTP/1.1",
        b"",
    ],
)
def test_request_lines_that_are_not_for_the_fast_lane(line: bytes) -> None:
    assert parse_head(line + b"\r\nHost: h\r\n\r\n") is None


def test_host_is_needed() -> None:
    assert parse_head(b"GET / HTTP/1.1\r\n\r\n") is None
    assert parse_head(b"GET / HTTP/1.1\r\nHost: \r\n\r\n") is None


def test_incomplete_heads() -> None:
    for stop in range(len(PLAIN)):
        assert parse_head(PLAIN[:stop]) is None
    assert parse_head(PLAIN + b"G") is None
    assert parse_head(PLAIN.replace(b"\r\n", b"\n")) is None


def test_strange_names_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_KNOWN_NAMES", dict(head._KNOWN_NAMES))
    for number in range(3 * head._KNOWN_NAMES_MAX):
        parse_head(with_line(b"x-strange-%d: 1" % number))
    assert len(head._KNOWN_NAMES) == head._KNOWN_NAMES_MAX
    assert parse_head(PLAIN) is not None
    assert parse_head(with_line(b"x-yet-another: 1")) is None


def test_headers_from_raw() -> None:
    raw = [(b"Host", b" h "), (b"X-A", b"1"), (b"x-a", b"\t2"), (b"X-B", b"\xc3\xa9\xff"), (b"X-C", b"")]
    assert headers_from_raw(raw) == {"host": "h", "x-a": "1,2", "x-b": "é\udcff", "x-c": ""}
