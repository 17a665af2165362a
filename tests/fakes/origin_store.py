"""What the fake origin remembers and how S3 answers from it: an independent, small reading of the S3 API for tests.

Owns: buckets, object versions, multipart uploads, sub-resources, and the function `serve` from a whole request to an
answer. Does not own sockets, faults or the request log (tests.fakes.origin). Shares no code with kos, so that a
misreading of the protocol shows as a failing test and not as an agreement.

Invariant: a version, once stored, never changes; an object exists from the moment its whole request was accepted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import parse_qsl, quote_plus, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.fakes.generated import Generated

Headers = dict[str, str]

_KEPT = ("content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires")
# fmt: off
_SUBRESOURCES = frozenset((
    "acl", "tagging", "policy", "lifecycle", "cors", "website", "versioning", "encryption", "notification",
    "replication", "logging", "location", "object-lock", "retention", "legal-hold", "requestPayment", "accelerate",
    "ownershipControls", "publicAccessBlock", "policyStatus", "analytics", "inventory", "metrics",
    "intelligent-tiering", "attributes", "torrent", "restore", "select",
))
# fmt: on


@dataclass(slots=True, eq=False)
class Version:
    body: bytes | Generated
    etag: str  # with its quotes, as on the wire
    last_modified: float
    headers: Headers
    checksums: Headers
    version_id: str
    parts: tuple[int, ...] = ()  # lengths of the parts of a multipart object
    delete_marker: bool = False
    part_checksums: tuple[Headers, ...] = ()  # of each part, where the origin has them


@dataclass(slots=True, eq=False)
class Upload:
    bucket: str
    key: str
    headers: Headers
    parts: dict[int, Version] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Bucket:
    objects: dict[str, list[Version]] = field(default_factory=dict)
    versioned: bool = False
    suspended: bool = False  # versioned once; now writes replace the null version and leave the others
    subresources: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def latest(self, key: str) -> Version | None:
        versions = self.objects.get(key)
        return None if not versions or versions[-1].delete_marker else versions[-1]


@dataclass(slots=True)
class Request:
    method: str
    raw_path: str
    raw_query: str
    headers: Headers
    bucket: str
    key: str
    query: Headers
    body: bytes = b""


@dataclass(slots=True)
class Answer:
    status: int
    headers: Headers = field(default_factory=dict)
    body: bytes | memoryview | Generated = b""


class Refusal(Exception):
    def __init__(
        self, status: int, code: str, message: str = "", headers: Headers | None = None, extra: str = ""
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.headers = status, code, message or code, headers or {}
        self.extra = extra

    def answer(self) -> Answer:
        text = (
            f"<Code>{self.code}</Code><Message>{escape(self.message)}</Message>{self.extra}<RequestId>FAKE</RequestId>"
        )
        return xml_answer(self.status, f"<Error>{text}</Error>", self.headers)


def xml_answer(status: int, text: str, headers: Headers | None = None) -> Answer:
    body = ('<?xml version="1.0" encoding="UTF-8"?>\n' + text).encode()
    return Answer(status, {"content-type": "application/xml", **(headers or {})}, body)


def parse_target(target: str, host: str, domain: str | None) -> tuple[str, str, str, str, Headers]:
    """raw path, raw query, bucket, key and decoded query of a request target as it was on the wire."""
    raw_path, _, raw_query = target.partition("?")
    query = dict(parse_qsl(raw_query.replace("+", "%2B"), keep_blank_values=True))
    name = host.partition(":")[0]
    rest = raw_path[1:]
    if domain and name.endswith("." + domain):
        bucket = name[: -len(domain) - 1]
    else:
        bucket, _, rest = rest.partition("/")
    return raw_path, raw_query, unquote(bucket), unquote(rest), query


class OriginStore:
    """In-memory S3. `now` gives epoch seconds; Last-Modified has S3's whole seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, Upload] = {}
        self._ids = itertools.count(1)
        #: an origin that does not know partNumber answers with the whole object
        self.knows_parts = True

    # -- for tests -----------------------------------------------------------------------------------------------

    def create_bucket(self, name: str, *, versioned: bool = False) -> Bucket:
        bucket = self.buckets.setdefault(name, Bucket())
        bucket.versioned = bucket.versioned or versioned
        return bucket

    def suspend_versions(self, name: str) -> None:
        self.buckets[name].suspended = True

    def put(
        self,
        bucket: str,
        key: str,
        body: bytes | Generated,
        headers: Headers | None = None,
        *,
        etag: str | None = None,
        last_modified: float | None = None,
        checksums: Headers | None = None,
        parts: tuple[int, ...] = (),
        part_checksums: tuple[Headers, ...] = (),
    ) -> Version:
        """Stores an object behind everyone's back; the bucket is made if need be. Returns the version with its ETag."""
        home = self.create_bucket(bucket)
        version = Version(
            body if isinstance(body, Generated) else bytes(body),
            etag or (body.etag if isinstance(body, Generated) else f'"{hashlib.md5(body).hexdigest()}"'),
            self.now() if last_modified is None else last_modified,
            {"content-type": "binary/octet-stream", **(headers or {})},
            checksums or {},
            f"v{next(self._ids):06d}" if home.versioned and not home.suspended else "null",
            parts,
            part_checksums=part_checksums,
        )
        self._append(home, key, version)
        return version

    def _append(self, home: Bucket, key: str, version: Version) -> None:
        versions = home.objects.setdefault(key, [])
        if version.version_id == "null":
            versions[:] = [each for each in versions if each.version_id != "null"]
        versions.append(version)

    def remove(self, bucket: str, key: str, version_id: str | None = None) -> Version | None:
        """Deletes the object (where there are versions: by a marker, which is returned), or one version for good."""
        home = self.buckets[bucket]
        if version_id is not None:
            versions = home.objects.get(key, [])
            versions[:] = [version for version in versions if version.version_id != version_id]
            return None
        if not home.versioned:
            home.objects.pop(key, None)
            return None
        marker_id = "null" if home.suspended else f"v{next(self._ids):06d}"
        marker = Version(b"", "", self.now(), {}, {}, marker_id, (), True)
        self._append(home, key, marker)
        return marker

    def get(self, bucket: str, key: str) -> Version | None:
        home = self.buckets.get(bucket)
        return home.latest(key) if home else None

    # -- the API -------------------------------------------------------------------------------------------------

    def serve(self, op: str, request: Request) -> Answer:
        """Answers one whole request (its body decoded). Never raises for what a client may do wrong."""
        try:
            handler = getattr(self, "_" + op, None)
            if handler is None:
                raise Refusal(501, "NotImplemented", op)
            if op not in ("ListBuckets", "CreateBucket") and request.bucket not in self.buckets:
                raise Refusal(404, "NoSuchBucket")
            answer: Answer = handler(request)
        except Refusal as refusal:
            answer = refusal.answer()
        return answer

    def _version(self, request: Request) -> Version:
        home = self.buckets[request.bucket]
        versions = home.objects.get(request.key, [])
        wanted = request.query.get("versionId")
        if wanted == "":
            raise Refusal(400, "InvalidArgument", "Version id cannot be the empty string")
        if wanted is not None:
            for version in versions:
                if version.version_id == wanted:
                    if version.delete_marker:
                        modified = formatdate(version.last_modified, usegmt=True)
                        marked = {**_marked(version), "allow": "DELETE", "last-modified": modified}
                        raise Refusal(405, "MethodNotAllowed", headers=marked)
                    return version
            raise Refusal(404, "NoSuchVersion")
        latest = home.latest(request.key)
        if latest is None:
            marked = _marked(versions[-1]) if versions else {}
            raise Refusal(404, "NoSuchKey", headers=marked, extra=f"<Key>{escape(request.key)}</Key>")
        return latest

    def _GetObject(self, request: Request) -> Answer:
        version = self._version(request)
        number = _part_number(request) if self.knows_parts else None
        headers = {
            "etag": version.etag,
            "last-modified": formatdate(version.last_modified, usegmt=True),
            "accept-ranges": "bytes",
            **version.headers,
        }
        if self.buckets[request.bucket].versioned:
            headers["x-amz-version-id"] = version.version_id
        tags = self.buckets[request.bucket].subresources.get((request.key, "tagging"), b"").count(b"<Tag>")
        if tags:
            headers["x-amz-tagging-count"] = str(tags)
        for name, value in request.query.items():
            if name.startswith("response-"):
                headers[name[len("response-") :]] = value
        status = _condition(request.headers, version)
        if status == 304:
            kept = ("etag", "last-modified", "cache-control", "x-amz-version-id")
            return Answer(304, {name: headers[name] for name in kept if name in headers})
        size = len(version.body)
        start, stop, partial = _slice(request, version) if number is None else _part_slice(number, version)
        with_checksums = request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED"
        if partial:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        if number is not None and version.parts:
            headers["x-amz-mp-parts-count"] = str(len(version.parts))
            if with_checksums and version.part_checksums:
                headers.update(version.part_checksums[number - 1])
        elif with_checksums and (number is not None or not partial):
            headers.update(version.checksums)
        whole = version.body if isinstance(version.body, Generated) else memoryview(version.body)
        return Answer(206 if partial else 200, headers, whole[start:stop])

    _HeadObject = _GetObject  # the server leaves the body out and keeps its length

    def _PutObject(self, request: Request) -> Answer:
        _check_write_condition(request.headers, self.buckets[request.bucket].latest(request.key))
        checksums = _check_body(request)
        version = self.put(request.bucket, request.key, request.body, _kept(request.headers), checksums=checksums)
        headers = {"etag": version.etag, **checksums}
        if self.buckets[request.bucket].versioned:
            headers["x-amz-version-id"] = version.version_id
        return Answer(200, headers)

    def _DeleteObject(self, request: Request) -> Answer:
        if "if-match" in request.headers:
            _check_write_condition(request.headers, self._version(request))
        marker = self.remove(request.bucket, request.key, request.query.get("versionId"))
        return Answer(204, {} if marker is None else _marked(marker))

    def _DeleteObjects(self, request: Request) -> Answer:
        _check_body(request)
        done = []
        for item in _elements(request.body, "Object"):
            key = _text(item, "Key")
            present, wanted = self.buckets[request.bucket].latest(key), _text(item, "ETag", "").strip('"')
            if wanted and (present is None or wanted != present.etag.strip('"')):
                done.append(f"<Error><Key>{escape(key)}</Key><Code>PreconditionFailed</Code></Error>")
                continue
            self.remove(request.bucket, key, _text(item, "VersionId", "") or None)
            done.append(f"<Deleted><Key>{escape(key)}</Key></Deleted>")
        return xml_answer(200, f"<DeleteResult>{''.join(done)}</DeleteResult>")

    def _source(self, request: Request) -> Version:
        path, _, version_id = request.headers["x-amz-copy-source"].partition("?versionId=")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        if bucket not in self.buckets:
            raise Refusal(404, "NoSuchBucket")
        query = {"versionId": version_id} if version_id else {}
        version = self._version(Request("GET", "", "", {}, bucket, key, query))
        wanted = request.headers.get("x-amz-copy-source-if-match")
        if wanted is not None and wanted.strip('"') != version.etag.strip('"'):
            raise Refusal(412, "PreconditionFailed")
        return version

    def _CopyObject(self, request: Request) -> Answer:
        source = self._source(request)
        replace = request.headers.get("x-amz-metadata-directive", "COPY").upper() == "REPLACE"
        headers = _kept(request.headers) if replace else source.headers
        version = self.put(request.bucket, request.key, source.body, headers, checksums=source.checksums)
        return xml_answer(200, f"<CopyObjectResult>{_stamp(version)}</CopyObjectResult>")

    def _CreateMultipartUpload(self, request: Request) -> Answer:
        upload_id = f"upload{next(self._ids)}"
        self.uploads[upload_id] = Upload(request.bucket, request.key, _kept(request.headers))
        where = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key><UploadId>{upload_id}</UploadId>"
        return xml_answer(200, f"<InitiateMultipartUploadResult>{where}</InitiateMultipartUploadResult>")

    def _upload(self, request: Request) -> Upload:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            raise Refusal(404, "NoSuchUpload")
        return upload

    def _part(self, request: Request, body: bytes, checksums: Headers) -> Version:
        part = Version(body, f'"{hashlib.md5(body).hexdigest()}"', self.now(), {}, checksums, "null")
        self._upload(request).parts[int(request.query["partNumber"])] = part
        return part

    def _UploadPart(self, request: Request) -> Answer:
        self._upload(request)
        checksums = _check_body(request)
        return Answer(200, {"etag": self._part(request, request.body, checksums).etag, **checksums})

    def _UploadPartCopy(self, request: Request) -> Answer:
        body = self._source(request).body
        assert not isinstance(body, Generated), "parts are kept"
        span = request.headers.get("x-amz-copy-source-range")
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
        return xml_answer(200, f"<CopyPartResult>{_stamp(self._part(request, body, {}))}</CopyPartResult>")

    def _CompleteMultipartUpload(self, request: Request) -> Answer:
        upload = self._upload(request)
        chosen = []
        for item in _elements(request.body, "Part"):
            part = upload.parts.get(int(_text(item, "PartNumber")))
            if part is None or _text(item, "ETag").strip('"') != part.etag.strip('"'):
                raise Refusal(400, "InvalidPart")
            chosen.append(part)
        if not chosen:
            raise Refusal(400, "MalformedXML")
        digest = hashlib.md5(b"".join(binascii.unhexlify(p.etag.strip('"')) for p in chosen)).hexdigest()
        etag = f'"{digest}-{len(chosen)}"'
        lengths = tuple(len(p.body) for p in chosen)
        body = b"".join(p.body for p in chosen)
        if int(request.headers.get("x-amz-mp-object-size", len(body))) != len(body):
            raise Refusal(400, "InvalidRequest", "The x-amz-mp-object-size header does not match what was uploaded")
        _check_write_condition(request.headers, self.buckets[upload.bucket].latest(upload.key))
        self.put(upload.bucket, upload.key, body, upload.headers, etag=etag, parts=lengths)
        del self.uploads[request.query["uploadId"]]
        where = f"<Bucket>{upload.bucket}</Bucket><Key>{escape(upload.key)}</Key><ETag>{escape(etag)}</ETag>"
        return xml_answer(200, f"<CompleteMultipartUploadResult>{where}</CompleteMultipartUploadResult>")

    def _AbortMultipartUpload(self, request: Request) -> Answer:
        self._upload(request)
        del self.uploads[request.query["uploadId"]]
        return Answer(204)

    def _ListParts(self, request: Request) -> Answer:
        parts = sorted(self._upload(request).parts.items())
        rows = "".join(
            f"<Part><PartNumber>{n}</PartNumber>{_stamp(p)}<Size>{len(p.body)}</Size></Part>" for n, p in parts
        )
        return xml_answer(200, f"<ListPartsResult><IsTruncated>false</IsTruncated>{rows}</ListPartsResult>")

    def _ListMultipartUploads(self, request: Request) -> Answer:
        rows = "".join(
            f"<Upload><Key>{escape(u.key)}</Key><UploadId>{i}</UploadId></Upload>"
            for i, u in self.uploads.items()
            if u.bucket == request.bucket
        )
        return xml_answer(200, f"<ListMultipartUploadsResult>{rows}</ListMultipartUploadsResult>")

    def _ListObjectsV2(self, request: Request) -> Answer:
        query = request.query
        v2 = query.get("list-type") == "2"
        limit = _max_keys(query.get("max-keys", ""))
        encoding = query.get("encoding-type")
        if encoding is not None and encoding.lower() != "url":
            raise _bad_argument("Invalid Encoding Method specified in Request", "encoding-type", encoding)
        after, inside_groups = query.get("marker", ""), False
        if v2:
            after, inside_groups = query.get("start-after", ""), True
            if "continuation-token" in query:
                after, inside_groups = _token_read(query["continuation-token"]), False
        if limit < 0:
            raise _bad_argument("Argument maxKeys must be an integer between 0 and 2147483647", "maxKeys", str(limit))
        contents: list[str] = []
        groups: list[str] = []
        last, truncated = "", False
        owner = "<Owner><ID>fake</ID></Owner>" if not v2 or query.get("fetch-owner") == "true" else ""

        def show(text: str) -> str:
            return quote_plus(text, safe="/*") if encoding else _as_xml(text)

        for name, version in self._entries(request, after, inside_groups):
            if len(contents) + len(groups) == min(limit, 1000):
                truncated = limit > 0
                break
            if version is None:
                groups.append(f"<CommonPrefixes><Prefix>{show(name)}</Prefix></CommonPrefixes>")
            else:
                about = f"<Key>{show(name)}</Key>{_stamp(version)}<Size>{len(version.body)}</Size>{owner}"
                contents.append(f"<Contents>{about}<StorageClass>STANDARD</StorageClass></Contents>")
            last = name
        elements = [("Name", request.bucket), ("Prefix", show(query.get("prefix", "")))]
        if v2:
            if "continuation-token" in query:
                elements.append(("ContinuationToken", escape(query["continuation-token"])))
            elif "start-after" in query:
                elements.append(("StartAfter", show(query["start-after"])))
            if truncated:
                elements.append(("NextContinuationToken", _token(last)))
            elements.append(("KeyCount", str(len(contents) + len(groups))))
        else:
            elements.append(("Marker", show(query.get("marker", ""))))
            if truncated and query.get("delimiter"):
                elements.append(("NextMarker", show(last)))
        elements.append(("MaxKeys", str(limit)))
        if query.get("delimiter"):
            elements.append(("Delimiter", show(query["delimiter"])))
        if encoding:
            elements.append(("EncodingType", encoding))
        elements.append(("IsTruncated", str(truncated).lower()))
        head = "".join(f"<{name}>{text}</{name}>" for name, text in elements)
        return xml_answer(200, f"<ListBucketResult>{head}{''.join(contents + groups)}</ListBucketResult>")

    _ListObjects = _ListObjectsV2

    def _entries(self, request: Request, after: str, inside_groups: bool) -> Iterator[tuple[str, Version | None]]:
        """Keys with their versions and groups with None, in order of their bytes, all behind `after`.

        inside_groups: a group is listed again if only some of its keys are behind `after` (start-after), else not (tokens
        and markers, where `after` may name a group that was listed).
        """
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        home = self.buckets[request.bucket]
        seen = ""
        for key in sorted(home.objects, key=lambda key: key.encode("utf-8", "surrogateescape")):
            version = home.latest(key)
            if version is None or not key.startswith(prefix) or _bytes(key) <= _bytes(after):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                yield key, version
                continue
            group = key[: cut + len(delimiter)]
            if group != seen and (inside_groups or not after.startswith(group)):
                yield group, None
            seen = group

    def _ListBuckets(self, request: Request) -> Answer:
        rows = "".join(f"<Bucket><Name>{name}</Name></Bucket>" for name in sorted(self.buckets))
        return xml_answer(200, f"<ListAllMyBucketsResult><Buckets>{rows}</Buckets></ListAllMyBucketsResult>")

    def _CreateBucket(self, request: Request) -> Answer:
        self.create_bucket(request.bucket)
        return Answer(200, {"location": f"/{request.bucket}"})

    def _DeleteBucket(self, request: Request) -> Answer:
        if any(self.buckets[request.bucket].latest(key) for key in self.buckets[request.bucket].objects):
            raise Refusal(409, "BucketNotEmpty")
        del self.buckets[request.bucket]
        return Answer(204)

    def _HeadBucket(self, request: Request) -> Answer:
        return Answer(200, {"x-amz-bucket-region": "us-east-1"})

    def _Subresource(self, request: Request) -> Answer:
        """Tagging, ACL, policy and the like: what was PUT is what GET gives."""
        name = next(n for n in request.query if n in _SUBRESOURCES)
        kept = self.buckets[request.bucket].subresources
        where = (request.key, name)
        if request.method == "PUT":
            kept[where] = request.body
            return Answer(200)
        if request.method == "DELETE":
            kept.pop(where, None)
            return Answer(204)
        if where in kept:
            return Answer(200, {"content-type": "application/xml"}, kept[where])
        if name in ("location", "versioning", "acl", "tagging"):
            return xml_answer(200, f"<{name.capitalize()}/>")
        raise Refusal(404, "NoSuchConfiguration")


def _max_keys(text: str) -> int:
    """As S3 reads it; may be negative."""
    if not text:
        return 1000
    if not re.fullmatch("-?[0-9]+", text, re.ASCII) or len(text) > 4000 or not -(2**31) <= int(text) < 2**31:
        raise _bad_argument("Provided max-keys not an integer or within integer range", "max-keys", text)
    return int(text)


def _bad_argument(message: str, name: str, value: str = "") -> Refusal:
    extra = f"<ArgumentName>{name}</ArgumentName>"
    return Refusal(
        400,
        "InvalidArgument",
        message,
        extra=extra + (f"<ArgumentValue>{escape(value)}</ArgumentValue>" if value else ""),
    )


def _token(last: str) -> str:
    """Opaque, with the characters of base64 that a careless client or proxy would change."""
    return base64.b64encode(b"\xfb\xff" + _bytes(last)).decode()


def _token_read(token: str) -> str:
    try:
        raw = base64.b64decode(token, validate=True)
    except binascii.Error:
        raw = b""
    if not raw.startswith(b"\xfb\xff"):
        raise _bad_argument("The continuation token provided is incorrect", "continuation-token")
    return raw[2:].decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _as_xml(text: str) -> str:
    """Text as S3 puts it into a document: what XML cannot hold becomes a reference all the same."""
    return re.sub("[\x00-\x08\x0b-\x1f]", lambda found: f"&#x{ord(found[0]):x};", escape(text))


def operation(method: str, key: str, query: Headers, headers: Headers) -> str:
    """The S3 API name of a request; Subresource for tagging, ACL and the like."""
    if any(name in _SUBRESOURCES for name in query):
        return "Subresource"
    copy = "x-amz-copy-source" in headers
    if not key:
        if method == "POST" and "delete" in query:
            return "DeleteObjects"
        if method == "GET" and "uploads" in query:
            return "ListMultipartUploads"
        listing = "ListObjectsV2" if query.get("list-type") == "2" else "ListObjects"
        return {"GET": listing, "PUT": "CreateBucket", "DELETE": "DeleteBucket", "HEAD": "HeadBucket"}.get(
            method, "Unknown"
        )
    if "uploadId" in query:
        part = "UploadPartCopy" if copy else "UploadPart"
        posts = {"GET": "ListParts", "PUT": part, "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return posts.get(method, "Unknown")
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "Unknown"
    put = "CopyObject" if copy else "PutObject"
    return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": put, "DELETE": "DeleteObject"}.get(method, "Unknown")


def decode_aws_chunked(body: bytes) -> tuple[bytes, Headers]:
    """The payload and the trailers of an aws-chunked body; signatures are not looked at."""
    pieces, trailers, at = [], {}, 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        at = end + 2
        if size == 0:
            break
        pieces.append(body[at : at + size])
        if body[at + size : at + size + 2] != b"\r\n":
            raise Refusal(400, "IncompleteBody")
        at += size + 2
    for line in body[at:].split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if colon:
            trailers[name.decode().lower().strip()] = value.decode().strip()
    return b"".join(pieces), trailers


def _kept(headers: Headers) -> Headers:
    kept = {k: v for k, v in headers.items() if k in _KEPT or k.startswith("x-amz-meta-")}
    coding = [c.strip() for c in kept.pop("content-encoding", "").split(",") if c.strip() not in ("", "aws-chunked")]
    if coding:
        kept["content-encoding"] = ",".join(coding)
    return kept


def _check_body(request: Request) -> Headers:
    """Verifies what the client said about the body; returns the checksum headers to keep."""
    body, headers = request.body, request.headers
    claimed = headers.get("x-amz-content-sha256", "")
    if len(claimed) == 64 and hashlib.sha256(body).hexdigest() != claimed:
        raise Refusal(400, "XAmzContentSHA256Mismatch")
    if "content-md5" in headers and base64.b64encode(hashlib.md5(body).digest()).decode() != headers["content-md5"]:
        raise Refusal(400, "BadDigest")
    sums = {
        name: value
        for name, value in headers.items()
        if name.startswith("x-amz-checksum-") and name not in ("x-amz-checksum-algorithm", "x-amz-checksum-mode")
    }
    computable = {
        "x-amz-checksum-crc32": lambda: binascii.crc32(body).to_bytes(4, "big"),
        "x-amz-checksum-sha1": lambda: hashlib.sha1(body).digest(),
        "x-amz-checksum-sha256": lambda: hashlib.sha256(body).digest(),
    }
    for name, value in sums.items():
        if name in computable and base64.b64encode(computable[name]()).decode() != value:
            raise Refusal(400, "BadDigest")
    return sums


def _marked(marker: Version) -> Headers:
    return {"x-amz-delete-marker": "true", "x-amz-version-id": marker.version_id} if marker.delete_marker else {}


def _date(text: str | None) -> float | None:
    """Epoch seconds of an HTTP date; None for none, and for what is none."""
    try:
        return None if text is None else parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return None


def _names(value: str, version: Version, *, weakly: bool) -> bool:
    listed = [v.strip() for v in value.split(",")]
    if weakly:
        listed = [v.removeprefix("W/") for v in listed]
    return listed == ["*"] or version.etag.strip('"') in [v.strip('"') for v in listed]


def _condition(headers: Headers, version: Version) -> int:
    whole_s = int(version.last_modified)
    if "if-match" in headers:
        if not _names(headers["if-match"], version, weakly=False):
            raise Refusal(412, "PreconditionFailed")
    elif (unmodified := _date(headers.get("if-unmodified-since"))) is not None and whole_s > unmodified:
        raise Refusal(412, "PreconditionFailed")
    if "if-none-match" in headers:
        return 304 if _names(headers["if-none-match"], version, weakly=True) else 200
    if (modified := _date(headers.get("if-modified-since"))) is not None and whole_s <= modified:
        return 304
    return 200


def _part_number(request: Request) -> int | None:
    text = request.query.get("partNumber")
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 10000:
        raise Refusal(400, "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive")
    if "range" in request.headers:
        raise Refusal(400, "InvalidRequest", "Cannot specify both Range header and partNumber query parameter")
    return int(text)


def _part_slice(number: int, version: Version) -> tuple[int, int, bool]:
    """What an object that was stored in one piece has is one part; an empty one is answered whole."""
    parts = version.parts or (len(version.body),)
    if number > len(parts):
        raise Refusal(416, "InvalidPartNumber")
    start = sum(parts[: number - 1])
    return start, start + parts[number - 1], parts[number - 1] > 0


def _check_write_condition(headers: Headers, present: Version | None) -> None:
    if headers.get("if-none-match") == "*" and present is not None:
        raise Refusal(412, "PreconditionFailed")
    wanted = headers.get("if-match")
    if wanted is not None and (present is None or wanted.strip('"') != present.etag.strip('"')):
        raise Refusal(412, "PreconditionFailed")


def _slice(request: Request, version: Version) -> tuple[int, int, bool]:
    size = len(version.body)
    spec = request.headers.get("range", "")
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range not in (version.etag, formatdate(version.last_modified, usegmt=True)):
        return 0, size, False
    if not spec.startswith("bytes=") or "," in spec:
        return 0, size, False
    first, dash, last = spec[6:].partition("-")
    if not dash or not (first or last) or not (first + last).isdigit():
        return 0, size, False
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return 0, size, False
    else:
        start, stop = max(size - int(last), 0), size
        if size == 0 and int(last) > 0:
            return 0, 0, False  # the last bytes of nothing are nothing: S3 answers 200
    if start >= size or start >= stop:
        extra = f"<ActualObjectSize>{size}</ActualObjectSize><RangeRequested>{spec}</RangeRequested>"
        raise Refusal(416, "InvalidRange", headers={"content-range": f"bytes */{size}"}, extra=extra)
    return start, stop, True


def _stamp(version: Version) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(version.last_modified))
    return f"<ETag>{escape(version.etag)}</ETag><LastModified>{when}</LastModified>"


def _elements(body: bytes, name: str) -> list[ElementTree.Element]:
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise Refusal(400, "MalformedXML") from error
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == name]


def _text(element: ElementTree.Element, name: str, absent: str | None = None) -> str:
    found = [child.text or "" for child in element if child.tag.rpartition("}")[2] == name]
    if not found:
        if absent is None:
            raise Refusal(400, "MalformedXML")
        return absent
    return found[0]
