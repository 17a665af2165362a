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
