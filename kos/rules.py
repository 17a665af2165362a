"""Which rule holds for an object: the first whose glob matches.

Owns: the meaning of globs over `bucket` and `bucket/key`, and the memo that makes asking per request cheap.
Does not own: what a rule says (kos.config.Rule) or whether a record is fresh by it (koscache).

Globs: `*` any run of characters, `?` one, `[abc]`, `[!abc]`. A pattern without `/` is about whole buckets; in one with
it, the part before the first `/` is about the bucket and never matches a `/`, the rest is about the key, where `*` does
match `/`. A pattern that ends in `/` means everything below it.

Invariant: the memo holds at most MEMO_MAX keys and changes no answer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kos.config import Rule

#: two strings of at most 1 KiB each and a tuple: below 40 MB if every key had the greatest length, 5 MB as keys are
MEMO_MAX: Final = 16384

#: what holds when no rule matches
DEFAULT: Final = Rule(match="*")


@dataclass(frozen=True, slots=True)
class Match:
    """A rule, its place in the configuration (None: the built-in default), and why it holds, for explain."""

    rule: Rule
    index: int | None
    why: str


@dataclass(frozen=True, slots=True)
class _Compiled:
    rule: Rule
    index: int | None
    bucket: re.Pattern[str]
    key: re.Pattern[str] | None  # None: every key of the bucket


class Rules:
    """The rules of a configuration, ready to be asked on every request."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._compiled = [_compile(rule, index) for index, rule in enumerate(rules)]
        self._compiled.append(_compile(DEFAULT, None))
        # Most buckets are under one rule as a whole: those cost one look-up and no memory per key.
        self._by_bucket: dict[str, Rule | None] = {}
        self._by_key: dict[tuple[str, str], Rule] = {}

    def match(self, bucket: str, key: str) -> Rule:
        """The rule of an object: one look-up in a dict when asked before."""
        rule = self._by_bucket.get(bucket)
        if rule is not None:
            return rule
        rule = self._by_key.get((bucket, key))
        return rule if rule is not None else self._find(bucket, key)

    def explain(self, bucket: str, key: str) -> Match:
        """As match, with the rule's number and the reason."""
        found = self._search(bucket, key)
        if found.index is None:
            return Match(found.rule, None, "no rule matches; the built-in default holds")
        over = "the bucket" if found.key is None else "bucket and key"
        return Match(found.rule, found.index, f"rules[{found.index}] is the first whose glob matches {over}")

    def _search(self, bucket: str, key: str) -> _Compiled:
        for compiled in self._compiled:
            if compiled.bucket.fullmatch(bucket) and (compiled.key is None or compiled.key.fullmatch(key)):
                return compiled
        raise AssertionError("the default rule matches everything")

    def _find(self, bucket: str, key: str) -> Rule:
        rule = self._search(bucket, key).rule
        if bucket not in self._by_bucket:
            first = next(compiled for compiled in self._compiled if compiled.bucket.fullmatch(bucket))
            _bound(self._by_bucket)
            self._by_bucket[bucket] = rule if first.key is None else None
        if self._by_bucket[bucket] is None:
            _bound(self._by_key)
            self._by_key[bucket, key] = rule
        return rule


def _bound(memo: dict[str, Rule | None] | dict[tuple[str, str], Rule]) -> None:
    # Starting over is simpler than an LRU and as good: a full memo refills at the cost of one search a key.
    if len(memo) >= MEMO_MAX:
        memo.clear()


def _compile(rule: Rule, index: int | None) -> _Compiled:
    bucket, slash, key = rule.match.partition("/")
    whole = not slash or key in ("", "*")
    # fnmatch's `*` may match a `/`, but a bucket's name never holds one.
    return _Compiled(rule, index, _glob(bucket), None if whole else _glob(f"{key}*" if key.endswith("/") else key))


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))
