"""The Range request header as S3 reads it.

Owns: which Range headers count, and what slice of an object of known size one means. Does not own: conditions and
If-Range (kos.s3.conditions), response headers (kos.s3.object_response).

Invariant: resolve() returns 0 <= start < stop <= size, or raises; a range never reaches outside of the object.

Sources: RFC 9110 section 14; https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html. S3 serves the whole
object, as if no Range had been sent, for several ranges, foreign units, bad syntax and first > last.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kos.errors import S3Error

# 20 digits hold every 64-bit offset; longer numbers are no offsets, and int() of unbounded digits is quadratic.
_SINGLE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,20})[ \t]*-[ \t]*([0-9]{0,20})", re.ASCII | re.IGNORECASE)


class RangeSpec(NamedTuple):
    """One byte range, inclusive as in the header. first None: the last `last` bytes. last None: to the end."""

    first: int | None
    last: int | None

    def __str__(self) -> str:
        first = "" if self.first is None else self.first
        last = "" if self.last is None else self.last
        return f"bytes={first}-{last}"


def parse(header: str | None) -> RangeSpec | None:
    """The range of a Range header; None when there is none or when S3 ignores it (the answer is then a plain 200)."""
    if header is None:
        return None
    match = _SINGLE.fullmatch(header.strip())
    if match is None:
        return None
    first_digits, last_digits = match.groups()
    if not first_digits:
        return RangeSpec(None, int(last_digits)) if last_digits else None
    first = int(first_digits)
    if not last_digits:
        return RangeSpec(first, None)
    last = int(last_digits)
    return RangeSpec(first, last) if first <= last else None


def resolve(spec: RangeSpec, size: int) -> tuple[int, int]:
    """The half-open slice (start, stop) that spec means in an object of size bytes, clamped to its end.

    Raises S3Error InvalidRange (416) when no byte of the object is in it: a start at or after the end, a suffix of
    nothing, any range of an empty object.
    """
    first, last = spec.first, spec.last
    if first is None:
        assert last is not None, "a range has at least one end"
        start, stop = max(0, size - last), size
    else:
        start, stop = first, size if last is None else min(last + 1, size)
    if start >= stop:
        raise S3Error(
            "InvalidRange",
            extra={"RangeRequested": str(spec), "ActualObjectSize": str(size)},
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop
