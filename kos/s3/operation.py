"""What a request asks for: method, target and a few headers to one S3 operation, and what the cache does with it.

Owns: the table of S3's operations and which of them concern the cache. Does not own: signatures, permissions, bodies,
or how an operation is carried out.

The theory on one page. S3 tells operations apart by four things, looked at in this order:

1. the target: the service ("/"), a bucket, or an object (a key is there);
2. the method;
3. the first query parameter that names a sub-resource (?acl, ?uploads, ?uploadId=...), in the order of the tables;
4. x-amz-copy-source, which makes a copy of a PUT.

Authentication parameters, response-* overrides, x-id (which SDKs add) and x-* parameters never name an operation.

Then it is handled in one of five ways. READ: an object read that the cache may answer. LIST: a listing of objects, the
same. WRITE: something that changes what reads of an object show, body or headers, or what listings do; the cache must
forget the keys in `forgets` (those of DeleteObjects are in its body; a write to a bucket itself has none). FORWARD: the
cache has no business with it; it is passed on as it is. A read that the cache must not answer (a customer's key,
anything unknown) is FORWARD with a bypass_reason. PART: a READ of one part of an object, whose bounds have to be known.

Invariant: what is not understood is never answered from the cache, and whatever might change an object is a WRITE: an
unknown parameter makes a read FORWARD, and an unknown change of an object a WRITE of its key.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

from kos.errors import S3Error
from kos.s3 import names
from kos.s3.head import Headers, RequestHead
from kos.s3.sigv4_claim import (
    AUTH_PARAMETERS,
    CACHE_COUNT,
    CACHE_LENGTH_MAX,
    VERSION_2_PARAMETERS,
    cut_signature,
    is_version_2,
)


class Op(enum.Enum):
    """S3's operations by their API name. Sub-resources of a bucket are two: reading one and changing one."""

    ListBuckets = enum.auto()
    ListObjects = enum.auto()
    ListObjectsV2 = enum.auto()
    ListObjectVersions = enum.auto()
    ListMultipartUploads = enum.auto()
    GetBucketLocation = enum.auto()
    HeadBucket = enum.auto()
    CreateBucket = enum.auto()
    DeleteBucket = enum.auto()
    DeleteObjects = enum.auto()
    BucketSubresourceRead = enum.auto()
    BucketSubresourceWrite = enum.auto()
    GetObject = enum.auto()
    HeadObject = enum.auto()
    PutObject = enum.auto()
    CopyObject = enum.auto()
    DeleteObject = enum.auto()
    RenameObject = enum.auto()
    RestoreObject = enum.auto()
    SelectObjectContent = enum.auto()
    UpdateObjectEncryption = enum.auto()
    CreateMultipartUpload = enum.auto()
    UploadPart = enum.auto()
    UploadPartCopy = enum.auto()
    CompleteMultipartUpload = enum.auto()
    AbortMultipartUpload = enum.auto()
    ListParts = enum.auto()
    GetObjectAcl = enum.auto()
    PutObjectAcl = enum.auto()
    GetObjectAttributes = enum.auto()
    GetObjectLegalHold = enum.auto()
    PutObjectLegalHold = enum.auto()
    GetObjectRetention = enum.auto()
    PutObjectRetention = enum.auto()
    GetObjectTagging = enum.auto()
    PutObjectTagging = enum.auto()
    DeleteObjectTagging = enum.auto()
    GetObjectTorrent = enum.auto()
    Preflight = enum.auto()
    Unknown = enum.auto()


class Handling(enum.Enum):
    """What the cache has to do with an operation."""

    READ = "read"
    PART = "part"
    LIST = "list"
    WRITE = "write"
    FORWARD = "forward"


class Operation(NamedTuple):
    """One request, understood.

    params: the query, decoded, without authentication; of a repeated parameter the first. subresource: the parameter
    that named the operation. forgets: keys of bucket that a WRITE changes. bypass_reason: why a read is not for the
    cache. changes_versions: the WRITE may change or remove versions of these keys that are not the current object, or
    what GetObject shows of them. version_id: of a READ, the version that it asks for; None for the current object.
    """

    op: Op
    handling: Handling
    bucket: str | None
    key: str | None
    params: Mapping[str, str]
    subresource: str | None = None
    forgets: tuple[str, ...] = ()
    bypass_reason: str | None = None
    changes_versions: bool = False
    version_id: str | None = None


_READ, _LIST, _WRITE, _FORWARD = Handling.READ, Handling.LIST, Handling.WRITE, Handling.FORWARD

_Table = dict[str, tuple[tuple[str, Op, Handling], ...]]

#: method -> (sub-resource, operation, handling): the first that is there counts. Tags, holds and restores are WRITEs
#: because GetObject shows them in its headers (x-amz-tagging-count, x-amz-object-lock-*, x-amz-restore).
_OBJECT: Final[_Table] = {
    "GET": (
        ("uploadId", Op.ListParts, _FORWARD),
        ("acl", Op.GetObjectAcl, _FORWARD),
        ("attributes", Op.GetObjectAttributes, _FORWARD),
        ("legal-hold", Op.GetObjectLegalHold, _FORWARD),
        ("retention", Op.GetObjectRetention, _FORWARD),
        ("tagging", Op.GetObjectTagging, _FORWARD),
        ("torrent", Op.GetObjectTorrent, _FORWARD),
    ),
    "HEAD": (),
    "PUT": (
        ("acl", Op.PutObjectAcl, _FORWARD),
        ("encryption", Op.UpdateObjectEncryption, _WRITE),
        ("legal-hold", Op.PutObjectLegalHold, _WRITE),
        ("renameObject", Op.RenameObject, _WRITE),
        ("retention", Op.PutObjectRetention, _WRITE),
        ("tagging", Op.PutObjectTagging, _WRITE),
    ),
    "POST": (
        ("uploads", Op.CreateMultipartUpload, _FORWARD),
        ("uploadId", Op.CompleteMultipartUpload, _WRITE),
        ("restore", Op.RestoreObject, _WRITE),
        ("select", Op.SelectObjectContent, _FORWARD),
    ),
    "DELETE": (
        ("uploadId", Op.AbortMultipartUpload, _FORWARD),
        ("tagging", Op.DeleteObjectTagging, _WRITE),
    ),
}

#: Every name that is an object's sub-resource for some method: with one of them, a method that does not know it is
#: Unknown (S3 refuses it), never a plain PUT or DELETE.
_OBJECT_NAMES: Final = frozenset(name for table in _OBJECT.values() for name, _, _ in table) | {"partNumber"}
_UPLOAD_NAMES: Final = frozenset({"uploadId", "partNumber"})

#: Writes that, unless they name a version, make a new version, or a mark that the object is gone, and leave all others
#: as they are. Every other one may concern versions too: tags of the current object are also those of its version.
_OF_CURRENT: Final = frozenset({Op.PutObject, Op.CopyObject, Op.CompleteMultipartUpload, Op.DeleteObject})

#: Sub-resources of a bucket that are operations of a name of their own.
_BUCKET: Final[_Table] = {
    "GET": (
        ("list-type", Op.ListObjectsV2, _LIST),
        ("versions", Op.ListObjectVersions, _FORWARD),
        ("uploads", Op.ListMultipartUploads, _FORWARD),
        ("location", Op.GetBucketLocation, _FORWARD),
    ),
    "POST": (("delete", Op.DeleteObjects, _WRITE),),
}

#: Sub-resources of a bucket that are read by GET and changed by PUT, POST and DELETE, and touch no object. Changing one is
#: a WRITE for listings: they may show something else, or be refused, afterwards.
_BUCKET_SETTINGS: Final = (
    "abac", "accelerate", "acl", "analytics", "cors", "encryption", "intelligent-tiering", "inventory", "lifecycle",
    "logging", "metadataConfiguration", "metadataInventoryTable", "metadataJournalTable", "metadataTable", "metrics",
    "notification", "object-lock", "ownershipControls", "policy", "policyStatus", "publicAccessBlock", "replication",
    "requestPayment", "tagging", "versioning", "website",
)  # fmt: skip

#: Making and removing a bucket is a WRITE for its listings.
_BUCKET_PLAIN: Final = {
    "GET": (Op.ListObjects, _LIST),
    "HEAD": (Op.HeadBucket, _FORWARD),
    "PUT": (Op.CreateBucket, _WRITE),
    "DELETE": (Op.DeleteBucket, _WRITE),
}

#: Parameters that a read may carry and still be answered by the cache.
_READ_PARAMETERS: Final = frozenset(
    {
        "response-cache-control", "response-content-disposition", "response-content-encoding",
        "response-content-language", "response-content-type", "response-expires",
    }
)  # fmt: skip

#: Headers that make a read another's business, and why.
_BYPASS_HEADERS: Final = {
    "x-amz-server-side-encryption-customer-algorithm": "sse_c",
    "x-amz-server-side-encryption-customer-key": "sse_c",
    "x-amz-server-side-encryption-customer-key-md5": "sse_c",
    "x-amz-expected-bucket-owner": "expected_bucket_owner",
    "x-amz-request-payer": "request_payer",
    # A browser asks from another site: what it may see is the origin's word, and differs from site to site.
    "origin": "cors",
    # The key names a file in an archive, for this request alone.
    "x-minio-extract": "unknown_header",
}
_BYPASS_HEADER_NAMES: Final = frozenset(_BYPASS_HEADERS)

#: Headers by which MinIO changes other objects than the request names, no more than it can be told which: everything
#: below a key or in a bucket is removed, or an archive is put as the files in it.
_MANY_CHANGED: Final = {"DELETE": "x-minio-force-delete", "PUT": "x-amz-meta-snowball-auto-extract"}

#: A version id that the cache may take for a name. S3's are URL-ready and have at most 1 024 bytes; of a longer or stranger
#: one, and of an empty one, the origin says what it is.
_VERSION_ID: Final = re.compile(r"[!-~]{1,1024}")

#: What no key that the cache knows begins with: it begins the names of versions there.
_RESERVED: Final = "\0"

#: 4 096 targets, path and host of at most 512 characters: 4 MB at worst.
_TARGET_CACHE_COUNT: Final = 4096
_TARGET_CACHE_LENGTH_MAX: Final = 512


class _Query(NamedTuple):
    """A query's parameters, why an object read with them would not be the cache's, and whether one was repeated."""

    params: Mapping[str, str]
    bypass_reason: str | None
    repeated: bool = False


_NO_QUERY: Final = _Query(MappingProxyType({}), None)


def parse(head: RequestHead, domain: str | None = None) -> Operation:
    """The operation of a request. domain: of virtual-hosted style, None if only path style is spoken.

    S3Error: InvalidURI, InvalidBucketName, KeyTooLongError; MethodNotAllowed; NotImplemented for what changes objects
    without saying which (browser form uploads, whose key stands in the body, after the point where kos must know it, and
    the headers in _MANY_CHANGED), and for sessions, which are credentials.
    """
    method, raw_path, raw_query, headers = head
    host = headers.get("host", "") if domain else ""
    if len(raw_path) + len(host) <= _TARGET_CACHE_LENGTH_MAX:
        bucket, key = _known_target(raw_path, host, domain)
    else:
        bucket, key = names.split_target(raw_path, host, domain)
    query = _query(raw_query) if raw_query else _NO_QUERY
    if key is not None:
        if method == "GET" or method == "HEAD":
            return _object_read(method, bucket, key, query, headers)
        return _object_change(method, bucket, key, query, headers)
    if method == "OPTIONS":
        return Operation(Op.Preflight, _FORWARD, bucket, None, query.params)
    if bucket is not None:
        _refuse_many_changed(method, headers)
        return _bucket_operation(method, bucket, query)
    if method != "GET":
        raise S3Error("MethodNotAllowed", extra={"Method": method, "ResourceType": "SERVICE"})
    return Operation(Op.ListBuckets, _FORWARD, None, None, query.params)


def _object_read(method: str, bucket: str | None, key: str, query: _Query, headers: Headers) -> Operation:
    params, bypass_reason, _ = query
    if params:
        for name, op, handling in _OBJECT[method]:
            if name in params:
                return Operation(op, handling, bucket, key, params, name)
    if not _BYPASS_HEADER_NAMES.isdisjoint(headers):
        bypass_reason = bypass_reason or next(_BYPASS_HEADERS[name] for name in headers if name in _BYPASS_HEADERS)
    if key[0] == _RESERVED:
        bypass_reason = "reserved_key"
    version_id = None
    handling = _READ
    if params:
        version_id = params.get("versionId")
        if "partNumber" in params:
            handling = Handling.PART
    op = Op.GetObject if method == "GET" else Op.HeadObject
    if bypass_reason:
        handling = _FORWARD
    return Operation(op, handling, bucket, key, params, None, (), bypass_reason, False, version_id)


def _refuse_many_changed(method: str, headers: Headers) -> None:
    name = _MANY_CHANGED.get(method)
    if name is not None and headers.get(name, "false").lower() != "false":
        raise S3Error("NotImplemented", f"{name} is not supported: which objects it changes cannot be known.")


def _object_change(method: str, bucket: str | None, key: str, query: _Query, headers: Headers) -> Operation:
    params, _, repeated = query
    if method == "OPTIONS":
        return Operation(Op.Preflight, _FORWARD, bucket, key, params)
    _refuse_many_changed(method, headers)
    table = _OBJECT.get(method)
    if table is None:
        raise S3Error("MethodNotAllowed", extra={"Method": method, "ResourceType": "OBJECT"})
    copies = "x-amz-copy-source" in headers
    # Two operations named at once, or an upload without its id (also where one of two ids is empty): origins differ in
    # what they make of it, and one may change the object. So that is a WRITE of no name.
    named = params.keys() & _OBJECT_NAMES
    clear = not repeated and all(params[name] for name in named & _UPLOAD_NAMES)
    if method == "PUT" and named == _UPLOAD_NAMES and clear:
        return Operation(Op.UploadPartCopy if copies else Op.UploadPart, _FORWARD, bucket, key, params, "uploadId")
    clear = clear and len(named) == 1
    for name, op, handling in table:
        if name in params and (clear or handling is _WRITE):
            forgets: tuple[str, ...] = (key,) if handling is _WRITE else ()
            if op is Op.RenameObject:
                forgets += _rename_sources(bucket, headers.get("x-amz-rename-source", ""))
            versions = handling is _WRITE and (op not in _OF_CURRENT or "versionId" in params)
            return Operation(op, handling, bucket, key, params, name, forgets, None, versions)
    plain = Op.Unknown
    if not named:
        if method == "PUT":
            plain = Op.CopyObject if copies else Op.PutObject
        elif method == "DELETE":
            plain = Op.DeleteObject
    versions = plain not in _OF_CURRENT or "versionId" in params
    return Operation(plain, _WRITE, bucket, key, params, None, (key,), None, versions)


def _rename_sources(bucket: str | None, header: str) -> tuple[str, ...]:
    """The key that RenameObject takes away. The header may name the bucket or not; forgetting both readings is safe."""
    source = names.percent_decode(header).lstrip("/")
    prefix = f"{bucket}/"
    return tuple(text for text in {source, source.removeprefix(prefix)} if text)


def _bucket_operation(method: str, bucket: str, query: _Query) -> Operation:
    params = query.params
    if "session" in params and method == "GET":
        # Its answer would be keys to the origin, which are kos' own affair.
        raise S3Error("NotImplemented", "Sessions of directory buckets are not supported.")
    listing_bypass = "repeated_parameter" if query.repeated else None
    for name, op, handling in _BUCKET.get(method, ()):
        if name in params:
            bypass_reason = listing_bypass if handling is _LIST else None
            return Operation(op, handling, bucket, None, params, name, (), bypass_reason)
    for name in _BUCKET_SETTINGS:
        if name in params:
            if method in ("GET", "HEAD"):
                return Operation(Op.BucketSubresourceRead, _FORWARD, bucket, None, params, name)
            return Operation(Op.BucketSubresourceWrite, _WRITE, bucket, None, params, name)
    if method == "POST":
        raise S3Error("NotImplemented", "Uploads by an HTML form are not supported; use PUT or a presigned URL.")
    plain = _BUCKET_PLAIN.get(method)
    if plain is None:
        raise S3Error("MethodNotAllowed", extra={"Method": method, "ResourceType": "BUCKET"})
    op, handling = plain
    return Operation(op, handling, bucket, None, params, None, (), listing_bypass if handling is _LIST else None)


def _query(raw_query: str) -> _Query:
    # The signature is no part of the operation, and without it the same query comes again and again.
    rest, _ = cut_signature(raw_query)
    return _known_query(rest) if len(rest) <= CACHE_LENGTH_MAX else _parse_query(rest)


def _parse_query(raw_query: str) -> _Query:
    params: dict[str, str] = {}
    bypass_reason = None
    repeated = False
    authentication = AUTH_PARAMETERS | VERSION_2_PARAMETERS if is_version_2(raw_query) else AUTH_PARAMETERS
    for name, value in names.parse_query(raw_query):
        if name in authentication:
            continue
        if name in params:
            bypass_reason = bypass_reason or "repeated_parameter"
            repeated = True
            continue
        params[name] = value
        if name not in _READ_PARAMETERS:
            bypass_reason = bypass_reason or _bypass_reason(name, value)
    return _Query(MappingProxyType(params), bypass_reason, repeated)


def _bypass_reason(name: str, value: str) -> str | None:
    """Why a read with this parameter is not the cache's. SDKs put headers of a presigned request into its query."""
    lower = name.lower()
    if lower in _BYPASS_HEADERS:
        return _BYPASS_HEADERS[lower]
    if name == "versionId":
        return None if _VERSION_ID.fullmatch(value) else "version_id"
    if name == "partNumber":
        return None  # whatever its value: the handler refuses what is none
    if lower == "x-id" or lower == "x-amz-checksum-mode" or (lower.startswith("x-") and not lower.startswith("x-amz-")):
        return None
    return "unknown_parameter"


_known_query = lru_cache(maxsize=CACHE_COUNT)(_parse_query)
_known_target = lru_cache(maxsize=_TARGET_CACHE_COUNT)(names.split_target)
