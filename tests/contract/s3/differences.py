"""Where an answer through kos is not the origin's, and why that is right.

Owns: the rules, for what differs in many cases in one way, and the table, for what differs in one case. Does not own:
what is compared (scene.py) or asked (cases/).

Invariant: a difference that is not here fails a test, and so does an entry here that is no longer seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from tests.contract.s3.scene import Observation

#: path -> (what moto gives, what kos gives)
Paths = dict[str, tuple[str, str]]


class Rule(NamedTuple):
    """What differs wherever it comes up. All but reason and case are regular expressions for the whole text.

    request: as in "get_object" or "HEAD /BUCKET/k". status: of both answers. path: within the answer. moto, kos: the
    values. case: the name of one that shows it.
    """

    reason: str
    case: str
    request: str
    status: str
    path: str
    moto: str = ".*"
    kos: str = ".*"


_READ: Final = r"get_object|head_object|(?:presigned get_object)|(?:presigned head_object)|(?:GET|HEAD) /BUCKET/.*"
_HEAD: Final = r"head_object|HEAD /BUCKET/.*|presigned head_object"

RULES: Final = (
    Rule(
        "RFC 9110 14.4: a range that cannot be given is answered with the size of what there is",
        "objects.range_of_ten_bytes[at the end]", _READ, "416", "header content-range", "absent", r"'bytes \*/\d+'",
    ),
    Rule(
        "moto puts the object's headers on a HEAD that failed, or those of a web page; S3 and kos those of an error",
        "conditions.read[match-]", _HEAD, "4..", "header .*",
    ),
    Rule(
        "RFC 9110 15.4.5: a 304 has what a 200 would have had of these",
        "conditions.read[none-match-]", _READ, "304", "header (?:last-modified|cache-control)", "absent",
    ),
    Rule(
        "RFC 9110 15.4.5: a 304 says of the object only what a cache needs to bring its copy up to date",
        "conditions.read[none-match-]", _READ, "304", "header accept-ranges", kos="absent",
    ),
    Rule(
        "moto takes the parameter Expires of a link for a header of the object",
        "presigned.by_version_2[plain]", "presigned .*", "2..", "header expires", r"'\d+'", "absent",
    ),
    Rule(
        "a checksum of the whole object on an answer with Content-Range would be taken for that of the range",
        "objects.range_of_ten_bytes[whole]", _READ, "206", "Checksum.*|header x-amz-checksum-.*", kos="absent",
    ),
)  # fmt: skip


def unexplained(found: Paths, through: Observation) -> tuple[Paths, set[Rule]]:
    """What of found no rule explains, and the rules that explain the rest. through: all that kos answered."""
    requests = {path.removesuffix(".status"): text for path, text in through.items() if path.endswith(".status")}
    left: Paths = {}
    used: set[Rule] = set()
    for path, pair in found.items():
        request = next((label for label in requests if path.startswith(f"{label}.")), "")
        rule = next((each for each in RULES if request and _holds(each, request, requests[request], path, pair)), None)
        if rule is None:
            left[path] = pair
        else:
            used.add(rule)
    return left, used


def _holds(rule: Rule, request: str, status: str, path: str, pair: tuple[str, str]) -> bool:
    compared: Mapping[str, str] = {
        rule.request: request.partition(" ")[2],
        rule.status: status,
        rule.path: path[len(request) + 1 :],
    }
    values = (rule.moto, pair[0]), (rule.kos, pair[1])
    return all(re.fullmatch(wanted, text, re.DOTALL) for wanted, text in (*compared.items(), *values))


class Difference(NamedTuple):
    """reason: why kos answers otherwise in this case."""

    reason: str
    paths: Paths


_TABLE: Final[tuple[tuple[str, dict[str, Paths]], ...]] = (
    (
        "S3 knows no such bucket names: InvalidBucketName, before the origin is asked",
        {
            "buckets.name[blank]": {
                "1 PUT /a%20b.status": ("200", "400"),
                "2 GET /a%20b?list-type=2&max-keys=1.status": ("200", "400"),
                "1 PUT /a%20b./Error/Code": ("absent", "'InvalidBucketName'"),
                "2 GET /a%20b?list-type=2&max-keys=1./Error/Code": ("absent", "'InvalidBucketName'"),
            },
            "buckets.name[star]": {
                "1 PUT /a*b.status": ("200", "400"),
                "2 GET /a*b?list-type=2&max-keys=1.status": ("200", "400"),
                "1 PUT /a*b./Error/Code": ("absent", "'InvalidBucketName'"),
                "2 GET /a*b?list-type=2&max-keys=1./Error/Code": ("absent", "'InvalidBucketName'"),
            },
        },
    ),
    (
        "on the service there is only GET (ListBuckets): MethodNotAllowed",
        {
            "buckets.method_on_the_service[POST]": {
                "1 POST /.status": ("200", "405"),
                "1 POST /./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
            "buckets.method_on_the_service[PATCH]": {
                "1 PATCH /.status": ("200", "405"),
                "1 PATCH /./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
            "buckets.method_on_the_service[DELETE]": {
                "1 DELETE /.status": ("200", "405"),
                "1 DELETE /./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
            "buckets.method_on_the_service[PUT]": {
                "1 PUT /.status": ("200", "405"),
                "1 PUT /./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
        },
    ),
    (
        "a method that HTTP does not know is no request: 400, as S3 says it",
        {
            "buckets.method_on_the_service[FROB]": {
                "1 FROB /.status": ("405", "400"),
                "1 FROB /./Error/Code": ("absent", "'InvalidRequest'"),
            },
            "objects.method[FROB]": {
                "2 FROB /BUCKET/k.status": ("405", "400"),
                "2 FROB /BUCKET/k./Error/Code": ("absent", "'InvalidRequest'"),
            },
        },
    ),
    (
        "uploads by an HTML form are not implemented, and moto fails without one",
        {
            "buckets.method_on_a_bucket[POST]": {
                "1 POST /BUCKET.status": ("500", "501"),
                "1 POST /BUCKET./Error/Code": ("absent", "'NotImplemented'"),
            },
        },
    ),
    (
        "a session would be credentials of the origin; moto, which has no sessions, lists the bucket",
        {
            "buckets.session": {
                "1 GET /BUCKET?session.status": ("200", "501"),
                "1 GET /BUCKET?session./Error/Code": ("absent", "'NotImplemented'"),
            },
        },
    ),
    (
        "S3 has no PATCH: MethodNotAllowed, where moto fails",
        {
            "buckets.method_on_a_bucket[PATCH]": {
                "1 PATCH /BUCKET.status": ("500", "405"),
                "1 PATCH /BUCKET./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
            "objects.method[PATCH]": {
                "2 PATCH /BUCKET/k.status": ("500", "405"),
                "2 PATCH /BUCKET/k./Error/Code": ("absent", "'MethodNotAllowed'"),
            },
        },
    ),
    (
        "S3: If-Match that holds beats If-Unmodified-Since that does not",
        {
            "conditions.read[match+ unmodified-]": {
                "2 GET /BUCKET/k.status": ("412", "200"),
                "2 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "3 HEAD /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "2 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
                "4 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
            },
        },
    ),
    (
        "RFC 9110 13.2.2: If-Match is looked at first, and so is what failed",
        {
            "conditions.read[match- unmodified-]": {
                "2 GET /BUCKET/k./Error/Condition": ("'If-Unmodified-Since'", "'If-Match'"),
                "4 GET /BUCKET/k./Error/Condition": ("'If-Unmodified-Since'", "'If-Match'"),
            },
        },
    ),
    (
        "RFC 9110 13.1: * matches every object, a list by any of its tags, If-None-Match weakly",
        {
            "conditions.shape[match star]": {
                "2 GET /BUCKET/k.status": ("412", "200"),
                "2 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "3 HEAD /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "2 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
                "4 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
            },
            "conditions.shape[none-match star]": {
                "2 GET /BUCKET/k.status": ("200", "304"),
                "2 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
                "3 HEAD /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
            },
            "conditions.shape[none-match weak]": {
                "2 GET /BUCKET/k.status": ("200", "304"),
                "2 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
                "3 HEAD /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
            },
            "conditions.shape[none-match list]": {
                "2 GET /BUCKET/k.status": ("200", "304"),
                "2 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
                "3 HEAD /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.status": ("200", "304"),
                "4 GET /BUCKET/k.body": ("b'0123456789'", "absent"),
            },
            "conditions.shape[match list]": {
                "2 GET /BUCKET/k.status": ("412", "200"),
                "2 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "3 HEAD /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k.status": ("412", "200"),
                "4 GET /BUCKET/k./Error/Code": ("'PreconditionFailed'", "absent"),
                "2 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
                "4 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
            },
        },
    ),
    (
        "S3 takes a tag without its quotes, and moto does for GET but not for HEAD",
        {
            "conditions.shape[match without quotes]": {
                "3 HEAD /BUCKET/k.status": ("412", "200"),
            },
            "conditions.shape[none-match without quotes]": {
                "3 HEAD /BUCKET/k.status": ("200", "304"),
            },
        },
    ),
    (
        "RFC 9110 13.1.3: a date that is none is ignored, where moto fails",
        {
            "conditions.shape[modified no date]": {
                "2 GET /BUCKET/k.status": ("500", "200"),
                "2 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
                "3 HEAD /BUCKET/k.status": ("500", "200"),
                "4 GET /BUCKET/k.status": ("500", "200"),
                "4 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
            },
            "conditions.shape[unmodified no date]": {
                "2 GET /BUCKET/k.status": ("500", "200"),
                "2 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
                "3 HEAD /BUCKET/k.status": ("500", "200"),
                "4 GET /BUCKET/k.status": ("500", "200"),
                "4 GET /BUCKET/k.body": ("absent", "b'0123456789'"),
            },
        },
    ),
    (
        "RFC 9110 13.1.5: If-Range of another version makes the answer the whole object; moto ignores it",
        {
            "conditions.shape[if-range fails]": {
                "2 GET /BUCKET/k.status": ("206", "200"),
                "2 GET /BUCKET/k.body": ("b'12'", "b'0123456789'"),
                "3 HEAD /BUCKET/k.status": ("206", "200"),
                "4 GET /BUCKET/k.status": ("206", "200"),
                "4 GET /BUCKET/k.body": ("b'12'", "b'0123456789'"),
            },
            "conditions.shape[if-range date fails]": {
                "2 GET /BUCKET/k.status": ("206", "200"),
                "2 GET /BUCKET/k.body": ("b'12'", "b'0123456789'"),
                "3 HEAD /BUCKET/k.status": ("206", "200"),
                "4 GET /BUCKET/k.status": ("206", "200"),
                "4 GET /BUCKET/k.body": ("b'12'", "b'0123456789'"),
            },
            "objects.read_header[if range]": {
                "2 GET /BUCKET/k.status": ("206", "200"),
                "2 GET /BUCKET/k.body": ("b'123'", "b'0123456789'"),
                "3 GET /BUCKET/k.status": ("206", "200"),
                "3 GET /BUCKET/k.body": ("b'123'", "b'0123456789'"),
                "4 HEAD /BUCKET/k.status": ("206", "200"),
            },
        },
    ),
    (
        "S3: a key has at most 1 024 bytes; moto counts characters, or not at all",
        {
            "keys.too_long": {
                "1 put_object.status": ("200", "400"),
                "2 get_object.status": ("200", "400"),
                "2 get_object.Body": ("b'0123456789'", "absent"),
                "3 head_object.status": ("200", "400"),
                "4 delete_object.status": ("204", "400"),
                "5 copy_object.status": ("404", "400"),
                "5 copy_object.Error.Code": ("'NoSuchKey'", "'KeyTooLongError'"),
                "6 create_multipart_upload.status": ("200", "400"),
                "7 put_object.status": ("200", "400"),
                "8 get_object.status": ("200", "400"),
                "8 get_object.Body": ("b'0123456789'", "absent"),
                "9 head_object.status": ("200", "400"),
                "10 delete_object.status": ("204", "400"),
                "11 copy_object.status": ("404", "400"),
                "11 copy_object.Error.Code": ("'NoSuchKey'", "'KeyTooLongError'"),
                "12 create_multipart_upload.status": ("200", "400"),
                "1 put_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "2 get_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "3 head_object.Error.Code": ("absent", "'400'"),
                "4 delete_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "6 create_multipart_upload.Error.Code": ("absent", "'KeyTooLongError'"),
                "7 put_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "8 get_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "9 head_object.Error.Code": ("absent", "'400'"),
                "10 delete_object.Error.Code": ("absent", "'KeyTooLongError'"),
                "12 create_multipart_upload.Error.Code": ("absent", "'KeyTooLongError'"),
            },
        },
    ),
    (
        "a path that cannot be decoded names no key: InvalidURI; moto keeps something else",
        {
            "keys.not_readable[broken escape]": {
                "1 GET /BUCKET/a%zz.status": ("404", "400"),
                "1 GET /BUCKET/a%zz./Error/Code": ("'NoSuchKey'", "'InvalidURI'"),
                "2 PUT /BUCKET/a%zz.status": ("200", "400"),
                "2 PUT /BUCKET/a%zz./Error/Code": ("absent", "'InvalidURI'"),
            },
            "keys.not_readable[cut escape]": {
                "1 GET /BUCKET/a%4.status": ("404", "400"),
                "1 GET /BUCKET/a%4./Error/Code": ("'NoSuchKey'", "'InvalidURI'"),
                "2 PUT /BUCKET/a%4.status": ("200", "400"),
                "2 PUT /BUCKET/a%4./Error/Code": ("absent", "'InvalidURI'"),
            },
            "keys.not_readable[not UTF-8]": {
                "1 GET /BUCKET/a%ff%fe.status": ("404", "400"),
                "1 GET /BUCKET/a%ff%fe./Error/Code": ("'NoSuchKey'", "'InvalidURI'"),
                "2 PUT /BUCKET/a%ff%fe.status": ("200", "400"),
                "2 PUT /BUCKET/a%ff%fe./Error/Code": ("absent", "'InvalidURI'"),
            },
        },
    ),
    (
        "S3: at most 1 000 keys in one request",
        {
            "deletes.a_thousand_and_one": {
                "1 delete_objects.status": ("200", "400"),
                "1 delete_objects.Error.Code": ("absent", "'MalformedXML'"),
            },
        },
    ),
    (
        "what is no list of keys is MalformedXML, where moto fails",
        {
            "deletes.document[nothing]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
            "deletes.document[no XML]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
            "deletes.document[broken XML]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
            "deletes.document[another root]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
            "deletes.document[no objects]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
            "deletes.document[no key]": {
                "3 POST /BUCKET?delete.status": ("500", "400"),
                "3 POST /BUCKET?delete./Error/Code": ("absent", "'MalformedXML'"),
            },
        },
    ),
    (
        "S3: max-keys is a number of 32 bits and not negative; moto fails, or takes what it can",
        {
            "listings.query[max-keys of letters]": {
                "1 GET /BUCKET?list-type=2&max-keys=many.status": ("500", "400"),
                "2 GET /BUCKET?list-type=2&max-keys=many.status": ("500", "400"),
                "1 GET /BUCKET?list-type=2&max-keys=many./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?list-type=2&max-keys=many./Error/Code": ("absent", "'InvalidArgument'"),
            },
            "listings.query[negative max-keys]": {
                "1 GET /BUCKET?list-type=2&max-keys=-1.status": ("200", "400"),
                "2 GET /BUCKET?list-type=2&max-keys=-1.status": ("200", "400"),
                "1 GET /BUCKET?list-type=2&max-keys=-1./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?list-type=2&max-keys=-1./Error/Code": ("absent", "'InvalidArgument'"),
            },
            "listings.query[huge max-keys]": {
                "1 GET /BUCKET?list-type=2&max-keys=99999999999999999999.status": ("200", "400"),
                "2 GET /BUCKET?list-type=2&max-keys=99999999999999999999.status": ("200", "400"),
                "1 GET /BUCKET?list-type=2&max-keys=99999999999999999999./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?list-type=2&max-keys=99999999999999999999./Error/Code": ("absent", "'InvalidArgument'"),
            },
            "listings.query[v1 max-keys of letters]": {
                "1 GET /BUCKET?max-keys=many.status": ("500", "400"),
                "2 GET /BUCKET?max-keys=many.status": ("500", "400"),
                "1 GET /BUCKET?max-keys=many./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?max-keys=many./Error/Code": ("absent", "'InvalidArgument'"),
            },
            "listings.query[v1 negative max-keys]": {
                "1 GET /BUCKET?max-keys=-1.status": ("200", "400"),
                "2 GET /BUCKET?max-keys=-1.status": ("200", "400"),
                "1 GET /BUCKET?max-keys=-1./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?max-keys=-1./Error/Code": ("absent", "'InvalidArgument'"),
            },
        },
    ),
    (
        "S3: an empty max-keys is none, where moto fails",
        {
            "listings.query[empty max-keys]": {
                "1 GET /BUCKET?list-type=2&max-keys=.status": ("500", "200"),
                "2 GET /BUCKET?list-type=2&max-keys=.status": ("500", "200"),
            },
        },
    ),
    (
        "S3: the only encoding is url; moto takes any",
        {
            "listings.query[unknown encoding]": {
                "1 GET /BUCKET?list-type=2&encoding-type=base64.status": ("200", "400"),
                "2 GET /BUCKET?list-type=2&encoding-type=base64.status": ("200", "400"),
                "1 GET /BUCKET?list-type=2&encoding-type=base64./Error/Code": ("absent", "'InvalidArgument'"),
                "2 GET /BUCKET?list-type=2&encoding-type=base64./Error/Code": ("absent", "'InvalidArgument'"),
            },
        },
    ),
    (
        "S3 names the argument that is wrong",
        {
            "listings.query[empty token]": {
                "1 GET /BUCKET?list-type=2&continuation-token=./Error/ArgumentName": ("absent", "'continuation-token'"),
                "2 GET /BUCKET?list-type=2&continuation-token=./Error/ArgumentName": ("absent", "'continuation-token'"),
            },
        },
    ),
    (
        "moto fails for HEAD of a part that is not there, and gives the whole object for GET",
        {
            "multipart.two_parts": {
                "14 get_object.status": ("200", "503"),
                "14 get_object.Body": ("5243880 bytes f5870481c599d753", "absent"),
                "15 head_object.status": ("500", "503"),
                "15 head_object.Error.Code": ("'500'", "'503'"),
                "14 get_object.Error.Code": ("absent", "'ServiceUnavailable'"),
            },
        },
    ),
    (
        "moto's HEAD leaves off what kind of checksum it is, its GET does not; kos says the same for both",
        {
            "multipart.checksum[CRC32]": {
                "7 head_object.ChecksumCRC32": ("'dYPmEQ=='", "'dYPmEQ==-2'"),
                "7 head_object.header x-amz-checksum-crc32": ("'dYPmEQ=='", "'dYPmEQ==-2'"),
                "7 head_object.ChecksumType": ("absent", "'COMPOSITE'"),
                "7 head_object.header x-amz-checksum-type": ("absent", "'COMPOSITE'"),
            },
            "multipart.checksum[CRC32C]": {
                "7 head_object.ChecksumCRC32C": ("'dYPmEQ=='", "'dYPmEQ==-2'"),
                "7 head_object.header x-amz-checksum-crc32c": ("'dYPmEQ=='", "'dYPmEQ==-2'"),
                "7 head_object.ChecksumType": ("absent", "'COMPOSITE'"),
                "7 head_object.header x-amz-checksum-type": ("absent", "'COMPOSITE'"),
            },
            "multipart.checksum[CRC64NVME]": {
                "7 head_object.ChecksumType": ("absent", "'FULL_OBJECT'"),
                "7 head_object.header x-amz-checksum-type": ("absent", "'FULL_OBJECT'"),
            },
            "multipart.checksum[SHA1]": {
                "7 head_object.ChecksumSHA1": ("'6tQrb5UfMOI7nbrrtGcqdpRvM6M='", "'6tQrb5UfMOI7nbrrtGcqdpRvM6M=-2'"),
                "7 head_object.header x-amz-checksum-sha1": (
                    "'6tQrb5UfMOI7nbrrtGcqdpRvM6M='",
                    "'6tQrb5UfMOI7nbrrtGcqdpRvM6M=-2'",
                ),
                "7 head_object.ChecksumType": ("absent", "'COMPOSITE'"),
                "7 head_object.header x-amz-checksum-type": ("absent", "'COMPOSITE'"),
            },
            "multipart.checksum[SHA256]": {
                "7 head_object.ChecksumSHA256": (
                    "'tfmzeY9XeH2OXmxrtS4iDWlNIKUTAFv0/csHs2lsoD8='",
                    "'tfmzeY9XeH2OXmxrtS4iDWlNIKUTAFv0/csHs2lsoD8=-2'",
                ),
                "7 head_object.header x-amz-checksum-sha256": (
                    "'tfmzeY9XeH2OXmxrtS4iDWlNIKUTAFv0/csHs2lsoD8='",
                    "'tfmzeY9XeH2OXmxrtS4iDWlNIKUTAFv0/csHs2lsoD8=-2'",
                ),
                "7 head_object.ChecksumType": ("absent", "'COMPOSITE'"),
                "7 head_object.header x-amz-checksum-type": ("absent", "'COMPOSITE'"),
            },
            "multipart.checksum_type[COMPOSITE]": {
                "5 head_object.ChecksumCRC32": ("'TlsbHw=='", "'TlsbHw==-1'"),
                "5 head_object.header x-amz-checksum-crc32": ("'TlsbHw=='", "'TlsbHw==-1'"),
            },
        },
    ),
    (
        "RFC 9110 14.2: a Range that is not understood is ignored; moto fails, refuses or guesses",
        {
            "objects.range_of_ten_bytes[no unit]": {
                "2 get_object.status": ("500", "200"),
                "2 get_object.Error.Code": ("'500'", "absent"),
                "3 head_object.status": ("500", "200"),
                "3 head_object.Error.Code": ("'500'", "absent"),
                "5 get_object.status": ("500", "200"),
                "5 get_object.Error.Code": ("'500'", "absent"),
                "2 get_object.Body": ("absent", "b'0123456789'"),
                "5 get_object.Body": ("absent", "b'0123456789'"),
            },
            "objects.range_of_ten_bytes[foreign unit]": {
                "2 get_object.status": ("206", "200"),
                "2 get_object.Body": ("b'012345'", "b'0123456789'"),
                "3 head_object.status": ("206", "200"),
                "5 get_object.status": ("206", "200"),
                "5 get_object.Body": ("b'012345'", "b'0123456789'"),
            },
            "objects.range_of_nothing[backwards]": {
                "2 get_object.status": ("416", "200"),
                "2 get_object.Error.Code": ("'InvalidRange'", "absent"),
                "3 head_object.status": ("416", "200"),
                "3 head_object.Error.Code": ("'416'", "absent"),
            },
            "objects.range_of_nothing[no unit]": {
                "2 get_object.status": ("500", "200"),
                "2 get_object.Error.Code": ("'500'", "absent"),
                "3 head_object.status": ("500", "200"),
                "3 head_object.Error.Code": ("'500'", "absent"),
            },
            "objects.range_of_nothing[foreign unit]": {
                "2 get_object.status": ("416", "200"),
                "2 get_object.Error.Code": ("'InvalidRange'", "absent"),
                "3 head_object.status": ("416", "200"),
                "3 head_object.Error.Code": ("'416'", "absent"),
            },
        },
    ),
    (
        "a number beyond 64 bits is no offset, so the Range is not understood and ignored",
        {
            "objects.range_of_ten_bytes[huge]": {
                "2 get_object.status": ("206", "200"),
                "3 head_object.status": ("206", "200"),
                "5 get_object.status": ("206", "200"),
            },
            "objects.range_of_nothing[huge]": {
                "2 get_object.status": ("416", "200"),
                "2 get_object.Error.Code": ("'InvalidRange'", "absent"),
                "3 head_object.status": ("416", "200"),
                "3 head_object.Error.Code": ("'416'", "absent"),
            },
        },
    ),
    (
        "the range is told as it was understood",
        {
            "objects.range_of_nothing[capital unit]": {
                "2 get_object.Error.RangeRequested": ("'Bytes=0-5'", "'bytes=0-5'"),
            },
            "objects.range_of_nothing[blank]": {
                "2 get_object.Error.RangeRequested": ("'bytes= 0-5'", "'bytes=0-5'"),
            },
            "objects.range_of_nothing[blanks inside]": {
                "2 get_object.Error.RangeRequested": ("'bytes=0 - 5'", "'bytes=0-5'"),
            },
        },
    ),
    (
        "S3: HeadObject takes the response-* parameters as GetObject does; moto does not",
        {
            "objects.response_override[content type]": {
                "4 head_object.ContentType": ("'text/plain'", "'text/x-other'"),
                "4 head_object.header content-type": ("'text/plain'", "'text/x-other'"),
            },
            "objects.response_override[language]": {
                "4 head_object.ContentLanguage": ("'de'", "'eo'"),
                "4 head_object.header content-language": ("'de'", "'eo'"),
            },
            "objects.response_override[expires]": {
                "4 head_object.Expires": ("absent", "2031-05-04T03:02:01+00:00"),
                "4 head_object.ExpiresString": ("absent", "'Sun, 04 May 2031 03:02:01 GMT'"),
                "4 head_object.header expires": ("absent", "'Sun, 04 May 2031 03:02:01 GMT'"),
            },
            "objects.response_override[cache control]": {
                "4 head_object.CacheControl": ("'private'", "'no-cache'"),
                "4 head_object.header cache-control": ("'private'", "'no-cache'"),
            },
            "objects.response_override[disposition]": {
                "4 head_object.ContentDisposition": ("absent", "'attachment; filename=\"x y\"'"),
                "4 head_object.header content-disposition": ("absent", "'attachment; filename=\"x y\"'"),
            },
            "objects.response_override[encoding]": {
                "4 head_object.ContentEncoding": ("absent", "'x-other'"),
                "4 head_object.header content-encoding": ("absent", "'x-other'"),
            },
            "objects.response_override[empty]": {
                "4 head_object.ContentType": ("'text/plain'", "''"),
                "4 head_object.header content-type": ("'text/plain'", "''"),
            },
            "objects.response_override[several]": {
                "4 head_object.CacheControl": ("'private'", "'no-store'"),
                "4 head_object.ContentType": ("'text/plain'", "'a/b'"),
                "4 head_object.header content-type": ("'text/plain'", "'a/b'"),
                "4 head_object.header cache-control": ("'private'", "'no-store'"),
            },
            "objects.query[override with blanks]": {
                "4 HEAD /BUCKET/k?response-content-type=text%2Fa%20b.header content-type": (
                    "'binary/octet-stream'",
                    "'text/a b'",
                ),
            },
            "objects.query[override with plus]": {
                "4 HEAD /BUCKET/k?response-content-disposition=a%2Bb.header content-disposition": ("absent", "'a+b'"),
            },
        },
    ),
    (
        "S3: an object that is not of parts has the part 1 and no other, and no part is 0; an empty one has no range",
        {
            "objects.part_number_of_a_whole_object": {
                "4 get_object.Error.Code": ("'416'", "'InvalidPartNumber'"),
                "4 get_object.header content-type": ("'text/html; charset=utf-8'", "'XML'"),
                "4 get_object.header content-length": ("'162'", "absent"),
                "6 get_object.status": ("200", "400"),
                "6 get_object.Body": ("b'0123456789'", "absent"),
                "7 head_object.status": ("200", "400"),
                "9 get_object.status": ("206", "200"),
                "10 head_object.status": ("206", "200"),
                "4 get_object.Error.PartNumberRequested": ("absent", "'2'"),
                "4 get_object.Error.ActualPartCount": ("absent", "'1'"),
                "6 get_object.Error.Code": ("absent", "'InvalidArgument'"),
                "7 head_object.Error.Code": ("absent", "'400'"),
            },
        },
    ),
    (
        "moto cannot HEAD the null version that it GETs",
        {
            "versions.a_version_in_a_bucket_without": {
                "3 head_object.status": ("400", "200"),
                "3 head_object.Error.Code": ("'400'", "absent"),
            },
        },
    ),
)

DIFFERENCES: Final = {case: Difference(reason, paths) for reason, cases in _TABLE for case, paths in cases.items()}
