"""AWS Signature Version 4 for S3: checking what clients signed, signing what goes to an origin.

Owns: the canonical request, the string to sign, derived keys, and every refusal that follows from them. Does not own:
bodies (kos.s3.aws_chunked and kos.s3.checksums take the Identity and go on from there), or who may do what.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from typing import Final, NamedTuple

ALGORITHM: Final = "AWS4-HMAC-SHA256"
EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()


class Payload(enum.Enum):
    """How the body is covered by the signature, as x-amz-content-sha256 says."""

    UNSIGNED = "UNSIGNED-PAYLOAD"
    SIGNED = "sha256"
    STREAMING_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
    STREAMING_SIGNED_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
    STREAMING_UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


class Identity(NamedTuple):
    """Who signed a request, and what is needed to check the body that follows."""

    access_key: str
    payload: Payload
    payload_sha256: str | None
    seed_signature: str
    scope: str
    amz_date: str
    signing_key: bytes
    presigned: bool


def chunk_signature(signing_key: bytes, amz_date: str, scope: str, previous: str, chunk_sha256: str) -> str:
    """The signature of one aws-chunked chunk, given the signature before it (the seed for the first)."""
    text = f"AWS4-HMAC-SHA256-PAYLOAD\n{amz_date}\n{scope}\n{previous}\n{EMPTY_SHA256}\n{chunk_sha256}"
    return hmac.digest(signing_key, text.encode(), "sha256").hex()


def trailer_signature(signing_key: bytes, amz_date: str, scope: str, previous: str, trailers_sha256: str) -> str:
    """The signature of the trailers; trailers_sha256 is over "name:value\\n" lines, previous that of the last chunk."""
    text = f"AWS4-HMAC-SHA256-TRAILER\n{amz_date}\n{scope}\n{previous}\n{trailers_sha256}"
    return hmac.digest(signing_key, text.encode(), "sha256").hex()
