"""What happened at the origin, and which answers of kos it allows.

Owns: the commit order of every key at the origin, which commits were acknowledged through kos, and the verdict on a read.
Does not own: making requests (workload) or the origin (tests.fakes.origin).

Invariant: a verdict depends only on what was written down before the read was answered; all times are time.monotonic() of
the test's process, where the origin lives too.

The rule (the consistency contract): a read that began at t0 may return version v only if
  - v was committed before the answer came, and
  - nothing acknowledged through kos before t0 was committed after v, and
  - v was still current at t0 - freshness (writes that went around kos).
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

#: what scheduling on a busy machine may add to a freshness time between kos' clock reading and the test's
SLACK_S = 0.25

Place = tuple[str, str]


@lru_cache(maxsize=512)
def content(key: str, number: int, size: int) -> bytes:
    """The bytes of one version: unlike those of any other version at every offset."""
    return random.Random(f"{key} {number}").randbytes(size)


@dataclass(slots=True)
class Commit:
    """One change of one key at the origin; number None is a deletion."""

    etag: str | None
    body: bytes | None
    began: float
    ended: float
    acknowledged: float | None = None
    through: str = ""


@dataclass(slots=True)
class Read:
    """One answer of kos: status, the ETag named, the body, the slice asked for (start, stop) or None for all."""

    place: Place
    began: float
    ended: float
    status: int
    etag: str | None
    body: bytes
    wanted: tuple[int, int] | None
    note: str


@dataclass
class Ledger:
    """Thread-safe: the origin writes commits from its thread."""

    freshness_s: dict[str, float]
    commits: dict[Place, list[Commit]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, store: Any) -> None:
        """Write down every put and remove of this OriginStore in the order in which they take effect."""
        put, remove = store.put, store.remove

        def watched_put(bucket: str, key: str, body: bytes, *arguments: Any, **named: Any) -> Any:
            with self._lock:
                began = time.monotonic()
                version = put(bucket, key, body, *arguments, **named)
                self.commits[bucket, key].append(Commit(version.etag, bytes(body), began, time.monotonic()))
            return version

        def watched_remove(bucket: str, key: str, version_id: str | None = None) -> Any:
            assert version_id is None, "the ledger knows of no versions"
            with self._lock:
                began = time.monotonic()
                marker = remove(bucket, key)
                self.commits[bucket, key].append(Commit(None, None, began, time.monotonic()))
            return marker

        store.put, store.remove = watched_put, watched_remove

    def acknowledge(self, place: Place, etag: str | None, began: float, through: str = "") -> None:
        """A write through kos that began at `began` was answered with success just now; None is a deletion. through: what it
        went through, for who reads a verdict."""
        now = time.monotonic()
        with self._lock:
            own = [c for c in self.commits[place] if c.etag == etag and c.ended >= began]
            assert own, f"{place}: kos acknowledged {etag} which never reached the origin"
            # Overlapping deletions look alike; the earliest is the one that claims least.
            if own[0].acknowledged is None:
                own[0].acknowledged, own[0].through = now, through

    def violation(self, read: Read) -> str | None:
        """None if the contract allows this answer, else what is wrong with it."""
        with self._lock:
            history = list(self.commits[read.place])
        if read.status in (200, 206):
            candidates = [n for n, c in enumerate(history) if c.etag == read.etag]
            if not candidates:
                return f"ETag {read.etag} was never at the origin"
            torn = self._torn(read, history[candidates[-1]])
            if torn:
                return torn
        elif read.status == 404:
            candidates = [-1, *(n for n, c in enumerate(history) if c.etag is None)]
        else:
            return f"status {read.status} is no answer to judge"
        reasons = [self._too_old(read, history, n) for n in candidates]
        return None if None in reasons else str(reasons[-1])

    def listing_violation(self, place: Place, etag: str | None, began: float, ended: float) -> str | None:
        """As violation, for one key of a listing: the ETag that it shows, None where it shows no such key."""
        with self._lock:
            history = list(self.commits[place])
        candidates = [n for n, commit in enumerate(history) if commit.etag == etag]
        if etag is None:
            candidates = [-1, *candidates]
        if not candidates:
            return f"ETag {etag} was never at the origin"
        read = Read(place, began, ended, 200, etag, b"", None, "")
        reasons = [self._too_old(read, history, n) for n in candidates]
        return None if None in reasons else str(reasons[-1])

    def story(self, place: Place, last: int = 8) -> str:
        """The last changes of a key, for who reads a verdict."""
        with self._lock:
            history = self.commits[place][-last:]
        told = [
            f"{c.etag} at {c.began:.3f}" + (f" told at {c.acknowledged:.3f} {c.through}" if c.acknowledged else "")
            for c in history
        ]
        return "; ".join(told)

    @staticmethod
    def _torn(read: Read, commit: Commit) -> str | None:
        assert commit.body is not None
        expected = commit.body if read.wanted is None else commit.body[slice(*read.wanted)]
        if read.body == expected:
            return None
        if len(read.body) != len(expected):
            return f"wrong length: {len(read.body)} bytes of {len(expected)} under ETag {read.etag}"
        first = next(n for n, (a, b) in enumerate(zip(read.body, expected, strict=True)) if a != b)
        return f"torn: differs from version {read.etag} at byte {first} of {len(expected)}"

    def _too_old(self, read: Read, history: list[Commit], n: int) -> str | None:
        if n >= 0 and history[n].began > read.ended:
            return "from the future"
        later = history[n + 1 :]
        for commit in later:
            if commit.acknowledged is not None and commit.acknowledged < read.began:
                ago = read.began - commit.acknowledged
                took = commit.acknowledged - commit.ended
                return (
                    f"a write ({commit.etag}) acknowledged {ago:.3f} s before the read is not seen; {commit.through}, "
                    f"it was at the origin {took:.3f} s before that"
                )
        if later:
            age = read.began - later[0].ended
            if age > self.freshness_s[read.place[0]] + SLACK_S:
                return f"{age:.3f} s staler than the origin, allowed {self.freshness_s[read.place[0]]} s"
        return None
