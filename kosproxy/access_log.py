"""One JSON line for every request that was answered.

Owns: which fields a line has, and that neither secrets nor signatures are among them (no headers, no query, no more of
the credentials than the access key's id). Does not own: where lines go and when (kos.log.AccessLog).

Invariant: every request that had an answer, in whole or in part, has exactly one line.
"""

from __future__ import annotations

from typing import Final

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
