"""Links that boto3 makes, opened by clients that know nothing of S3, as browsers, curl and urllib are.

For an endpoint that is not AWS's, boto3 signs links by version 2 unless it is told otherwise: so most cases are tried by
both versions, in path style and in virtual-hosted style.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import re
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from tests.clients.conftest import DOMAIN, Endpoint
from tests.clients.test_boto3 import KEYS
from tests.conditions import eventually
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node

BODY = b"signed body"
STYLES = ("path", "virtual")
both_versions = pytest.mark.parametrize("version", ["s3", "s3v4"], ids=["v2", "v4"])


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        found = re.search(rb"<Code>(\w+)</Code>", self.body)
        return found[1].decode() if found else ""

    @property
    def phase(self) -> str:
        return self.headers.get("x-kos-cache", "none").partition(";")[0]


def linker(endpoint: Endpoint, version: str, style: str = "path") -> Any:
    """A boto3 client that only makes links. Virtual style: for a name that no DNS knows, so visit() tells the node."""
    host = endpoint.host if style == "path" else f"{DOMAIN}:{endpoint.host.rpartition(':')[2]}"
    return boto3.client(
        "s3",
        endpoint_url=f"{endpoint.url.partition('://')[0]}://{host}",
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": style}, signature_version=None if version == "s3" else version),
    )


def visit(endpoint: Endpoint, method: str, url: str, body: bytes | None = None, **headers: str) -> Answer:
    """Ask the node for exactly this target, whatever host the link names."""
    parts = urlsplit(url)
    address = endpoint.host
    with contextlib.closing(
        http.client.HTTPSConnection(address, timeout=20, context=endpoint.tls)
        if endpoint.secure
        else http.client.HTTPConnection(address, timeout=20)
    ) as connection:
        connection.putrequest(method, f"{parts.path}?{parts.query}", skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", parts.netloc)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


@both_versions
@pytest.mark.parametrize("style", STYLES)
def test_put_get_head_and_delete(endpoint: Endpoint, origin: Any, bucket: str, version: str, style: str) -> None:
    link = linker(endpoint, version, style).generate_presigned_url
    for key in KEYS:
        named = {"Bucket": bucket, "Key": key}
        url = link("put_object", named, ExpiresIn=60)
        assert ("AWSAccessKeyId=" in url) == (version == "s3") and (DOMAIN in url) == (style == "virtual")
        assert visit(endpoint, "PUT", url, BODY).status == 200
        assert origin.get_object(**named)["Body"].read() == BODY
    for key in KEYS:
        url = link("get_object", {"Bucket": bucket, "Key": key}, ExpiresIn=60)
        assert visit(endpoint, "GET", url).body == BODY
    for key in KEYS:
        named = {"Bucket": bucket, "Key": key}
        url = link("get_object", named, ExpiresIn=60)
        eventually(lambda url=url: visit(endpoint, "GET", url).phase == "hit", "the daemon has stored it")
        ranged = visit(endpoint, "GET", url, Range="bytes=2-4")
        assert (ranged.status, ranged.body, ranged.phase) == (206, BODY[2:5], "hit")
        head = visit(endpoint, "HEAD", link("head_object", named, ExpiresIn=60))
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(BODY)), b"")
        assert visit(endpoint, "DELETE", link("delete_object", named, ExpiresIn=60)).status == 204
        gone = visit(endpoint, "GET", link("get_object", named, ExpiresIn=60))
        assert (gone.status, gone.code) == (404, "NoSuchKey")


@both_versions
def test_what_does_not_hold_is_refused(endpoint: Endpoint, bucket: str, version: str) -> None:
    link = linker(endpoint, version).generate_presigned_url
    put = link("put_object", {"Bucket": bucket, "Key": "k"}, ExpiresIn=60)
    assert visit(endpoint, "PUT", put, BODY).status == 200
    url = link("get_object", {"Bucket": bucket, "Key": "k"}, ExpiresIn=60)
    for changed in (
        url.replace("/k?", "/other?"),
        url + "&versionId=1",
        url + "&response-content-type=text/html",
        re.sub(r"Expires=(\d+)", lambda found: f"Expires={int(found[1]) + 1}", url),
    ):
        assert changed != url
        assert visit(endpoint, "GET", changed).code == "SignatureDoesNotMatch"
    assert visit(endpoint, "DELETE", url).code == "SignatureDoesNotMatch"
    assert visit(endpoint, "GET", url, x_amz_meta_a="1").status == 403
    if version == "s3":
        past = visit(endpoint, "GET", link("get_object", {"Bucket": bucket, "Key": "k"}, ExpiresIn=-60))
        assert past.code == "AccessDenied" and b"Request has expired" in past.body
    assert visit(endpoint, "GET", url).body == BODY


@both_versions
def test_overrides_and_checksums_of_a_read(endpoint: Endpoint, s3: Any, bucket: str, version: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY, ChecksumAlgorithm="SHA256")
    link = linker(endpoint, version).generate_presigned_url
    wanted = {"Bucket": bucket, "Key": "k", "ResponseContentType": "text/plain; charset=utf-8"}
    wanted["ResponseContentDisposition"] = 'attachment; filename="a+b c.txt"'
    plain, asking = link("get_object", wanted), link("get_object", {**wanted, "ChecksumMode": "ENABLED"})
    # Version 4 signs the header, which is to be sent; version 2 moves it into the query.
    headers = {"x_amz_checksum_mode": "ENABLED"} if version == "s3v4" else {}
    expected = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    phases = set()
    for _ in range(4):
        answer = visit(endpoint, "GET", asking, **headers)
        assert answer.headers["x-amz-checksum-sha256"] == expected
        phases.add(answer.phase)
        answer = visit(endpoint, "GET", plain)
        assert "x-amz-checksum-sha256" not in answer.headers
        assert answer.headers["content-type"] == wanted["ResponseContentType"]
        assert answer.headers["content-disposition"] == wanted["ResponseContentDisposition"]
    eventually(lambda: visit(endpoint, "GET", asking, **headers).phase == "hit", "the daemon has stored it")
    assert visit(endpoint, "GET", asking, **headers).headers["x-amz-checksum-sha256"] == expected


@both_versions
def test_a_put_with_everything_signed(endpoint: Endpoint, s3: Any, bucket: str, version: str) -> None:
    crc32 = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
    md5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    link = linker(endpoint, version).generate_presigned_url
    named = {"Bucket": bucket, "Key": "k"}
    said = {
        "ContentType": "text/x-odd", "ContentMD5": md5, "Metadata": {"colour": "light  blue"}, "ChecksumCRC32": crc32,
        "ServerSideEncryption": "AES256", "Tagging": "a=b%20c", "ACL": "private",
    }  # fmt: skip
    url = link("put_object", named | said)
    headers = {
        "content_type": "text/x-odd", "content_md5": md5, "x_amz_meta_colour": "light  blue",
        "x_amz_checksum_crc32": crc32, "x_amz_server_side_encryption": "AES256", "x_amz_tagging": "a=b%20c",
        "x_amz_acl": "private",
    }  # fmt: skip
    assert visit(endpoint, "PUT", url, b"another one", **headers).code == "BadDigest"
    assert visit(endpoint, "PUT", url, BODY, **headers | {"content_type": "text/html"}).code == "SignatureDoesNotMatch"
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    for sent in (headers, {}) if version == "s3" else (headers,):
        # A link of version 2 carries all it says: whoever opens it need not know.
        assert visit(endpoint, "PUT", url, BODY, **sent).status == 200
        stored = s3.head_object(**named)
        assert (stored["ContentType"], stored["Metadata"]) == ("text/x-odd", {"colour": "light  blue"})
        assert stored["ServerSideEncryption"] == "AES256"
        assert s3.get_object_tagging(**named)["TagSet"] == [{"Key": "a", "Value": "b c"}]
        s3.delete_object(**named)
    if version == "s3":
        assert visit(endpoint, "PUT", url, b"another one").code == "BadDigest"


@both_versions
def test_a_multipart_upload_by_links(endpoint: Endpoint, origin: Any, bucket: str, version: str) -> None:
    link = linker(endpoint, version).generate_presigned_url
    named: dict[str, Any] = {"Bucket": bucket, "Key": "20m +é&=.bin"}
    created = visit(endpoint, "POST", link("create_multipart_upload", named), b"")
    upload = {**named, "UploadId": created.body.partition(b"<UploadId>")[2].partition(b"<")[0].decode()}
    pieces = [b"a" * (5 << 20), b"the end"]
    etags = []
    for number, piece in enumerate(pieces, 1):
        answer = visit(endpoint, "PUT", link("upload_part", {**upload, "PartNumber": number}), piece)
        assert answer.status == 200
        etags.append(answer.headers["etag"])
    parts = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{e}</ETag></Part>" for n, e in enumerate(etags, 1))
    body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
    completed = visit(endpoint, "POST", link("complete_multipart_upload", upload), body)
    assert completed.status == 200 and b"<CompleteMultipartUploadResult" in completed.body
    assert origin.get_object(**named)["Body"].read() == b"".join(pieces)
    listed = visit(endpoint, "GET", link("list_objects_v2", {"Bucket": bucket, "Prefix": "20m +"}))
    assert listed.status == 200 and b"<KeyCount>1</KeyCount>" in listed.body


def test_a_page_of_another_site_uses_a_link(endpoint: Endpoint, s3: Any, bucket: str, kos_node: Node) -> None:
    """What a browser does: it asks beforehand, unsigned, then sends the request with its Origin."""
    page = "https://app.example"
    rule = {"AllowedMethods": ["GET", "PUT"], "AllowedOrigins": [page], "AllowedHeaders": ["*"], "MaxAgeSeconds": 60}
    s3.put_bucket_cors(Bucket=bucket, CORSConfiguration={"CORSRules": [rule]})
    for version in ("s3", "s3v4"):
        link = linker(endpoint, version).generate_presigned_url
        url = link("put_object", {"Bucket": bucket, "Key": "k"})
        asked = visit(endpoint, "OPTIONS", url, Origin=page, Access_Control_Request_Method="PUT")
        assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, page)
        assert visit(endpoint, "PUT", url, BODY, Origin=page).status == 200
        url = link("get_object", {"Bucket": bucket, "Key": "k"})
        for _ in range(2):
            read = visit(endpoint, "GET", url, Origin=page)
            assert (read.body, read.headers["x-kos-cache"]) == (BODY, "bypass;reason=cors")
    assert visit(endpoint, "OPTIONS", url.partition("?")[0]).code == "AccessDenied"
