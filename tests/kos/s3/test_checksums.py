"""Every promise about a body: kept, broken, unreadable, and promised twice."""

from __future__ import annotations

import base64
import hashlib

import pytest
from awscrt.checksums import XXHash
from botocore.session import Session

from kos.errors import S3Error
from kos.s3.checksums import ALGORITHMS, HEADER_PREFIX, BodyCheck, encoded_length
from kos.s3.sigv4 import Payload

# The check value of each CRC is published for exactly this text.
BODY = b"123456789"
VALUES = {
    "crc32": base64.b64encode(bytes.fromhex("cbf43926")).decode(),
    "crc32c": base64.b64encode(bytes.fromhex("e3069283")).decode(),
    "crc64nvme": base64.b64encode(bytes.fromhex("ae8b14860a799888")).decode(),
    "sha1": base64.b64encode(hashlib.sha1(BODY).digest()).decode(),
    "sha256": base64.b64encode(hashlib.sha256(BODY).digest()).decode(),
    "sha512": base64.b64encode(hashlib.sha512(BODY).digest()).decode(),
    "md5": base64.b64encode(hashlib.md5(BODY).digest()).decode(),
    # From the CRT, the library that AWS's own SDKs compute them with; kos does with another one.
    "xxhash64": base64.b64encode(XXHash.compute_xxhash64(BODY)).decode(),
    "xxhash3": base64.b64encode(XXHash.compute_xxhash3_64(BODY)).decode(),
    "xxhash128": base64.b64encode(XXHash.compute_xxhash3_128(BODY)).decode(),
}
MD5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()
HEX = hashlib.sha256(BODY).hexdigest()


def run(check: BodyCheck, body: bytes = BODY, trailers: dict[str, str] | None = None) -> BodyCheck:
    for start in range(0, len(body), 4):
        check.update(body[start : start + 4])
    check.finish(trailers)
    return check


def error_of(
    headers: dict[str, str],
    payload: Payload = Payload.UNSIGNED,
    payload_sha256: str | None = None,
    length: int | None = None,
    trailers: dict[str, str] | None = None,
    body: bytes = BODY,
) -> S3Error:
    with pytest.raises(S3Error) as caught:
        run(BodyCheck(headers, payload, payload_sha256, length), body, trailers)
    return caught.value


def test_every_algorithm_that_s3_has_is_known() -> None:
    model = Session().get_service_model("s3")
    assert {name.lower() for name in model.shape_for("ChecksumAlgorithm").enum} == ALGORITHMS.keys() == VALUES.keys()


def test_an_algorithm_of_tomorrow_is_left_to_the_origin_unless_it_comes_as_a_trailer() -> None:
    assert run(BodyCheck({"x-amz-checksum-blake3": "AAAA"}, Payload.UNSIGNED, None, None)).computed == {}
    announced = {"x-amz-trailer": "x-amz-checksum-blake3"}
    assert error_of(announced, Payload.STREAMING_UNSIGNED_TRAILER).code == "InvalidRequest"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checksum_in_a_header(algorithm: str) -> None:
    name = HEADER_PREFIX + algorithm
    check = run(BodyCheck({name: VALUES[algorithm]}, Payload.UNSIGNED, None, len(BODY)))
    assert check.algorithm == algorithm
    assert check.computed == {name: VALUES[algorithm]}
    assert len(VALUES[algorithm]) == encoded_length(algorithm)
    assert error_of({name: VALUES[algorithm]}, body=b"12345678x").code == "BadDigest"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", [Payload.STREAMING_SIGNED_TRAILER, Payload.STREAMING_UNSIGNED_TRAILER])
def test_a_checksum_in_a_trailer(algorithm: str, form: Payload) -> None:
    name = HEADER_PREFIX + algorithm
    headers = {"x-amz-trailer": name, "x-amz-sdk-checksum-algorithm": algorithm.upper()}
    check = run(BodyCheck(headers, form, None, None), trailers={name: VALUES[algorithm]})
    assert check.computed == {name: VALUES[algorithm]}
    assert error_of(headers, form, trailers={name: VALUES[algorithm]}, body=b"x").code == "BadDigest"
    assert error_of(headers, form, trailers={name: "!"}).code == "InvalidRequest"
    assert error_of(headers, form, trailers={}).code == "MalformedTrailerError"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_unreadable_checksum_is_refused_before_the_body(algorithm: str) -> None:
    name = HEADER_PREFIX + algorithm
    for text in ("", "é", "====", VALUES[algorithm][:-1], VALUES[algorithm] + "AAAA", VALUES[algorithm] + "-3"):
        with pytest.raises(S3Error, match=f"InvalidRequest: Value for {name} header is invalid."):
            BodyCheck({name: text}, Payload.UNSIGNED, None, None)


def test_more_than_one_checksum_is_refused() -> None:
    two = {"x-amz-checksum-crc32": VALUES["crc32"], "x-amz-checksum-sha1": VALUES["sha1"]}
    assert error_of(two).code == "InvalidRequest"
    both = {"x-amz-checksum-crc32": VALUES["crc32"], "x-amz-trailer": "x-amz-checksum-crc32"}
    assert error_of(both, Payload.STREAMING_UNSIGNED_TRAILER).code == "InvalidRequest"


def test_trailers_that_could_never_be_checked_are_refused() -> None:
    for headers, form in (
        ({"x-amz-trailer": "x-amz-checksum-sha10"}, Payload.STREAMING_UNSIGNED_TRAILER),
        ({"x-amz-trailer": "x-amz-meta-a"}, Payload.STREAMING_SIGNED_TRAILER),
        ({"x-amz-trailer": "x-amz-checksum-crc32"}, Payload.UNSIGNED),
        ({"x-amz-trailer": "x-amz-checksum-crc32"}, Payload.STREAMING_SIGNED),
    ):
        error = error_of(headers, form)
        assert (error.code, error.message) == (
            "InvalidRequest",
            "The value specified in the x-amz-trailer header is not supported",
        )


def test_headers_about_the_kind_of_checksum_are_no_checksums() -> None:
    headers = {
        "x-amz-checksum-algorithm": "CRC32",
        "x-amz-checksum-type": "COMPOSITE",
        "x-amz-checksum-mode": "ENABLED",
        "x-amz-sdk-checksum-algorithm": "CRC32C",
    }
    check = run(BodyCheck(headers, Payload.UNSIGNED, None, None))
    assert check.algorithm is None and check.computed == {}


def test_checksums_of_an_object_are_not_checked_against_the_list_of_its_parts() -> None:
    headers = {"x-amz-checksum-crc32": "AAAAAA==-3", "x-amz-checksum-sha1": VALUES["sha1"]}
    assert run(BodyCheck(headers, Payload.UNSIGNED, None, None, object_checksums=True)).computed == {}
    ends = headers | {"x-amz-trailer": "x-amz-checksum-crc32"}
    form = Payload.STREAMING_UNSIGNED_TRAILER
    trailers = {"x-amz-checksum-crc32": VALUES["crc32"]}
    assert run(BodyCheck(ends, form, None, None, object_checksums=True), trailers=trailers).computed == trailers
    with pytest.raises(S3Error, match="BadDigest"):
        run(BodyCheck(ends, form, None, None, object_checksums=True), b"other", trailers)


def test_content_md5() -> None:
    run(BodyCheck({"content-md5": MD5}, Payload.UNSIGNED, None, None))
    assert error_of({"content-md5": MD5}, body=b"x").code == "BadDigest"
    for text in ("", "AAAA", "not base64", MD5 + "=", MD5.rstrip("=")):
        assert error_of({"content-md5": text}).code == "InvalidDigest"


def test_the_hash_of_a_signed_payload() -> None:
    run(BodyCheck({}, Payload.SIGNED, HEX, None))
    error = error_of({}, Payload.SIGNED, HEX, body=b"x")
    assert error.code == "XAmzContentSHA256Mismatch"
    assert error.extra["ClientComputedContentSHA256"] == HEX
    assert error.extra["S3ComputedContentSHA256"] == hashlib.sha256(b"x").hexdigest()


def test_all_promises_at_once_are_computed_once() -> None:
    headers = {"content-md5": MD5, "x-amz-checksum-sha256": VALUES["sha256"]}
    check = run(BodyCheck(headers, Payload.SIGNED, HEX, len(BODY), also=("crc64nvme",)))
    assert check.computed == {
        "x-amz-checksum-sha256": VALUES["sha256"],
        "x-amz-checksum-crc64nvme": VALUES["crc64nvme"],
    }


def test_a_body_of_another_length() -> None:
    check = BodyCheck({}, Payload.UNSIGNED, None, 5)
    check.update(b"12345")
    with pytest.raises(S3Error, match="IncompleteBody"):
        check.update(b"6")
    error = error_of({}, length=10)
    assert error.code == "IncompleteBody"
    assert error.extra == {"NumberBytesExpected": "10", "NumberBytesProvided": "9"}
    run(BodyCheck({}, Payload.UNSIGNED, None, 0), b"")
