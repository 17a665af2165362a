"""Reads of objects, versions and parts with conditions and ranges at random: the node answers as its origin does, cold and
warm."""

from __future__ import annotations

import http.client
import random
import re
from email.utils import formatdate
from urllib.parse import quote

import pytest

from tests.fakes.http import exchange, signed
from tests.fakes.node import Node
from tests.fakes.origin import FakeOrigin

KEYS = ("plain", "a//b", "../z", "a/./b", "é +%2F", "k\0n", "\0k", "a\r", "empty", "parts", "parts", "nowhere")
PARTS = (1_048_577, 700_000, 51_423)
#: What must be the same; what is not here is of one answer, or is kos' own.
SAME = (
    "content-length", "content-range", "content-type", "etag", "last-modified", "x-amz-checksum-crc32",
    "x-amz-checksum-type", "x-amz-mp-parts-count", "x-amz-version-id",
)  # fmt: skip
RANGES = ("0-", "0-0", "5-9", "-5", "-0", "99999999-", "0-99999999", "1048570-1048590", "-1500000", "10-5", "x")


def put_all(origin: FakeOrigin, bucket: str, rng: random.Random) -> None:
    origin.create_bucket(bucket, versioned=True)
    sums = {"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "FULL_OBJECT"}
    for key in sorted(set(KEYS) - {"nowhere", "empty", "parts"}):
        origin.put(bucket, key, rng.randbytes(10))
        origin.put(bucket, key, rng.randbytes(3000), checksums=sums)
    origin.put(bucket, "empty", b"", checksums=sums)
    composed = {"x-amz-checksum-crc32": "AAAAAA==-3", "x-amz-checksum-type": "COMPOSITE"}
    # Two versions under one ETag: their lengths tell them apart.
    for parts in ((5, 7, 9), PARTS):
        body = rng.randbytes(sum(parts))
        origin.put(bucket, "parts", body, etag=f'"{"ab" * 16}-3"', parts=parts, checksums=composed)


def request(origin: FakeOrigin, bucket: str, rng: random.Random) -> tuple[str, str, dict[str, str]]:
    key = rng.choice(KEYS)
    versions = origin.store.buckets[bucket].objects.get(key, [])
    query: list[str] = []
    headers: dict[str, str] = {}
    if rng.random() < 0.4:
        query.append("versionId=" + rng.choice([*(each.version_id for each in versions), "null", "v99"]))
    if rng.random() < 0.35:
        query.append(f"partNumber={rng.randrange(1, 5)}")
    elif rng.random() < 0.5:
        headers["Range"] = "bytes=" + rng.choice(RANGES)
    etag = versions[-1].etag if versions else '"x"'
    then = formatdate(versions[-1].last_modified if versions else 0, usegmt=True)
    etags, dates = (etag, etag.strip('"'), '"z"', "*", f'"q", {etag}'), (then, formatdate(0, usegmt=True), "junk")
    of = {"If-Match": etags, "If-None-Match": (*etags, f"W/{etag}"), "If-Range": (etag, '"z"', *dates[:2])}
    of |= {"If-Modified-Since": (*dates, formatdate(4e9, usegmt=True)), "If-Unmodified-Since": dates}
    headers |= {name: rng.choice(values) for name, values in of.items() if rng.random() < 0.15}
    if rng.random() < 0.4:
        headers["x-amz-checksum-mode"] = "ENABLED"
    if rng.random() < 0.1:
        query.append("response-content-type=a%2Fb")
    path = f"/{bucket}/{quote(key, safe='/')}" + ("?" + "&".join(query) if query else "")
    return rng.choice(("GET", "GET", "HEAD")), path, headers


def direct(origin: FakeOrigin, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", origin.port)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def shown(status: int, headers: dict[str, str], body: bytes) -> tuple[int, object, dict[str, str]]:
    """What a client goes by: of an error its code, of an answer its bytes and its headers."""
    if status >= 400:
        code = re.search(rb"<Code>([^<]*)</Code>", body)
        return status, code and code[1], {}
    return status, body, {name: headers[name] for name in SAME if name in headers and (status, name) != (304, SAME[0])}


@pytest.mark.parametrize("seed", range(3))
def test_reads_at_random(shared_node: Node, origin: FakeOrigin, seed: int) -> None:
    rng, bucket = random.Random(seed), f"random-{seed}"
    put_all(origin, bucket, rng)
    for number in range(300):
        method, path, headers = request(origin, bucket, rng)
        wanted = shown(*direct(origin, method, path, headers))
        for _ in range(2):
            got = exchange(signed(shared_node, method, path, headers=headers))
            assert shown(got.status, got.headers, got.body) == wanted, (seed, number, method, path, headers)
