"""One object: written with everything that a PUT can say, read and read in part, and removed."""

from __future__ import annotations

import base64
import datetime
import hashlib
from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

EXPIRES = datetime.datetime(2031, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)

PUT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "content type": {"ContentType": "application/x-parquet"},
    "content type with charset": {"ContentType": "text/html; charset=iso-8859-1"},
    "empty content type": {"ContentType": ""},
    "cache control": {"CacheControl": "private, max-age=10"},
    "disposition": {"ContentDisposition": 'attachment; filename="a b.bin"'},
    "encoding": {"ContentEncoding": "gzip"},
    "two encodings": {"ContentEncoding": "gzip, br"},
    "language": {"ContentLanguage": "de-AT, en"},
    "expires": {"Expires": EXPIRES},
    "metadata": {"Metadata": {"colour": "blue", "x-y_z": "1"}},
    "metadata in capitals": {"Metadata": {"Colour": "Blue"}},
    "empty metadata": {"Metadata": {"none": ""}},
    "metadata with blanks": {"Metadata": {"inner": "a  b"}},
    "much metadata": {"Metadata": {f"name-{n}": "v" * 60 for n in range(25)}},
    "storage class": {"StorageClass": "STANDARD_IA"},
    "storage class standard": {"StorageClass": "STANDARD"},
    "unknown storage class": {"StorageClass": "SHINY"},
    "glacier": {"StorageClass": "GLACIER"},
    "redirect": {"WebsiteRedirectLocation": "/elsewhere"},
    "tags": {"Tagging": "a=b&c=d%20e"},
    "acl": {"ACL": "public-read"},
    "acl private": {"ACL": "private"},
    "encryption": {"ServerSideEncryption": "AES256"},
    "encryption by key": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "some-key", "BucketKeyEnabled": True},
    "right MD5": {"ContentMD5": base64.b64encode(hashlib.md5(b"0123456789").digest()).decode()},
    "payer": {"RequestPayer": "requester"},
    "owner": {"ExpectedBucketOwner": "123456789012"},
    "everything": {
        "ContentType": "text/plain", "CacheControl": "no-store", "ContentDisposition": "inline",
        "ContentEncoding": "identity", "ContentLanguage": "fr", "Expires": EXPIRES, "Metadata": {"m": "n"},
        "StorageClass": "STANDARD_IA", "Tagging": "t=u", "ServerSideEncryption": "AES256",
    },
}  # fmt: skip


@each(PUT_ARGUMENTS)
def put(s: Scene, arguments: dict[str, Any]) -> None:
    s.put(**arguments)
    s.head()
    s.get()
    s.keys()


@each(
    {"empty": 0, "one byte": 1, "64 KiB": 1 << 16, "a block": 1 << 20, "over a block": (1 << 20) + 1, "5 MB": 5_000_000}
)
def size(s: Scene, size: int) -> None:
    s.put(body=bytes(range(251)) * (size // 251) + b"x" * (size % 251))
    s.head()
    s.get()
    s.get(Range="bytes=0-0")
    s.get(Range="bytes=-1")
    s.keys()


@case
def overwrite(s: Scene) -> None:
    for body in (b"first", b"second, longer", b""):
        s.put(body=body, Metadata={"length": str(len(body))})
        s.get()
        s.head()


@case
def overwrite_by_the_same(s: Scene) -> None:
    s.put(ContentType="text/a", Metadata={"n": "1"})
    s.get()
    s.put(ContentType="text/b")
    s.get()
    s.head()


@case
def delete(s: Scene) -> None:
    s.put()
    s.get()
    s.delete()
    s.get()
    s.head()
    s.delete()
    s.keys()


@case
def delete_and_put_again(s: Scene) -> None:
    s.put(body=b"old")
    s.get()
    s.delete()
    s.get()
    s.put(body=b"new")
    s.get()


@case
def delete_what_never_was(s: Scene) -> None:
    s.delete("never")


@case
def missing(s: Scene) -> None:
    s.get("missing")
    s.head("missing")
    s.get("missing", Range="bytes=0-1")
    s.get("missing", IfNoneMatch="*")
    s.get("missing", IfMatch="*")


@case
def no_such_bucket(s: Scene) -> None:
    for operation in ("get_object", "head_object", "delete_object", "get_object_tagging", "get_object_acl"):
        s.call(operation, Bucket="no-such-bucket-here", Key="k")
    s.call("put_object", Bucket="no-such-bucket-here", Key="k", Body=b"x")


#: "~": the object has ten bytes.
RANGES = {
    "first byte": "bytes=0-0",
    "middle": "bytes=3-5",
    "last byte": "bytes=9-9",
    "from": "bytes=4-",
    "from the start": "bytes=0-",
    "whole": "bytes=0-9",
    "beyond the end": "bytes=5-100",
    "suffix": "bytes=-3",
    "suffix of all": "bytes=-10",
    "suffix of more": "bytes=-100",
    "suffix of nothing": "bytes=-0",
    "at the end": "bytes=10-",
    "after the end": "bytes=100-200",
    "backwards": "bytes=5-3",
    "several": "bytes=0-1,4-5",
    "several with blanks": "bytes=0-1, 4-5",
    "no unit": "0-5",
    "foreign unit": "items=0-5",
    "capital unit": "Bytes=0-5",
    "no numbers": "bytes=-",
    "no number at all": "bytes=",
    "letters": "bytes=a-b",
    "negative": "bytes=--5",
    "blank": "bytes= 0-5",
    "blanks inside": "bytes=0 - 5",
    "huge": "bytes=0-99999999999999999999999",
    "huge start": "bytes=18446744073709551616-",
}


@each(RANGES)
def range_of_ten_bytes(s: Scene, text: str) -> None:
    s.put()
    s.get(Range=text)
    s.head(Range=text)
    # Now that it is stored as well.
    s.get()
    s.get(Range=text)


@each(RANGES)
def range_of_nothing(s: Scene, text: str) -> None:
    s.put(body=b"")
    s.get(Range=text)
    s.head(Range=text)


@each({"over two blocks": (1_000_000, 1_100_000), "a block": (1 << 20, (2 << 20) - 1), "all but ends": (1, 2_999_998)})
def range_of_blocks(s: Scene, ends: tuple[int, int]) -> None:
    s.put(body=bytes(range(250)) * 12_000)
    s.get(Range=f"bytes={ends[0]}-{ends[1]}")
    s.get()
    s.get(Range=f"bytes={ends[0]}-{ends[1]}")


OVERRIDES: dict[str, dict[str, Any]] = {
    "content type": {"ResponseContentType": "text/x-other"},
    "language": {"ResponseContentLanguage": "eo"},
    "expires": {"ResponseExpires": EXPIRES},
    "cache control": {"ResponseCacheControl": "no-cache"},
    "disposition": {"ResponseContentDisposition": 'attachment; filename="x y"'},
    "encoding": {"ResponseContentEncoding": "x-other"},
    "empty": {"ResponseContentType": ""},
    "several": {"ResponseContentType": "a/b", "ResponseCacheControl": "no-store"},
}


@each(OVERRIDES)
def response_override(s: Scene, arguments: dict[str, Any]) -> None:
    s.put(ContentType="text/plain", CacheControl="private", ContentLanguage="de")
    s.get(**arguments)
    s.get(Range="bytes=1-2", **arguments)
    s.head(**arguments)
    s.get()


@case
def response_override_of_what_is_missing(s: Scene) -> None:
    s.get("missing", ResponseContentType="text/x-other")


@each({name: name for name in ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")})
def checksum(s: Scene, algorithm: str) -> None:
    s.put(ChecksumAlgorithm=algorithm)
    s.get(ChecksumMode="ENABLED")
    s.head(ChecksumMode="ENABLED")
    s.head()
    s.get(ChecksumMode="ENABLED", Range="bytes=2-3")
    s.keys()


#: Of b"0123456789".
CHECKSUMS = {
    "crc32": "poTHxg==",
    "sha1": base64.b64encode(hashlib.sha1(b"0123456789").digest()).decode(),
    "sha256": base64.b64encode(hashlib.sha256(b"0123456789").digest()).decode(),
}


@each(CHECKSUMS)
def checksum_given(s: Scene, value: str) -> None:
    name = {28: "SHA1", 44: "SHA256"}.get(len(value), "CRC32")
    s.put(**{f"Checksum{name}": value})
    s.head(ChecksumMode="ENABLED")
    s.get()


@case
def checksum_of_an_empty_object(s: Scene) -> None:
    s.put(body=b"", ChecksumAlgorithm="SHA256")
    s.get(ChecksumMode="ENABLED")
    s.head(ChecksumMode="ENABLED")


@each(
    {
        "unicode": "grün",
        "emoji": "\N{SLIGHTLY SMILING FACE}",
        "latin 1": "caf\xe9",
        "encoded word": "=?UTF-8?B?Z3LDvG4=?=",
    }
)
def metadata_beyond_ascii(s: Scene, value: str) -> None:
    headers = {"x-amz-meta-colour": value}
    s.raw("PUT", "/k", headers=headers, body=b"x")
    s.raw("GET", "/k")
    s.raw("HEAD", "/k")
    s.raw("GET", "/k")


@case
def gzip_is_not_unpacked(s: Scene) -> None:
    import gzip

    s.put(body=gzip.compress(b"text " * 100, mtime=0), ContentEncoding="gzip", ContentType="text/plain")
    s.get()
    s.raw("GET", "/k", headers={"Accept-Encoding": "gzip, deflate"})
    s.raw("GET", "/k", headers={"Accept-Encoding": "identity"})
    s.raw("HEAD", "/k")


@each(
    {
        "x-id": "/k?x-id=GetObject",
        "unknown parameter": "/k?colour=blue",
        "empty query": "/k?",
        "own parameter": "/k?x-mine=1",
        "override with blanks": "/k?response-content-type=text%2Fa%20b",
        "override with plus": "/k?response-content-disposition=a%2Bb",
    }
)
def query(s: Scene, target: str) -> None:
    s.put()
    s.raw("GET", target)
    s.raw("GET", target)
    s.raw("HEAD", target)


@each(
    {
        "range in capitals": {"RANGE": "bytes=1-3"},
        "accept": {"Accept": "image/png"},
        "no cache": {"Cache-Control": "no-cache", "Pragma": "no-cache"},
        "origin": {"Origin": "https://elsewhere.example"},
        "if range": {"If-Range": '"no such tag"', "Range": "bytes=1-3"},
        "odd": {"X-Odd": "1", "X-Amz-Odd": "2"},
        "customer key": {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
        "owner": {"x-amz-expected-bucket-owner": "123456789012"},
        "other owner": {"x-amz-expected-bucket-owner": "999999999999"},
    }
)
def read_header(s: Scene, headers: dict[str, str]) -> None:
    s.put()
    s.raw("GET", "/k", headers=headers)
    s.raw("GET", "/k", headers=headers)
    s.raw("HEAD", "/k", headers=headers)


@each({name: name for name in ("PATCH", "FROB", "POST", "OPTIONS")})
def method(s: Scene, method: str) -> None:
    s.put()
    s.raw(method, "/k")
    s.get()


@case
def put_without_content(s: Scene) -> None:
    s.raw("PUT", "/k")
    s.get()


@case
def put_a_folder(s: Scene) -> None:
    s.put("folder/", b"")
    s.head("folder/")
    s.head("folder")
    s.put("folder/inner", b"x")
    s.get("folder/")
    s.keys()
    s.delete("folder/")
    s.get("folder/inner")
    s.keys()


@case
def put_if_absent(s: Scene) -> None:
    s.put(body=b"one", IfNoneMatch="*")
    s.get()
    s.put(body=b"two", IfNoneMatch="*")
    s.get()


@case
def put_if_match(s: Scene) -> None:
    etag = s.put(body=b"one")["ETag"]
    s.get()
    s.put(body=b"two", IfMatch='"0123456789abcdef0123456789abcdef"')
    s.get()
    s.put(body=b"three", IfMatch=etag)
    s.get()
    s.put("missing", body=b"four", IfMatch=etag)
    s.get("missing")


@case
def delete_if_match(s: Scene) -> None:
    etag = s.put()["ETag"]
    s.get()
    s.delete(IfMatch='"0123456789abcdef0123456789abcdef"')
    s.get()
    s.delete(IfMatch=etag)
    s.get()


@case
def append(s: Scene) -> None:
    s.put()
    s.put(body=b"more", WriteOffsetBytes=10)
    s.get()


@case
def rename(s: Scene) -> None:
    s.put("old")
    s.get("old")
    s.call("rename_object", Key="new", RenameSource="old")
    s.get("old")
    s.get("new")


@case
def attributes(s: Scene) -> None:
    s.put(ChecksumAlgorithm="SHA256")
    s.call("get_object_attributes", Key="k", ObjectAttributes=["ETag", "Checksum", "ObjectSize", "StorageClass"])
    s.call("get_object_attributes", Key="k", ObjectAttributes=["ObjectParts"])
    s.call("get_object_attributes", Key="k", ObjectAttributes=["ObjectSize"])
    s.call("get_object_attributes", Key="missing", ObjectAttributes=["ETag"])
    s.put(body=b"other")
    s.call("get_object_attributes", Key="k", ObjectAttributes=["ETag", "Checksum", "ObjectSize", "StorageClass"])


@case
def part_number_of_a_whole_object(s: Scene) -> None:
    s.put()
    for number in (1, 2, 0):
        s.get(PartNumber=number)
        s.head(PartNumber=number)
    s.put("empty", b"")
    s.get("empty", PartNumber=1)
    s.head("empty", PartNumber=1)


@case
def restore(s: Scene) -> None:
    s.put(StorageClass="GLACIER")
    s.get()
    s.head()
    s.call("restore_object", Key="k", RestoreRequest={"Days": 1})
    s.head()
    s.get()
    s.put("warm")
    s.call("restore_object", Key="warm", RestoreRequest={"Days": 1})
    s.call("restore_object", Key="missing", RestoreRequest={"Days": 1})


@case
def select(s: Scene) -> None:
    s.put(body=b'{"a": 1}\n{"a": 2}\n')
    for key in ("k", "missing"):
        s.call(
            "select_object_content",
            Key=key,
            Expression="SELECT * FROM S3Object s WHERE s.a = 2",
            ExpressionType="SQL",
            InputSerialization={"JSON": {"Type": "LINES"}},
            OutputSerialization={"JSON": {}},
        )


@case
def torrent(s: Scene) -> None:
    s.put()
    s.call("get_object_torrent", Key="k")


@case
def acl(s: Scene) -> None:
    s.put()
    s.call("get_object_acl", Key="k")
    s.call("put_object_acl", Key="k", ACL="public-read")
    s.call("get_object_acl", Key="k")
    s.get()
    s.call("put_object_acl", Key="missing", ACL="private")
    s.call("get_object_acl", Key="missing")


@case
def acl_by_grants(s: Scene) -> None:
    owner = {"ID": "75aa57f09aa0c8caeab4f8c24e99d10f8e7faeebf76c078efc7c6caea54ba06a"}
    grant = {"Grantee": {"Type": "CanonicalUser", **owner}, "Permission": "READ"}
    s.put()
    s.call("put_object_acl", Key="k", AccessControlPolicy={"Owner": owner, "Grants": [grant]})
    s.call("get_object_acl", Key="k")
    s.put("by-header", GrantRead="uri=http://acs.amazonaws.com/groups/global/AllUsers")
    s.call("get_object_acl", Key="by-header")


@case
def encryption_is_changed(s: Scene) -> None:
    s.put()
    s.get()
    s.raw("PUT", "/k?encryption", body=b"<ObjectEncryption/>")
    s.get()
