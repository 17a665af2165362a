"""CopyObject: what is copied, what is said about it, and what must hold of the source."""

from __future__ import annotations

from typing import Any

from tests.contract.s3.cases.conditions import ETAG, FUTURE, OTHER, PAST
from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene


def _copy(s: Scene, source: Any = "k", to: str = "copy", **arguments: Any) -> dict[str, Any]:
    if isinstance(source, str):
        source = {"Bucket": s.bucket, "Key": source}
    return s.call("copy_object", Key=to, CopySource=source, **arguments)


def _full(s: Scene) -> None:
    s.put(
        ContentType="text/plain",
        Metadata={"m": "1"},
        CacheControl="no-store",
        Tagging="t=1",
        StorageClass="STANDARD_IA",
    )


@each(
    {
        "plain": {},
        "COPY": {"MetadataDirective": "COPY"},
        "COPY with metadata": {"MetadataDirective": "COPY", "Metadata": {"m": "2"}},
        "REPLACE": {"MetadataDirective": "REPLACE", "Metadata": {"m": "2"}, "ContentType": "text/new"},
        "REPLACE by nothing": {"MetadataDirective": "REPLACE"},
        "unknown directive": {"MetadataDirective": "FORGET"},
        "tags COPY": {"TaggingDirective": "COPY"},
        "tags REPLACE": {"TaggingDirective": "REPLACE", "Tagging": "u=2"},
        "storage class": {"StorageClass": "STANDARD"},
        "encryption": {"ServerSideEncryption": "AES256"},
        "acl": {"ACL": "public-read"},
        "checksum": {"ChecksumAlgorithm": "SHA256"},
        "redirect": {"WebsiteRedirectLocation": "/x"},
    }
)
def copy(s: Scene, arguments: dict[str, Any]) -> None:
    _full(s)
    s.get("copy")
    _copy(s, **arguments)
    s.head("copy")
    s.get("copy")
    s.call("get_object_tagging", Key="copy")


@each(
    {
        "without a change": {},
        "REPLACE": {"MetadataDirective": "REPLACE", "Metadata": {"m": "2"}},
        "storage class": {"StorageClass": "GLACIER"},
    }
)
def onto_itself(s: Scene, arguments: dict[str, Any]) -> None:
    _full(s)
    s.get()
    _copy(s, to="k", **arguments)
    s.get()
    s.head()


@each(
    {
        "match+": {"CopySourceIfMatch": ETAG},
        "match-": {"CopySourceIfMatch": OTHER},
        "none-match+": {"CopySourceIfNoneMatch": OTHER},
        "none-match-": {"CopySourceIfNoneMatch": ETAG},
        "modified+": {"CopySourceIfModifiedSince": PAST},
        "unmodified-": {"CopySourceIfUnmodifiedSince": PAST},
        "unmodified+": {"CopySourceIfUnmodifiedSince": FUTURE},
        "match+ unmodified-": {"CopySourceIfMatch": ETAG, "CopySourceIfUnmodifiedSince": PAST},
        "target absent": {"IfNoneMatch": "*"},
        "target matches not": {"IfMatch": OTHER},
    }
)
def condition(s: Scene, arguments: dict[str, Any]) -> None:
    s.put()
    s.put("copy", b"what was there")
    s.get("copy")
    _copy(s, **arguments)
    s.get("copy")


@case
def over_another(s: Scene) -> None:
    s.put(body=b"new")
    s.put("copy", b"old")
    s.get("copy")
    _copy(s)
    s.get("copy")
    s.put(body=b"changed afterwards")
    s.get("copy")


@case
def of_what_is_missing(s: Scene) -> None:
    _copy(s, "missing")
    _copy(s, {"Bucket": "no-such-bucket-here", "Key": "k"})
    s.get("copy")
    s.put()
    s.call("copy_object", Bucket="no-such-bucket-here", Key="k", CopySource={"Bucket": s.bucket, "Key": "k"})


@case
def between_buckets(s: Scene) -> None:
    other = f"{s.bucket}-b"
    s.call("create_bucket", Bucket=other)
    s.put(body=b"from here")
    _copy(s, to="k2", Bucket=other)
    s.call("get_object", Bucket=other, Key="k2")
    _copy(s, {"Bucket": other, "Key": "k2"}, to="back")
    s.get("back")


@each(
    {
        "leading slash": "/BUCKET/a%20b",
        "no leading slash": "BUCKET/a%20b",
        "all escaped": "%2FBUCKET%2Fa%20b",
        "plus for a blank": "BUCKET/a+b",
        "blank as it is": "BUCKET/a b",
        "no key": "BUCKET",
        "nothing": "",
    }
)
def source_as_text(s: Scene, source: str) -> None:
    s.put("a b", b"blank")
    s.put("a+b", b"plus")
    s.raw("PUT", "/copy", headers={"x-amz-copy-source": source.replace("BUCKET", s.bucket)})
    s.get("copy")


@case
def of_a_version(s: Scene) -> None:
    s.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
    first = s.put(body=b"first")
    s.put(body=b"second")
    _copy(s, {"Bucket": s.bucket, "Key": "k", "VersionId": first["VersionId"]})
    s.get("copy")
    _copy(s, {"Bucket": s.bucket, "Key": "k", "VersionId": "no-such-version"}, to="other")
    # The first version is the newest again.
    _copy(s, {"Bucket": s.bucket, "Key": "k", "VersionId": first["VersionId"]}, to="k")
    s.get()


@case
def of_a_large_object(s: Scene) -> None:
    s.put(body=bytes(range(250)) * 12_000)
    _copy(s)
    s.get("copy")
    s.get("copy", Range="bytes=1048570-1048590")
