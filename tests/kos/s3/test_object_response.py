"""Answers to reads: what is kept of the origin's headers, and status, headers and slice of every kind of answer."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3.head import RequestHead
from kos.s3.object_response import ObjectAnswer, ObjectMeta, answer, http_date, meta_from_headers, render_head

MODIFIED = "Sun, 06 Nov 1994 08:49:37 GMT"
META = ObjectMeta(
    etag='"abc"',
    size=100,
    last_modified=MODIFIED,
    headers=(
        ("Content-Type", "text/plain"),
        ("Cache-Control", "max-age=60"),
        ("Content-Encoding", "gzip"),
        ("x-amz-meta-color", "blue"),
        ("x-amz-version-id", "v1"),
    ),
    checksums=(("x-amz-checksum-crc32", "AAAAAA=="), ("x-amz-checksum-type", "FULL_OBJECT")),
    checksums_known=True,
)


def read(
    method: str = "GET",
    params: dict[str, str] | None = None,
    meta: ObjectMeta = META,
    age_s: int | None = 7,
    **headers: str,
) -> ObjectAnswer:
    head = RequestHead(method, "/b/k", "", {name.replace("_", "-"): value for name, value in headers.items()})
    return answer(head, params or {}, meta, cache_note="hit", age_s=age_s, request_id="RID")


def test_a_whole_object() -> None:
    response = read()
    assert (response.status, response.start, response.stop) == (200, 0, 100)
    assert dict(response.headers) == {
        "x-amz-request-id": "RID",
        "x-kos-cache": "hit",
        "ETag": '"abc"',
        "Last-Modified": MODIFIED,
        "Age": "7",
        "Accept-Ranges": "bytes",
        "Content-Type": "text/plain",
        "Cache-Control": "max-age=60",
        "Content-Encoding": "gzip",
        "x-amz-meta-color": "blue",
        "x-amz-version-id": "v1",
        "Content-Length": "100",
    }


def test_a_head_has_the_headers_of_the_get_and_no_body() -> None:
    for headers in ({}, {"range": "bytes=3-5"}, {"x_amz_checksum_mode": "ENABLED"}, {"if_none_match": "*"}):
        get, head = read(**headers), read("HEAD", **headers)
        assert (head.status, head.headers) == (get.status, get.headers)
        assert head.start == head.stop


def test_a_range() -> None:
    response = read(range="bytes=10-19")
    assert (response.status, response.start, response.stop) == (206, 10, 20)
    headers = dict(response.headers)
    assert headers["Content-Range"] == "bytes 10-19/100"
    assert headers["Content-Length"] == "10"
    assert read(range="bytes=0-1,5-6").status == 200
    assert dict(read(range="bytes=-500").headers)["Content-Range"] == "bytes 0-99/100"


def test_a_range_outside_of_the_object_names_its_size() -> None:
    for method in ("GET", "HEAD"):
        with pytest.raises(S3Error) as caught:
            read(method, range="bytes=100-")
        assert caught.value.status == 416
        assert caught.value.headers["Content-Range"] == "bytes */100"
        assert caught.value.extra["ActualObjectSize"] == "100"


def test_an_empty_object() -> None:
    empty = ObjectMeta('"e"', 0, MODIFIED, ())
    response = read(meta=empty)
    assert (response.status, response.start, response.stop) == (200, 0, 0)
    assert dict(response.headers)["Content-Length"] == "0"
    with pytest.raises(S3Error, match="InvalidRange"):
        read(meta=empty, range="bytes=0-")


def test_checksums_only_when_asked_for_and_never_of_the_whole_on_a_206() -> None:
    assert "x-amz-checksum-crc32" not in dict(read().headers)
    asked = dict(read(x_amz_checksum_mode="enabled").headers)
    assert asked["x-amz-checksum-crc32"] == "AAAAAA=="
    assert asked["x-amz-checksum-type"] == "FULL_OBJECT"
    for header in ("bytes=0-9", "bytes=0-"):
        partial = dict(read(x_amz_checksum_mode="ENABLED", range=header).headers)
        assert not [name for name in partial if name.startswith("x-amz-checksum")]
    unmodified = dict(read(x_amz_checksum_mode="ENABLED", if_none_match="*").headers)
    assert not [name for name in unmodified if name.startswith("x-amz-checksum")]


def test_not_modified_keeps_what_caches_need() -> None:
    response = read(if_none_match='"abc"', range="bytes=200-")
    assert (response.status, response.start, response.stop) == (304, 0, 0)
    assert dict(response.headers) == {
        "x-amz-request-id": "RID",
        "x-kos-cache": "hit",
        "ETag": '"abc"',
        "Last-Modified": MODIFIED,
        "Age": "7",
        "Cache-Control": "max-age=60",
        "x-amz-version-id": "v1",
    }


def test_a_failed_condition_comes_before_the_range() -> None:
    with pytest.raises(S3Error) as caught:
        read(if_match='"x"', range="bytes=200-")
    assert (caught.value.code, caught.value.extra) == ("PreconditionFailed", {"Condition": "If-Match"})


def test_if_range() -> None:
    assert read(if_range='"abc"', range="bytes=1-2").status == 206
    assert read(if_range='"old"', range="bytes=1-2").status == 200
    assert read(if_range='"old"', range="bytes=200-").status == 200


def test_overrides_replace_headers() -> None:
    response = read(
        params={
            "response-content-type": "image/png",
            "response-content-language": "de",
            "response-expires": "never",
            "response-cache-control": "no-cache",
            "response-content-disposition": 'attachment; filename="é.png"',
            "response-content-encoding": "identity",
        }
    )
    names = [name for name, _ in response.headers]
    assert len(names) == len({name.lower() for name in names})
    headers = dict(response.headers)
    assert headers["Content-Type"] == "image/png"
    assert headers["Content-Language"] == "de"
    assert headers["Expires"] == "never"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Content-Encoding"] == "identity"
    assert headers["x-amz-meta-color"] == "blue"
    assert b'filename="\xe9.png"' in render_head(200, response.headers)


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: x=1", "a\nb", "a\rb", "a\0b", "\x7f", "ключ", "\udc80"])
def test_an_override_that_cannot_be_a_header_is_refused(text: str) -> None:
    with pytest.raises(S3Error) as caught:
        read(params={"response-content-type": text})
    assert caught.value.code == "InvalidArgument"
    assert caught.value.extra["ArgumentName"] == "response-content-type"


def test_age_and_dates_are_left_out_when_unknown() -> None:
    response = read(meta=ObjectMeta('"a"', 1, "", ()), age_s=None)
    assert {"Age", "Last-Modified", "Date"}.isdisjoint(dict(response.headers))
    head = RequestHead("GET", "/b/k", "", {})
    dated = answer(head, {}, META, cache_note="hit", age_s=0, request_id="R", date=http_date(784111777.9))
    assert dict(dated.headers)["Date"] == MODIFIED


ORIGIN = {
    "ETag": '"abc"',
    "Last-Modified": MODIFIED,
    "Content-Length": "100",
    "Content-Type": "text/plain",
    "x-amz-meta-color": "blue",
    "x-amz-version-id": "v1",
    "x-amz-checksum-crc32": "AAAAAA==",
    "x-amz-checksum-type": "FULL_OBJECT",
    "Date": "now",
    "Server": "AmazonS3",
    "Accept-Ranges": "bytes",
    "Connection": "keep-alive, X-Private",
    "X-Private": "1",
    "Keep-Alive": "5",
    "Transfer-Encoding": "chunked",
    "x-amz-request-id": "1",
    "x-amz-id-2": "2",
    "x-amzn-RequestId": "3",
    "Age": "3",
    "x-kos-cache": "hit",
    "Access-Control-Allow-Origin": "*",
    "Set-Cookie": "a=b",
}


def test_what_is_kept_of_an_origins_answer() -> None:
    meta = meta_from_headers(200, ORIGIN)
    assert meta == ObjectMeta(
        etag='"abc"',
        size=100,
        last_modified=MODIFIED,
        headers=(("Content-Type", "text/plain"), ("x-amz-meta-color", "blue"), ("x-amz-version-id", "v1")),
        checksums=(("x-amz-checksum-crc32", "AAAAAA=="), ("x-amz-checksum-type", "FULL_OBJECT")),
        checksums_known=True,
    )
    assert meta_from_headers(200, list(ORIGIN.items())) == meta


def test_a_206_tells_the_size_of_the_whole_and_no_checksum() -> None:
    meta = meta_from_headers(206, {**ORIGIN, "Content-Length": "10", "Content-Range": "bytes 0-9/100"})
    assert meta is not None
    assert (meta.size, meta.checksums, meta.checksums_known) == (100, (), False)


def test_checksums_are_unknown_where_they_were_not_asked_for() -> None:
    bare = {"ETag": '"a"', "Content-Length": "0"}
    known, unknown = meta_from_headers(200, bare), meta_from_headers(200, bare, checksum_mode=False)
    assert known is not None and known.checksums_known
    assert unknown is not None and not unknown.checksums_known


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (404, {"ETag": '"a"', "Content-Length": "1"}),
        (304, {"ETag": '"a"', "Content-Length": "1"}),
        (200, {"Content-Length": "1"}),
        (200, {"ETag": "", "Content-Length": "1"}),
        (200, {"ETag": '"a"'}),
        (200, {"ETag": '"a"', "Content-Length": "x"}),
        (206, {"ETag": '"a"', "Content-Length": "1"}),
        (206, {"ETag": '"a"', "Content-Range": "bytes 0-0/*"}),
        (206, {"ETag": '"a"', "Content-Range": "items 0-0/1"}),
    ],
)
def test_an_answer_that_names_no_version_of_known_size(status: int, headers: dict[str, str]) -> None:
    assert meta_from_headers(status, headers) is None


def test_an_object_stored_without_a_type_has_s3s_default() -> None:
    meta = meta_from_headers(200, {"etag": '"a"', "content-length": "1"})
    assert meta is not None
    assert meta.headers == (("Content-Type", "binary/octet-stream"),)


def test_a_rendered_head() -> None:
    assert (
        render_head(206, [("A", "b"), ("C", "\udce9é")])
        == b"HTTP/1.1 206 Partial Content\r\nA: b\r\nC: \xe9\xc3\xa9\r\n\r\n"
    )
    assert render_head(304, []) == b"HTTP/1.1 304 Not Modified\r\n\r\n"
    assert render_head(529, []) == b"HTTP/1.1 529 Unknown\r\n\r\n"  # origins have statuses of their own


@pytest.mark.parametrize("header", [("A", "b\r\nC: d"), ("A\r\nB", "c"), ("A", "b\n"), ("A", "\r"), ("A", "\0")])
def test_a_head_that_would_break_open_is_not_rendered(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        render_head(200, [header])
