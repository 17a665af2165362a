"""Whether an object is what a completion would make."""

from __future__ import annotations

import hashlib
import re

import pytest

from kos.s3 import completion
from kos.s3.checksums import ALGORITHMS, encoded_length
from kos.s3.completion import multipart_etag, result, says_no_such_upload

NS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
A, B = hashlib.md5(b"a" * 9).hexdigest(), hashlib.md5(b"b" * 5).hexdigest()
TOGETHER = hashlib.md5(bytes.fromhex(A) + bytes.fromhex(B)).hexdigest()


def part(number: object, etag: str, more: str = "") -> str:
    return f"<Part>\n <PartNumber>{number}</PartNumber><ETag>{etag}</ETag>{more}</Part>"


def request(*parts: str, attributes: str = NS) -> bytes:
    return f"<CompleteMultipartUpload {attributes}>{''.join(parts)}</CompleteMultipartUpload>".encode()


def test_the_etag_that_the_parts_make() -> None:
    checksum = "<ChecksumCRC32>AAAAAA==</ChecksumCRC32>"
    for document in (
        request(part(1, A), part(2, B)),
        request(part(1, f"&quot;{A}&quot;", checksum), part(9999, f'"{B.upper()}"', checksum)),
        request(part(3, A), part(10000, B), attributes=""),
        b'<?xml version="1.0" encoding="UTF-8"?>\n' + request(part(" 1 ", A), part(2, f"\n{B}\n")),
    ):
        assert multipart_etag(document) == f'"{TOGETHER}-2"'
    assert multipart_etag(request(part(7, A))) == f'"{hashlib.md5(bytes.fromhex(A)).hexdigest()}-1"'


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<",
        request(),
        request(part(2, A), part(1, B)),
        request(part(1, A), part(1, B)),
        request(part(0, A)),
        request(part("1x", A)),
        request(part(1, A + "-3")),
        request(part(1, A[:-1])),
        request(part(1, "opaque")),
        request(part(1, A, f"<ETag>{B}</ETag>")),
        request(f"<Part><ETag>{A}</ETag></Part>"),
        request(f"<Other><PartNumber>1</PartNumber><ETag>{A}</ETag></Other>"),
        request(part(1, A)).replace(b"CompleteMultipartUpload", b"Delete"),
        b"<!DOCTYPE x>" + request(part(1, A)),
    ],
)
def test_what_cannot_be_told(document: bytes) -> None:
    assert multipart_etag(document) is None


def test_ten_thousand_parts_with_checksums_and_no_more() -> None:
    value = "A" * encoded_length("sha512")
    more = f"\n    <ChecksumSHA512>{value}</ChecksumSHA512>\n"
    parts = [part(number, f"&quot;{A}&quot;", more) for number in range(1, 10_002)]
    largest = request(*parts[:-1])
    assert len(largest) <= completion.REQUEST_MAX_BYTES
    assert multipart_etag(largest) == f'"{hashlib.md5(bytes.fromhex(A) * 10_000).hexdigest()}-10000"'
    assert multipart_etag(request(*parts)) is None


def test_a_part_with_every_checksum_still_fits() -> None:
    every = "".join(f"<Checksum{n}>{'A' * encoded_length(n)}</Checksum{n}>" for n in ALGORITHMS)
    assert 10_000 * len(part(10_000, f"&quot;{A}&quot;", every)) <= completion.REQUEST_MAX_BYTES


def test_no_such_upload() -> None:
    error = b'<?xml version="1.0"?><Error><Code>NoSuchUpload</Code><Message>m</Message></Error>'
    assert says_no_such_upload(404, error) and says_no_such_upload(200, b" \n " + error)
    assert not says_no_such_upload(400, error)
    for other in (b"", b"NoSuchUpload", error.replace(b"NoSuchUpload", b"NoSuchBucket"), error.replace(b"Error", b"E")):
        assert not says_no_such_upload(404, other)


def test_the_result() -> None:
    headers = {
        "etag": '"e-2"',
        "x-amz-checksum-crc64nvme": "AAAAAAAAAAA=",
        "x-amz-checksum-type": "FULL_OBJECT",
        "content-length": "7",
    }
    document = result("http://h/b/k", "b", "k&<é", headers).decode()
    found = dict(re.findall(r"<(\w+)>([^<]*)</", document))
    assert found == {
        "Location": "http://h/b/k",
        "Bucket": "b",
        "Key": "k&amp;&lt;é",
        "ETag": "&quot;e-2&quot;",
        "ChecksumCRC64NVME": "AAAAAAAAAAA=",
        "ChecksumType": "FULL_OBJECT",
    }
