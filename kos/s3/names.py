"""Buckets and keys as they stand in a URL: percent-encoding, path style and virtual-hosted style, and what S3 allows.

Owns: decoding and encoding by AWS's rules (everything but A-Z a-z 0-9 - . _ ~ is encoded, upper-case hex), the split of
a target into bucket and key. Does not own: what is done to them (kos.s3.operation) or the signature (kos.s3.sigv4).

Invariant: nothing is normalized. "//", "." and ".." are ordinary parts of a key, "+" in a path is a plus, and the path
is decoded before it is split, so two paths with one canonical form (and hence one signature) always mean the same object.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html (UriEncode);
https://docs.aws.amazon.com/AmazonS3/latest/userguide/ object-keys.html, VirtualHosting.html, bucketnamingrules.html
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from kos.errors import S3Error

KEY_MAX_BYTES: Final = 1024

_UNRESERVED: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
_UNRESERVED_AND_SLASH: Final = _UNRESERVED + b"/"
_BROKEN_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
#: The older, wider rule (buckets made before 2018 may have capitals, underscores and up to 255 characters). Names of one
#: and two characters, which S3 has never had, are other origins' business to refuse.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def uri_encode(text: str, safe_slash: bool) -> str:
    """AWS's UriEncode of the UTF-8 bytes of text; escaped surrogates give back the bytes that they stand for."""
    raw = text.encode("utf-8", "surrogateescape")
    if not raw.translate(None, _UNRESERVED_AND_SLASH if safe_slash else _UNRESERVED):
        return text
    return quote_from_bytes(raw, safe="/" if safe_slash else "")


def encode_key(key: str) -> str:
    """A key as it stands in a URL path: "/" is kept."""
    return uri_encode(key, True)


def percent_decode_path(raw: str) -> str:
    """A raw path, decoded. S3Error InvalidURI if an escape is broken or the bytes are not UTF-8."""
    if "%" not in raw and raw.isascii():
        return raw
    encoded = raw.encode("utf-8", "surrogateescape")
    if _BROKEN_ESCAPE.search(encoded):
        raise S3Error("InvalidURI", extra={"URI": _printable(encoded)})
    try:
        return unquote_to_bytes(encoded).decode("utf-8")
    except UnicodeDecodeError:
        raise S3Error("InvalidURI", extra={"URI": _printable(encoded)}) from None


def canonical_path(raw: str) -> str:
    """A raw path in the one form that is signed: decoded and encoded again, "/" kept, nothing collapsed."""
    encoded = raw.encode("utf-8", "surrogateescape")
    if not encoded.translate(None, _UNRESERVED_AND_SLASH):
        return raw or "/"
    if _BROKEN_ESCAPE.search(encoded):
        raise S3Error("InvalidURI", extra={"URI": _printable(encoded)})
    return quote_from_bytes(unquote_to_bytes(encoded), safe="/")


def percent_decode(raw: str) -> str:
    """Percent-encoded text, decoded; "+" is a plus. Bytes that are not UTF-8 become escaped surrogates."""
    if "%" not in raw:
        return raw
    return unquote_to_bytes(raw.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def query_decode(raw: str) -> str:
    """A name or value of a raw query, decoded. "+" is a blank, as S3 reads what form encoders make of one."""
    return percent_decode(raw.replace("+", " "))


def parse_query(raw_query: str) -> list[tuple[str, str]]:
    """The pairs of a raw query, decoded, in the order sent; a name without "=" has the value ""."""
    pairs: list[tuple[str, str]] = []
    for piece in raw_query.split("&"):
        if piece:
            name, _, value = piece.partition("=")
            pairs.append((query_decode(name), query_decode(value)))
    return pairs


def split_target(raw_path: str, host: str, domain: str | None) -> tuple[str | None, str | None]:
    """Bucket and key of a request; (None, None) is the service itself, (bucket, None) the bucket.

    host: the Host header, port and all. domain: of virtual-hosted style (<bucket>.<domain>), None if only path style
    is spoken. Other hosts, and the domain itself, mean path style. S3Error: InvalidURI, InvalidBucketName,
    KeyTooLongError.
    """
    path = percent_decode_path(raw_path)
    if path[:1] != "/":
        raise S3Error("InvalidURI", extra={"URI": raw_path})
    bucket = bucket_of_host(host, domain) if domain else None
    if bucket is not None:
        key = path[1:]
    elif path == "/":
        return None, None
    else:
        bucket, _, key = path[1:].partition("/")
    check_bucket(bucket)
    if not key:
        return bucket, None
    check_key(key)
    return bucket, key


def bucket_of_host(host: str, domain: str) -> str | None:
    """The bucket that a Host header names below domain; None if it names none."""
    name = host.lower()
    if not name.endswith("]"):
        bare, colon, port = name.rpartition(":")
        if colon and port.isdigit():
            name = bare
    suffix = "." + domain.lower()
    return name[: -len(suffix)] if name.endswith(suffix) else None


def check_bucket(bucket: str) -> None:
    """S3Error InvalidBucketName unless bucket may be a bucket's name."""
    if not _BUCKET.fullmatch(bucket):
        raise S3Error("InvalidBucketName", extra={"BucketName": bucket})


def check_key(key: str) -> None:
    """S3Error KeyTooLongError if key has more than 1024 bytes of UTF-8."""
    size = len(key) if key.isascii() else len(key.encode("utf-8", "surrogateescape"))
    if size > KEY_MAX_BYTES:
        raise S3Error("KeyTooLongError", extra={"Size": str(size), "MaxSizeAllowed": str(KEY_MAX_BYTES)})


def _printable(raw: bytes) -> str:
    """Raw bytes for an error document: what is not UTF-8 is replaced."""
    return raw.decode("utf-8", "replace")
