"""Requests to one endpoint, one after another, and what came back in a form in which two endpoints can be compared.

Owns: sending (by boto3, by a presigned URL, or byte for byte), and the observation of an answer: a flat mapping of
paths to text, in which everything that must differ from run to run has a name instead of its value (the second version
id seen is "id-2" at every endpoint). Does not own: which requests are made (cases/), or which differences are right
(differences.py).

Invariant: nothing of an answer is left out but what stands in _VOLATILE, _UNCOMPARED and _UNCOMPARED_HEADERS.
"""

from __future__ import annotations

import datetime
import hashlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any, Final
from xml.etree import ElementTree

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.eventstream import EventStream
from botocore.exceptions import BotoCoreError, ClientError
from botocore.response import StreamingBody

from tests.fakes.node import ACCESS_KEY, SECRET_KEY

Observation = dict[str, str]

TIMEOUT_S: Final = 30.0
#: Reads that a cache may answer. Through kos each is made until it is a hit, and at least twice.
_READS: Final = frozenset(
    {"get_object", "head_object", "get_object_attributes", "list_objects", "list_objects_v2", "list_object_versions"}
)
#: What is stored in the background is there within milliseconds; what is never stored is asked this often and no more.
_AGAIN_MAX: Final = 10
_AGAIN_PAUSE_S: Final = 0.002
_STORED: Final = frozenset({"200", "206", "304"})

#: (endpoint, bucket) of what share() has filled.
_SHARED: Final[set[tuple[str, str]]] = set()

_NO_BUCKET: Final = frozenset({"list_buckets", "write_get_object_response"})
#: Points in time: when something happened, which is never twice the same.
_VOLATILE: Final = frozenset({"LastModified", "Initiated", "CreationDate", "AbortDate", "Date"})
_VOLATILE_HEADERS: Final = frozenset({"last-modified", "x-amz-abort-date"})
#: Names that the store makes up.
_IDS: Final = frozenset(
    {
        "VersionId", "CopySourceVersionId", "DeleteMarkerVersionId", "NextVersionIdMarker", "VersionIdMarker",
        "UploadId", "NextUploadIdMarker", "UploadIdMarker", "ContinuationToken", "NextContinuationToken",
        "x-amz-version-id", "x-amz-copy-source-version-id",
    }
)  # fmt: skip
#: Of documents: one answer's own, or text for people, which every store words in its own way.
_UNCOMPARED: Final = frozenset({"RequestId", "HostId", "Message", "Resource", "HTTPHeaders", "RetryAttempts"})
#: Of headers: the connection's, one answer's own, what kos says about itself, and what moto adds: leave for browsers of
#: every site, and some headers of the PUT, which it takes for the object's. Documents are compared by their elements, so
#: their length is not.
_UNCOMPARED_HEADERS: Final = frozenset(
    {
        "access-control-allow-origin", "age", "connection", "content-md5", "date", "server", "transfer-encoding",
        "x-amz-content-sha256", "x-amz-id-2", "x-amz-request-id", "x-amz-sdk-checksum-algorithm", "x-amzn-requestid",
        "x-kos-cache",
    }
)  # fmt: skip
_DOCUMENT: Final = re.compile(r"(application|text)/xml\b")


class Scene:
    """One case's requests to one endpoint.

    client: of boto3, signing by version 4. old_client: one that signs links by version 2. trust: for https. repeats:
    whether reads are made again, to see cached answers as well.
    """

    def __init__(
        self, client: Any, old_client: Any, trust: ssl.SSLContext | None, bucket: str, *, repeats: bool
    ) -> None:
        self.client = client
        self._old_client = old_client
        self._trust = trust
        self.bucket = bucket
        self.endpoint: str = client.meta.endpoint_url
        #: everything observed, in order
        self.seen: Observation = {}
        #: x-kos-cache of every answer that had one, without the reason
        self.phases: list[str] = []
        self._repeats = repeats
        self._count = 0
        self._ids: dict[str, str] = {}

    def share(self, name: str, keys: Iterable[str]) -> None:
        """Go on in a bucket of these keys that other cases read as well, and none changes."""
        self.bucket = f"{self.bucket.partition('-')[0]}-{name}"
        if (self.endpoint, self.bucket) not in _SHARED:
            self.client.create_bucket(Bucket=self.bucket)
            self.fill(keys)
            _SHARED.add((self.endpoint, self.bucket))

    def fill(self, keys: Iterable[str]) -> None:
        """Objects under these keys, each with a body of its own; not observed."""
        for key in keys:
            self.client.put_object(Bucket=self.bucket, Key=key, Body=f"the body of {key}".encode())

    # -- requests

    def call(self, operation: str, /, **arguments: Any) -> dict[str, Any]:
        """One call of a boto3 client's method. Returns its answer, or that of the ClientError."""
        if operation not in _NO_BUCKET:
            arguments.setdefault("Bucket", self.bucket)
        label = self._label(operation)
        answer, first = self._once(operation, arguments)
        self._record(label, first)
        if self._repeats and operation in _READS:
            for _ in range(_AGAIN_MAX):
                _, again = self._once(operation, arguments)
                # Only what is not as it was the first time, so that a constant answer looks as if it was read once.
                changed = {path: text for path, text in again.items() if first.get(path) != text}
                changed |= dict.fromkeys(first.keys() - again.keys(), "absent")
                self._record(f"{label} again", changed)
                if self.phases[-1] != "miss" or first["status"] not in _STORED:
                    break
                time.sleep(_AGAIN_PAUSE_S)
        return answer

    def put(self, key: str = "k", body: bytes = b"0123456789", **arguments: Any) -> dict[str, Any]:
        return self.call("put_object", Key=key, Body=body, **arguments)

    def get(self, key: str = "k", **arguments: Any) -> dict[str, Any]:
        return self.call("get_object", Key=key, **arguments)

    def head(self, key: str = "k", **arguments: Any) -> dict[str, Any]:
        return self.call("head_object", Key=key, **arguments)

    def delete(self, key: str = "k", **arguments: Any) -> dict[str, Any]:
        return self.call("delete_object", Key=key, **arguments)

    def keys(self) -> None:
        """What is in the bucket now."""
        self.call("list_objects_v2")

    def raw(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        sent: str | None = None,
    ) -> None:
        """A signed request with this very target, behind the bucket's name: "" or "/key" or "?query".

        sent: the same path written in another way, which leaves the signature right.
        """
        whole = f"/{self.bucket}{target}"
        self._raw(method, whole, headers, body, sent=None if sent is None else f"/{self.bucket}{sent}")

    def raw_service(self, method: str, target: str) -> None:
        """A signed request that names no bucket, or another one."""
        self._raw(method, target, None, None)

    def presigned(
        self,
        operation: str,
        *,
        key: str = "k",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        version_2: bool = False,
        **arguments: Any,
    ) -> None:
        """What a link to an operation gives to somebody who has no keys. headers: sent along."""
        client = self._old_client if version_2 else self.client
        method = {"put": "PUT", "head": "HEAD", "delete": "DELETE", "upload": "PUT"}.get(operation.split("_")[0], "GET")
        url = client.generate_presigned_url(
            operation, Params={"Bucket": self.bucket, "Key": key, **arguments}, ExpiresIn=300, HttpMethod=method
        )
        target = urllib.parse.urlsplit(url)
        label = self._label(f"presigned {operation}")
        times = 2 if self._repeats and method in ("GET", "HEAD") else 1
        seen: list[Observation] = []
        for _ in range(times):
            seen.append(self._exchange(method, f"{target.path}?{target.query}", dict(headers or {}), body))
        self._record(label, seen[0])
        self._record(f"{label} again", {path: text for path, text in seen[-1].items() if seen[0].get(path) != text})

    def note(self, label: str, value: object) -> None:
        """Something that the case computed from answers."""
        self._record(self._label(label), _flat(self._named(value), "value"))

    # -- observing

    def _label(self, operation: str) -> str:
        self._count += 1
        return f"{self._count} {operation}"

    def _record(self, label: str, observation: Observation) -> None:
        self.seen.update({f"{label}.{path}": text for path, text in observation.items()})

    def _once(self, operation: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Observation]:
        try:
            answer = getattr(self.client, operation)(**arguments)
        except ClientError as refusal:
            answer = refusal.response
        metadata = answer.get("ResponseMetadata", {})
        self._phase(metadata.get("HTTPHeaders", {}))
        seen: Observation = {"status": str(metadata.get("HTTPStatusCode"))}
        members = {name: value for name, value in answer.items() if name != "ResponseMetadata"}
        for name, value in members.items():
            if isinstance(value, StreamingBody):
                try:
                    members[name] = answer[name] = value.read()
                except BotoCoreError as failure:
                    members[name] = answer[name] = type(failure).__name__
            elif isinstance(value, EventStream):
                members[name] = answer[name] = list(value)
        seen |= _flat(self._named(members))
        seen |= self._headers(metadata.get("HTTPHeaders", {}))
        return answer, seen

    def _phase(self, headers: Mapping[str, str]) -> None:
        self.phases.append(headers.get("x-kos-cache", "none").partition(";")[0])

    def _headers(self, headers: Mapping[str, str]) -> Observation:
        document = _DOCUMENT.match(headers.get("content-type", "")) is not None
        seen: Observation = {}
        for name, value in headers.items():
            if name in _UNCOMPARED_HEADERS or (document and name == "content-length"):
                continue
            if name in _VOLATILE_HEADERS:
                value = "time"
            elif name == "content-type" and document:
                value = "XML"
            named = self._named({name: value})
            seen[f"header {name}"] = repr(named[name])
        return seen

    def _raw(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        *,
        sent: str | None = None,
    ) -> None:
        request = AWSRequest(method=method, url=self.endpoint + target, headers=dict(headers or {}))
        request.headers["x-amz-content-sha256"] = "UNSIGNED-PAYLOAD"
        request.context["payload_signing_enabled"] = False
        _Signer(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        shown = str(self._named(sent or target))
        seen = self._exchange(method, sent or target, dict(request.headers.items()), body)
        self._record(self._label(f"{method} {shown}"), seen)

    def _exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> Observation:
        server = urllib.parse.urlsplit(self.endpoint)
        address = str(server.hostname), server.port
        connection = (
            http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
            if self._trust is None
            else http.client.HTTPSConnection(*address, timeout=TIMEOUT_S, context=self._trust)
        )
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value.encode())
            if body is not None or method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body or b"")))
            connection.endheaders(body)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        named = {name.lower(): value for name, value in response.getheaders()}
        self._phase(named)
        seen: Observation = {"status": str(response.status)} | self._headers(named)
        if text.lstrip().startswith(b"<") and _DOCUMENT.match(named.get("content-type", "")):
            try:
                return seen | self._document(text)
            except ElementTree.ParseError:
                seen["well-formed"] = "no"
        return seen | _flat(self._named({"body": text.replace(self.bucket.encode(), b"BUCKET")}))

    def _document(self, text: bytes) -> Observation:
        root = ElementTree.fromstring(text)
        seen: Observation = {}

        def walk(element: ElementTree.Element, path: str) -> None:
            tag = element.tag.rpartition("}")[2]
            if tag in _UNCOMPARED:
                return
            path = f"{path}/{tag}"
            number = 1
            while (unique := path if number == 1 else f"{path}[{number}]") in seen:
                number += 1
            if len(element):
                seen[unique] = ""
                for child in element:
                    walk(child, unique)
            else:
                value = element.text or ""
                seen[unique] = "time" if tag in _VOLATILE else repr(self._named({tag: value})[tag])

        walk(root, "")
        return seen

    def _named(self, value: Any, name: str = "") -> Any:
        """value with names for what is different from run to run."""
        if isinstance(value, Mapping):
            return {key: self._named(each, str(key)) for key, each in value.items() if key not in _UNCOMPARED}
        if isinstance(value, list | tuple):
            return [self._named(each, name) for each in value]
        if name in _VOLATILE:
            return "time"
        if isinstance(value, str):
            if name in _IDS and value not in ("", "null"):
                return self._ids.setdefault(value, f"id-{len(self._ids) + 1}")
            for known, label in self._ids.items():
                value = value.replace(known, label)
            return value.replace(self.bucket, "BUCKET")
        return value


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    def payload(self, request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"


def _flat(value: Any, path: str = "") -> Observation:
    """Leaves by their paths; an empty list or mapping is a leaf."""
    if isinstance(value, Mapping) and value:
        seen: Observation = {}
        for name, each in value.items():
            seen |= _flat(each, f"{path}.{name}" if path else str(name))
        return seen
    if isinstance(value, list) and value:
        seen = {}
        for number, each in enumerate(value):
            seen |= _flat(each, f"{path}.{number}")
        return seen
    if not path:
        return {}
    if isinstance(value, bytes) and len(value) > 64:
        return {path: f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:16]}"}
    if isinstance(value, datetime.datetime):
        return {path: value.isoformat()}
    return {path: repr(value)}


def differences(direct: Observation, through: Observation) -> dict[str, tuple[str, str]]:
    """path -> (what the origin gives directly, what it gives through kos), for paths where these are not the same.

    Of answers with different statuses only status, error code and a body that was asked for are told: nothing else can
    be alike.
    """
    paths = [*direct, *(path for path in through if path not in direct)]
    apart = {
        path.removesuffix("status")
        for path in paths
        if path.endswith(".status") and direct.get(path) != through.get(path)
    }
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        request = next((each for each in apart if path.startswith(each)), None)
        if request is None:
            pair = direct.get(path, "absent"), through.get(path, "absent")
        elif path.endswith(_TOLD):
            pair = _told(direct, request, path), _told(through, request, path)
        else:
            continue
        if pair[0] != pair[1]:
            found[path] = pair
    return found


_BODIES: Final = (".Body", ".body")
_TOLD: Final = (".status", ".Error.Code", "/Error/Code", *_BODIES)


def _told(seen: Observation, request: str, path: str) -> str:
    text = seen.get(path, "absent")
    # The body of an error is its document or a page for people, and that of a HEAD is none.
    no_body = not seen.get(f"{request}status", "").startswith("2") or text == "b''"
    return "absent" if path.endswith(_BODIES) and no_body else text
