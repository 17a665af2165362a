"""Multipart uploads, from their creation to reads of what became of them."""

from __future__ import annotations

from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

#: The smallest that a part but the last may be.
PART = 5 << 20
ALGORITHMS = {name: name for name in ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")}


def _create(s: Scene, key: str = "k", **arguments: Any) -> str:
    upload = s.call("create_multipart_upload", Key=key, **arguments).get("UploadId", "none")
    return str(upload)


def _part(s: Scene, upload: str, number: int, body: bytes, key: str = "k", **arguments: Any) -> dict[str, Any]:
    answer = s.call("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=body, **arguments)
    kept = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
    return {"PartNumber": number, **kept}


def _complete(s: Scene, upload: str, parts: list[dict[str, Any]], key: str = "k", **arguments: Any) -> None:
    wanted = {"MultipartUpload": {"Parts": parts}} if parts else {}
    s.call("complete_multipart_upload", Key=key, UploadId=upload, **wanted, **arguments)


@case
def one_part(s: Scene) -> None:
    upload = _create(s)
    _complete(s, upload, [_part(s, upload, 1, b"all of it")])
    s.get()
    s.head()
    s.keys()


@case
def two_parts(s: Scene) -> None:
    upload = _create(s, ContentType="text/x", Metadata={"a": "b"}, CacheControl="no-cache", Tagging="x=y")
    parts = [_part(s, upload, 1, b"a" * PART), _part(s, upload, 2, b"b" * 1000)]
    _complete(s, upload, parts)
    s.head()
    s.get()
    s.get(Range=f"bytes={PART - 5}-{PART + 5}")
    s.get(Range="bytes=-1010")
    s.call("get_object_tagging", Key="k")
    for number in (1, 2, 3):
        s.get(PartNumber=number)
        s.head(PartNumber=number)
    s.call("get_object_attributes", Key="k", ObjectAttributes=["ETag", "ObjectParts", "ObjectSize", "Checksum"])


@case
def an_empty_part(s: Scene) -> None:
    upload = _create(s)
    _complete(s, upload, [_part(s, upload, 1, b"")])
    s.get()


@case
def parts_out_of_order(s: Scene) -> None:
    upload = _create(s)
    second, first = _part(s, upload, 7, b"b"), _part(s, upload, 3, b"a" * PART)
    _complete(s, upload, [second, first])
    s.get()
    _complete(s, upload, [first, second])
    s.get()


@case
def parts_with_gaps(s: Scene) -> None:
    upload = _create(s)
    parts = [_part(s, upload, number, body) for number, body in ((10, b"a" * PART), (500, b"b"))]
    _complete(s, upload, parts)
    s.get(Range="bytes=-2")


@case
def a_part_too_small(s: Scene) -> None:
    s.put(body=b"as it was")
    s.get()
    upload = _create(s)
    _complete(s, upload, [_part(s, upload, number, b"small") for number in (1, 2)])
    s.get()


@case
def a_part_that_is_missing(s: Scene) -> None:
    s.put(body=b"as it was")
    upload = _create(s)
    part = _part(s, upload, 1, b"x")
    _complete(s, upload, [part, part | {"PartNumber": 2}])
    s.get()


@each({"other": '"0123456789abcdef0123456789abcdef"', "empty": '""', "no hash": "x"})
def a_wrong_etag(s: Scene, etag: str) -> None:
    upload = _create(s)
    _part(s, upload, 1, b"x")
    _complete(s, upload, [{"PartNumber": 1, "ETag": etag}])
    s.get()


@case
def an_etag_without_quotes(s: Scene) -> None:
    upload = _create(s)
    etag = _part(s, upload, 1, b"x")["ETag"].strip('"')
    _complete(s, upload, [{"PartNumber": 1, "ETag": etag}])
    s.get()


@case
def no_parts_listed(s: Scene) -> None:
    upload = _create(s)
    _part(s, upload, 1, b"x")
    _complete(s, upload, [])
    s.get()


@case
def a_part_again(s: Scene) -> None:
    upload = _create(s)
    old = _part(s, upload, 1, b"old")
    new = _part(s, upload, 1, b"new")
    s.call("list_parts", Key="k", UploadId=upload)
    _complete(s, upload, [old])
    s.get()
    _complete(s, upload, [new])
    s.get()


@case
def only_some_of_the_parts(s: Scene) -> None:
    upload = _create(s)
    parts = [_part(s, upload, number, b"abc"[number - 1 : number]) for number in (1, 2, 3)]
    _complete(s, upload, parts[1:2])
    s.get()


@case
def completed_twice(s: Scene) -> None:
    upload = _create(s)
    part = _part(s, upload, 1, b"x")
    _complete(s, upload, [part])
    _complete(s, upload, [part])
    s.get()
    _part(s, upload, 2, b"late")


@case
def over_another(s: Scene) -> None:
    s.put(body=b"old")
    s.get()
    upload = _create(s)
    part = _part(s, upload, 1, b"new")
    s.get()
    _complete(s, upload, [part])
    s.get()
    s.head()


@case
def aborted(s: Scene) -> None:
    s.put(body=b"as it was")
    upload = _create(s)
    part = _part(s, upload, 1, b"x")
    s.call("abort_multipart_upload", Key="k", UploadId=upload)
    _part(s, upload, 1, b"y")
    _complete(s, upload, [part])
    s.call("list_parts", Key="k", UploadId=upload)
    s.call("abort_multipart_upload", Key="k", UploadId=upload)
    s.get()
    s.call("list_multipart_uploads")


@case
def no_such_upload(s: Scene) -> None:
    upload = "no-such-upload"
    _part(s, upload, 1, b"x")
    _complete(s, upload, [{"PartNumber": 1, "ETag": '"x"'}])
    s.call("abort_multipart_upload", Key="k", UploadId=upload)
    s.call("list_parts", Key="k", UploadId=upload)
    s.call("upload_part_copy", Key="k", UploadId=upload, PartNumber=1, CopySource={"Bucket": s.bucket, "Key": "k"})


@case
def of_another_key(s: Scene) -> None:
    upload = _create(s)
    _part(s, upload, 1, b"x", key="other")
    s.call("list_parts", Key="other", UploadId=upload)


@each({"zero": 0, "negative": -1, "10000": 10_000, "10001": 10_001})
def part_number(s: Scene, number: int) -> None:
    upload = _create(s)
    part = _part(s, upload, number, b"x")
    if "ETag" in part:
        _complete(s, upload, [part])
    s.get()


@each({"letters": "one", "empty": "", "decimal": "1.5"})
def part_number_as_text(s: Scene, text: str) -> None:
    upload = _create(s)
    s.raw("PUT", f"/k?partNumber={text}&uploadId={upload}", body=b"x")


@case
def upload_id_alone(s: Scene) -> None:
    upload = _create(s)
    s.put(body=b"as it was")
    s.get()
    s.raw("PUT", f"/k?uploadId={upload}", body=b"x")
    s.raw("PUT", "/k?partNumber=1", body=b"y")
    s.get()


@each(ALGORITHMS)
def checksum(s: Scene, algorithm: str) -> None:
    upload = _create(s, ChecksumAlgorithm=algorithm)
    parts = [
        _part(s, upload, number, body, ChecksumAlgorithm=algorithm) for number, body in ((1, b"a" * PART), (2, b"b"))
    ]
    s.call("list_parts", Key="k", UploadId=upload)
    _complete(s, upload, parts)
    s.get(ChecksumMode="ENABLED")
    s.head(ChecksumMode="ENABLED")


@each(
    {
        "FULL_OBJECT": ("CRC32", "FULL_OBJECT"),
        "COMPOSITE": ("CRC32", "COMPOSITE"),
        "of 64": ("CRC64NVME", "FULL_OBJECT"),
    }
)
def checksum_type(s: Scene, what: tuple[str, str]) -> None:
    algorithm, kind = what
    upload = _create(s, ChecksumAlgorithm=algorithm, ChecksumType=kind)
    part = _part(s, upload, 1, b"one part", ChecksumAlgorithm=algorithm)
    _complete(s, upload, [part], ChecksumType=kind)
    s.get(ChecksumMode="ENABLED")
    s.head(ChecksumMode="ENABLED")


@each({"right": 8, "wrong": 9})
def object_size(s: Scene, size: int) -> None:
    upload = _create(s)
    _complete(s, upload, [_part(s, upload, 1, b"one part")], MpuObjectSize=size)
    s.get()


@case
def if_absent(s: Scene) -> None:
    for body in (b"first", b"second"):
        upload = _create(s)
        _complete(s, upload, [_part(s, upload, 1, body)], IfNoneMatch="*")
        s.get()


@case
def list_parts(s: Scene) -> None:
    upload = _create(s)
    s.call("list_parts", Key="k", UploadId=upload)
    for number in (1, 2, 3, 5, 8):
        _part(s, upload, number, b"x" * number)
    s.call("list_parts", Key="k", UploadId=upload)
    marker = 0
    for _ in range(3):
        page = s.call("list_parts", Key="k", UploadId=upload, MaxParts=2, PartNumberMarker=marker)
        marker = page.get("NextPartNumberMarker", 0)
    for arguments in (
        {"MaxParts": 0},
        {"MaxParts": 5000},
        {"PartNumberMarker": 8},
        {"PartNumberMarker": 4, "MaxParts": 1},
    ):
        s.call("list_parts", Key="k", UploadId=upload, **arguments)


@case
def list_uploads(s: Scene) -> None:
    s.call("list_multipart_uploads")
    for key in ("a/1", "a/2", "b/1", "c", "d é+"):
        _create(s, key)
    s.call("list_multipart_uploads")


@each(
    {
        "prefix": {"Prefix": "a/"},
        "delimiter": {"Delimiter": "/"},
        "prefix and delimiter": {"Prefix": "a/", "Delimiter": "/"},
        "maximum": {"MaxUploads": 2},
        "key marker": {"KeyMarker": "a/2"},
        "encoding": {"EncodingType": "url"},
        "no match": {"Prefix": "zz"},
    }
)
def list_uploads_by(s: Scene, arguments: dict[str, Any]) -> None:
    for key in ("a/1", "a/2", "b/1", "c", "d é+"):
        _create(s, key)
    s.call("list_multipart_uploads", **arguments)


@case
def copies(s: Scene) -> None:
    s.put("source", bytes(range(250)) * 30_000)
    upload = _create(s)
    parts = []
    for number, extent in ((1, f"bytes=0-{PART - 1}"), (2, "bytes=100-199")):
        source = {"Bucket": s.bucket, "Key": "source"}
        answer = s.call(
            "upload_part_copy", Key="k", UploadId=upload, PartNumber=number, CopySource=source, CopySourceRange=extent
        )
        parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
    s.call("list_parts", Key="k", UploadId=upload)
    _complete(s, upload, parts)
    s.get()


@each(
    {
        "whole": {},
        "beyond the end": {"CopySourceRange": "bytes=5-100"},
        "malformed": {"CopySourceRange": "5-6"},
        "suffix": {"CopySourceRange": "bytes=-3"},
        "match-": {"CopySourceIfMatch": '"other"'},
        "missing": {"CopySource": "missing"},
        "no bucket": {"CopySource": "no-such-bucket-here/k"},
    }
)
def copy(s: Scene, arguments: dict[str, Any]) -> None:
    s.put("source", b"0123456789")
    upload = _create(s)
    source = arguments.get("CopySource", "source")
    where = {"CopySource": source if "/" in source else f"{s.bucket}/{source}"}
    answer = s.call("upload_part_copy", Key="k", UploadId=upload, PartNumber=1, **{**arguments, **where})
    if "CopyPartResult" in answer:
        _complete(s, upload, [{"PartNumber": 1, "ETag": answer["CopyPartResult"]["ETag"]}])
    s.get()


@each(
    {
        "no XML": b"complete",
        "nothing": b"",
        "another root": b"<Other/>",
        "no ETag": b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber></Part></CompleteMultipartUpload>",
        "no number": b"<CompleteMultipartUpload><Part><ETag>x</ETag></Part></CompleteMultipartUpload>",
    }
)
def completion(s: Scene, body: bytes) -> None:
    upload = _create(s)
    _part(s, upload, 1, b"x")
    s.raw("POST", f"/k?uploadId={upload}", body=body)
    s.get()


@each({"blank": "a b", "plus": "a+b", "umlauts": "grüße", "clients' own": "20m +é&=.bin", "slashes": "a//b/"})
def key(s: Scene, key: str) -> None:
    upload = _create(s, key)
    part = _part(s, upload, 1, b"x", key=key)
    s.call("list_parts", Key=key, UploadId=upload)
    s.call("list_multipart_uploads")
    _complete(s, upload, [part], key=key)
    s.get(key)


@case
def in_no_bucket(s: Scene) -> None:
    s.call("create_multipart_upload", Bucket="no-such-bucket-here", Key="k")
    s.call("list_multipart_uploads", Bucket="no-such-bucket-here")


@case
def of_a_versioned_bucket(s: Scene) -> None:
    s.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"first", b"second"):
        upload = _create(s)
        _complete(s, upload, [_part(s, upload, 1, body)])
        s.get()
    s.call("list_object_versions")
