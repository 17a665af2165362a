"""What explain says in each state of a record."""

from __future__ import annotations

from typing import cast

import pytest

from kos.config import ALWAYS, Rule
from kos.rules import Rules
from kos.s3.object_response import ObjectMeta
from koscache.content import Location, Record, make_record
from koscache.explain import explain_object
from koscache.reader import Reader
from tests.fakes.clock import FakeClock

SLOT = 7


class FakeFence:
    def __init__(self, *, alone: bool = True, trusts: bool = True) -> None:
        self.alone = alone
        self._trusts = trusts

    def trusted(self) -> bool:
        return self._trusts

    def value_of(self, bucket: str, key: str) -> int:
        return SLOT


class FakeReader:
    """A reader that knows one record and some of its blocks."""

    def __init__(self, record: Record | None, numbers: list[int], fence: FakeFence | None = None) -> None:
        self.fence = fence or FakeFence()
        self._record, self._numbers = record, numbers

    def record(self, bucket: str, key: str) -> Record | None:
        return self._record

    def blocks(self, content: bytes) -> list[tuple[int, Location]]:
        return [(number, Location(0, 0, 10, 0, True)) for number in self._numbers]


def record(age_s: float = 5.0, fence: int = SLOT) -> Record:
    meta = ObjectMeta(etag='"e"', size=45, last_modified="", headers=(), checksums=(), checksums_known=True)
    return make_record("b", "k", meta, validated_at=FakeClock().now() - age_s, fence=fence)


@pytest.mark.parametrize(
    ("known", "numbers", "freshness", "next_get"),
    [
        (None, [], "absent", "miss: asks the origin"),
        (record(), [0, 1, 2, 3, 4], "fresh", "hit"),
        (record(), [0, 1, 4], "fresh", "miss of blocks"),
        (record(age_s=31), [0], "expired", "revalidation: older than the rule allows"),
        (record(fence=SLOT + 1), [0], "fenced", "revalidation: written since"),
    ],
)
def test_states(known: Record | None, numbers: list[int], freshness: str, next_get: str) -> None:
    reader = cast(Reader, FakeReader(known, numbers))
    answer = explain_object(reader, Rules([]), FakeClock(), 10, "b", "k")
    assert answer["freshness"] == freshness
    assert answer["next_get"].startswith(next_get)
    assert answer["rule"]["why"] == "no rule matches; the built-in default holds"
    if known is not None:
        assert answer["blocks"]["count"] == 5
        assert answer["blocks"]["cached"] == len(numbers)


def test_a_version_is_explained_by_its_own_record_and_never_goes_out_of_date() -> None:
    reader = cast(Reader, FakeReader(record(age_s=10_000), [0, 1, 2, 3, 4]))
    answer = explain_object(reader, Rules([]), FakeClock(), 10, "b", "k", "v1")
    assert (answer["freshness"], answer["rule"]["freshness"]) == ("fresh", "immutable")
    assert "a version never goes out of date" in answer["rule"]["why"]
    answer = explain_object(reader, Rules([]), FakeClock(), 10, "b", "k", "null")
    assert (answer["freshness"], answer["rule"]["freshness"]) == ("expired", "30s")


def test_runs_and_age() -> None:
    reader = cast(Reader, FakeReader(record(), [0, 1, 4]))
    rules = Rules([Rule(match="b", freshness=ALWAYS, stale_if_error_s=60)])
    answer = explain_object(reader, rules, FakeClock(), 10, "b", "k")
    assert answer["blocks"]["cached_runs"] == [(0, 2), (4, 5)]
    assert answer["record"]["age_s"] == 5.0
    assert answer["rule"] == {
        "index": 0,
        "match": "b",
        "freshness": "always",
        "stale_if_error": "1m",
        "why": "rules[0] is the first whose glob matches the bucket",
    }


@pytest.mark.parametrize(
    ("known", "numbers", "trusts", "next_get"),
    [
        (None, [], True, "peer or miss: asks the key's home"),
        (record(), [0, 1], True, "peer or miss of blocks"),
        (record(), [0, 1, 2, 3, 4], True, "hit"),
        (record(), [0, 1, 2, 3, 4], False, "revalidation: this node may not hear of every write"),
    ],
)
def test_in_a_cluster(known: Record | None, numbers: list[int], trusts: bool, next_get: str) -> None:
    reader = cast(Reader, FakeReader(known, numbers, FakeFence(alone=False, trusts=trusts)))
    assert explain_object(reader, Rules([]), FakeClock(), 10, "b", "k")["next_get"].startswith(next_get)
