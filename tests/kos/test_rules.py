"""Rules: the first glob that matches, the same with and without the memo."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos import rules as module
from kos.config import Rule
from kos.rules import DEFAULT, Rules


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
