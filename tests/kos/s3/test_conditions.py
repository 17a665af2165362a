"""Conditional reads: every combination of the four headers, entity-tag lists, three forms of dates."""

from __future__ import annotations

import itertools

import pytest

from kos.s3.conditions import Verdict, evaluate, matches, parse_http_date, range_applies

ETAG = '"abc"'
MODIFIED = "Sun, 06 Nov 1994 08:49:37 GMT"
EARLIER = "Sun, 06 Nov 1994 08:49:36 GMT"
LATER = "Sun, 06 Nov 1994 08:49:38 GMT"


def verdict(**headers: str) -> Verdict:
    return evaluate({name.replace("_", "-"): value for name, value in headers.items()}, ETAG, MODIFIED)


def test_no_condition() -> None:
    assert verdict() is Verdict.PROCEED


def test_each_condition_alone() -> None:
    assert verdict(if_match='"abc"') is Verdict.PROCEED
    assert verdict(if_match='"abd"') is Verdict.FAILED_ETAG
    assert verdict(if_none_match='"abc"') is Verdict.NOT_MODIFIED_ETAG
    assert verdict(if_none_match='"abd"') is Verdict.PROCEED
    assert verdict(if_modified_since=EARLIER) is Verdict.PROCEED
    assert verdict(if_modified_since=MODIFIED) is Verdict.NOT_MODIFIED_DATE
    assert verdict(if_modified_since=LATER) is Verdict.NOT_MODIFIED_DATE
    assert verdict(if_unmodified_since=EARLIER) is Verdict.FAILED_DATE
    assert verdict(if_unmodified_since=MODIFIED) is Verdict.PROCEED
    assert verdict(if_unmodified_since=LATER) is Verdict.PROCEED


def test_the_two_combinations_that_s3_documents() -> None:
    assert verdict(if_match=ETAG, if_unmodified_since=EARLIER) is Verdict.PROCEED
    assert verdict(if_none_match=ETAG, if_modified_since=EARLIER) is Verdict.NOT_MODIFIED_ETAG


MATCH = {None: None, True: '"abc"', False: '"x"'}
NONE_MATCH = {None: None, True: '"x"', False: '"abc"'}
MODIFIED_SINCE = {None: None, True: EARLIER, False: LATER}
UNMODIFIED_SINCE = {None: None, True: LATER, False: EARLIER}


@pytest.mark.parametrize(
    ("match", "none_match", "modified", "unmodified"), list(itertools.product((None, True, False), repeat=4))
)
def test_all_combinations_in_the_order_of_rfc_9110(
    match: bool | None, none_match: bool | None, modified: bool | None, unmodified: bool | None
) -> None:
    first = match if match is not None else unmodified
    second = none_match if none_match is not None else modified
    if first is False:
        expected = Verdict.FAILED_ETAG if match is False else Verdict.FAILED_DATE
    elif second is False:
        expected = Verdict.NOT_MODIFIED_ETAG if none_match is False else Verdict.NOT_MODIFIED_DATE
    else:
        expected = Verdict.PROCEED
    sent = {
        "if-match": MATCH[match],
        "if-none-match": NONE_MATCH[none_match],
        "if-modified-since": MODIFIED_SINCE[modified],
        "if-unmodified-since": UNMODIFIED_SINCE[unmodified],
    }
    headers = {name: value for name, value in sent.items() if value is not None}
    assert evaluate(headers, ETAG, MODIFIED) is expected


@pytest.mark.parametrize("bad", ["", "yesterday", "784111777", "Sun, 32 Nov 1994 08:49:37 GMT", "\ud800"])
def test_a_date_that_cannot_be_read_is_ignored(bad: str) -> None:
    assert verdict(if_modified_since=bad) is Verdict.PROCEED
    assert verdict(if_unmodified_since=bad) is Verdict.PROCEED


def test_an_object_without_a_date_ignores_conditions_on_dates() -> None:
    assert evaluate({"if-modified-since": LATER}, ETAG, "") is Verdict.PROCEED
    assert evaluate({"if-unmodified-since": EARLIER}, ETAG, "") is Verdict.PROCEED
    assert evaluate({"if-modified-since": ""}, ETAG, "") is Verdict.PROCEED


@pytest.mark.parametrize(
    ("field", "etag", "strong", "weak"),
    [
        ('"abc"', '"abc"', True, True),
        ("abc", '"abc"', True, True),
        ("*", '"abc"', True, True),
        (" * ", '"abc"', True, True),
        ('"*"', '"abc"', False, False),
        ('W/"abc"', '"abc"', False, True),
        ('"abc"', 'W/"abc"', False, True),
        ('W/"abc"', 'W/"abc"', False, True),
        ('"x", "abc"', '"abc"', True, True),
        ('"x","y",W/"abc" , "z"', '"abc"', False, True),
        (',, "abc" ,', '"abc"', True, True),
        ('"a,b", "c"', '"a,b"', True, True),
        ('"a,b"', '"a"', False, False),
        ('x, abc"', '"abc"', False, False),
        ('"abc', '"abc"', False, False),
        ("", '"abc"', False, False),
        ('"ABC"', '"abc"', False, False),
        ('"abc-2"', '"abc-2"', True, True),
    ],
)
def test_entity_tag_lists(field: str, etag: str, strong: bool, weak: bool) -> None:
    assert matches(field, etag, weak=False) is strong
    assert matches(field, etag, weak=True) is weak


@pytest.mark.parametrize(
    "text", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_the_three_forms_of_a_date(text: str) -> None:
    assert parse_http_date(text) == 784111777


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 00 Nov 1994 08:49:37 GMT",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Sun, 06 Foo 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 CET",
        "Sun, 06 Nov 1994 08:49:37 GMT ",
        "٠٦",
    ],
)
def test_what_is_no_date(text: str) -> None:
    assert parse_http_date(text) is None


@pytest.mark.parametrize(
    ("if_range", "etag", "expected"),
    [
        (None, ETAG, True),
        ('"abc"', ETAG, True),
        ("abc", ETAG, True),
        ('"abd"', ETAG, False),
        ('W/"abc"', ETAG, False),
        ('W/"abc"', 'W/"abc"', False),
        (MODIFIED, ETAG, True),
        (EARLIER, ETAG, False),
        (LATER, ETAG, False),
        ("rubbish", ETAG, False),
        ("", ETAG, False),
    ],
)
def test_if_range(if_range: str | None, etag: str, expected: bool) -> None:
    assert range_applies(if_range, etag, MODIFIED) is expected
