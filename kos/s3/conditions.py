"""Conditional reads: If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since and If-Range.

Owns: entity-tag and HTTP-date comparison and the order in which S3 weighs the four conditions. Does not own: the answer
that follows from a verdict (kos.s3.object_response), conditional writes (the origin judges those).

Invariant: a condition that cannot be understood never turns an answer into a wrong 304: an unreadable date is ignored,
an unreadable entity tag matches nothing.

Sources: RFC 9110 sections 5.6.7, 8.8.3, 13.1, 13.2.2; https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html
(If-Match true beats If-Unmodified-Since false: 200; If-None-Match false beats If-Modified-Since true: 304).
"""

from __future__ import annotations

import re
from calendar import timegm
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kos.s3.head import Headers

#: The request headers that make a read conditional (If-Range only chooses between 206 and 200 and is not among them).
CONDITION_HEADERS: Final = frozenset({"if-match", "if-none-match", "if-modified-since", "if-unmodified-since"})


class Verdict(Enum):
    """What the conditions say, with the header that decided; the value is S3's <Condition> element."""

    PROCEED = ""
    NOT_MODIFIED_ETAG = "If-None-Match"
    NOT_MODIFIED_DATE = "If-Modified-Since"
    FAILED_ETAG = "If-Match"
    FAILED_DATE = "If-Unmodified-Since"


NOT_MODIFIED: Final = frozenset({Verdict.NOT_MODIFIED_ETAG, Verdict.NOT_MODIFIED_DATE})
FAILED: Final = frozenset({Verdict.FAILED_ETAG, Verdict.FAILED_DATE})


def evaluate(headers: Headers, etag: str, last_modified: str) -> Verdict:
    """Weighs the conditions of a read of an existing object.

    etag is as on the wire (quoted); last_modified is an HTTP date or "" when the origin gave none (then conditions on
    dates are ignored). The order is RFC 9110's and S3's: a date counts only where its entity-tag sibling is absent.
    """
    if_match = headers.get("if-match")
    if if_match is not None:
        if not matches(if_match, etag, weak=False):
            return Verdict.FAILED_ETAG
    else:
        since = headers.get("if-unmodified-since")
        if since is not None and _is_later(last_modified, since) is True:
            return Verdict.FAILED_DATE
    if_none_match = headers.get("if-none-match")
    if if_none_match is not None:
        if matches(if_none_match, etag, weak=True):
            return Verdict.NOT_MODIFIED_ETAG
    else:
        since = headers.get("if-modified-since")
        if since is not None and _is_later(last_modified, since) is False:
            return Verdict.NOT_MODIFIED_DATE
    return Verdict.PROCEED


def range_applies(if_range: str | None, etag: str, last_modified: str) -> bool:
    """Whether a Range header counts, given If-Range: its strong entity tag or its exact date must be the object's.

    RFC 9110 section 13.1.5. An If-Range that cannot be read counts as changed: the whole object is never wrong.
    """
    if if_range is None:
        return True
    if_range = if_range.strip()
    if if_range == etag:
        return not etag.startswith("W/")
    asked = parse_http_date(if_range)
    if asked is not None:
        return asked == parse_http_date(last_modified)
    return not if_range.startswith(('"', "W/")) and f'"{if_range}"' == etag


# An entity tag: optional W/, then quoted text, or the bare text that S3 takes as well. Each alternative starts with a
# different character and none can match empty, so there is nothing to backtrack into.
_ENTITY_TAG = re.compile(r'[ \t,]*(?:(W/)?"([^"]*)"|([^",\s]+))[ \t]*(?=,|$)')


def _entity_tags(field: str) -> Iterator[tuple[bool, str]]:
    """(weak, opaque text) of each entity tag of a list; stops at the first that is none."""
    position = 0
    while (match := _ENTITY_TAG.match(field, position)) is not None:
        weak, quoted, bare = match.groups()
        yield weak is not None, bare if quoted is None else quoted
        position = match.end()


def matches(field: str, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags, or "*", holds etag; weak: compare as If-None-Match does, else as If-Match does."""
    own_weak = etag.startswith("W/")
    field = field.strip()
    if field == "*":
        return True
    if field == etag:
        return weak or not own_weak
    opaque = etag.removeprefix("W/").strip('"')
    return any(tag == opaque and (weak or not (tag_weak or own_weak)) for tag_weak, tag in _entity_tags(field))


_MONTHS: Final = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), start=1
    )
}
_IMF = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), (\d{2}) ([A-Z][a-z]{2}) (\d{4}) (\d{2}):(\d{2}):(\d{2}) (?:GMT|UTC|\+0000)",
    re.ASCII,
)
_RFC850 = re.compile(
    r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (\d{2})-([A-Z][a-z]{2})-(\d{2}) (\d{2}):(\d{2}):(\d{2}) GMT", re.ASCII
)
_ASCTIME = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) ([A-Z][a-z]{2}) ([ \d]\d) (\d{2}):(\d{2}):(\d{2}) (\d{4})", re.ASCII
)
_DAYS: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@lru_cache(maxsize=1024)
def parse_http_date(text: str) -> int | None:
    """Seconds since the epoch of an HTTP date in any of RFC 9110's three forms; None when it is none of them."""
    if match := _IMF.fullmatch(text):
        day, month_name, year, hour, minute, second = match.groups()
    elif match := _RFC850.fullmatch(text):
        day, month_name, year, hour, minute, second = match.groups()
        # Two digits: 70..99 lie in the last century, the rest in this one; no object is older than 1970.
        year = f"19{year}" if year >= "70" else f"20{year}"
    elif match := _ASCTIME.fullmatch(text):
        month_name, day, hour, minute, second, year = match.groups()
    else:
        return None
    month = _MONTHS.get(month_name)
    if month is None or not 1 <= int(day) <= _DAYS[month - 1] or int(hour) > 23 or int(minute) > 59 or int(second) > 60:
        return None
    if int(year) < 1:
        return None
    return timegm((int(year), month, int(day), int(hour), int(minute), int(second), 0, 0, 0))


def _is_later(last_modified: str, date: str) -> bool | None:
    """Whether the object was modified after date; None when either cannot be read."""
    date = date.strip()
    if date == last_modified and date:
        return False if parse_http_date(date) is not None else None
    modified, asked = parse_http_date(last_modified), parse_http_date(date)
    if modified is None or asked is None:
        return None
    return modified > asked
