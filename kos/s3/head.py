"""The head of a request: what stands on the wire before the body, as values.

Owns: the type RequestHead that every other part of the protocol reads, the joining and decoding of header fields, and a
strict parser for the heads that the fast lane may answer. Does not own: HTTP framing, bodies, keep-alive (the server's
parser does that), or any meaning of a header (the modules beside this one).

Invariant: parse_head either returns exactly what the server's full parser would have seen, or None. It never guesses:
whatever is unusual goes the slow way.

Sources: RFC 9110 section 5 (fields), RFC 9112 sections 2 to 5 (message syntax).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

#: Lower-case names; repeated fields joined with ","; values decoded as UTF-8 (surrogateescape), outer blanks stripped.
Headers = dict[str, str]

#: A larger head is not for the fast lane. S3 allows 8 KiB of request line and 8 KiB of headers.
HEAD_MAX_BYTES: Final = 16 * 1024


class RequestHead(NamedTuple):
    """Method, target and headers of one request, exactly as they were sent.

    raw_path: the path as on the wire (not decoded, nothing collapsed), without the query. raw_query: without "?", "" if
    there is none. A named tuple, because one is made for every request and a frozen dataclass costs four times as much.
    """

    method: str
    raw_path: str
    raw_query: str
    headers: Headers


def headers_from_raw(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Header fields as (name, value) bytes, in the order received, to Headers."""
    headers: Headers = {}
    for raw_name, raw_value in raw:
        name = raw_name.decode("utf-8", "surrogateescape").lower()
        value = raw_value.decode("utf-8", "surrogateescape").strip(" \t")
        present = headers.get(name)
        headers[name] = value if present is None else f"{present},{value}"
    return headers


_PRINTABLE: Final = bytes(range(0x20, 0x7F))
#: What a field name is made of, once lower-case (RFC 9110 section 5.6.2).
TOKEN: Final = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")

#: Fields that say something about the connection or a body: such a request is never for the fast lane.
_NOT_HERE: Final = frozenset(
    {
        "transfer-encoding", "expect", "upgrade", "http2-settings", "te", "trailer", "proxy-connection",
        "proxy-authorization", "keep-alive", "x-amz-decoded-content-length", "x-amz-trailer",
    }
)  # fmt: skip

_COMMON: Final = (
    "Host", "User-Agent", "Accept", "Accept-Encoding", "Accept-Language", "Authorization", "Connection",
    "Content-Length", "Content-Type", "Content-MD5", "Range", "If-Match", "If-None-Match", "If-Modified-Since",
    "If-Unmodified-Since", "Date", "Cache-Control", "Pragma", "X-Amz-Date", "X-Amz-Content-SHA256",
    "X-Amz-Content-Sha256", "X-Amz-Checksum-Mode",
    "X-Amz-Expected-Bucket-Owner", "X-Amz-Request-Payer", "amz-sdk-invocation-id", "Amz-Sdk-Invocation-Id",
    "amz-sdk-request", "Amz-Sdk-Request", "X-Amz-User-Agent", "X-Forwarded-For", "X-Forwarded-Proto", "Traceparent",
)  # fmt: skip

#: Names as sent -> lower case, checked once and never again: looking one up costs a tenth of checking it. Names of
#: clients' own making are added up to the limit (2 048 of at most 64 characters); requests with yet others go the slow
#: way. Nothing is ever dropped, so a flood of strange names cannot make the common ones slow.
_KNOWN_NAMES: Final[dict[str, str]] = {name: name.lower() for name in _COMMON} | {n.lower(): n.lower() for n in _COMMON}
_KNOWN_NAMES_MAX: Final = 2048
_KNOWN_NAME_LENGTH_MAX: Final = 64


def parse_head(head: bytes) -> RequestHead | None:
    """A complete HTTP/1.1 head of GET or HEAD without a body, its blank line included; None if anything is unusual.

    Unusual is: a body or the promise of one, Connection other than keep-alive, another version or method, a repeated or
    folded field, a bare CR or LF, control or non-ASCII characters, a name that is no token, a missing Host, more than
    HEAD_MAX_BYTES. None is no verdict: the server's full parser decides what such a request gets.
    """
    if len(head) > HEAD_MAX_BYTES or head[-4:] != b"\r\n\r\n":
        return None
    lines = head[:-4].decode("latin-1").split("\r\n")
    # What is left without the printable characters must be the line ends just split at, and nothing else: this one pass
    # in C finds bare CR and LF, NUL, tabs and everything beyond ASCII.
    if head.translate(None, _PRINTABLE) != b"\r\n" * (len(lines) + 1):
        return None
    request_line = lines[0].split(" ")
    if len(request_line) != 3:
        return None
    method, target, version = request_line
    if version != "HTTP/1.1" or (method != "GET" and method != "HEAD") or target[:1] != "/" or "#" in target:
        return None
    headers: Headers = {}
    del lines[0]
    try:
        for line in lines:
            raw_name, value = line.split(":", 1)
            headers[_KNOWN_NAMES[raw_name]] = value.strip()
    except (KeyError, ValueError):
        if not _learn_names(lines):
            return None
        return parse_head(head)
    if len(headers) != len(lines) or not _NOT_HERE.isdisjoint(headers) or not headers.get("host"):
        return None
    if headers.get("content-length", "0") != "0" or headers.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    raw_path, _, raw_query = target.partition("?")
    return RequestHead(method, raw_path, raw_query, headers)


def _learn_names(lines: list[str]) -> bool:
    """Whether all lines begin with a token and a colon, and all of these names are known now."""
    for line in lines:
        raw_name, colon, _ = line.partition(":")
        name = raw_name.lower()
        if not colon or not name or not TOKEN.issuperset(name):
            return False
        if raw_name not in _KNOWN_NAMES:
            if len(_KNOWN_NAMES) >= _KNOWN_NAMES_MAX or len(name) > _KNOWN_NAME_LENGTH_MAX:
                return False
            _KNOWN_NAMES[raw_name] = name
    return True
