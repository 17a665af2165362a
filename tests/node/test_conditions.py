"""Conditional reads through a node are answered as by the origin itself: cold, hot, revalidated and stale.

The fake origin weighs conditions by a reading of S3's documentation of its own. So this finds what kos gets wrong, and
what it answers differently depending on what it happens to know.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import itertools
import random
import time
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kos.s3.names import encode_key
from kos.s3.sigv4 import sign_headers
from tests.conditions import eventually
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node
from tests.fakes.origin import FakeOrigin

MODIFIED_S = 1_751_364_000  # Tue, 01 Jul 2025 10:00:00 GMT
MODIFIED = "Tue, 01 Jul 2025 10:00:00 GMT"
EARLIER, LATER = "Mon, 30 Jun 2025 10:00:00 GMT", "Wed, 02 Jul 2025 10:00:00 GMT"
BODIES = {"empty": b"", "little": b"0123456789", "blocks": random.Random(3).randbytes(1_200_000)}
ETAGS = {name: f'"{hashlib.md5(body).hexdigest()}"' for name, body in BODIES.items()}
_numbers = itertools.count()


class Answer(NamedTuple):
    status: int
    code: bytes
    headers: dict[str, str]
    body: bytes
    note: str

    def said(self) -> tuple[object, ...]:
        """All but what only kos says."""
        return self[:-1]


_COMPARED = (
    "etag", "content-length", "content-range", "content-type", "last-modified", "x-amz-checksum-crc32",
    "x-amz-checksum-type", "x-amz-meta-a",
)  # fmt: skip


def ask(address: str, method: str, key: str, headers: dict[str, str]) -> Answer:
    path = "/b/" + encode_key(key)
    host = address.removeprefix("http://")
    signed = {"host": host} | {name: value for name, value in headers.items() if name.startswith("x-amz-")}
    sent = sign_headers(
        method, path, "", signed, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1",
        now=time.time(), session_token=None,
    )  # fmt: skip
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request(method, path, headers={**headers, **sent})
        response = connection.getresponse()
        body = response.read()
        named = {name.lower(): value for name, value in response.getheaders()}
        code = body.partition(b"<Code>")[2].partition(b"</Code>")[0] if response.status >= 400 else b""
        compared = {name: named[name] for name in _COMPARED if name in named and response.status < 300}
        if response.status in (304, 416):
            compared = {name: named[name] for name in ("etag", "content-range") if name in named}
        return Answer(response.status, code, compared, b"" if code else body, named.get("x-kos-cache", ""))
    finally:
        connection.close()


def put(origin: FakeOrigin, key: str, name: str) -> None:
    body = BODIES[name]
    checksum = base64.b64encode(binascii.crc32(body).to_bytes(4, "big")).decode()
    checksums = {"x-amz-checksum-crc32": checksum, "x-amz-checksum-type": "FULL_OBJECT"}
    origin.put("b", key, body, {"x-amz-meta-a": "b"}, last_modified=MODIFIED_S, checksums=checksums)


RIGHT, OTHER = "<right>", '"0123456789abcdef0123456789abcdef"'
TAGS = st.one_of(
    st.sampled_from([RIGHT, OTHER, "*", f"W/{RIGHT}", f"{OTHER}, {RIGHT}", f"{OTHER},W/{RIGHT}", "", '"', "bare"]),
    st.lists(st.sampled_from([RIGHT, OTHER, f"W/{OTHER}"]), min_size=1, max_size=4).map(", ".join),
)
DATES = st.sampled_from(
    [MODIFIED, EARLIER, LATER, "yesterday", "", "2025-07-02T10:00:00Z", "Wed, 32 Jul 2025 1:0:0 GMT"]
)
RANGES = st.sampled_from(
    ["bytes=0-0", "bytes=3-", "bytes=-4", "bytes=-0", "bytes=0-", "bytes=10-", "bytes=5-2", "bytes=0-1,3-4", "items=0-1",
     "bytes=1000000-1100000", "bytes=1048570-1048580", "bytes=-5000000", "bytes=9999999-", "nonsense", ""]
)  # fmt: skip
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "if-match": TAGS,
        "if-none-match": TAGS,
        "if-modified-since": DATES,
        "if-unmodified-since": DATES,
        "range": RANGES,
        "if-range": st.sampled_from([RIGHT, OTHER, MODIFIED, LATER]),
        "x-amz-checksum-mode": st.just("ENABLED"),
    },
)


_STALE = {
    "if-match": [RIGHT, RIGHT, OTHER, "*"],
    "if-none-match": [RIGHT, OTHER, OTHER, f"W/{RIGHT}"],
    "if-modified-since": [MODIFIED, EARLIER, LATER, "yesterday"],
    "if-unmodified-since": [MODIFIED, EARLIER, LATER, "yesterday"],
    "range": ["bytes=0-3", "bytes=-3", "bytes=99-"],
    "if-range": [RIGHT, OTHER],
}


def resolved(headers: dict[str, str], name: str) -> dict[str, str]:
    return {field: value.replace(RIGHT, ETAGS[name]) for field, value in headers.items()}


def known(node: Node, key: str) -> bool:
    """Whether the node has the record: it reaches the index a moment after the first answer."""
    answer = ask(node.s3_url, "HEAD", key, {})
    assert answer.status == 200
    return answer.note.startswith(("hit", "revalidated"))


def check(node: Node, origin: FakeOrigin, method: str, name: str, headers: dict[str, str]) -> None:
    """One question to the origin, and to the node that never heard of the object, has it, and has to ask about it."""
    headers = resolved(headers, name)
    number = next(_numbers)
    key, asked_about = f"conditions/{number}", f"always/conditions/{number}"
    put(origin, key, name)
    expected = ask(origin.endpoint, method, key, headers).said()
    assert ask(node.s3_url, method, key, headers).said() == expected, "cold"
    eventually(lambda: known(node, key), "the record is in the index")
    assert ask(node.s3_url, method, key, headers).said() == expected, "hot"
    put(origin, asked_about, name)
    assert ask(node.s3_url, "GET", asked_about, {"x-amz-checksum-mode": "ENABLED"}).body == BODIES[name]
    eventually(lambda: known(node, asked_about), "the record is in the index")
    assert ask(node.s3_url, method, asked_about, headers).said() == expected, "revalidated"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["GET", "GET", "HEAD"]), name=st.sampled_from(sorted(BODIES)), headers=HEADERS)
@example("GET", "blocks", {"range": "bytes=0-9", "if-range": OTHER, "x-amz-checksum-mode": "ENABLED"})
@example("HEAD", "little", {"range": "bytes=0-9", "x-amz-checksum-mode": "ENABLED"})
@example("GET", "empty", {"range": "bytes=-4"})
def test_conditional_reads_are_answered_as_by_the_origin(
    shared_node: Node, origin: FakeOrigin, method: str, name: str, headers: dict[str, str]
) -> None:
    check(shared_node, origin, method, name, headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        # The four combined cases of S3's documentation.
        ({"if-match": RIGHT, "if-unmodified-since": EARLIER}, 200),
        ({"if-none-match": RIGHT, "if-modified-since": EARLIER}, 304),
        ({"if-match": OTHER, "if-unmodified-since": LATER}, 412),
        ({"if-none-match": OTHER, "if-modified-since": LATER}, 200),
        # Both of a kind, and the order between the kinds.
        ({"if-match": RIGHT, "if-none-match": RIGHT}, 304),
        ({"if-match": OTHER, "if-none-match": RIGHT}, 412),
        ({"if-unmodified-since": EARLIER, "if-none-match": RIGHT}, 412),
        ({"if-match": "*"}, 200),
        ({"if-none-match": "*"}, 304),
        ({"if-match": f"W/{RIGHT}"}, 412),
        ({"if-none-match": f"W/{RIGHT}"}, 304),
        # Conditions come before the range: 412 and 304 beat 416, and a condition that holds leaves it.
        ({"if-match": OTHER, "range": "bytes=99-"}, 412),
        ({"if-none-match": RIGHT, "range": "bytes=99-"}, 304),
        ({"if-match": RIGHT, "range": "bytes=99-"}, 416),
        ({"if-match": RIGHT, "range": "bytes=0-0"}, 206),
        # If-Range only chooses between the range and the whole.
        ({"if-range": OTHER, "range": "bytes=99-"}, 200),
        ({"if-range": RIGHT, "range": "bytes=99-"}, 416),
        ({"if-range": MODIFIED, "range": "bytes=0-1"}, 206),
        ({"if-range": OTHER, "if-match": OTHER, "range": "bytes=0-1"}, 412),
        # What cannot be read is ignored.
        ({"if-modified-since": "yesterday"}, 200),
        ({"if-unmodified-since": "yesterday"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_documented_cases(
    shared_node: Node, origin: FakeOrigin, method: str, headers: dict[str, str], status: int
) -> None:
    check(shared_node, origin, method, "little", headers)
    key = f"documented/{next(_numbers)}"
    put(origin, key, "little")
    assert ask(shared_node.s3_url, method, key, resolved(headers, "little")).status == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"if-match": "*"}, {"if-none-match": "*"}, {"if-match": OTHER, "range": "bytes=0-1"}, {"range": "bytes=-1"}],
)
def test_what_is_not_there_is_404_whatever_the_conditions(
    shared_node: Node, origin: FakeOrigin, method: str, headers: dict[str, str]
) -> None:
    expected = ask(origin.endpoint, method, "not/there", headers)
    assert expected.status == 404
    assert ask(shared_node.s3_url, method, "not/there", headers).said() == expected.said()


def test_conditions_on_what_is_served_stale(shared_node: Node, origin: FakeOrigin) -> None:
    drawn = random.Random(11)
    asked = [
        (method, {field: drawn.choice(values) for field, values in _STALE.items() if drawn.random() < 0.4})
        for method in ("GET", "HEAD") * 20
    ]
    put(origin, "stale/direct", "little")
    put(origin, "stale/conditions", "little")
    assert ask(shared_node.s3_url, "GET", "stale/conditions", {"x-amz-checksum-mode": "ENABLED"}).body == b"0123456789"
    eventually(lambda: known(shared_node, "stale/conditions"), "the record is in the index")
    direct = [ask(origin.endpoint, method, "stale/direct", resolved(headers, "little")) for method, headers in asked]
    fault = origin.fault(times=None, status=500)
    try:
        for (method, headers), expected in zip(asked, direct, strict=True):
            stale = ask(shared_node.s3_url, method, "stale/conditions", resolved(headers, "little"))
            assert stale.said() == expected.said() and stale.note.startswith("stale"), (method, headers)
    finally:
        fault.end()
    put(origin, "stale/after", "little")
    eventually(lambda: ask(shared_node.s3_url, "GET", "stale/after", {}).status == 200, "the breaker has closed")


def test_a_whole_answer_to_if_range_has_the_checksums_however_the_object_became_known(
    shared_node: Node, origin: FakeOrigin
) -> None:
    put(origin, "ranged/first", "blocks")
    first = ask(shared_node.s3_url, "GET", "ranged/first", {"range": "bytes=0-99", "x-amz-checksum-mode": "ENABLED"})
    assert first.status == 206 and "x-amz-checksum-crc32" not in first.headers
    eventually(lambda: known(shared_node, "ranged/first"), "the record is in the index")
    origin.forget()
    asked = {"range": "bytes=0-99", "if-range": OTHER, "x-amz-checksum-mode": "ENABLED"}
    whole = ask(shared_node.s3_url, "GET", "ranged/first", asked)
    assert whole.said() == ask(origin.endpoint, "GET", "ranged/first", asked).said()
    assert whole.status == 200 and "x-amz-checksum-crc32" in whole.headers
    assert origin.count(method="HEAD") == 1, "which completes the record"


def test_ranges_of_an_object_without_known_checksums_are_hits_all_the_same(
    shared_node: Node, origin: FakeOrigin
) -> None:
    put(origin, "ranged/only", "blocks")
    asked = {"range": "bytes=0-1048575", "x-amz-checksum-mode": "ENABLED"}
    assert ask(shared_node.s3_url, "GET", "ranged/only", asked).status == 206
    eventually(lambda: ask(shared_node.s3_url, "GET", "ranged/only", asked).note == "hit", "the block is here")
    assert origin.count(key="ranged/only") == 1
