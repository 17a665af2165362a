"""The bench's own origin, as far as a cache depends on an origin."""

from __future__ import annotations

import http.client
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import links, synthetic
from bench.client import get, get_many, put
from bench.results import BenchFailed
from bench.signing import Object, plain_get, presigned_get, signed_put

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd, epoll")
KEY = synthetic.key_of(3_000_000, "x")
PATH = Object(synthetic.BUCKET, KEY).path


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[links.Far]:
    with links.far_origin(Path(tmp_path_factory.mktemp("origin")), None) as running:
        yield running


def _ask(far: links.Far, method: str, path: str = PATH, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(far.at.host, far.at.port, timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_a_whole_object_has_the_bytes_of_its_key(far: links.Far) -> None:
    assert get(far.at, presigned_get(far.at, Object(synthetic.BUCKET, KEY)), verify_key=KEY).size == 3_000_000


@pytest.mark.parametrize(
    ("asked", "span"),
    [
        ("bytes=0-0", (0, 0)),
        ("bytes=10-99", (10, 99)),
        ("bytes=2999990-", (2_999_990, 2_999_999)),
        ("bytes=-5", (2_999_995, 2_999_999)),
    ],
)
def test_a_range_is_answered_exactly(far: links.Far, asked: str, span: tuple[int, int]) -> None:
    status, headers, body = _ask(far, "GET", Range=asked)
    first, last = span
    assert (status, headers["content-range"]) == (206, f"bytes {first}-{last}/3000000")
    assert len(body) == last - first + 1
    assert synthetic.matches(KEY, first, body)


def test_a_range_behind_the_end_is_416(far: links.Far) -> None:
    assert _ask(far, "GET", Range="bytes=3000000-")[0] == 416


def test_validators(far: links.Far) -> None:
    etag = synthetic.etag_of(KEY)
    assert _ask(far, "GET", If_None_Match=etag)[0] == 304
    assert _ask(far, "GET", If_Match='"other"')[0] == 412
    assert _ask(far, "GET", If_Match=etag, Range="bytes=0-1")[0] == 206


def test_head_has_the_length_and_no_body(far: links.Far) -> None:
    status, headers, body = _ask(far, "HEAD")
    assert (status, headers["content-length"], body) == (200, "3000000", b"")


def test_what_has_no_size_is_not_there(far: links.Far) -> None:
    assert _ask(far, "GET", "/bench/nothing")[0] == 404


def test_puts_are_counted_to_the_byte(far: links.Far) -> None:
    before = far.counters()
    body = synthetic.pattern()[: 2 << 20]
    put(far.at, signed_put(far.at, Object("bench", "1/put"), len(body)), body)
    put(far.at, signed_put(far.at, Object("bench", "1/put"), 0), b"")
    after = far.counters()
    assert after["puts"] - before["puts"] == 2
    assert after["bytes_received"] - before["bytes_received"] == len(body)


def test_a_multipart_upload_is_taken(far: links.Far) -> None:
    before = far.counters()["bytes_received"]
    path = Object("bench", synthetic.key_of(1000, "parts")).path
    status, _, created = _ask(far, "POST", path + "?uploads")
    assert status == 200 and b"<UploadId>upload</UploadId>" in created
    put(far.at, signed_put(far.at, Object("bench", "1/part"), 1000), bytes(1000))
    connection = http.client.HTTPConnection(far.at.host, far.at.port, timeout=10)
    connection.request("POST", path + "?uploadId=upload", body=b"<CompleteMultipartUpload/>")
    answer = connection.getresponse()
    assert answer.status == 200 and synthetic.etag_of(synthetic.key_of(1000, "parts")).encode() in answer.read()
    connection.close()
    assert far.counters()["bytes_received"] - before == 1000 + len(b"<CompleteMultipartUpload/>")


def test_many_requests_over_a_few_connections(far: links.Far) -> None:
    requests = [presigned_get(far.at, Object("bench", synthetic.key_of(1000 + i, "m"))) for i in range(50)]
    seen = get_many(far.at, requests, 4)
    assert (seen.requests, seen.size) == (50, sum(range(1000, 1050)))


def test_a_wrong_status_fails_the_client(far: links.Far) -> None:
    with pytest.raises(BenchFailed, match="404"):
        get(far.at, plain_get(far.at, "/bench/nothing"))
    with pytest.raises(BenchFailed, match="404"):
        get_many(far.at, [plain_get(far.at, "/bench/nothing")], 1)


def test_a_wrong_byte_fails_the_client(far: links.Far) -> None:
    with pytest.raises(BenchFailed, match="wrong bytes"):
        get(far.at, plain_get(far.at, PATH), verify_key=synthetic.key_of(3_000_000, "another"))
