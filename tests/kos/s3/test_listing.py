"""Questions of listings: what S3 refuses, what is left to the origin, and one key for each question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3.listing import Question, bypass_reason, parse

_texts = st.one_of(st.none(), st.text(max_size=6), st.sampled_from(["", "a", "a/", "//", "1:a", "\udc80", "%2F", "\0"]))
questions = st.builds(
    Question,
    bucket=st.sampled_from(["b", "bb"]),
    version=st.sampled_from([1, 2]),
    prefix=_texts,
    delimiter=_texts,
    max_keys=st.one_of(st.none(), st.integers(0, 2000)),
    encoding_type=st.sampled_from([None, "url"]),
    marker=_texts,
    token=_texts.filter(lambda token: token != ""),
    start_after=_texts,
    fetch_owner=st.sampled_from([None, "true", "false"]),
    attributes=st.sampled_from([None, "RestoreStatus", "RestoreStatus, Other"]),
).map(lambda asked: _of_its_version(asked))


def _of_its_version(asked: Question) -> Question:
    """Without the parameters of the other version, which no parsed question has."""
    rest = (asked.bucket, asked.version, asked.prefix, asked.delimiter, asked.max_keys, asked.encoding_type)
    if asked.version == 1:
        return Question(*rest, marker=asked.marker, attributes=asked.attributes)
    return Question(
        *rest,
        token=asked.token,
        start_after=asked.start_after,
        fetch_owner=asked.fetch_owner,
        attributes=asked.attributes,
    )


@given(questions, questions)
def test_questions_have_one_key_just_when_they_are_equal(one: Question, other: Question) -> None:
    assert (one.key == other.key) == (one == other)


@given(questions)
def test_what_is_asked_of_the_origin_is_the_same_question(asked: Question) -> None:
    params, headers = dict(asked.query()), dict(asked.headers())
    assert bypass_reason(params, headers) is None
    assert parse(asked.bucket, params, headers) == asked


@given(questions, st.permutations(["x-id", "X-Custom", "x-amz-user-agent"]))
def test_what_changes_no_answer_changes_no_key(asked: Question, names: list[str]) -> None:
    params = {names[0]: "v", **dict(reversed(asked.query())), names[1]: "v"}
    headers = dict.fromkeys(("host", "x-amz-date", "x-forwarded-for", "accept-encoding"), "v") | dict(asked.headers())
    assert bypass_reason(params, headers) is None
    assert parse(asked.bucket, params, headers).key == asked.key


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("5", 5), ("05", 5), ("-0", 0), ("1001", 1001), ("2147483647", 2147483647), ("0" * 5000 + "7", 7)],
)
def test_max_keys_that_s3_takes(text: str, number: int) -> None:
    assert parse("b", {"max-keys": text}, {}).max_keys == number


def test_an_empty_max_keys_is_none() -> None:
    assert parse("b", {"max-keys": ""}, {}) == parse("b", {}, {})


_PARSE = "Provided max-keys not an integer or within integer range"
_RANGE = "Argument maxKeys must be an integer between 0 and 2147483647"
_ENCODING = "Invalid Encoding Method specified in Request"
_TOKEN = "The continuation token provided is incorrect"


@pytest.mark.parametrize(
    ("params", "message", "name", "value"),
    [
        *(
            ({"max-keys": text}, _PARSE, "max-keys", text)
            for text in (
                "abc",
                " 5",
                "+5",
                "5 ",
                "1_0",
                "٥",
                "2147483648",
                "-2147483649",
                "9" * 5000,
                "-",
                "1.0",
                "0x1",
            )
        ),
        ({"max-keys": "-1"}, _RANGE, "maxKeys", "-1"),
        ({"max-keys": "-01"}, _RANGE, "maxKeys", "-1"),
        ({"max-keys": "-2147483648"}, _RANGE, "maxKeys", "-2147483648"),
        ({"encoding-type": "base64"}, _ENCODING, "encoding-type", "base64"),
        ({"encoding-type": ""}, _ENCODING, "encoding-type", ""),
        ({"list-type": "2", "continuation-token": ""}, _TOKEN, "continuation-token", None),
        ({"max-keys": "x", "encoding-type": "y"}, _PARSE, "max-keys", "x"),
        ({"max-keys": "-1", "encoding-type": "y"}, _ENCODING, "encoding-type", "y"),
        ({"list-type": "2", "max-keys": "-1", "continuation-token": ""}, _TOKEN, "continuation-token", None),
    ],
)
def test_what_s3_refuses(params: dict[str, str], message: str, name: str, value: str | None) -> None:
    with pytest.raises(S3Error) as refused:
        parse("b", params, {})
    assert (refused.value.code, refused.value.status, refused.value.message) == ("InvalidArgument", 400, message)
    assert refused.value.extra == {"ArgumentName": name} | ({} if value is None else {"ArgumentValue": value})


def test_encoding_type_is_read_without_case() -> None:
    assert parse("b", {"encoding-type": "URL"}, {}).key == parse("b", {"encoding-type": "url"}, {}).key


@pytest.mark.parametrize(
    ("params", "headers", "reason"),
    [
        ({}, ("host", "authorization", "x-amz-date", "x-amz-content-sha256"), None),
        ({"list-type": "2", "prefix": "//", "x-id": "ListObjectsV2"}, (), None),
        ({"list-type": "1"}, (), "list_type"),
        ({"list-type": ""}, (), "list_type"),
        ({"list-type": "2", "fetch-owner": "yes"}, (), "fetch_owner"),
        ({"list-type": "2", "fetch-owner": ""}, (), "fetch_owner"),
        ({"list-type": "2", "marker": "a"}, (), "unknown_parameter"),
        ({"start-after": "a"}, (), "unknown_parameter"),
        ({"continuation-token": ""}, (), "unknown_parameter"),
        ({"metadata": "true"}, (), "unknown_parameter"),
        ({"X-Amz-Request-Payer": "requester"}, (), "request_payer"),
        ({"X-Amz-Something": "new"}, (), "unknown_parameter"),
        ({}, ("x-amz-expected-bucket-owner",), "expected_bucket_owner"),
        ({}, ("x-amz-optional-object-attributes",), "optional_attributes"),
        ({"list-type": "2", "X-Amz-Optional-Object-Attributes": "RestoreStatus"}, (), "unknown_parameter"),
        ({}, ("x-amz-request-payer",), "request_payer"),
        ({}, ("x-amz-something-new",), "unknown_header"),
        ({}, ("x-minio-extract",), "unknown_header"),
        ({}, ("origin",), "cors"),
    ],
)
def test_what_is_left_to_the_origin(params: dict[str, str], headers: tuple[str, ...], reason: str | None) -> None:
    assert bypass_reason(params, dict.fromkeys(headers, "a;b")) == reason
