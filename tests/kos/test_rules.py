"""Rules: the first glob that matches, the same with and without the memo."""

from __future__ import annotations

import fnmatch
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos import rules as module
from kos.config import Rule
from kos.rules import DEFAULT, Below, Rules, meets


def rules(*patterns: str) -> Rules:
    return Rules(Rule(match=pattern, freshness=float(number)) for number, pattern in enumerate(patterns))


@pytest.mark.parametrize(
    ("pattern", "bucket", "key", "matches"),
    [
        ("*", "b", "any/thing", True),
        ("data", "data", "x", True),
        ("data", "database", "x", False),
        ("data*", "database", "x", True),
        ("data/*", "data", "a/b/c", True),
        ("data/", "data", "a/b/c", True),
        ("data/*", "database", "x", False),
        ("data/raw/", "data", "raw/2026/x", True),
        ("data/raw/", "data", "raw", False),
        ("data/raw", "data", "raw", True),
        ("data/raw", "data", "raw/x", False),
        ("data/*.idx", "data", "a/b.idx", True),
        ("data/*.idx", "data", "a/b.idx2", False),
        ("d?ta/[ab]*", "data", "bcd", True),
        ("d?ta/[!ab]*", "data", "bcd", False),
        ("data/a.b", "data", "axb", False),
        ("data/*", "data", "line\nbreak", True),
        ("*/x", "b", "x", True),
        ("*/x", "b", "y/x", False),
    ],
)
def test_globs(pattern: str, bucket: str, key: str, matches: bool) -> None:
    asked = rules(pattern)
    for _ in range(2):  # the second answer is the memo's
        assert (asked.match(bucket, key) is not DEFAULT) == matches
    assert (asked.explain(bucket, key).index == 0) == matches


def test_the_first_match_wins_and_explain_says_which() -> None:
    asked = rules("b/hot/*", "b/*", "*")
    assert asked.match("b", "hot/x").freshness == 0.0
    assert asked.match("b", "cold").freshness == 1.0
    assert asked.match("c", "hot/x").freshness == 2.0
    assert asked.explain("b", "cold").why == "rules[1] is the first whose glob matches the bucket"
    assert asked.explain("b", "hot/x").why == "rules[0] is the first whose glob matches bucket and key"


def test_without_rules_the_default_holds() -> None:
    assert Rules([]).match("b", "k") is DEFAULT
    assert Rules([]).explain("b", "k").index is None
    assert DEFAULT.freshness == 30.0


_words = st.text(alphabet="ab/*?", min_size=1, max_size=4).filter(lambda word: not word.startswith("/"))


@given(st.lists(_words, max_size=4), st.lists(st.tuples(st.sampled_from("ab"), st.text("ab/", min_size=1, max_size=3))))
def test_the_memo_changes_no_answer(patterns: list[str], asked: list[tuple[str, str]]) -> None:
    kept = rules(*patterns)
    for bucket, key in asked:
        fresh = rules(*patterns).explain(bucket, key).rule
        assert kept.match(bucket, key) == fresh


def test_the_memo_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMO_MAX", 10)
    asked = rules("b/x*", "*")
    for number in range(100):
        asked.match("b", f"x{number}")
        asked.match(f"bucket-{number}", "k")
    assert len(asked._by_key) <= 10
    assert len(asked._by_bucket) <= 10


def test_asking_again_costs_less_than_a_microsecond() -> None:
    asked = rules(*(f"b/x{number}*" for number in range(50)), "*")
    asked.match("b", "zzz")
    best = min(_seconds(asked) for _ in range(20))
    assert best < 1e-6


def _seconds(asked: Rules) -> float:
    started = time.process_time()
    for _ in range(2_000):
        asked.match("b", "zzz")
    return (time.process_time() - started) / 2_000


@pytest.mark.parametrize(
    ("glob", "prefix", "some", "every"),
    [
        ("*", "", True, True),
        ("*", "a/b", True, True),
        ("raw/*", "", True, False),
        ("raw/*", "ra", True, False),
        ("raw/*", "raw", True, False),
        ("raw/*", "raw/", True, True),
        ("raw/*", "raw/x", True, True),
        ("raw/*", "rax", False, False),
        ("*.idx", "a", True, False),
        ("*.idx", "a.idx", True, False),
        ("a", "a", True, False),
        ("a", "ab", False, False),
        ("a?c*", "abc", True, True),
        ("[ab]*", "b", True, True),
        ("[!ab]*", "b", False, False),
        ("[]]*", "]x", True, True),
        ("[!]]*", "]x", False, False),
        ("a[", "a[", True, False),
        ("a[", "ab", False, False),
        ("**", "", True, True),
        ("a**", "a", True, True),
    ],
)
def test_how_a_glob_meets_a_prefix(glob: str, prefix: str, some: bool, every: bool) -> None:
    assert meets(glob, prefix) == Below(some, every)


_globs = st.text(alphabet="ab/*?[]!", min_size=1, max_size=5)
_ALL_KEYS = ["".join(letters) for count in range(1, 6) for letters in itertools.product("ab/", repeat=count)]


@given(_globs, st.text("ab/", max_size=3))
def test_meeting_a_prefix_errs_to_the_safe_side_only(glob: str, prefix: str) -> None:
    below = [key for key in _ALL_KEYS if key.startswith(prefix)]
    matched = [key for key in below if fnmatch.fnmatchcase(key, glob)]
    found = meets(glob, prefix)
    assert found.some or not matched
    assert not found.every or matched == below


@given(st.text(alphabet="ab/*?", min_size=1, max_size=3), st.text("ab/", max_size=2))
def test_a_glob_without_classes_meets_a_prefix_just_where_a_key_matches(glob: str, prefix: str) -> None:
    # Such a glob reads at most three characters beyond the prefix, so the short keys show whether one matches.
    some = any(fnmatch.fnmatchcase(key, glob) for key in (*_ALL_KEYS, prefix) if key.startswith(prefix))
    assert meets(glob, prefix).some == some


_bucket_globs = st.sampled_from(["b", "*", "c", "?", "[!b]"])
_patterns = st.one_of(_bucket_globs, st.builds(lambda bucket, key: f"{bucket}/{key}", _bucket_globs, _globs))


@given(
    st.lists(st.tuples(_patterns, st.integers(0, 5), st.integers(0, 5)), max_size=5),
    st.text("ab/", max_size=3),
)
def test_a_listing_is_never_trusted_longer_than_the_rule_of_a_key_that_it_may_show(
    drawn: list[tuple[str, int, int]], prefix: str
) -> None:
    asked = Rules(
        Rule(match=pattern, listings=float(fresh), stale_if_error_s=float(stale)) for pattern, fresh, stale in drawn
    )
    shown = {id(rule): rule for rule in (asked.match("b", key) for key in _ALL_KEYS if key.startswith(prefix))}
    under = asked.under("b", prefix)
    for rule in shown.values():
        assert any(rule is each for each in under)
    for _ in range(2):  # the second answer is the memo's
        listing = asked.listing("b", prefix)
        assert listing.fresh_s <= min(rule.listings for rule in shown.values())
        assert listing.stale_if_error_s <= min(rule.stale_if_error_s for rule in shown.values())


def test_a_listing_takes_the_strictest_rule_below_its_prefix_and_no_other() -> None:
    asked = Rules(
        [
            Rule(match="b/raw/*", freshness=600.0, listings=600.0),
            Rule(match="b/live/*", freshness=0.0, stale_if_error_s=5.0),
            Rule(match="b/*", freshness=float("inf")),
            Rule(match="*", freshness=1.0),
        ]
    )
    assert asked.listing("b", "raw/x") == (600.0, 3600.0)
    assert asked.listing("b", "r") == (30.0, 3600.0), "an immutable prefix may still get new keys"
    assert asked.listing("b", "") == (0.0, 5.0)
    assert asked.listing("b", "live/") == (0.0, 5.0)
    assert asked.listing("c", "raw/") == (1.0, 3600.0)
    assert asked.under("b", "raw/") == (asked.match("b", "raw/x"),)
    assert Rules([]).listing("b", "") == (30.0, 3600.0)


def test_a_prefix_longer_than_any_key_costs_no_more_than_the_longest_key() -> None:
    asked = rules("b/" + "x*" * 20, "b/y*", "*")
    for number in range(100):
        asked.listing("b", "x" * 60_000 + str(number))
    ((_, prefix),) = asked._by_prefix
    assert prefix == "x" * 1024


def test_the_memo_of_prefixes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMO_MAX", 10)
    asked = rules("b/x*", "*")
    for number in range(100):
        asked.listing("b", f"x{number}")
    assert len(asked._by_prefix) <= 10
