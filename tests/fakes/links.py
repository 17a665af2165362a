"""Links that are signed by version 2, made without the code that checks them."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable

from kos.s3.names import uri_encode
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY

_COVERED = ("acl", "partNumber", "uploadId", "versionId")


def version_2(
    method: str,
    path: str,
    query: Iterable[tuple[str, str]] = (),
    *,
    access_key: str = ACCESS_KEY,
    secret_key: str = SECRET_KEY,
    expires: float = NOW + 600,
    **headers: str,
) -> str:
    """The query of a link. path: path style, as it will be sent. headers: those that are signed, "_" for "-"; those that
    stand in query count as well."""
    query = list(query)
    sent = {name.replace("_", "-"): value for name, value in headers.items()} | {
        name: value for name, value in query if name.startswith(("x-amz-", "content-"))
    }
    amz = "".join(f"{name}:{value}\n" for name, value in sorted(sent.items()) if name.startswith("x-amz-"))
    covered = sorted(f"{name}={value}" for name, value in query if name in _COVERED or name.startswith("response-"))
    resource = path + ("?" + "&".join(covered) if covered else "")
    plain = f"{sent.get('content-md5', '')}\n{sent.get('content-type', '')}"
    text = f"{method}\n{plain}\n{int(expires)}\n{amz}{resource}"
    signature = base64.b64encode(hmac.digest(secret_key.encode(), text.encode(), "sha1")).decode()
    own = [("AWSAccessKeyId", access_key), ("Signature", signature), ("Expires", str(int(expires)))]
    return "&".join(f"{uri_encode(name, False)}={uri_encode(value, False)}" for name, value in [*query, *own])
