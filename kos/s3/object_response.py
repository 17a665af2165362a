"""The answer to an object read: status, headers and the slice of the body, from a record and a request.

Owns: what is kept of the origin's headers, conditions -> range -> headers in S3's order, response-* overrides, and the
bytes of a response head. Does not own: where the body comes from, or the XML of an error (kos.s3.xml).

Invariant: pure, and the only place where these headers are made: for the same request and record every lane gives the
same status, headers and slice. No header value that leaves here holds CR, LF or NUL.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html and API_HeadObject.html; RFC 9110 section
15.4.5 (what a 304 carries), RFC 9111 section 5.1 (Age).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

from kos.errors import S3Error
from kos.s3 import conditions, ranges

if TYPE_CHECKING:
    from kos.s3.head import RequestHead


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """What the origin said about one version of an object, as far as it may be said again.

    etag: as on the wire, with quotes. size: bytes. last_modified: HTTP date, "" when the origin gave none. headers: all
    other end-to-end headers. checksums: x-amz-checksum-* of the whole object; checksums_known: whether the origin was
    asked for them, so that an empty tuple means "it has none".
    """

    etag: str
    size: int
    last_modified: str
    headers: tuple[tuple[str, str], ...]
    checksums: tuple[tuple[str, str], ...] = ()
    checksums_known: bool = False


class ObjectAnswer(NamedTuple):
    """A response to a read: the body is the half-open slice start, stop of the object; start == stop means no body.

    A named tuple, because one is made for every request and a frozen dataclass costs three times as much.
    """

    status: int
    headers: list[tuple[str, str]]
    start: int
    stop: int


class Part(NamedTuple):
    """One part of an object: its half-open slice, how many parts the object has (None for one that was not uploaded in
    parts), and the checksums that the origin has of this part."""

    start: int
    stop: int
    parts_count: int | None
    checksums: tuple[tuple[str, str], ...] = ()


#: The ETag of an object that was stored in one piece: what S3 gives to one of parts ends in "-N".
_OF_ONE_PIECE: Final = re.compile(r'"[0-9a-fA-F]{32}"', re.ASCII)


def sole_part(meta: ObjectMeta, number: int) -> Part | None:
    """The part of an object that was stored in one piece: all of it; None if its ETag does not tell that it was.

    Raises S3Error InvalidPartNumber (416) for any part but the first.
    """
    if _OF_ONE_PIECE.fullmatch(meta.etag) is None:
        return None
    if number > 1:
        raise S3Error("InvalidPartNumber", extra={"PartNumberRequested": str(number), "ActualPartCount": "1"})
    return Part(0, meta.size, None, meta.checksums)


# Headers of the origin's answer that are not the object's: they belong to one connection, to one response, to the
# origin itself, or are made anew in answer(). Access-Control-* depends on the asker's Origin.
_NOT_KEPT: Final = frozenset(
    {
        "accept-ranges", "age", "alt-svc", "connection", "content-length", "content-range", "date", "etag",
        "keep-alive", "last-modified", "proxy-authenticate", "proxy-authentication-info", "proxy-connection",
        "server", "set-cookie", "strict-transport-security", "te", "trailer", "transfer-encoding", "upgrade", "via",
        "www-authenticate", "x-amz-id-2", "x-amz-mp-parts-count", "x-amz-request-id", "x-amz-request-charged",
        "x-amzn-requestid", "x-kos-cache",
    }
)  # fmt: skip
_NOT_KEPT_PREFIXES: Final = ("access-control-",)
_CHECKSUM_PREFIX: Final = "x-amz-checksum-"


def for_everybody(name: str) -> bool:
    """Whether a header of the origin's answer, by its name in lower case, may be said again to others who ask the same."""
    return name not in _NOT_KEPT and not name.startswith(_NOT_KEPT_PREFIXES)


# What S3 names an object that was stored without a type.
_DEFAULT_TYPE: Final = ("Content-Type", "binary/octet-stream")

_CONTENT_RANGE: Final = re.compile(r"bytes (?:[0-9]{1,20}-[0-9]{1,20}|\*)/([0-9]{1,20})", re.ASCII)
_CONTENT_LENGTH: Final = re.compile(r"[0-9]{1,20}", re.ASCII)


def meta_from_headers(
    status: int, headers: Mapping[str, str] | Iterable[tuple[str, str]], *, checksum_mode: bool = True
) -> ObjectMeta | None:
    """What the origin's answer to a GET or HEAD of an object tells about it; None when it does not name one version.

    status: 200 or 206, anything else gives None. headers: of that answer, names in any case. checksum_mode: whether the
    request carried x-amz-checksum-mode: ENABLED. None also when the ETag or the size of the whole object is missing or
    unreadable: without them bytes of two versions could not be told apart.
    """
    if status not in (200, 206):
        return None
    # An HTTP client may give names as a subclass of str of its own, which the message format of records refuses.
    pairs = [(str(name), value) for name, value in (headers.items() if isinstance(headers, Mapping) else headers)]
    named = {name.lower(): value for name, value in pairs}
    etag = named.get("etag", "").strip()
    size = _size_of_whole(status, named)
    if not etag or size is None:
        return None
    hop_by_hop = {name.strip().lower() for name in named.get("connection", "").split(",")}
    kept: list[tuple[str, str]] = []
    checksums: list[tuple[str, str]] = []
    for name, value in pairs:
        lower = name.lower()
        if lower.startswith(_CHECKSUM_PREFIX):
            checksums.append((name, value))
        elif lower not in hop_by_hop and for_everybody(lower):
            kept.append((name, value))
    if "content-type" not in named:
        kept.append(_DEFAULT_TYPE)
    # A 206 may carry the checksum of a part where the range is exactly that part: it says nothing about the object.
    whole = status == 200
    if "-" in etag and "x-amz-checksum-type" not in named:
        # Made of parts: the value may be one over the parts' checksums. S3 says which it is (COMPOSITE, and "-3" behind
        # the value); an origin that does not say gives a value that clients would take for the whole body's.
        checksums.clear()
    return ObjectMeta(
        etag=etag,
        size=size,
        last_modified=named.get("last-modified", ""),
        headers=tuple(kept),
        checksums=tuple(checksums) if whole else (),
        checksums_known=whole and (checksum_mode or bool(checksums)),
    )


def _size_of_whole(status: int, named: Mapping[str, str]) -> int | None:
    if status == 206:
        match = _CONTENT_RANGE.fullmatch(named.get("content-range", "").strip())
        return None if match is None else int(match[1])
    length = named.get("content-length", "").strip()
    return int(length) if _CONTENT_LENGTH.fullmatch(length) else None


#: Query parameters by which a client replaces a response header.
OVERRIDES: Final[Mapping[str, str]] = {
    "response-content-type": "Content-Type",
    "response-content-language": "Content-Language",
    "response-expires": "Expires",
    "response-cache-control": "Cache-Control",
    "response-content-disposition": "Content-Disposition",
    "response-content-encoding": "Content-Encoding",
}
# What a 304 keeps of the record's headers (ETag and Last-Modified are always there).
_KEPT_ON_304: Final = frozenset({"cache-control", "content-location", "expires", "vary", "x-amz-version-id"})
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_ACCEPT_RANGES: Final = ("Accept-Ranges", "bytes")


def answer(
    head: RequestHead,
    params: Mapping[str, str],
    meta: ObjectMeta,
    *,
    cache_note: str,
    age_s: int | None,
    request_id: str,
    date: str | None = None,
    part: Part | None = None,
) -> ObjectAnswer:
    """The response to a GET or HEAD of the object that meta describes: 200, 206 or 304.

    params: the decoded query. cache_note: the value of x-kos-cache. age_s: seconds since the origin vouched for meta,
    None for no Age header. date: the value of Date, None to leave it out. part: which one a read by partNumber is of (an
    empty one is answered 200, as S3 does, because no Content-Range can say what it is). For HEAD the slice is empty,
    Content-Length that of the GET. Raises S3Error PreconditionFailed (412), InvalidRange (416), InvalidArgument (a
    response-* override that cannot be a header).
    """
    size = meta.size
    start, stop, status = 0, size, 200
    kept: Iterable[tuple[str, str]] = meta.headers
    if not OVERRIDES.keys().isdisjoint(params):
        kept = _overridden(meta.headers, params)
    asked = head.headers
    if not conditions.CONDITION_HEADERS.isdisjoint(asked):
        verdict = conditions.evaluate(asked, meta.etag, meta.last_modified)
        if verdict in conditions.FAILED:
            raise S3Error("PreconditionFailed", extra={"Condition": verdict.value})
        if verdict in conditions.NOT_MODIFIED:
            status = 304
    if "range" in asked and status == 200:
        spec = ranges.parse(asked["range"])
        if (
            spec is not None
            and (size or not spec.last or spec.first is not None)  # the last n bytes of nothing are all of it: 200
            and conditions.range_applies(asked.get("if-range"), meta.etag, meta.last_modified)
        ):
            start, stop = ranges.resolve(spec, size)
            status = 206
    if part is not None and status == 200:
        start, stop = part.start, part.stop
        if start < stop:
            status = 206
    headers = [("x-amz-request-id", request_id), ("x-kos-cache", cache_note), ("ETag", meta.etag)]
    if meta.last_modified:
        headers.append(("Last-Modified", meta.last_modified))
    if date is not None:
        headers.append(("Date", date))
    if age_s is not None:
        headers.append(("Age", str(age_s)))
    if status == 304:
        headers.extend([pair for pair in kept if pair[0].lower() in _KEPT_ON_304])
        return ObjectAnswer(304, headers, 0, 0)
    headers.append(_ACCEPT_RANGES)
    headers.extend(kept)
    if status == 206:
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
    if part is not None:
        if part.parts_count is not None:
            headers.append(("x-amz-mp-parts-count", str(part.parts_count)))
        if part.checksums and asked.get("x-amz-checksum-mode", "").upper() == "ENABLED":
            headers.extend(part.checksums)
    elif status == 200 and meta.checksums and asked.get("x-amz-checksum-mode", "").upper() == "ENABLED":
        headers.extend(meta.checksums)
    headers.append(("Content-Length", str(stop - start)))
    if head.method == "HEAD":
        return ObjectAnswer(status, headers, 0, 0)
    return ObjectAnswer(status, headers, start, stop)


def _overridden(kept: Iterable[tuple[str, str]], params: Mapping[str, str]) -> list[tuple[str, str]]:
    replaced: dict[str, tuple[str, str]] = {}
    for parameter, name in OVERRIDES.items():
        text = params.get(parameter)
        if text is not None:
            replaced[name.lower()] = (name, _header_text(parameter, text))
    return [pair for pair in kept if pair[0].lower() not in replaced] + list(replaced.values())


def _header_text(parameter: str, text: str) -> str:
    """A client's text as a header value, in the ISO-8859-1 that S3 sends; raises InvalidArgument if it cannot be one.

    The wire encoding of kos' header strings is UTF-8 with surrogateescape; decoding Latin-1 bytes that way makes them
    come out as they are.
    """
    if _CONTROL.search(text) is None:
        try:
            return text if text.isascii() else text.encode("latin-1").decode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            pass
    raise S3Error(
        "InvalidArgument",
        "Header value cannot be represented using ISO-8859-1.",
        extra={"ArgumentName": parameter, "ArgumentValue": text},
    )


_STATUS_LINES: Final[Mapping[int, str]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus
}


def render_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """The bytes of a response head: status line, headers, blank line; UTF-8 with surrogateescape, as headers are read.

    Raises ValueError when a name or value holds CR, LF or NUL: such a header would end the head early and let whoever
    chose the value write the rest of the response.
    """
    # Whole pairs are joined in C: half the time of formatting each line.
    lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown", *map(": ".join, headers), "\r\n"]
    text = "\r\n".join(lines)
    line_count = len(lines)
    if text.count("\n") != line_count or text.count("\r") != line_count or "\0" in text:
        raise ValueError("a response header holds CR, LF or NUL")
    return text.encode("utf-8", "surrogateescape")


@lru_cache(maxsize=4)
def _http_date(epoch_s: int) -> str:
    return formatdate(epoch_s, usegmt=True)


def http_date(epoch_s: float) -> str:
    """A time as an HTTP date (RFC 9110 section 5.6.7); made once a second."""
    return _http_date(int(epoch_s))


class Template(NamedTuple):
    """The head of an answer but for what every answer has of its own: its id, the date and the age."""

    status: int
    start: int
    stop: int
    before_id: bytes
    before_date: bytes
    before_age: bytes
    rest: bytes

    def render(self, request_id: str, date: str, age_s: int) -> bytes:
        """The same bytes as render_head(answer(...))."""
        return b"%b%b%b%b%b%d%b" % (
            self.before_id, request_id.encode(), self.before_date, date.encode(), self.before_age, age_s, self.rest,
        )  # fmt: skip


_MARK_ID: Final = "REQUEST-ID-GOES-HERE"
_MARK_DATE: Final = "DATE-GOES-HERE"
_MARK_AGE: Final = 9_876_543_210_123_456


def template(head: RequestHead, params: Mapping[str, str], meta: ObjectMeta, *, cache_note: str) -> Template | None:
    """answer() and render_head() once, to be filled in for every request that asks the same of the same version.

    None when a header of the object looks like one of the marks. Raises as answer() does.
    """
    said = answer(head, params, meta, cache_note=cache_note, age_s=_MARK_AGE, request_id=_MARK_ID, date=_MARK_DATE)
    text = render_head(said.status, said.headers)
    pieces: list[bytes] = []
    for mark in (_MARK_ID, _MARK_DATE, str(_MARK_AGE)):
        if text.count(mark.encode()) != 1:
            return None
        piece, _, text = text.partition(mark.encode())
        pieces.append(piece)
    return Template(said.status, said.start, said.stop, pieces[0], pieces[1], pieces[2], text)
