"""Conditional reads: every pair of conditions, held and failed, and the shapes in which tags and dates come."""

from __future__ import annotations

import itertools

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

#: Of b"0123456789".
ETAG = '"781e5e245d69b566979b86e28d23f2c7"'
OTHER = '"0123456789abcdef0123456789abcdef"'
PAST = "Wed, 01 Jan 2020 00:00:00 GMT"
#: Before the end of the clocks of 32 bits, and after the tests.
FUTURE = "Thu, 01 Jan 2037 00:00:00 GMT"

#: label -> (header, value); "+" holds for the object, "-" does not.
CONDITIONS = {
    "match+": ("If-Match", ETAG),
    "match-": ("If-Match", OTHER),
    "none-match+": ("If-None-Match", OTHER),
    "none-match-": ("If-None-Match", ETAG),
    "modified+": ("If-Modified-Since", PAST),
    "unmodified-": ("If-Unmodified-Since", PAST),
    "unmodified+": ("If-Unmodified-Since", FUTURE),
}
PAIRS = {
    f"{one} {other}": dict([CONDITIONS[one], CONDITIONS[other]])
    for one, other in itertools.combinations(CONDITIONS, 2)
    if CONDITIONS[one][0] != CONDITIONS[other][0]
}
SINGLE = {label: dict([condition]) for label, condition in CONDITIONS.items()}


def _read(s: Scene, headers: dict[str, str]) -> None:
    for method in ("GET", "HEAD", "GET"):
        s.raw(method, "/k", headers=headers)


@each(SINGLE | PAIRS)
def read(s: Scene, headers: dict[str, str]) -> None:
    s.put(CacheControl="max-age=5", ContentType="text/plain")
    _read(s, headers)


@each(SINGLE)
def read_a_range(s: Scene, headers: dict[str, str]) -> None:
    s.put()
    _read(s, headers | {"Range": "bytes=2-4"})


@each(SINGLE | {"star": {"If-Match": "*"}, "no star": {"If-None-Match": "*"}})
def read_what_is_missing(s: Scene, headers: dict[str, str]) -> None:
    _read(s, headers)


@each(
    {
        "match star": {"If-Match": "*"},
        "none-match star": {"If-None-Match": "*"},
        "match without quotes": {"If-Match": ETAG.strip('"')},
        "none-match without quotes": {"If-None-Match": ETAG.strip('"')},
        "none-match weak": {"If-None-Match": f"W/{ETAG}"},
        "none-match list": {"If-None-Match": f"{OTHER}, {ETAG}"},
        "match list": {"If-Match": f"{OTHER}, {ETAG}"},
        "match empty": {"If-Match": '""'},
        "modified no date": {"If-Modified-Since": "yesterday"},
        "unmodified no date": {"If-Unmodified-Since": "yesterday"},
        "modified in the future": {"If-Modified-Since": FUTURE},
        "if-range holds": {"If-Range": ETAG, "Range": "bytes=1-2"},
        "if-range fails": {"If-Range": OTHER, "Range": "bytes=1-2"},
        "if-range date fails": {"If-Range": PAST, "Range": "bytes=1-2"},
    }
)
def shape(s: Scene, headers: dict[str, str]) -> None:
    s.put()
    _read(s, headers)


@case
def by_the_date_that_was_told(s: Scene) -> None:
    s.put()
    told = s.head()["LastModified"]
    for name in ("IfModifiedSince", "IfUnmodifiedSince"):
        s.get(**{name: told})
        s.head(**{name: told})


@case
def after_a_change(s: Scene) -> None:
    etag = s.put()["ETag"]
    s.get(IfNoneMatch=etag)
    s.put(body=b"changed")
    s.get(IfNoneMatch=etag)
    s.get(IfMatch=etag)
    s.head(IfMatch=etag)
    s.put()
    s.get(IfNoneMatch=etag)
