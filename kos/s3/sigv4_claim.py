"""What a request says of its own signature: in the Authorization header, or in the query of a presigned URL.

Owns: finding the claim, its form, its dates, and the refusals of malformed ones. Does not own: whether the claim is
true (kos.s3.sigv4).

Invariant: a claim is a pure function of the text it was read from, so claims may be remembered; whatever depends on the
time, on secrets or on the signature itself is decided elsewhere, anew for each request.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-auth-using-authorization-header.html and
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final, NamedTuple, NoReturn

from kos.errors import S3Error
from kos.s3 import names
from kos.s3.head import TOKEN, Headers, RequestHead

ALGORITHM: Final = "AWS4-HMAC-SHA256"
EXPIRES_MAX_S: Final = 7 * 24 * 3600

#: Query parameters that authenticate a presigned request; they are no part of the operation.
AUTH_PARAMETERS: Final = frozenset(
    {
        "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature",
        "X-Amz-Security-Token", "X-Amz-Content-Sha256",
    }
)  # fmt: skip
#: Those that clients also write in lower case, as the headers that they stand for.
_CASELESS: Final = {"x-amz-content-sha256": "X-Amz-Content-Sha256", "x-amz-security-token": "X-Amz-Security-Token"}
_AUTH_NAMES: Final = frozenset(name.lower() for name in AUTH_PARAMETERS)
#: Session tokens, which nobody has given out here.
TOKEN_HEADERS: Final = frozenset({"x-amz-security-token", "x-amz-s3session-token"})
#: The parameters of a query that is signed by version 2: they count only when all of them are there.
VERSION_2_PARAMETERS: Final = frozenset({"AWSAccessKeyId", "Expires", "Signature"})
_REQUIRED_PARAMETERS: Final = (
    "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders",
)  # fmt: skip

#: Nobody has more headers to sign. Every header is looked up among them before anybody is known to have signed anything.
_SIGNED_NAMES_MAX: Final = 256

# Limits of what is remembered, per process and table: 2 048 texts of at most 1 KiB with what was read from them are
# some 8 MB at worst, and 300 KB as clients really sign.
CACHE_COUNT: Final = 2048
CACHE_LENGTH_MAX: Final = 1024

_QUERY_NEEDS: Final = (
    "Query-string authentication version 4 requires the X-Amz-Algorithm, X-Amz-Credential, X-Amz-Signature, "
    "X-Amz-Date, X-Amz-SignedHeaders, and X-Amz-Expires parameters."
)
_VERSION_2_NEEDS: Final = (
    "Query-string authentication requires the Signature, Expires and AWSAccessKeyId parameters, each of them once"
)
HEADER_NEEDS: Final = "the authorization header requires three components: Credential, SignedHeaders, and Signature."
_NOT_SUPPORTED: Final = f"The authorization mechanism you have provided is not supported. Please use {ALGORITHM}."
_ONE_MECHANISM: Final = (
    "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string parameter or "
    "the Authorization header should be specified"
)


class Credential(NamedTuple):
    """An access key and its scope. date: yyyyMMdd; scope: "date/region/s3/aws4_request"."""

    access_key: str
    date: str
    region: str
    scope: str


class Claim(NamedTuple):
    """Who says to have signed, and which headers. signed_headers: as sent, names separated by ";"."""

    credential: Credential
    signed_headers: str
    signed_names: tuple[str, ...]


class PresignClaim(NamedTuple):
    """The claim in a query. signed_at: epoch seconds; payload_hash: X-Amz-Content-Sha256, None if it was not given.

    moved: headers that the client moved into the query, as SDKs do with x-amz-*; names in lower case, each once.
    """

    claim: Claim
    amz_date: str
    signed_at: int
    expires_s: int
    payload_hash: str | None
    canonical_query: str
    moved: tuple[tuple[str, str], ...]


def cut_signature(raw_query: str) -> tuple[str, str | None]:
    """A raw query without its X-Amz-Signature, and that signature (None if there is none).

    The rest is the same for all requests that differ only in their signature, so what it claims can be remembered.
    """
    start = raw_query.find("X-Amz-Signature=")
    if start < 0 or (start and raw_query[start - 1] != "&"):
        return raw_query, None
    stop = raw_query.find("&", start)
    if stop < 0:
        return raw_query[: start - 1] if start else "", raw_query[start + 16 :]
    return raw_query[:start] + raw_query[stop + 1 :], raw_query[start + 16 : stop]


def presign_claim(query: str) -> PresignClaim | None:
    """What a query (without its signature) claims; None if it is no presigned one."""
    return _known_presign_claim(query) if len(query) <= CACHE_LENGTH_MAX else _parse_presign_claim(query)


def _parse_presign_claim(query: str) -> PresignClaim | None:
    pairs = names.parse_query(query)
    found: dict[str, str] = {}
    moved: dict[str, str] = {}
    repeated = False
    for name, value in pairs:
        lower = name.lower()
        name = _CASELESS.get(lower, name)
        if name in AUTH_PARAMETERS:
            repeated = repeated or name in found
            found[name] = value
        elif lower.startswith("x-amz-") and lower not in _AUTH_NAMES:
            moved[lower] = f"{moved[lower]},{value}" if lower in moved else value
    if not found.keys() - {"X-Amz-Content-Sha256"}:
        return None
    if repeated or "X-Amz-Signature" in found:
        refuse_query("An authentication parameter is given more than once.")
    if "X-Amz-Security-Token" in found or not TOKEN_HEADERS.isdisjoint(moved):
        raise S3Error("InvalidToken")
    if any(name not in found for name in _REQUIRED_PARAMETERS):
        refuse_incomplete_query()
    if found["X-Amz-Algorithm"] != ALGORITHM:
        refuse_query(f'X-Amz-Algorithm only supports "{ALGORITHM}"')
    credential = _credential(found["X-Amz-Credential"])
    if isinstance(credential, str):
        refuse_query(f"Error parsing the X-Amz-Credential parameter; {credential}")
    amz_date = found["X-Amz-Date"]
    signed_at = _parse_amz_date(amz_date)
    if signed_at is None:
        refuse_query("X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\"")
    if amz_date[:8] != credential.date:
        refuse_query(wrong_date(credential.date, amz_date))
    signed_headers = found["X-Amz-SignedHeaders"]
    signed_names = _signed_names(signed_headers)
    if signed_names is None:
        refuse_query("X-Amz-SignedHeaders must be lower-case header names, separated by semicolons")
    claim = Claim(credential, signed_headers, signed_names)
    expires_s = _expires(found["X-Amz-Expires"])
    payload_hash = found.get("X-Amz-Content-Sha256")
    return PresignClaim(
        claim, amz_date, signed_at, expires_s, payload_hash, canonical_query(pairs), tuple(moved.items())
    )


def _expires(text: str) -> int:
    number = text.removeprefix("-")
    if not (number.isascii() and number.isdigit()) or len(number) > 18:
        refuse_query("X-Amz-Expires should be a number")
    expires_s = int(text)
    if expires_s < 0:
        refuse_query("X-Amz-Expires must be non-negative")
    if expires_s == 0:
        refuse_query("X-Amz-Expires must be at least one second")
    if expires_s > EXPIRES_MAX_S:
        refuse_query(
            "X-Amz-Expires must be less than a week (in seconds); "
            f"that is, the given X-Amz-Expires must be less than {EXPIRES_MAX_S} seconds"
        )
    return expires_s


def cut_header_signature(authorization: str) -> tuple[str, str]:
    """An Authorization header without its signature, and the signature ("" if there is none)."""
    start = authorization.find("Signature=")
    if start < 0:
        return authorization, ""
    stop = authorization.find(",", start)
    if stop < 0:
        return authorization[:start], authorization[start + 10 :]
    return authorization[:start] + authorization[stop + 1 :], authorization[start + 10 : stop].strip(" ")


def header_claim(text: str) -> Claim:
    """What an Authorization header (without its signature) claims."""
    return _known_header_claim(text) if len(text) <= CACHE_LENGTH_MAX else _parse_header_claim(text)


def _parse_header_claim(text: str) -> Claim:
    algorithm, _, fields = text.partition(" ")
    if algorithm == "AWS" or algorithm.startswith("AWS4-ECDSA-"):
        raise S3Error("InvalidRequest", _NOT_SUPPORTED)
    if algorithm != ALGORITHM:
        raise S3Error("InvalidArgument", "Unsupported Authorization Type", extra={"ArgumentName": "Authorization"})
    found: dict[str, str] = {}
    for field in fields.split(","):
        name, _, value = field.strip(" ").partition("=")
        if name:
            if name in found:
                refuse_header(f"{name} is given more than once.")
            found[name] = value
    if "Credential" not in found or "SignedHeaders" not in found:
        refuse_header(HEADER_NEEDS)
    credential = _credential(found["Credential"])
    if isinstance(credential, str):
        refuse_header(credential)
    signed_names = _signed_names(found["SignedHeaders"])
    if signed_names is None:
        refuse_header("SignedHeaders must be lower-case header names, separated by semicolons.")
    return Claim(credential, found["SignedHeaders"], signed_names)


def _credential(text: str) -> Credential | str:
    """Access key and scope, or what is wrong with them. The scope counts from the end: an access key may have a "/"."""
    parts = text.rsplit("/", 4)
    if len(parts) != 5 or not parts[0] or len(parts[1]) != 8 or not _is_region(parts[2]):
        return 'the Credential is mal-formed; expecting "<YOUR-AKID>/YYYYMMDD/REGION/SERVICE/aws4_request".'
    access_key, date, region, service, terminator = parts
    if service != "s3":
        return f'incorrect service "{printable(service)}". This endpoint belongs to "s3".'
    if terminator != "aws4_request":
        return f'incorrect terminal "{printable(terminator)}". This endpoint uses "aws4_request".'
    return Credential(access_key, date, region, f"{date}/{region}/s3/aws4_request")


def _is_region(text: str) -> bool:
    """Any region, but nothing that could reach over a line of the string to sign."""
    return bool(text) and TOKEN.issuperset(text.lower())


def _signed_names(text: str) -> tuple[str, ...] | None:
    signed_names = tuple(text.split(";"))
    if len(signed_names) > _SIGNED_NAMES_MAX:
        return None
    return signed_names if all(name and TOKEN.issuperset(name) for name in signed_names) else None


def header_date(headers: Headers) -> tuple[str, int]:
    """When a request with a signed header was signed: ISO 8601 and epoch seconds. x-amz-date counts before Date."""
    amz_date = headers.get("x-amz-date")
    text = headers.get("date", "") if amz_date is None else amz_date
    signed_at = _parse_amz_date(text) if len(text) == 16 else None
    if signed_at is not None:
        return text, signed_at
    if amz_date is None and len(text) <= 64:
        try:
            signed_at = calendar.timegm(parsedate_to_datetime(text).utctimetuple())
            return amz_time(signed_at), signed_at
        except (ValueError, OverflowError):
            pass
    raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header")


@lru_cache(maxsize=256)
def _parse_amz_date(text: str) -> int | None:
    """Epoch seconds of "yyyyMMddTHHmmssZ"; None if it is not one."""
    digits = text[:8] + text[9:15]
    if len(text) != 16 or text[8] != "T" or text[15] != "Z" or not (digits.isascii() and digits.isdigit()):
        return None
    year, month, day = int(text[:4]), int(text[4:6]), int(text[6:8])
    hour, minute, second = int(text[9:11]), int(text[11:13]), int(text[13:15])
    try:
        moment = datetime(year, month, day, hour, minute, second)
    except ValueError:
        return None
    return calendar.timegm(moment.timetuple())


def canonical_query(pairs: Iterable[tuple[str, str]]) -> str:
    """The canonical query of decoded pairs: encoded, then sorted by name and value. Also fit to be sent as it is."""
    encode = names.uri_encode
    encoded = sorted([(encode(name, False), encode(value, False)) for name, value in pairs])
    return "&".join([f"{name}={value}" for name, value in encoded])


def canonical_raw_query(raw_query: str) -> str:
    """The canonical query of a raw one."""
    if len(raw_query) <= CACHE_LENGTH_MAX:
        return _known_query(raw_query)
    return canonical_query(names.parse_query(raw_query))


_known_presign_claim = lru_cache(maxsize=CACHE_COUNT)(_parse_presign_claim)
_known_header_claim = lru_cache(maxsize=CACHE_COUNT)(_parse_header_claim)


@lru_cache(maxsize=CACHE_COUNT)
def _known_query(raw_query: str) -> str:
    return canonical_query(names.parse_query(raw_query))


def iso_time(now: float) -> str:
    """Epoch seconds as error documents give times: 2013-05-24T00:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


def amz_time(now: float) -> str:
    """Epoch seconds as signatures give times: 20130524T000000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))


def wrong_date(date: str, amz_date: str) -> str:
    """The complaint about a credential's date that is not the request's."""
    return f'Invalid credential date "{printable(date)}". This date is not the same as X-Amz-Date: "{amz_date[:8]}".'


def printable(text: str) -> str:
    """Text of a request for an error document: bytes that are not UTF-8 are replaced."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def refuse_query(message: str) -> NoReturn:
    """A presigned query that is not well-formed."""
    raise S3Error("AuthorizationQueryParametersError", message)


def refuse_header(message: str) -> NoReturn:
    """An Authorization header that is not well-formed."""
    raise S3Error("AuthorizationHeaderMalformed", f"The authorization header is malformed; {message}")


def refuse_two_mechanisms() -> NoReturn:
    """A request that is signed in more than one place."""
    raise S3Error("InvalidArgument", _ONE_MECHANISM, extra={"ArgumentName": "Authorization"})


def refuse_incomplete_query() -> NoReturn:
    """A presigned query that lacks a parameter."""
    raise S3Error("AuthorizationQueryParametersError", _QUERY_NEEDS)


def refuse_unclaimed(head: RequestHead) -> NoReturn:
    """A request without a claim: anonymous, or signed by a mechanism that is not spoken here."""
    if is_version_2(head.raw_query):
        raise S3Error("InvalidRequest", _NOT_SUPPORTED)
    if {"AWSAccessKeyId", "Signature"} & _raw_names(head.raw_query):
        refuse_version_2()
    raise S3Error("AccessDenied")


def is_version_2(raw_query: str) -> bool:
    """Whether a query is signed by signature version 2."""
    return "AWSAccessKeyId=" in raw_query and _raw_names(raw_query) >= VERSION_2_PARAMETERS


def _raw_names(raw_query: str) -> set[str]:
    return {piece.partition("=")[0] for piece in raw_query.split("&")}


def refuse_version_2() -> NoReturn:
    """A query that is signed by version 2 in part, or ambiguously."""
    raise S3Error("AccessDenied", _VERSION_2_NEEDS)
