"""What a listing asks for: parameters to one canonical question, by which its answer can be kept and found again.

Owns: the parameters of ListObjects and ListObjectsV2, what S3 refuses of them, which requests are not for the cache, and
the canonical form. Does not own: the answer (it is relayed and kept as the origin's bytes), where it is kept.

Invariant: two questions with one key are answered alike by any origin, and every parameter or header that could change the
answer is either part of the key or a reason to bypass. Nothing is taken for the same that an origin might tell apart: an
empty prefix and none are two questions.

What S3 does, beyond its documentation: max-keys is a decimal int32, empty means 1000, a negative one is refused under
another name than what is no number; an answer has at most 1000 keys whatever it says; encoding-type is read without case;
a list-type other than 2 is not refused, so what becomes of it is left to the origin; the first of a repeated parameter
counts, but origins differ in that, so those are left to them too.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/ API_ListObjects.html, API_ListObjectsV2.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kos.errors import S3Error

_INT32_MAX: Final = 2**31 - 1
_NUMBER: Final = re.compile(r"(-?)0*([0-9]{1,10})")

_BOTH: Final = frozenset({"prefix", "delimiter", "max-keys", "encoding-type"})
_OF_VERSION: Final = {
    1: _BOTH | {"marker"},
    2: _BOTH | {"list-type", "continuation-token", "start-after", "fetch-owner"},
}

#: Headers beginning with x-amz- that change no listing: of the signature, of the client, of bodies.
_HARMLESS: Final = frozenset(
    {
        "x-amz-checksum-mode", "x-amz-content-sha256", "x-amz-date", "x-amz-decoded-content-length",
        "x-amz-sdk-checksum-algorithm", "x-amz-security-token", "x-amz-user-agent",
    }
)  # fmt: skip
_BYPASS_HEADERS: Final = {
    "origin": "cors",
    "x-amz-expected-bucket-owner": "expected_bucket_owner",
    "x-amz-request-payer": "request_payer",
}

#: What more to say of each object. Clients made of the AWS CRT and Mountpoint's send it with every listing.
_ATTRIBUTES: Final = "x-amz-optional-object-attributes"
#: RestoreStatus is the only one so far. Of anything that is no list of names the origin says what it is.
_ATTRIBUTE_NAMES: Final = re.compile(r"[A-Za-z]{1,64}(?:, ?[A-Za-z]{1,64}){0,7}")


@dataclass(frozen=True, slots=True)
class Question:
    """One listing. Texts are decoded, bytes that are not UTF-8 as escaped surrogates; None: not asked.

    version: 1 or 2. token, start_after, fetch_owner: of version 2. marker: of version 1. max_keys: as asked, from 0 on.
    attributes: the value of x-amz-optional-object-attributes.
    """

    bucket: str
    version: int
    prefix: str | None = None
    delimiter: str | None = None
    max_keys: int | None = None
    encoding_type: str | None = None
    marker: str | None = None
    token: str | None = None
    start_after: str | None = None
    fetch_owner: str | None = None
    attributes: str | None = None

    def query(self) -> list[tuple[str, str]]:
        """The decoded pairs to ask the origin with, in one order."""
        pairs = (
            ("list-type", "2" if self.version == 2 else None),
            ("prefix", self.prefix),
            ("delimiter", self.delimiter),
            ("max-keys", None if self.max_keys is None else str(self.max_keys)),
            ("encoding-type", self.encoding_type),
            ("marker", self.marker),
            ("continuation-token", self.token),
            ("start-after", self.start_after),
            ("fetch-owner", self.fetch_owner),
        )
        return [(name, value) for name, value in pairs if value is not None]

    def headers(self) -> list[tuple[str, str]]:
        """The headers to ask the origin with."""
        return [] if self.attributes is None else [(_ATTRIBUTES, self.attributes)]

    @property
    def key(self) -> bytes:
        """Bytes that are the same for equal questions and for no others: each text with its length before it."""
        pieces = [self.bucket]
        # No parameter of a listing has a header's name.
        for name, value in (*self.query(), *self.headers()):
            pieces += (name, value)
        encoded = [piece.encode("utf-8", "surrogateescape") for piece in pieces]
        return b"".join(b"%d:%b" % (len(piece), piece) for piece in encoded)


def version_of(params: Mapping[str, str]) -> int:
    """1 or 2: which of the two listings the parameters ask for."""
    return 2 if "list-type" in params else 1


def bypass_reason(params: Mapping[str, str], headers: Mapping[str, str]) -> str | None:
    """Why a listing is not the cache's, so that the origin must be asked as the client asked; None if it is.

    params: decoded, without authentication. headers: named in lower case.
    """
    if params.get("list-type", "2") != "2":
        return "list_type"
    if params.get("fetch-owner", "true") not in ("true", "false"):
        return "fetch_owner"
    known = _OF_VERSION[version_of(params)]
    for name in params:
        if name not in known:
            lower = name.lower()
            if lower.startswith("x-amz-"):
                if lower not in _HARMLESS:
                    return _BYPASS_HEADERS.get(lower, "unknown_parameter")
            elif not lower.startswith("x-"):
                return "unknown_parameter"
    for name in headers:
        if name in _BYPASS_HEADERS:
            return _BYPASS_HEADERS[name]
        if name == _ATTRIBUTES:
            if _ATTRIBUTE_NAMES.fullmatch(headers[name]) is None:
                return "optional_attributes"
            continue
        if name.startswith(("x-amz-", "x-minio-")) and name not in _HARMLESS:
            return "unknown_header"
    return None


def parse(bucket: str, params: Mapping[str, str], headers: Mapping[str, str]) -> Question:
    """The question of parameters and headers that have no bypass_reason().

    S3Error InvalidArgument as S3 says it, in the order in which S3 looks (max-keys that is no number, encoding-type,
    token, max-keys out of range); only that the bucket is not looked up in between.
    """
    max_keys = _max_keys(params.get("max-keys"))
    encoding_type = params.get("encoding-type")
    if encoding_type is not None:
        if encoding_type.lower() != "url":
            raise _invalid("Invalid Encoding Method specified in Request", "encoding-type", encoding_type)
        encoding_type = "url"
    token = params.get("continuation-token")
    if token == "":
        raise _invalid("The continuation token provided is incorrect", "continuation-token")
    if max_keys is not None and max_keys < 0:
        message = f"Argument maxKeys must be an integer between 0 and {_INT32_MAX}"
        raise _invalid(message, "maxKeys", str(max_keys))
    return Question(
        bucket,
        version_of(params),
        params.get("prefix"),
        params.get("delimiter"),
        max_keys,
        encoding_type,
        params.get("marker"),
        token,
        params.get("start-after"),
        params.get("fetch-owner"),
        headers.get(_ATTRIBUTES),
    )


def _max_keys(text: str | None) -> int | None:
    """None: not asked, or empty. May be negative."""
    if not text:
        return None
    # int() alone would take " 5", "+5" and "1_000" as well.
    match = _NUMBER.fullmatch(text)
    number = int(match[1] + match[2]) if match and text.isascii() else None
    if number is None or not -_INT32_MAX - 1 <= number <= _INT32_MAX:
        raise _invalid("Provided max-keys not an integer or within integer range", "max-keys", text)
    return number


def _invalid(message: str, name: str, value: str | None = None) -> S3Error:
    extra = {"ArgumentName": name} if value is None else {"ArgumentName": name, "ArgumentValue": value}
    return S3Error("InvalidArgument", message, extra=extra)
