"""Links: what somebody without keys can do with one."""

from __future__ import annotations

from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

KEYS = {"plain": "k", "clients' own": "20m +é&=.bin", "slashes": "a//b/../c/", "percent": "a%41"}
#: Without a type urllib's and moto's peers take a body for a form.
TYPE = {"Content-Type": "text/plain"}


@each(KEYS)
def get(s: Scene, key: str) -> None:
    s.put(key)
    s.presigned("get_object", key=key)
    s.presigned("get_object", key=key, headers={"Range": "bytes=2-4"})
    s.presigned("head_object", key=key)
    s.presigned("get_object", key=f"{key}-missing")


@each(KEYS)
def put(s: Scene, key: str) -> None:
    s.presigned("put_object", key=key, body=b"by a link", headers=TYPE)
    s.get(key)
    s.presigned("put_object", key=key, body=b"by a link again", headers=TYPE)
    s.get(key)


@each(
    {
        "content type": {"ResponseContentType": "text/x-other"},
        "disposition": {"ResponseContentDisposition": 'attachment; filename="ä b"'},
        "version": {"VersionId": "null"},
        "part": {"PartNumber": 1},
    }
)
def get_with(s: Scene, arguments: dict[str, Any]) -> None:
    s.put()
    s.presigned("get_object", **arguments)


@each(KEYS)
def by_version_2(s: Scene, key: str) -> None:
    """The type of a body is signed by a link of version 2, so without one there is none."""
    s.presigned("put_object", key=key, body=b"by a link", version_2=True)
    s.presigned("get_object", key=key, version_2=True)
    s.presigned("get_object", key=key, version_2=True, headers={"Range": "bytes=2-4"})
    s.presigned("get_object", key=key, version_2=True, ResponseContentType="text/x-other")
    s.presigned("head_object", key=key, version_2=True)
    s.presigned("delete_object", key=key, version_2=True)
    s.get(key)


@case
def get_with_a_signed_header(s: Scene) -> None:
    s.put()
    s.presigned("get_object", headers={"x-amz-checksum-mode": "ENABLED"}, ChecksumMode="ENABLED")


@case
def put_with_signed_headers(s: Scene) -> None:
    headers = {"Content-Type": "text/x-mine", "x-amz-meta-colour": "blue", "x-amz-storage-class": "STANDARD_IA"}
    s.presigned(
        "put_object",
        body=b"signed headers",
        headers=headers,
        ContentType="text/x-mine",
        Metadata={"colour": "blue"},
        StorageClass="STANDARD_IA",
    )
    s.get()
    s.head()


@case
def multipart(s: Scene) -> None:
    upload = s.call("create_multipart_upload", Key="k")["UploadId"]
    s.presigned("upload_part", body=b"one part", headers=TYPE, UploadId=upload, PartNumber=1)
    listed = s.call("list_parts", Key="k", UploadId=upload)
    parts = {"Parts": [{"PartNumber": 1, "ETag": listed["Parts"][0]["ETag"]}]}
    s.call("complete_multipart_upload", Key="k", UploadId=upload, MultipartUpload=parts)
    s.presigned("get_object")


@case
def delete(s: Scene) -> None:
    s.put()
    s.get()
    s.presigned("delete_object")
    s.get()


@case
def conditions(s: Scene) -> None:
    etag = s.put()["ETag"]
    s.presigned("get_object", headers={"If-None-Match": etag})
    s.presigned("get_object", headers={"If-Match": '"other"'})
