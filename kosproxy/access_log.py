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


_second: tuple[int, str] = (-1, "")


def time_text(epoch_s: float) -> str:
    """RFC 3339 with milliseconds; the part that stays the same for a second is made once a second."""
    global _second
    whole = int(epoch_s)
    if _second[0] != whole:
        _second = (whole, timestamp(whole)[:-4])
    return f"{_second[1]}{int((epoch_s - whole) * 1000):03d}Z"


def printable(text: str | None) -> str | None:
    """Text of a client's as it can stand in JSON: bytes that are not UTF-8 are shown escaped."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


#: what a request is called that was refused before it was known what it asks for
UNKNOWN: Final = "Unknown"
