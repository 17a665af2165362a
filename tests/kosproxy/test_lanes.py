"""Both lanes give the same answer: status, headers and bytes, over generated requests.

Two proxies over the same objects, one with both lanes, one with the slow lane only, get the same request byte for byte.
Request ids are taken out (each proxy counts its own), nothing else.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kos.s3.names import encode_key
from kos.s3.object_response import ObjectMeta
from kos.s3.sigv4 import canonical_query, presign, sign_headers
from koscache.carrier import Freshness, version_name
from tests.fakes import certificates
from tests.fakes.carrier import BLOCK, FakeCarrier
from tests.fakes.links import version_2
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY, Proxy

HOST = "kos.test:9000"
TRUSTING = certificates.client_context()
MODIFIED = "Wed, 01 Jul 2026 10:00:00 GMT"
SIZES = {"empty": 0, "tiny": 1, "small": 4096, "odd": 33_333, "blocks": 3 * BLOCK + 5, "large": 2_500_000}
BODIES = {name: random.Random(size).randbytes(size) for name, size in SIZES.items()}
#: the one key that has versions; what is put as the name of one is what a versionId finds
VERSIONED = "small"
VERSIONS = {"v/1": b"an older small one", "null": b"a null one" * 9000}
KEYS = [*SIZES, "sp ace/+é//../x", "no-checksums", "expired", "elsewhere", "absent"]


def meta_of(name: str, body: bytes) -> ObjectMeta:
    return ObjectMeta(
        etag=f'"{name.encode().hex()}"',
        size=len(body),
        last_modified=MODIFIED,
        headers=(("Content-Type", "text/x-odd"), ("x-amz-meta-colour", "bl\u00fce"), ("Cache-Control", "max-age=60")),
        checksums=() if name == "no-checksums" else (("x-amz-checksum-crc32", "AAAAAA=="),),
        checksums_known=name != "no-checksums",
    )


@dataclass(frozen=True)
class Pair:
    both: Proxy
    slow: Proxy
    carrier: FakeCarrier


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    carrier = FakeCarrier(tmp_path_factory.mktemp("lanes") / "store")
    for key in KEYS:
        if key != "absent":
            body = BODIES.get(key, b"some bytes of " + key.encode())
            stored = carrier.put("bucket", key, body, meta_of(key, body))
            stored.hidden = key == "elsewhere"
            stored.freshness = Freshness.EXPIRED if key == "expired" else Freshness.FRESH
    for version_id, body in VERSIONS.items():
        carrier.put("bucket", version_name(VERSIONED, version_id), body, meta_of(f"version-{version_id}", body))
    with Proxy(carrier).running() as both, Proxy(carrier, lanes="slow").running() as slow:
        yield Pair(both, slow, carrier)
    assert (carrier.borrowed, carrier.open_bodies, carrier.open_opened) == (0, 0, 0)
    carrier.close_file()


@dataclass(frozen=True)
class Request:
    method: str
    key: str
    query: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    link: int  # 0: signed in the header; else the version that the query is signed by
    spoil: str

    def wire(self) -> bytes:
        path = "/bucket/" + encode_key(self.key)
        secret = "wrong" if self.spoil == "secret" else SECRET_KEY
        now = NOW - 100_000 if self.spoil == "time" else NOW
        access = "stranger" if self.spoil == "key" else ACCESS_KEY
        common: dict[str, Any] = {"access_key": access, "secret_key": secret, "region": "us-east-1", "now": now}
        lines = [("Host", HOST), *self.headers]
        query = canonical_query(list(self.query))
        if self.link == 4:
            query = presign(self.method, path, self.query, HOST, expires_s=600, **common)
        elif self.link == 2:
            named = {name.replace("-", "_"): value.strip() for name, value in self.headers if name.startswith("x-amz-")}
            keys = {"access_key": access, "secret_key": secret}
            query = version_2(self.method, path, self.query, expires=now + 600, **keys, **named)
        elif self.spoil != "anonymous":
            signed: Mapping[str, str] = {name.lower(): value for name, value in lines if name.lower() == "host"}
            lines += sign_headers(self.method, path, query, signed, session_token=None, **common).items()
        target = path + ("?" + query if query else "")
        head = f"{self.method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines)
        return (head + "\r\n").encode()


RANGES = st.one_of(
    st.builds("bytes={}-{}".format, st.integers(0, 300_000), st.integers(0, 300_000)),
    st.builds("bytes={}-".format, st.integers(0, 300_000)),
    st.builds("bytes=-{}".format, st.integers(0, 300_000)),
    st.sampled_from(["bytes=0-0", "bytes=-0", "bytes=5-2", "bytes=0-1,3-4", "items=0-1", "bytes=", "nonsense", ""]),
)
ETAGS = st.sampled_from(
    [f'"{key.encode().hex()}"' for key in KEYS[:6]] + ["*", '"other"', 'W/"x", "736d616c6c"', "bad"]
)
DATES = st.sampled_from([MODIFIED, "Tue, 30 Jun 2026 10:00:00 GMT", "Thu, 02 Jul 2026 10:00:00 GMT", "yesterday"])
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Range": RANGES,
        "if-match": ETAGS,
        "If-None-Match": ETAGS,
        "If-Modified-Since": DATES,
        "If-Unmodified-Since": DATES,
        "If-Range": st.one_of(ETAGS, DATES),
        "x-amz-checksum-mode": st.sampled_from(["ENABLED", "enabled", "no"]),
        "Accept-Encoding": st.sampled_from(["identity", "gzip, deflate"]),
        "Connection": st.sampled_from(["keep-alive", "Keep-Alive", "close"]),
        "Content-Length": st.just("0"),
        "Accept": st.just("*/*"),
        "X-Odd": st.sampled_from(["", "  padded\t", "caf\u00e9", "a,b"]),
        "x-amz-request-payer": st.just("requester"),
    },
)
QUERY = st.fixed_dictionaries(
    {},
    optional={
        "response-content-type": st.sampled_from(["text/plain", "a\r\nb: c", "caf\u00e9"]),
        "response-cache-control": st.just("no-cache"),
        "x-id": st.just("GetObject"),
        "x-amz-checksum-mode": st.just("ENABLED"),
        "versionId": st.sampled_from([*VERSIONS, "v/1", "absent"]),
    },
)
REQUESTS = st.builds(
    Request,
    st.sampled_from(["GET", "GET", "HEAD"]),
    st.sampled_from(KEYS),
    QUERY.map(lambda given: tuple(given.items())),
    HEADERS.map(lambda given: tuple(given.items())),
    st.sampled_from([0, 2, 4]),
    st.sampled_from(["", "", "", "", "", "", "secret", "time", "key", "anonymous"]),
)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def connect(proxy: Proxy, secure: bool) -> socket.socket:
    if not secure:
        return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    plain = socket.create_connection(("127.0.0.1", proxy.tls_port), timeout=20)
    return TRUSTING.wrap_socket(plain, server_hostname="127.0.0.1")


def ask(proxy: Proxy, wire: bytes, secure: bool = False) -> Answer:
    with connect(proxy, secure) as connection:
        connection.sendall(wire)
        received = b""
        while b"\r\n\r\n" not in received:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        lines = [line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:]]
        headers = tuple((name, value) for name, _, value in lines if name != "x-amz-request-id")
        assert len(headers) == len(lines) - 1
        length = next((int(value) for name, value in headers if name == "Content-Length"), 0)
        if wire.startswith(b"HEAD") or status == 304:
            length = 0
        while len(body) < length:
            piece = connection.recv(1 << 20)
            assert piece, "broken off"
            body += piece
        if isinstance(connection, ssl.SSLSocket):
            # Sends the client's close_notify and waits for the other: whatever came before it would be an error.
            connection.unwrap().close()
        else:
            connection.shutdown(socket.SHUT_WR)
            body += b"".join(iter(lambda: connection.recv(1 << 16), b""))
    body = re.sub(rb"<RequestId>\w+</RequestId>", b"", body)
    # A document's length is in its head as well, request id included: both have the same number of characters.
    return Answer(status, headers, body)


def body_of(request: Request) -> bytes:
    version_id = dict(request.query).get("versionId")
    if version_id is not None:
        assert request.key == VERSIONED
        return VERSIONS[version_id]
    return BODIES.get(request.key, b"some bytes of " + request.key.encode())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=REQUESTS, secure=st.sampled_from([False, False, True]))
def test_both_lanes_give_the_same_answer(pair: Pair, request: Request, secure: bool) -> None:
    wire = request.wire()
    both, slow = ask(pair.both, wire, secure), ask(pair.slow, wire, secure)
    assert both == slow
    # Out of what the ones before left to be remembered: the parsed head, then all but what may change.
    assert ask(pair.both, wire, not secure) == both
    assert ask(pair.both, wire, secure) == both
    if both.status in (200, 206) and request.method == "GET":
        body = body_of(request)
        found = dict(both.headers).get("Content-Range")
        if found is None:
            assert both.body == body
        else:
            start, stop = re.fullmatch(r"bytes (\d+)-(\d+)/\d+", found).groups()  # type: ignore[union-attr]
            assert both.body == body[int(start) : int(stop) + 1]


@pytest.mark.parametrize("key", [*SIZES, "sp ace/+é//../x", "no-checksums"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Range": "bytes=0-0"}, {"If-None-Match": "*"}, {"Connection": "keep-alive"}],
    ids=["plain", "range", "304", "keep-alive"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("link", [0, 2, 4])
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_plain_requests_take_the_fast_lane(
    pair: Pair, key: str, headers: dict[str, str], method: str, link: int, secure: bool
) -> None:
    """So that the property above is not true for the reason that everything was slow."""
    if key == "empty" and "Range" in headers:
        return
    before = len(pair.both.lines)
    answer = ask(pair.both, Request(method, key, (), tuple(headers.items()), link, "").wire(), secure)
    assert answer.status in (200, 206, 304)
    (line,) = pair.both.lines[before:]
    assert (line.lane, line.status, line.bytes) == ("fast", answer.status, len(answer.body))
    assert line.key == key and line.key_id == ACCESS_KEY and line.phase == "hit"


@pytest.mark.parametrize("version_id", VERSIONS)
@pytest.mark.parametrize("link", [0, 2, 4])
def test_versions_take_the_fast_lane_as_well(pair: Pair, version_id: str, link: int) -> None:
    request = Request("GET", VERSIONED, (("versionId", version_id),), (), link, "")
    for _ in range(3):
        before = len(pair.both.lines)
        assert ask(pair.both, request.wire()).body == VERSIONS[version_id]
        (line,) = pair.both.lines[before:]
        assert (line.lane, line.key, line.phase) == ("fast", VERSIONED, "hit")


@pytest.mark.parametrize("key", ["expired", "elsewhere", "absent"])
def test_what_is_not_a_plain_hit_takes_the_slow_lane(pair: Pair, key: str) -> None:
    before = len(pair.both.lines)
    ask(pair.both, Request("GET", key, (), (), 0, "").wire())
    assert [line.lane for line in pair.both.lines[before:]] == ["slow"]


def test_only_right_signatures_are_remembered(pair: Pair) -> None:
    """Else anybody could fill the worker's memory, or empty it of what clients come back with."""
    assert pair.both.edge is not None
    known = cast(Any, pair.both.edge.lanes.fast).__self__._known
    known.clear()
    padding = (("X-Padding", "x" * 4096),)
    for headers, spoil, remembered in (((), "secret", 0), ((), "time", 0), (padding, "", 0), ((), "", 1)):
        answer = ask(pair.both, Request("GET", KEYS[0], (), headers, 4, spoil).wire())
        assert (answer.status, len(known)) == (403 if spoil else 200, remembered)


@pytest.mark.parametrize("version", [2, 4])
def test_a_header_in_the_query_is_answered_like_a_header(pair: Pair, version: int) -> None:
    """SDKs move x-amz-checksum-mode there: the first time, and out of what is remembered of it."""
    for query, expected in (((), None), ((("x-amz-checksum-mode", "ENABLED"),), "AAAAAA==")):
        wire = Request("GET", "small", query, (), version, "").wire()
        for _ in range(4):
            answer = ask(pair.both, wire)
            assert (answer.status, dict(answer.headers).get("x-amz-checksum-crc32")) == (200, expected)
            assert pair.both.lines[-1].lane == "fast"
        assert ask(pair.slow, wire) == answer


@pytest.mark.parametrize("version", [2, 4])
def test_a_link_that_comes_again_is_checked_again(pair: Pair, version: int) -> None:
    """What is remembered of a head holds no verdict: neither of its signature nor of its time."""
    wire = Request("GET", "small", (), (), version, "").wire()
    for _ in range(3):
        assert ask(pair.both, wire).status == 200
    fast = cast(Any, pair.both.edge).lanes.fast.__self__
    assert wire in fast._repeated
    secrets = fast._secrets
    try:
        fast._secrets = {ACCESS_KEY: "another"}
        ask(pair.both, wire)
        assert pair.both.lines[-1].lane == "slow"
    finally:
        fast._secrets = secrets
    for _ in range(3):
        assert ask(pair.both, wire).status == 200
    assert wire in fast._repeated
    now = fast._now
    try:
        fast._now = lambda: NOW + 601
        ask(pair.both, wire)
        assert pair.both.lines[-1].lane == "slow"
    finally:
        fast._now = now
