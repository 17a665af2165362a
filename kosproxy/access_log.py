"""One JSON line for every request that was answered.

Owns: which fields a line has, and that neither secrets nor signatures are among them (no headers, no query, no more of
the credentials than the access key's id). Does not own: where lines go and when (kos.log.AccessLog).

Invariant: every request that had an answer, in whole or in part, has exactly one line.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from kos.log import timestamp


class Line(msgspec.Struct, frozen=True):
    """Times in milliseconds from the arrival of the request's head; bytes are of the body that went to the client."""

    time: str
    request_id: str
    client: str
    key_id: str | None
    operation: str
    bucket: str | None
    key: str | None
    range: str | None
    status: int
    error: str | None
    bytes: int
    lane: str
    phase: str | None
    reason: str | None
    origin_requests: int
    first_byte_ms: float
    total_ms: float


class LineTemplate(NamedTuple):
    """A line but for what every request has of its own: time, id, client and duration."""

    before_time: bytes
    before_id: bytes
    before_client: bytes
    before_first: bytes
    before_total: bytes
    rest: bytes

    def render(self, time: str, request_id: str, client: str, ms: float) -> bytes:
        """The same bytes as the encoded Line, first and last byte having gone at once, after ms milliseconds."""
        took = b"%.3f" % ms
        a, b, c, d, e, f = self
        return b"".join((a, time.encode(), b, request_id.encode(), c, client.encode(), d, took, e, took, f))


def line_template(line: Line) -> LineTemplate | None:
    """For all lines that differ from this one in time, id, client and duration only; None when the line's own text looks
    like one of the marks."""
    marked = msgspec.structs.replace(
        line,
        time="TIME-IS-HERE",
        request_id="ID-IS-HERE",
        client="CLIENT-IS-HERE",
        first_byte_ms=-7.125,
        total_ms=-9.875,
    )
    text = msgspec.json.encode(marked)
    pieces: list[bytes] = []
    for mark in (b"TIME-IS-HERE", b"ID-IS-HERE", b"CLIENT-IS-HERE", b"-7.125", b"-9.875"):
        if text.count(mark) != 1:
            return None
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return LineTemplate(pieces[0], pieces[1], pieces[2], pieces[3], pieces[4], text)


_last: tuple[int, str] = (-1, "")


def time_text(epoch_s: float) -> str:
    """RFC 3339 with milliseconds; requests of one millisecond share the text."""
    global _last
    millis = int(epoch_s * 1000)
    known, text = _last
    if known != millis:
        text = timestamp(epoch_s)
        _last = (millis, text)
    return text


def printable(text: str | None) -> str | None:
    """Text of a client's as it can stand in JSON: bytes that are not UTF-8 are shown escaped."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


#: what a request is called that was refused before it was known what it asks for
UNKNOWN: Final = "Unknown"
