"""By which mechanism a request is signed, and the request as it would be had it been signed in its headers.

Owns: the choice between version 4 (header or query) and version 2 (query only), and undoing what presigning does to a
request: authentication parameters go, and headers that the client moved into the query are headers again. Does not own:
the mechanisms (kos.s3.sigv4, kos.s3.sigv2), or who may do what.

Invariant: a request is signed by one mechanism or refused; and a header in the query counts exactly like a header, but
only if a right signature covered it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Protocol

from kos.errors import S3Error
from kos.s3 import names, sigv2, sigv4
from kos.s3.head import TOKEN, RequestHead
from kos.s3.sigv4 import Identity
from kos.s3.sigv4_claim import is_version_2, printable

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class Claimed(Protocol):
    """What a request says of its signature, parsed: a pure function of its head, so it may be kept with it."""

    @property
    def access_key(self) -> str:
        """Who says to have signed."""

    @property
    def in_query(self) -> bool:
        """Whether the query is signed (a presigned URL, which comes again as it is), and not a header."""

    @property
    def moved(self) -> tuple[tuple[str, str], ...]:
        """Headers that stand in the query, names in lower case, each once."""

    def is_claim(self, name: str) -> bool:
        """Whether a query parameter is part of the authentication or a header that stands in the query."""

    def check(self, secrets: Mapping[str, str], now: float) -> Identity:
        """Who signed the request: the signature is computed anew. secrets: access key -> secret key; now: epoch s.

        Raises S3Error when it is wrong, its key is unknown, or this is not the time for it."""

    def holds(self, secrets: Mapping[str, str], now: float) -> bool:
        """Whether check() would return."""


def claim_of(head: RequestHead, domain: str | None, *, version_2: bool) -> Claimed:
    """What a request says of its signature. Raises S3Error as sigv4.verify and sigv2.claim_of do.

    domain: of virtual-hosted style, None for path style. version_2: whether that is taken.
    """
    if version_2 and "AWSAccessKeyId=" in head.raw_query and is_version_2(head.raw_query):
        return sigv2.claim_of(head, domain)
    return sigv4.claim_of(head)


def unpresigned(head: RequestHead, claimed: Claimed) -> RequestHead:
    """The same question as a request that is signed in its headers would put it. Only for a claim that was checked.

    Where a header is given in both places, the header counts, which the signature covers as well. InvalidArgument for a
    name or value that cannot be a header's.
    """
    if not claimed.in_query:
        return head
    headers = dict(head.headers)
    for name, value in claimed.moved:
        if not name or not TOKEN.issuperset(name) or _CONTROL.search(value):
            extra = {"ArgumentName": printable(name), "ArgumentValue": printable(value)}
            raise S3Error("InvalidArgument", extra=extra)
        headers.setdefault(name, value.strip(" "))
    kept = [
        piece
        for piece in head.raw_query.split("&")
        if not claimed.is_claim(names.query_decode(piece.partition("=")[0]))
    ]
    return RequestHead(head.method, head.raw_path, "&".join(kept), headers)
