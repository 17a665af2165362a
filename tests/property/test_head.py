"""The fast parser against the server's: what it takes, the server's would have understood in the same way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kos.s3.head import parse_head
from tests.fuzz.targets import server_head

BASES = [
    b"GET /b/k%20l?x=1&y HTTP/1.1\r\nHost: h:9000\r\nRange: bytes=0-9\r\nUser-Agent: a b\r\n\r\n",
    b"HEAD // HTTP/1.1\r\nhost: h\r\nconnection: keep-alive\r\ncontent-length: 0\r\nX-Amz-Date: 1\r\n\r\n",
]
PIECES = [
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b":",
    b"\x00",
    b"\xc3\xa9",
    b"Host",
    b"?",
    b"#",
    b"%",
    b"1",
    b"\r\nx-a: b",
    b",",
]


@settings(max_examples=400)
@given(
    st.sampled_from(BASES),
    st.lists(
        st.tuples(st.integers(0, 140), st.integers(0, 3), st.sampled_from([b"", *PIECES])), min_size=1, max_size=4
    ),
)
def test_mutated_heads(base: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    raw = base
    for position, removed, added in edits:
        raw = raw[:position] + added + raw[position + removed :]
    parsed = parse_head(raw)
    if parsed is not None:
        assert parsed == server_head(raw)


@pytest.mark.parametrize("base", BASES)
def test_the_samples_themselves(base: bytes) -> None:
    parsed = parse_head(base)
    assert parsed is not None and parsed == server_head(base)
