"""CompleteMultipartUpload said twice: what the second one has to know to find out that the first one worked.

Owns: the ETag that the parts of a request make together, what a "no such upload" looks like, and the result that a
client would have had. Does not own: when to look (kosproxy.handlers.write); the request itself, which goes on byte for
byte, because the origin is the one to judge it.

S3 answers a completion that is repeated as it answered the first one. Other stores forget the upload as soon as it is an
object, and then say NoSuchUpload to a client whose first answer got lost on the way, although all went well.

Invariant: a request is only taken for fulfilled where the object's ETag is the one that exactly these parts make. What
cannot be worked out (ETags that are no MD5s, parts out of order, no XML) is None: nobody knows.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html;
userguide/checking-object-integrity-upload.html (ETag of a multipart object: MD5 over the parts' MD5s, "-", their number).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from kos.s3 import xml
from kos.s3.checksums import HEADERS

PARTS_MAX: Final = 10_000
#: A part with its SHA-512 and line breaks takes 300 bytes, with every checksum that S3 knows 800: 8 MB.
REQUEST_MAX_BYTES: Final = 8 * 1024 * 1024
#: The root; for each part itself, its number, its ETag and a checksum or two of the ten.
_ELEMENTS_MAX: Final = 1 + 5 * PARTS_MAX
_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
_MD5: Final = re.compile(r"[0-9a-fA-F]{32}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
#: An error document of an origin; more is none.
_ERROR_MAX_BYTES: Final = 64 * 1024


def multipart_etag(document: bytes) -> str | None:
    """The ETag, with its quotes, of the object that this request makes; None when that cannot be told.

    Takes up to 100 ms for 10 000 parts: not for the loop.
    """
    try:
        root = xml.read(document, REQUEST_MAX_BYTES, _ELEMENTS_MAX)
    except xml.UnreadableXML:
        return None
    if root.name != "CompleteMultipartUpload" or not 1 <= len(root.children) <= PARTS_MAX:
        return None
    joined = hashlib.md5(usedforsecurity=False)
    previous = 0
    for part in root.children:
        named = {child.name: child.text.strip() for child in part.children}
        etag, number = named.get("ETag", "").strip('"'), named.get("PartNumber", "")
        if part.name != "Part" or not _MD5.fullmatch(etag) or not _NUMBER.fullmatch(number):
            return None
        if len(named) != len(part.children) or int(number) <= previous:
            return None
        previous = int(number)
        joined.update(bytes.fromhex(etag))
    return f'"{joined.hexdigest()}-{len(root.children)}"'


def says_no_such_upload(status: int, document: bytes) -> bool:
    """Whether an origin's answer is "there is no such upload", said by its status or after a 200 that came too early."""
    if status not in (200, 404):
        return False
    try:
        root = xml.read(document, _ERROR_MAX_BYTES)
    except xml.UnreadableXML:
        return False
    return root.name == "Error" and any(each.name == "Code" and each.text == "NoSuchUpload" for each in root.children)


def result(location: str, bucket: str, key: str, headers: Mapping[str, str]) -> bytes:
    """The result of a completion, from a HEAD of the object. headers: of its answer, found by lower-case names."""
    elements = {"Location": location, "Bucket": bucket, "Key": key, "ETag": headers["etag"]}
    for name, algorithm in HEADERS.items():
        if name in headers:
            elements["Checksum" + algorithm.upper()] = headers[name]
    if "x-amz-checksum-type" in headers:
        elements["ChecksumType"] = headers["x-amz-checksum-type"]
    text = "".join(f"<{name}>{xml.escape(value)}</{name}>" for name, value in elements.items())
    root = "CompleteMultipartUploadResult"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{_NAMESPACE}">{text}</{root}>'.encode()
