"""Ranges, conditions and answers over generated headers: any text of a client gives an answer or an S3 error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3 import conditions, ranges
from kos.s3.head import RequestHead
from kos.s3.object_response import OVERRIDES, ObjectMeta, answer, http_date, meta_from_headers, render_head

sizes = st.integers(0, 1000)
offsets = st.one_of(st.integers(0, 1100), st.integers(0, 10**19))
range_headers = st.one_of(
    st.builds("bytes={}-{}".format, offsets, offsets),
    st.builds("bytes={}-".format, offsets),
    st.builds("bytes=-{}".format, offsets),
    st.text(max_size=40),
    st.from_regex(r"bytes=[0-9, \-]{0,20}", fullmatch=True),
)
tags = st.sampled_from(['"a"', '"b"', 'W/"a"', "a", "*", '"a,b"', ""])
tag_lists = st.one_of(st.lists(tags, max_size=4).map(", ".join), st.text(max_size=20))
dates = st.one_of(st.integers(0, 2**32).map(http_date), st.just(http_date(10**9)), st.text(max_size=40))
conditional = st.fixed_dictionaries(
    {},
    optional={
        "if-match": tag_lists,
        "if-none-match": tag_lists,
        "if-modified-since": dates,
        "if-unmodified-since": dates,
        "if-range": st.one_of(tags, dates),
        "range": range_headers,
        "x-amz-checksum-mode": st.sampled_from(["ENABLED", "no"]),
    },
)
META = ObjectMeta(
    '"a"', 500, http_date(10**9), (("Content-Type", "text/plain"),), (("x-amz-checksum-crc32", "AAAAAA=="),), True
)


@given(range_headers, sizes)
def test_a_range_lies_within_the_object(header: str, size: int) -> None:
    spec = ranges.parse(header)
    if spec is None:
        return
    assert ranges.parse(str(spec)) == spec
    try:
        start, stop = ranges.resolve(spec, size)
    except S3Error as error:
        assert error.status == 416
        assert size == 0 or (spec.first is None and spec.last == 0) or (spec.first is not None and spec.first >= size)
        return
    assert 0 <= start < stop <= size
    slice_of = (
        bytes(size)[spec.first : None if spec.last is None else spec.last + 1] if spec.first is not None else None
    )
    assert slice_of is None or len(slice_of) == stop - start


@given(st.integers(0, 4 * 10**9))
def test_dates_come_back(epoch_s: int) -> None:
    assert conditions.parse_http_date(http_date(epoch_s)) == epoch_s


@given(st.text(max_size=50))
def test_any_text_is_a_date_or_none(text: str) -> None:
    parsed = conditions.parse_http_date(text)
    assert parsed is None or isinstance(parsed, int)


@given(st.lists(st.text(st.characters(exclude_characters='"', codec="utf-8"), max_size=5), max_size=5), st.data())
def test_a_tag_is_found_in_a_list_exactly_if_it_is_there(texts: list[str], drawn: st.DataObject) -> None:
    field = ", ".join(f'"{text}"' for text in texts)
    wanted = drawn.draw(st.sampled_from([*texts, "other"]))
    assert conditions.matches(field, f'"{wanted}"', weak=True) is (wanted in texts)
    assert conditions.matches(field, f'"{wanted}"', weak=False) is (wanted in texts)


@given(
    st.sampled_from(["GET", "HEAD"]),
    conditional,
    st.dictionaries(st.sampled_from(sorted(OVERRIDES)), st.text(max_size=20), max_size=3),
)
def test_an_answer_is_whole_and_cannot_be_broken_open(
    method: str, headers: dict[str, str], params: dict[str, str]
) -> None:
    head = RequestHead(method, "/b/k", "", headers)
    try:
        response = answer(head, params, META, cache_note="hit", age_s=1, request_id="R")
    except S3Error as error:
        assert error.status in (400, 412, 416)
        return
    rendered = render_head(response.status, response.headers)
    assert rendered.count(b"\r\n") == len(response.headers) + 2
    named = {name.lower(): value for name, value in response.headers}
    assert len(named) == len(response.headers)
    assert named["etag"] == META.etag
    assert response.status in (200, 206, 304)
    if response.status == 304:
        assert "content-length" not in named and response.start == response.stop
        return
    length = int(named["content-length"])
    assert response.stop - response.start == (length if method == "GET" else 0)
    assert ("content-range" in named) == (response.status == 206)
    assert ("x-amz-checksum-crc32" in named) == (
        response.status == 200 and headers.get("x-amz-checksum-mode") == "ENABLED"
    )


@given(
    st.sampled_from([200, 206, 304, 404]),
    st.lists(
        st.tuples(
            st.sampled_from(["ETag", "etag", "Content-Length", "Content-Range", "Connection", "x-amz-meta-a", "Age"]),
            st.one_of(st.text(max_size=20), st.just("bytes 0-1/2"), st.integers(0, 99).map(str)),
        ),
        max_size=8,
    ),
)
def test_any_origin_headers_give_a_record_or_none(status: int, pairs: list[tuple[str, str]]) -> None:
    meta = meta_from_headers(status, pairs)
    if meta is not None:
        assert status in (200, 206) and meta.etag and meta.size >= 0
        assert {"etag", "content-length", "age"}.isdisjoint(name.lower() for name, _ in meta.headers)
