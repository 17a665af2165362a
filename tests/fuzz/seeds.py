"""Samples that fuzzing begins with: one of each shape that a parser knows.

Owns: the samples. What a run of the fuzzer found goes beside them, into tests/fuzz/found/TARGET/, one file each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOUND: Final = Path(__file__).parent / "found"

_HEADS: Final = (
    b"GET /b/k%20l?x=1&y HTTP/1.1\r\nHost: h:9000\r\nRange: bytes=0-9\r\nUser-Agent: a b\r\n\r\n",
    b"HEAD // HTTP/1.1\r\nhost: b.s3.test\r\nconnection: keep-alive\r\ncontent-length: 0\r\nX-Amz-Date: 1\r\n\r\n",
    b"GET /b/k?versionId=1&partNumber=2&response-content-type=a%2Fb&x-id=GetObject HTTP/1.1\r\nHost: h\r\n"
    b'If-Match: "0123", W/"x"\r\nIf-None-Match: *\r\nIf-Modified-Since: Fri, 24 May 2013 00:00:00 GMT\r\n'
    b"If-Range: Friday, 24-May-13 00:00:00 GMT\r\nRange: bytes=-5\r\nx-amz-checksum-mode: ENABLED\r\n\r\n",
    b"GET /?Action HTTP/1.1\r\nHost: h\r\nIf-Unmodified-Since: Fri May 24 00:00:00 2013\r\n\r\n",
    b"GET /b?list-type=2&prefix=a%2F&delimiter=%2F&max-keys=7&encoding-type=url&start-after=b&continuation-token=t"
    b"&fetch-owner=true HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /b/?marker=m&prefix= HTTP/1.1\r\nHost: h\r\n\r\n",
    b"PUT /b/k?partNumber=1&uploadId=u HTTP/1.1\r\nHost: h\r\nx-amz-copy-source: /b/k\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /b?delete HTTP/1.1\r\nHost: h\r\nContent-MD5: kAFQmDzST7DWlj99KOF/cg==\r\nContent-Length: 3\r\n\r\nabc",
    b"PUT /b/k HTTP/1.1\r\nHost: h\r\nx-amz-checksum-crc32: NSRBwg==\r\nx-amz-sdk-checksum-algorithm: CRC32\r\n"
    b"Content-Encoding: aws-chunked, gzip\r\nx-amz-trailer: x-amz-checksum-crc32c\r\n"
    b"x-amz-decoded-content-length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"GET /test.txt HTTP/1.1\r\nHost: examplebucket.s3.amazonaws.com\r\nx-amz-date: 20130524T000000Z\r\n"
    b"x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\r\n"
    b"Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
    b"SignedHeaders=host;x-amz-content-sha256;x-amz-date,Signature=" + b"0" * 64 + b"\r\n\r\n",
    b"GET /test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3"
    b"%2Faws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature="
    + b"0" * 64
    + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /b/k?AWSAccessKeyId=k&Expires=1369353700&Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /b/k HTTP/1.1\r\nHost: h\r\nAuthorization: AWS k:NpgCjnDzrM+WFzoENXmpNDUsSn8=\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 0\r\n\r\n",
    b"OPTIONS /b/k HTTP/1.1\r\nHost: h\r\nOrigin: http://a\r\nAccess-Control-Request-Method: GET\r\n\r\n",
    b"GET http://h/b/k?a=%zz#f HTTP/1.0\r\nConnection: close\r\n\r\n",
)
_ORIGIN: Final = (
    b'GET / HTTP/1.1\r\nETag: "0123-2"\r\nContent-Length: 10\r\nLast-Modified: Fri, 24 May 2013 00:00:00 GMT\r\n'
    b"x-amz-checksum-crc32: NSRBwg==-2\r\nx-amz-checksum-type: COMPOSITE\r\nContent-Range: bytes 0-9/100\r\n"
    b"Cache-Control: no-store\r\nx-amz-meta-a: b\r\n\r\n",
)
_CHUNKED: Final = (
    b"\x00\x05\x035;chunk-signature=" + b"0" * 64 + b"\r\nhello\r\n0;chunk-signature=" + b"0" * 64 + b"\r\n\r\n",
    b"\x02\x05\x015\r\nhello\r\n0\r\nx-amz-checksum-crc32:NSRBwg==\r\n\r\n",
    b"\x01\xff\x07"
    b"0;chunk-signature=" + b"0" * 64 + b"\r\nx-amz-checksum-crc32:NSRBwg==\r\n"
    b"x-amz-trailer-signature:" + b"0" * 64 + b"\r\n\r\n",
)
_DOCUMENTS: Final = (
    b'<?xml version="1.0" encoding="UTF-8"?><Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Quiet>true</Quiet>'
    b"<Object><Key>a&amp;b</Key><VersionId>v</VersionId></Object><Object><Key>c</Key><ETag>e</ETag></Object></Delete>",
    b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>&quot;"
    + b"0a" * 16
    + b"&quot;</ETag><ChecksumCRC32>x</ChecksumCRC32>"
    b"</Part></CompleteMultipartUpload>",
    b'<!DOCTYPE a [<!ENTITY b "cccccccccc">]><a>&b;&b;</a>',
    b'<?xml version="1.0" encoding="UTF-16"?><a/>',
    "<a>\u00e9&#x1;&#10;</a>".encode(),
    b"<a><![CDATA[<b>]]></a>" + b"<a>" * 20,
)
_CONNECTION: Final = tuple(
    bytes([step]) + sample
    for step, sample in (
        *((255, sample) for sample in _HEADS),
        (7, _HEADS[0]),
        (1, _HEADS[6]),
        (255, b"GET /fast HTTP/1.1\r\nHost: h\r\n\r\n" * 3),
        (9, b"GET /fast HTTP/1.1\r\nHost: h\r\n\r\nGET /slow HTTP/1.1\r\nHost: h\r\n\r\n"),
        (255, b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nabGET /fast HTTP/1.1\r\nHost: h\r\n\r\n"),
        (255, b"PUT /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        (255, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40)),
        (
            255,
            b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ),
    )
)

SEEDS: Final[dict[str, tuple[bytes, ...]]] = {
    "origin_head": _ORIGIN,
    "chunks": _CHUNKED,
    "document": _DOCUMENTS,
    "connection": _CONNECTION,
}


def seeds(target: str) -> list[bytes]:
    """The samples of a target, and what was found by fuzzing it."""
    found = sorted((FOUND / target).glob("*")) if (FOUND / target).is_dir() else []
    return [*SEEDS.get(target, _HEADS), *(path.read_bytes() for path in found)]
