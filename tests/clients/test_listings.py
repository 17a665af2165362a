"""boto3's listings through a node, page by page and twice, beside the same listings of the origin itself."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest

from tests.clients.conftest import Endpoint
from tests.fakes.node import client, phase

KEYS = [
    "a", "a/", "a//b", "a//c", "a/b", "a/b/c", "a b", "a+b", "a%2Fb", "a%b", "a&b", "a<b>", 'a"b', "ä/ö", "日本/語", "😀", "~t*",
    "//", "//x", "/lead", "z" * 1024, "é" * 512, "q?x=1#f",
]  # fmt: skip
PREFIXES = [
    "",
    "a",
    "a/",
    "a//",
    "a ",
    "a+",
    "a%",
    "a%2F",
    "ä",
    "日本/",
    "😀",
    "/",
    "//",
    "z" * 1024,
    "é" * 511,
    "q?",
    "none/",
]
#: All prefixes with the usual delimiters, and the odd delimiters once.
QUESTIONS = [*itertools.product(PREFIXES, ("", "/")), *itertools.product(("", "a"), ("//", "b", "%", "ö"))]


@pytest.fixture(scope="module")
def truth(origin_url: str) -> Any:
    s3 = client(origin_url)
    s3.create_bucket(Bucket="listed")
    for key in KEYS:
        s3.put_object(Bucket="listed", Key=key, Body=b"x")
    return s3


def seen(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "ResponseMetadata"}


def pages(s3: Any, operation: str, **asked: Any) -> list[dict[str, Any]]:
    return [seen(page) for page in s3.get_paginator(operation).paginate(Bucket="listed", **asked)]


@functools.cache
def _told(truth: Any, operation: str, prefix: str, delimiter: str) -> list[dict[str, Any]]:
    return pages(truth, operation, Prefix=prefix, Delimiter=delimiter)


@pytest.mark.parametrize("operation", ["list_objects", "list_objects_v2"])
def test_every_page_is_the_origin_s_also_the_second_time(endpoint: Endpoint, truth: Any, operation: str) -> None:
    s3 = endpoint.boto3()
    for prefix, delimiter in QUESTIONS:
        asked = {"Prefix": prefix, "Delimiter": delimiter}
        expected = _told(truth, operation, prefix, delimiter)
        assert pages(s3, operation, **asked) == expected
        assert pages(s3, operation, **asked) == expected, "from the cache"


def test_short_pages_and_starts(endpoint: Endpoint, truth: Any) -> None:
    s3 = endpoint.boto3()
    for size, start, owner in itertools.product((7, 1001), ("", "a/b", "ä"), (False, True)):
        asked = {"PaginationConfig": {"PageSize": size}, "StartAfter": start, "FetchOwner": owner}
        assert pages(s3, "list_objects_v2", **asked) == pages(truth, "list_objects_v2", **asked)
    walked = [
        entry["Key"]
        for page in pages(s3, "list_objects_v2", PaginationConfig={"PageSize": 4})
        for entry in page["Contents"]
    ]
    assert walked == sorted(KEYS)


def test_pages_by_tokens_are_hits_the_second_time(endpoint: Endpoint, truth: Any) -> None:
    s3 = endpoint.boto3(max_pool_connections=1)  # one connection, hence one worker
    asked = {"Bucket": "listed", "PaginationConfig": {"PageSize": 5}, "Prefix": "a" if endpoint.secure else ""}
    for _ in range(2):
        phases = [phase(page) for page in s3.get_paginator("list_objects_v2").paginate(**asked)]
    assert len(phases) > 1 and set(phases) == {"hit"}


def test_max_keys_of_zero_and_the_encoding_that_was_asked_for(endpoint: Endpoint, truth: Any) -> None:
    s3 = endpoint.boto3()
    for asked in ({"MaxKeys": 0}, {"EncodingType": "url"}, {"EncodingType": "url", "Prefix": "a", "Delimiter": "/"}):
        assert seen(s3.list_objects_v2(Bucket="listed", **asked)) == seen(
            truth.list_objects_v2(Bucket="listed", **asked)
        )
        assert seen(s3.list_objects(Bucket="listed", **asked)) == seen(truth.list_objects(Bucket="listed", **asked))
