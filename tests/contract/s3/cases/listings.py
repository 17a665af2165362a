"""Listings of both kinds: every parameter, page by page, and right after writes."""

from __future__ import annotations

from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

KEYS = (
    "a", "a/", "a/1", "a/2", "a/b/1", "a//1", "a b/1", "a+b", "a%41", "b/1", "b/2", "c", "c-1", "ä/ö", "z|1|2",
)  # fmt: skip


COMMON: dict[str, dict[str, Any]] = {
    "nothing": {},
    "prefix": {"Prefix": "a/"},
    "prefix inside a name": {"Prefix": "a"},
    "prefix of one key": {"Prefix": "c-1"},
    "prefix without match": {"Prefix": "nothing"},
    "prefix with blank": {"Prefix": "a b"},
    "prefix with plus": {"Prefix": "a+"},
    "prefix with percent": {"Prefix": "a%"},
    "prefix beyond ASCII": {"Prefix": "ä"},
    "empty prefix": {"Prefix": ""},
    "slash as prefix": {"Prefix": "/"},
    "delimiter": {"Delimiter": "/"},
    "prefix and delimiter": {"Prefix": "a/", "Delimiter": "/"},
    "prefix and delimiter without slash": {"Prefix": "a", "Delimiter": "/"},
    "two slashes": {"Prefix": "a//", "Delimiter": "/"},
    "odd delimiter": {"Delimiter": "|"},
    "letter as delimiter": {"Delimiter": "b"},
    "long delimiter": {"Delimiter": "b/"},
    "delimiter beyond ASCII": {"Delimiter": "ö"},
    "empty delimiter": {"Delimiter": ""},
    "encoding": {"EncodingType": "url"},
    "encoding and delimiter": {"EncodingType": "url", "Delimiter": "/", "Prefix": "a"},
    "no keys": {"MaxKeys": 0},
    "one key": {"MaxKeys": 1},
    "exactly all keys": {"MaxKeys": len(KEYS)},
    "more keys than S3 gives": {"MaxKeys": 5000},
    "one key with delimiter": {"MaxKeys": 1, "Delimiter": "/"},
    "payer": {"RequestPayer": "requester"},
    "owner of the bucket": {"ExpectedBucketOwner": "123456789012"},
    "attributes": {"OptionalObjectAttributes": ["RestoreStatus"]},
}


@each(COMMON | {"marker": {"Marker": "a/2"}, "marker that is no key": {"Marker": "a/1x"}, "last marker": {"Marker": "zz"},
                "marker and delimiter": {"Marker": "a/", "Delimiter": "/"}, "empty marker": {"Marker": ""},
                "marker beyond ASCII": {"Marker": "ä"}})  # fmt: skip
def v1(s: Scene, arguments: dict[str, Any]) -> None:
    s.share("listed", KEYS)
    s.call("list_objects", **arguments)


@each(COMMON | {"owner": {"FetchOwner": True}, "no owner": {"FetchOwner": False}, "start": {"StartAfter": "a/2"},
                "start that is no key": {"StartAfter": "a/1x"}, "start after the last": {"StartAfter": "zz"},
                "start and prefix": {"StartAfter": "a/1", "Prefix": "a/"}, "empty start": {"StartAfter": ""},
                "start and delimiter": {"StartAfter": "a/", "Delimiter": "/"},
                "start beyond ASCII": {"StartAfter": "ä"}})  # fmt: skip
def v2(s: Scene, arguments: dict[str, Any]) -> None:
    s.share("listed", KEYS)
    s.call("list_objects_v2", **arguments)


PAGES: dict[str, dict[str, Any]] = {
    "by one": {"MaxKeys": 1},
    "by four": {"MaxKeys": 4},
    "by two with delimiter": {"MaxKeys": 2, "Delimiter": "/"},
    "by two of a prefix": {"MaxKeys": 2, "Prefix": "a/", "Delimiter": "/"},
    "by three, encoded": {"MaxKeys": 3, "EncodingType": "url"},
}


@each(PAGES)
def pages_v1(s: Scene, arguments: dict[str, Any]) -> None:
    s.share("listed", KEYS)
    marker: dict[str, Any] = {}
    for _ in range(len(KEYS) + 2):
        page = s.call("list_objects", **arguments, **marker)
        if not page.get("IsTruncated"):
            break
        last = page.get("NextMarker") or page["Contents"][-1]["Key"]
        marker = {"Marker": last}


@each(PAGES | {"with a start": {"MaxKeys": 3, "StartAfter": "a/1"}, "with owners": {"MaxKeys": 5, "FetchOwner": True}})
def pages_v2(s: Scene, arguments: dict[str, Any]) -> None:
    s.share("listed", KEYS)
    token: dict[str, Any] = {}
    for _ in range(len(KEYS) + 2):
        page = s.call("list_objects_v2", **arguments, **token)
        if not page.get("IsTruncated"):
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}


@case
def empty(s: Scene) -> None:
    s.call("list_objects")
    s.call("list_objects_v2")
    s.call("list_objects_v2", Delimiter="/", Prefix="x/")
    s.call("list_object_versions")


@case
def no_such_bucket(s: Scene) -> None:
    for operation in ("list_objects", "list_objects_v2", "list_object_versions"):
        s.call(operation, Bucket="no-such-bucket-here")


@case
def after_writes(s: Scene) -> None:
    """Nothing that a client has just done is missing, and nothing is still there."""
    for key in ("d/1", "d/2", "e"):
        s.put(key)
        s.keys()
        s.call("list_objects", Prefix="d/", Delimiter="/")
    s.call("copy_object", Key="d/3", CopySource={"Bucket": s.bucket, "Key": "e"})
    s.call("list_objects_v2", Prefix="d/")
    s.put("d/2", b"another length")
    s.call("list_objects_v2", Prefix="d/")
    s.delete("d/1")
    s.call("list_objects_v2", Prefix="d/")
    s.call("delete_objects", Delete={"Objects": [{"Key": "d/2"}, {"Key": "d/3"}]})
    s.call("list_objects_v2", Prefix="d/")
    s.call("list_objects_v2", Delimiter="/")
    upload = s.call("create_multipart_upload", Key="d/4")["UploadId"]
    part = s.call("upload_part", Key="d/4", UploadId=upload, PartNumber=1, Body=b"x")
    s.call("list_objects_v2", Prefix="d/")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s.call("complete_multipart_upload", Key="d/4", UploadId=upload, MultipartUpload=parts)
    s.call("list_objects_v2", Prefix="d/")


@each(
    {
        "max-keys of letters": "?list-type=2&max-keys=many",
        "negative max-keys": "?list-type=2&max-keys=-1",
        "empty max-keys": "?list-type=2&max-keys=",
        "huge max-keys": "?list-type=2&max-keys=99999999999999999999",
        "v1 max-keys of letters": "?max-keys=many",
        "v1 negative max-keys": "?max-keys=-1",
        "unknown encoding": "?list-type=2&encoding-type=base64",
        "unknown token": "?list-type=2&continuation-token=no-such-token",
        "empty token": "?list-type=2&continuation-token=",
        "list-type 1": "?list-type=1",
        "list-type 3": "?list-type=3",
        "list-type of letters": "?list-type=two",
        "fetch-owner of letters": "?list-type=2&fetch-owner=perhaps",
        "fetch-owner in capitals": "?list-type=2&fetch-owner=TRUE",
        "unknown parameter": "?list-type=2&colour=blue",
        "repeated parameter": "?list-type=2&prefix=a&prefix=b",
        "marker of the other": "?list-type=2&marker=a%2F2",
        "start-after of the other": "?start-after=a%2F2",
        "with a slash": "/?list-type=2",
        "with a slash, v1": "/",
        "x-id": "?list-type=2&x-id=ListObjectsV2",
        "control character": "?list-type=2&prefix=a%01b",
        "not UTF-8": "?list-type=2&prefix=%FF",
        "plus in the prefix": "?list-type=2&prefix=a+b",
        "escaped plus in the prefix": "?list-type=2&prefix=a%2Bb",
    }
)
def query(s: Scene, target: str) -> None:
    s.share("asked", ("a/1", "a/2", "a+b", "a b", "b"))
    # A plus is a blank, and signed as one.
    s.raw("GET", target.replace("+", "%20"), sent=target)
    s.raw("GET", target.replace("+", "%20"), sent=target)


@case
def of_control_characters(s: Scene) -> None:
    """XML has no place for them: only an encoded listing can name these keys."""
    s.fill(("a\x01b", "a\tb", "a\x1fb"))
    s.raw("GET", "?list-type=2&encoding-type=url")
    s.raw("GET", "?encoding-type=url&delimiter=%01")


@case
def of_many(s: Scene) -> None:
    s.fill(f"{n % 7}/{n:03}" for n in range(30))
    s.call("list_objects_v2", MaxKeys=20)
    s.call("list_objects_v2", Delimiter="/")
    s.call("list_objects", Prefix="3/", MaxKeys=5)


@case
def of_odd_sorts(s: Scene) -> None:
    """Keys are sorted by their UTF-8 bytes."""
    s.fill(("a", "B", "é", "e\u0301", "\uffee", "\U0001f600", "~", "-", "_", "A0", "A_", "A~"))
    s.call("list_objects_v2", MaxKeys=5)
    s.call("list_objects_v2")
    s.call("list_objects_v2", StartAfter="é")


@case
def checksums_and_classes(s: Scene) -> None:
    s.put("one", StorageClass="STANDARD_IA", ChecksumAlgorithm="SHA256")
    s.put("two", StorageClass="GLACIER")
    s.keys()
    s.call("list_objects")
    s.call("list_object_versions")
