"""Objects of several versions, delete markers, and the null version."""

from __future__ import annotations

from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene


def _versioning(s: Scene, status: str = "Enabled") -> None:
    s.call("put_bucket_versioning", VersioningConfiguration={"Status": status})


def _id(answer: dict[str, Any]) -> str:
    return str(answer["VersionId"])


@case
def several(s: Scene) -> None:
    _versioning(s)
    ids = [_id(s.put(body=body, Metadata={"n": body.decode()})) for body in (b"1", b"22", b"333")]
    s.get()
    for each_id in ids:
        s.get(VersionId=each_id)
        s.head(VersionId=each_id)
        s.get(VersionId=each_id, Range="bytes=0-0")
    s.call("list_object_versions")


@case
def a_version_stays_what_it_is(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first"))
    s.get(VersionId=first)
    s.put(body=b"second")
    s.get(VersionId=first)
    s.get()
    s.delete()
    s.get(VersionId=first)
    s.get()


@case
def conditions_on_a_version(s: Scene) -> None:
    _versioning(s)
    one = s.put(body=b"first")
    two = s.put(body=b"second")
    s.get(VersionId=one["VersionId"], IfMatch=one["ETag"])
    s.get(VersionId=one["VersionId"], IfMatch=two["ETag"])
    s.get(VersionId=one["VersionId"], IfNoneMatch=one["ETag"])
    s.head(VersionId=one["VersionId"], IfNoneMatch=one["ETag"])


@each({"unknown": "abcdefghijklmnopqrstuvwxyz012345", "null": "null", "a blank": "a b", "very long": "v" * 500})
def no_such_version(s: Scene, version: str) -> None:
    _versioning(s)
    s.put()
    s.get(VersionId=version)
    s.head(VersionId=version)
    s.delete(VersionId=version)
    s.get()


@case
def an_empty_version_id(s: Scene) -> None:
    _versioning(s)
    s.put()
    s.raw("GET", "/k?versionId=")
    s.raw("HEAD", "/k?versionId=")


@case
def a_version_in_a_bucket_without(s: Scene) -> None:
    s.put()
    s.get(VersionId="null")
    s.head(VersionId="null")
    s.put(body=b"replaced")
    s.get(VersionId="null")
    s.get(VersionId="other")
    s.delete(VersionId="null")
    s.get(VersionId="null")
    s.get()


@case
def delete_marker(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put())
    s.get()
    marker = _id(s.delete())
    s.get()
    s.head()
    s.get(VersionId=first)
    s.get(VersionId=marker)
    s.head(VersionId=marker)
    s.keys()
    s.call("list_object_versions")
    s.delete(VersionId=marker)
    s.get()
    s.keys()


@case
def two_delete_markers(s: Scene) -> None:
    _versioning(s)
    s.put()
    s.delete()
    second = _id(s.delete())
    s.delete(VersionId=second)
    s.get()
    s.call("list_object_versions")


@case
def delete_a_version(s: Scene) -> None:
    _versioning(s)
    first, second, third = (_id(s.put(body=body)) for body in (b"1", b"2", b"3"))
    s.get()
    s.get(VersionId=second)
    s.delete(VersionId=second)
    s.get(VersionId=second)
    s.get()
    s.delete(VersionId=third)
    s.get()
    s.head()
    s.delete(VersionId=first)
    s.get()
    s.call("list_object_versions")


@case
def before_and_after_versioning(s: Scene) -> None:
    s.put(body=b"without")
    s.get()
    _versioning(s)
    s.get()
    s.get(VersionId="null")
    new = _id(s.put(body=b"with"))
    s.get()
    s.get(VersionId="null")
    s.call("list_object_versions")
    s.delete(VersionId=new)
    s.get()


@case
def suspended(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first"))
    _versioning(s, "Suspended")
    s.put(body=b"null one")
    s.get()
    s.get(VersionId="null")
    s.put(body=b"null two")
    s.get(VersionId="null")
    s.get(VersionId=first)
    s.delete()
    s.get()
    s.get(VersionId="null")
    s.call("list_object_versions")


LISTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "prefix": {"Prefix": "a/"},
    "delimiter": {"Delimiter": "/"},
    "prefix and delimiter": {"Prefix": "a/", "Delimiter": "/"},
    "encoding": {"EncodingType": "url"},
    "no keys": {"MaxKeys": 0},
    "two keys": {"MaxKeys": 2},
    "key marker": {"KeyMarker": "a/1"},
    "no match": {"Prefix": "zz"},
}


def _several_keys(s: Scene) -> None:
    s.client.put_bucket_versioning(Bucket=s.bucket, VersioningConfiguration={"Status": "Enabled"})
    for key in ("a/1", "a/1", "a/2", "b é", "c", "c", "c"):
        s.client.put_object(Bucket=s.bucket, Key=key, Body=key.encode())
    s.client.delete_object(Bucket=s.bucket, Key="c")


@each(LISTED)
def listed(s: Scene, arguments: dict[str, Any]) -> None:
    _several_keys(s)
    s.call("list_object_versions", **arguments)


@case
def listed_by_pages(s: Scene) -> None:
    _several_keys(s)
    marker: dict[str, Any] = {}
    for _ in range(12):
        page = s.call("list_object_versions", MaxKeys=2, **marker)
        if not page.get("IsTruncated"):
            break
        marker = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}


@case
def tags_of_a_version(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"1"))
    s.put(body=b"2")
    tags = {"TagSet": [{"Key": "a", "Value": "b"}]}
    s.get(VersionId=first)
    s.call("put_object_tagging", Key="k", VersionId=first, Tagging=tags)
    s.call("get_object_tagging", Key="k", VersionId=first)
    s.call("get_object_tagging", Key="k")
    s.get(VersionId=first)
    s.get()
    s.call("delete_object_tagging", Key="k", VersionId=first)
    s.get(VersionId=first)


@case
def attributes_of_a_version(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first"))
    s.put(body=b"and second")
    for arguments in ({}, {"VersionId": first}):
        s.call("get_object_attributes", Key="k", ObjectAttributes=["ETag", "ObjectSize"], **arguments)


@case
def override_on_a_version(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first", ContentType="text/plain"))
    s.put(body=b"second")
    s.get(VersionId=first, ResponseContentType="text/x-other")
    s.get(VersionId=first)


@case
def checksum_of_a_version(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first", ChecksumAlgorithm="SHA256"))
    s.put(body=b"second", ChecksumAlgorithm="SHA256")
    s.get(VersionId=first, ChecksumMode="ENABLED")
    s.head(VersionId=first, ChecksumMode="ENABLED")


@case
def encryption_of_a_version(s: Scene) -> None:
    _versioning(s)
    first = _id(s.put(body=b"first", ServerSideEncryption="AES256"))
    s.put(body=b"second")
    s.head(VersionId=first)
    s.get(VersionId=first)
