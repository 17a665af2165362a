"""Requests as an S3 client signs them, ready to be sent.

Owns: request heads with a presigned URL or an Authorization header, made with botocore's signer (not our own, so that
the two are held against each other). Does not own: sending.

Invariant: no two URLs of `presigned_targets` carry the same signature.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from bench.client import Address

ACCESS_KEY: Final = "BENCHCLIENT"
SECRET_KEY: Final = "bench-client-secret"
REGION: Final = "bench-1"
UNSIGNED: Final = "UNSIGNED-PAYLOAD"
_EXPIRES_MIN_S: Final = 3600
_EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Object:
    """What is asked for."""

    bucket: str
    key: str

    @property
    def path(self) -> str:
        return quote(f"/{self.bucket}/{self.key}")


def _credentials() -> Credentials:
    return Credentials(ACCESS_KEY, SECRET_KEY)


def presigned_target(to: Address, what: Object, expires_s: int = _EXPIRES_MIN_S) -> str:
    """Path and query of a presigned GET."""
    request = AWSRequest("GET", f"http://{to}{what.path}")
    S3SigV4QueryAuth(_credentials(), "s3", REGION, expires=expires_s).add_auth(request)
    url = urlsplit(request.url)
    return f"{url.path}?{url.query}"


def presigned_targets(to: Address, objects: Iterable[Object], count: int, *, own_query: bool = False) -> list[str]:
    """`count` presigned targets over the objects in turn, each with its own signature.

    As from a client that signs as it goes, where all URLs of a second have date and expiry in common; with own_query
    each has an expiry that no other has, the worst case for a server that remembers what it has decoded.
    """
    every = list(objects)
    return [
        presigned_target(to, every[i % len(every)], _EXPIRES_MIN_S + (i if own_query else i // len(every)))
        for i in range(count)
    ]


def plain_get(to: Address, target: str, *, more: str = "") -> bytes:
    """A GET head for a target that carries all it needs."""
    return f"GET {target} HTTP/1.1\r\nHost: {to}\r\n{more}\r\n".encode("ascii")


def presigned_get(to: Address, what: Object) -> bytes:
    """A GET head with a presigned URL."""
    return plain_get(to, presigned_target(to, what))


def signed_put(to: Address, what: Object, length: int, payload_sha256: str = UNSIGNED) -> bytes:
    """A PUT head with an Authorization header; payload_sha256: hex, or UNSIGNED-PAYLOAD."""
    request = AWSRequest("PUT", f"http://{to}{what.path}", headers={"X-Amz-Content-SHA256": payload_sha256})
    request.context["payload_signing_enabled"] = payload_sha256 != UNSIGNED
    signer = _PresetPayload(_credentials(), "s3", REGION)
    signer.add_auth(request)
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"PUT {what.path} HTTP/1.1\r\nHost: {to}\r\n{lines}Content-Length: {length}\r\n\r\n".encode("ascii")


def streaming_put(
    to: Address, what: Object, length: int, framing: int, trailer: str | None
) -> tuple[bytes, Callable[[str], bytes]]:
    """A PUT head of an aws-chunked body, and what signs its chunks in turn: SHA-256 of a chunk in hex -> signature.

    length: bytes of the body; framing: bytes that the chunks' lines add. trailer: the one that will come behind unsigned
    chunks; None: the chunks are signed.
    """
    form = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" if trailer is None else "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    headers = {
        "X-Amz-Content-SHA256": form, "Content-Encoding": "aws-chunked", "X-Amz-Decoded-Content-Length": str(length),
    }  # fmt: skip
    if trailer is not None:
        headers["X-Amz-Trailer"] = trailer
    request = AWSRequest("PUT", f"http://{to}{what.path}", headers=headers)
    _PresetPayload(_credentials(), "s3", REGION).add_auth(request)
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    head = f"PUT {what.path} HTTP/1.1\r\nHost: {to}\r\n{lines}Content-Length: {length + framing}\r\n\r\n"
    date = str(request.headers["X-Amz-Date"])
    scope = f"{date[:8]}/{REGION}/s3/aws4_request"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    previous = str(request.headers["Authorization"]).rpartition("Signature=")[2]

    def sign(chunk_sha256: str) -> bytes:
        nonlocal previous
        text = f"AWS4-HMAC-SHA256-PAYLOAD\n{date}\n{scope}\n{previous}\n{_EMPTY_SHA256}\n{chunk_sha256}"
        previous = hmac.digest(key, text.encode(), "sha256").hex()
        return previous.encode()

    return head.encode("ascii"), sign


def sha256_hex(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class _PresetPayload(S3SigV4Auth):  # type: ignore[misc]
    """The signer with the payload's hash already in its header (bodies are sent by the client, not by botocore)."""

    def payload(self, request: AWSRequest) -> str:
        return str(request.headers["X-Amz-Content-SHA256"])

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        preset = request.headers["X-Amz-Content-SHA256"]
        super()._modify_request_before_signing(request)
        del request.headers["X-Amz-Content-SHA256"]
        request.headers["X-Amz-Content-SHA256"] = preset
