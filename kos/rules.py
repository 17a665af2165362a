"""Which rule holds for an object: the first whose glob matches. And which may hold below a prefix, for its listings.

Owns: the meaning of globs over `bucket` and `bucket/key`, and the memo that makes asking per request cheap.
Does not own: what a rule says (kos.config.Rule) or whether a record is fresh by it (koscache).

Globs: `*` any run of characters, `?` one, `[abc]`, `[!abc]`. A pattern without `/` is about whole buckets; in one with
it, the part before the first `/` is about the bucket and never matches a `/`, the rest is about the key, where `*` does
match `/`. A pattern that ends in `/` means everything below it.

Invariant: the memo holds at most MEMO_MAX keys and changes no answer. A listing's rule is never laxer than that of any key
which the listing may show.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from kos.config import Rule

#: two strings of at most 1 KiB each and a tuple: below 40 MB if every key had the greatest length, 5 MB as keys are
MEMO_MAX: Final = 16384

#: No key is longer. A prefix may be as long as a request's head, and no key is below it; the rules below its beginning are
#: at least as strict, and to work them out holds the loop up no longer.
_PREFIX_MAX: Final = 1024

#: what holds when no rule matches
DEFAULT: Final = Rule(match="*")


@dataclass(frozen=True, slots=True)
class Match:
    """A rule, its place in the configuration (None: the built-in default), and why it holds, for explain."""

    rule: Rule
    index: int | None
    why: str


class ListingRule(NamedTuple):
    """How long a page of a listing may be trusted: the least of all rules that may hold for a key below its prefix.

    Both in seconds: fresh_s as Rule.listings, stale_if_error_s as in Rule.
    """

    fresh_s: float
    stale_if_error_s: float


class Below(NamedTuple):
    """How a glob meets the keys that begin with a prefix: whether it may match some, and whether it matches them all."""

    some: bool
    every: bool


@dataclass(frozen=True, slots=True)
class _Compiled:
    rule: Rule
    index: int | None
    bucket: re.Pattern[str]
    key: re.Pattern[str] | None  # None: every key of the bucket
    glob: str | None  # of the key, as key was made from it


class Rules:
    """The rules of a configuration, ready to be asked on every request."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._compiled = [_compile(rule, index) for index, rule in enumerate(rules)]
        self._compiled.append(_compile(DEFAULT, None))
        # Most buckets are under one rule as a whole: those cost one look-up and no memory per key.
        self._by_bucket: dict[str, Rule | None] = {}
        self._by_key: dict[tuple[str, str], Rule] = {}
        self._by_prefix: dict[tuple[str, str], ListingRule] = {}

    def under(self, bucket: str, prefix: str) -> tuple[Rule, ...]:
        """The rules of which each may hold for a key of the bucket that begins with the prefix, in their order."""
        found: list[Rule] = []
        for compiled in self._compiled:
            if compiled.bucket.fullmatch(bucket):
                below = Below(True, True) if compiled.glob is None else meets(compiled.glob, prefix)
                if below.some:
                    found.append(compiled.rule)
                if below.every:
                    break
        return tuple(found)

    def listing(self, bucket: str, prefix: str) -> ListingRule:
        """The rule of a listing of the bucket's keys that begin with the prefix: one look-up when asked before."""
        prefix = prefix[:_PREFIX_MAX]
        known = self._by_prefix.get((bucket, prefix))
        if known is None:
            rules = self.under(bucket, prefix)
            known = ListingRule(min(rule.listings for rule in rules), min(rule.stale_if_error_s for rule in rules))
            _bound(self._by_prefix)
            self._by_prefix[bucket, prefix] = known
        return known

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


def _bound(
    memo: dict[str, Rule | None] | dict[tuple[str, str], Rule] | dict[tuple[str, str], ListingRule],
) -> None:
    # Starting over is simpler than an LRU and as good: a full memo refills at the cost of one search a key.
    if len(memo) >= MEMO_MAX:
        memo.clear()


def _compile(rule: Rule, index: int | None) -> _Compiled:
    bucket, slash, key = rule.match.partition("/")
    whole = not slash or key in ("", "*")
    # fnmatch's `*` may match a `/`, but a bucket's name never holds one.
    glob = None if whole else f"{key}*" if key.endswith("/") else key
    return _Compiled(rule, index, _glob(bucket), None if glob is None else _glob(glob), glob)


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def meets(glob: str, prefix: str) -> Below:
    """How a glob meets the keys that begin with prefix. Errs to the safe side only: `some` is true where one matches, and
    `every` is true only where all do (a key has any characters, in any number).

    The glob's pieces are states of an automaton that reads the prefix. If any state is alive at its end, a key may go on
    to match; if only stars are left in one of them, every key does.
    """
    pieces = _pieces(glob)
    alive = _after_stars(pieces, {0})
    for character in prefix:
        alive = _after_stars(pieces, _step(pieces, alive, character))
        if not alive:
            return Below(False, False)
    ends = next((at for at in range(len(pieces), 0, -1) if pieces[at - 1] != "*"), 0)
    return Below(True, any(at >= ends and at < len(pieces) for at in alive))


def _step(pieces: tuple[str, ...], alive: set[int], character: str) -> set[int]:
    following: set[int] = set()
    for at in alive:
        if at < len(pieces):
            if pieces[at] == "*":
                following.add(at)
            elif _matches(pieces[at], character):
                following.add(at + 1)
    return following


def _after_stars(pieces: tuple[str, ...], alive: set[int]) -> set[int]:
    """The states and those that are reached from them with nothing read: a star matches nothing as well."""
    reached: set[int] = set()
    for at in alive:
        reached.add(at)
        while at < len(pieces) and pieces[at] == "*":
            at += 1
            reached.add(at)
    return reached


def _matches(piece: str, character: str) -> bool:
    if piece[0] == "[" and len(piece) > 1:
        return _class(piece).fullmatch(character) is not None
    return piece in ("?", character)


_class = lru_cache(maxsize=1024)(_glob)


@lru_cache(maxsize=1024)
def _pieces(glob: str) -> tuple[str, ...]:
    """The glob cut into what matches one character (itself, `?`, `[...]`) and stars, as fnmatch reads it."""
    pieces: list[str] = []
    at = 0
    while at < len(glob):
        end = at + 1
        if glob[at] == "[":
            closing = glob.find("]", at + 3 if glob.startswith("!", at + 1) else at + 2)
            end = closing + 1 if closing >= 0 else end
        pieces.append(glob[at:end])
        at = end
    return tuple(pieces)
