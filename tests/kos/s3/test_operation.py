"""The table of operations, as clients send them."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3.head import RequestHead
from kos.s3.operation import Handling, Op, Operation, parse
from koscache.content import version_name


def operation(line: str, *, domain: str | None = None, host: str = "127.0.0.1:9000", **headers: str) -> Operation:
    method, _, target = line.partition(" ")
    path, _, query = target.partition("?")
    sent = {"host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    return parse(RequestHead(method, path, query, sent), domain)


TABLE = """
GET /                                       ListBuckets             forward
GET /?max-buckets=1                         ListBuckets             forward
GET /bkt                                      ListObjects             list
GET /bkt/                                     ListObjects             list
GET /bkt/?delimiter=%2F                       ListObjects             list
GET /bkt?list-type=2&prefix=a                 ListObjectsV2           list
GET /bkt?versions                             ListObjectVersions      forward
GET /bkt?uploads                              ListMultipartUploads    forward
GET /bkt?location                             GetBucketLocation       forward
GET /bkt?policy                               BucketSubresourceRead   forward
GET /bkt?lifecycle                            BucketSubresourceRead   forward
GET /bkt?analytics&id=1                       BucketSubresourceRead   forward
HEAD /bkt                                     HeadBucket              forward
PUT /bkt                                      CreateBucket            write
PUT /bkt?versioning                           BucketSubresourceWrite  write
PUT /bkt?object-lock                          BucketSubresourceWrite  write
POST /bkt?metadataTable                       BucketSubresourceWrite  write
DELETE /bkt?cors                              BucketSubresourceWrite  write
DELETE /bkt                                   DeleteBucket            write
POST /bkt?delete                              DeleteObjects           write
OPTIONS /bkt                                  Preflight               forward
GET /bkt/k                                    GetObject               read
GET /bkt/k?x-id=GetObject                     GetObject               read
GET /bkt/k?response-content-type=a%2Fb        GetObject               read
GET /bkt/k?x-team=a                           GetObject               read
GET /bkt/k?versionId=1                        GetObject               read
GET /bkt/k?versionId=null                     GetObject               read
GET /bkt/k?versionId=                         GetObject               forward
HEAD /bkt/k?versionId=1                       HeadObject              read
GET /bkt/k?partNumber=1                       GetObject               part
GET /bkt/k?partNumber=1&versionId=v           GetObject               part
GET /bkt/k?uploadId=1                         ListParts               forward
GET /bkt/k?acl                                GetObjectAcl            forward
GET /bkt/k?attributes                         GetObjectAttributes     forward
GET /bkt/k?legal-hold                         GetObjectLegalHold      forward
GET /bkt/k?retention                          GetObjectRetention      forward
GET /bkt/k?tagging                            GetObjectTagging        forward
GET /bkt/k?torrent                            GetObjectTorrent        forward
HEAD /bkt/k                                   HeadObject              read
HEAD /bkt/k?partNumber=1                      HeadObject              part
HEAD /bkt/k?partNumber=                       HeadObject              part
HEAD /bkt/k?partNumber=1&uploadId=u           HeadObject              forward
HEAD /bkt/k?acl                               HeadObject              forward
PUT /bkt/k                                    PutObject               write
PUT /bkt/k?x-id=PutObject                     PutObject               write
PUT /bkt/k?partNumber=1&uploadId=u            UploadPart              forward
PUT /bkt/k?acl                                PutObjectAcl            forward
PUT /bkt/k?encryption                         UpdateObjectEncryption  write
PUT /bkt/k?legal-hold                         PutObjectLegalHold      write
PUT /bkt/k?retention                          PutObjectRetention      write
PUT /bkt/k?tagging                            PutObjectTagging        write
PUT /bkt/k?renameObject                       RenameObject            write
PUT /bkt/k?uploadId=u                         Unknown                 write
PUT /bkt/k?torrent                            Unknown                 write
POST /bkt/k?uploads                           CreateMultipartUpload   forward
POST /bkt/k?uploadId=u                        CompleteMultipartUpload write
POST /bkt/k?restore                           RestoreObject           write
POST /bkt/k?select&select-type=2              SelectObjectContent     forward
POST /bkt/k                                   Unknown                 write
DELETE /bkt/k                                 DeleteObject            write
DELETE /bkt/k?versionId=1                     DeleteObject            write
DELETE /bkt/k?uploadId=u                      AbortMultipartUpload    forward
DELETE /bkt/k?tagging                         DeleteObjectTagging     write
DELETE /bkt/k?acl                             Unknown                 write
OPTIONS /bkt/k                                Preflight               forward
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_table(row: str) -> None:
    method, target, op, handling = row.split()
    found = operation(f"{method} {target}")
    assert (found.op, found.handling) == (Op[op], Handling(handling))
    if found.key is not None:
        assert found.forgets == (("k",) if handling == "write" else ())


def test_a_listing_with_a_repeated_parameter_is_left_to_the_origin() -> None:
    assert operation("GET /bkt?prefix=a").bypass_reason is None
    for line in ("GET /bkt?prefix=a&prefix=b", "GET /bkt?list-type=2&list-type=1"):
        found = operation(line)
        assert (found.handling, found.bypass_reason) == (Handling.LIST, "repeated_parameter")


def test_a_write_to_a_bucket_itself_forgets_no_key() -> None:
    assert operation("PUT /bkt").forgets == operation("DELETE /bkt?policy").forgets == ()


def test_every_operation_is_in_the_table() -> None:
    assert {op.name for op in Op} - {row.split()[2] for row in TABLE.strip().splitlines()} == {
        "CopyObject",
        "UploadPartCopy",
    }


def test_copies() -> None:
    assert operation("PUT /bkt/k", x_amz_copy_source="/s/k").op is Op.CopyObject
    assert operation("PUT /bkt/k?partNumber=1&uploadId=u", x_amz_copy_source="/s/k").op is Op.UploadPartCopy
    assert operation("PUT /bkt/k", x_amz_copy_source="/s/k").forgets == ("k",)


@pytest.mark.parametrize(
    "line",
    [
        "PUT /bkt/k?uploadId=&partNumber=",
        "PUT /bkt/k?uploadId=u&partNumber=",
        "PUT /bkt/k?uploadId=u&partNumber=1&tagging",
        "PUT /bkt/k?acl&tagging",
        "PUT /bkt/k?acl&uploadId=u&partNumber=1",
        "POST /bkt/k?uploads&uploadId=u",
        "POST /bkt/k?select&restore",
        "DELETE /bkt/k?uploadId=",
        "DELETE /bkt/k?uploadId=u&tagging",
        "DELETE /bkt/k?uploadId=u&acl",
        "PUT /bkt/k?uploadId=u&partNumber=1&uploadId=",
        "DELETE /bkt/k?uploadId=u&uploadId=",
        "POST /bkt/k?uploads&uploads=1",
    ],
)
def test_what_an_origin_might_read_as_a_write_is_one(line: str) -> None:
    found = operation(line)
    assert (found.handling, found.forgets) == (Handling.WRITE, ("k",))


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("PUT /bkt/k", False),
        ("DELETE /bkt/k", False),
        ("POST /bkt/k?uploadId=u", False),
        ("DELETE /bkt/k?versionId=v", True),
        ("DELETE /bkt/k?versionId=", True),
        ("PUT /bkt/k?versionId=v", True),
        ("PUT /bkt/k?tagging", True),
        ("PUT /bkt/k?tagging&versionId=v", True),
        ("PUT /bkt/k?retention", True),
        ("PUT /bkt/k?legal-hold", True),
        ("PUT /bkt/k?encryption", True),
        ("POST /bkt/k?restore", True),
        ("DELETE /bkt/k?tagging", True),
        ("PUT /bkt/k?acl&tagging", True),
        ("PUT /bkt/k?acl", False),
        ("GET /bkt/k?versionId=v", False),
    ],
)
def test_which_writes_may_change_other_versions_than_the_current_one(line: str, changes: bool) -> None:
    assert operation(line).changes_versions is changes


@pytest.mark.parametrize("line", ["DELETE /bkt/k", "DELETE /bkt"])
def test_removing_objects_that_are_not_named_is_refused(line: str) -> None:
    with pytest.raises(S3Error, match="NotImplemented"):
        operation(line, x_minio_force_delete="true")
    assert operation(line, x_minio_force_delete="false").handling is Handling.WRITE


@pytest.mark.parametrize("query", ["session", "session=", "list-type=2&session"])
def test_nobody_is_given_keys_to_the_origin(query: str) -> None:
    with pytest.raises(S3Error, match="NotImplemented"):
        operation(f"GET /bkt?{query}")


def test_putting_objects_that_are_not_named_is_refused() -> None:
    with pytest.raises(S3Error, match="NotImplemented"):
        operation("PUT /bkt/k.tar", x_amz_meta_snowball_auto_extract="True")
    assert operation("PUT /bkt/k.tar", x_amz_meta_snowball_auto_extract="false").op is Op.PutObject


@pytest.mark.parametrize("source", ["old%2Fname", "/old/name", "bkt/old/name", "/bkt/old%2Fname"])
def test_rename_forgets_both_names(source: str) -> None:
    assert {"new", "old/name"} <= set(operation("PUT /bkt/new?renameObject", x_amz_rename_source=source).forgets)


@pytest.mark.parametrize(
    ("query", "header", "reason"),
    [
        ("", "", None),
        ("versionId=", "", "version_id"),
        ("versionId=a%20b", "", "version_id"),
        ("versionId=%00", "", "version_id"),
        ("versionId=%ff", "", "version_id"),
        ("versionId=" + "v" * 1025, "", "version_id"),
        ("versionId=" + "v" * 1024, "", None),
        ("versionId=a&versionId=b", "", "repeated_parameter"),
        ("partNumber=2&partNumber=3", "", "repeated_parameter"),
        ("newthing", "", "unknown_parameter"),
        ("x-amz-newthing=1", "", "unknown_parameter"),
        ("X-Amz-Checksum-Mode=ENABLED", "", None),
        ("X-Amz-Server-Side-Encryption-Customer-Key=1", "", "sse_c"),
        ("response-expires=1&response-expires=2", "", "repeated_parameter"),
        ("", "x-amz-server-side-encryption-customer-algorithm", "sse_c"),
        ("", "x-amz-expected-bucket-owner", "expected_bucket_owner"),
        ("", "x-amz-request-payer", "request_payer"),
        ("", "origin", "cors"),
        ("", "x-minio-extract", "unknown_header"),
        ("", "range", None),
        ("", "if-none-match", None),
    ],
)
def test_reads_that_are_not_for_the_cache(query: str, header: str, reason: str | None) -> None:
    for method in ("GET", "HEAD"):
        found = operation(f"{method} /bkt/k?{query}", **({header: "1"} if header else {}))
        assert found.bypass_reason == reason
        assert found.handling is (Handling.FORWARD if reason else Handling.READ)


def test_a_read_of_a_version_names_it() -> None:
    assert operation("GET /bkt/k?versionId=v%2F1.a_b-c").version_id == "v/1.a_b-c"
    assert operation("HEAD /bkt/k").version_id is None


def test_a_key_that_could_be_the_name_of_a_version_is_never_cached() -> None:
    assert operation("GET /bkt/%00v1%00k").bypass_reason == "reserved_key"
    assert operation("GET /bkt/%00v1%00k").handling is Handling.FORWARD
    assert version_name("k", "v1")[0] == "\0"


def test_authentication_is_no_part_of_the_operation() -> None:
    query = "X-Amz-Algorithm=a&X-Amz-Credential=c&X-Amz-Signature=s&response-expires=a%2Bb%20c&X-Amz-Date=d"
    found = operation(f"GET /bkt/k?{query}")
    assert found.handling is Handling.READ and dict(found.params) == {"response-expires": "a+b c"}
    query = "AWSAccessKeyId=a&Expires=1&Signature=s"
    found = operation(f"GET /bkt/k?{query}&response-expires=e")
    assert found.handling is Handling.READ and dict(found.params) == {"response-expires": "e"}
    # Of the three that sign by version 2 none means anything without the others.
    for name in ("AWSAccessKeyId", "Expires", "Signature"):
        left = "&".join(piece for piece in query.split("&") if not piece.startswith(name))
        found = operation(f"GET /bkt/k?{left}")
        assert (found.handling, found.bypass_reason) == (Handling.FORWARD, "unknown_parameter")


def test_parameters_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        operation("GET /bkt/k?acl").params["x"] = "y"  # type: ignore[index]


def test_virtual_hosted_style() -> None:
    found = operation("GET /k/l?acl", domain="s3.local", host="Bkt.s3.local:9000")
    assert (found.bucket, found.key, found.op) == ("bkt", "k/l", Op.GetObjectAcl)
    found = operation("GET /", domain="s3.local", host="bkt.s3.local")
    assert (found.bucket, found.key, found.op) == ("bkt", None, Op.ListObjects)
    found = operation("GET /bkt/k", domain="s3.local", host="s3.local:9000")
    assert (found.bucket, found.key) == ("bkt", "k")
    assert operation("GET /bkt/k", host="bkt.s3.local").bucket == "bkt"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("POST /bkt", "NotImplemented"),
        ("PATCH /bkt", "MethodNotAllowed"),
        ("PATCH /bkt/k", "MethodNotAllowed"),
        ("PUT /", "MethodNotAllowed"),
        ("GET //k", "InvalidBucketName"),
        ("GET /bkt%2Fk%", "InvalidURI"),
        ("GET /bkt/" + "k" * 1025, "KeyTooLongError"),
    ],
)
def test_refusals(line: str, code: str) -> None:
    with pytest.raises(S3Error) as caught:
        operation(line)
    assert caught.value.code == code
