"""When a question to a peer is asked a second time, of another one: after how long, and how often at most.

Owns: the recent latencies of heads, their 99th percentile, the budget of hedges. Does not own: asking
(koscache.carrier.peers).

Invariant: of all questions at most the configured share is doubled, but for a burst of _BURST.
"""

from __future__ import annotations

from typing import Final

#: Latencies that are remembered; the 99th percentile of them is the third largest.
_WINDOW: Final = 256
#: With fewer than this many there is no percentile to speak of.
_LEAST: Final = 32
#: Worked out anew after so many: sorting them takes 10 µs.
_EVERY: Final = 16
#: Hedges that may be saved up.
_BURST: Final = 8.0


class Latencies:
    """How long heads took lately."""

    __slots__ = ("_at", "_delay_s", "_least_s", "_most_s", "_since", "_window")

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._window: list[float] = []
        self._at = 0
        self._since = 0
        self._delay_s = most_s

    @property
    def delay_s(self) -> float:
        """For how long to wait for a head before another peer is asked: within least_s and most_s."""
        return self._delay_s

    def add(self, seconds: float) -> None:
        """A head took so long; or, of one that was not waited for to the end, longer than that."""
        window = self._window
        if len(window) < _WINDOW:
            window.append(seconds)
        else:
            window[self._at] = seconds
            self._at = (self._at + 1) % _WINDOW
        self._since += 1
        if self._since >= _EVERY and len(window) >= _LEAST:
            self._since = 0
            slow = sorted(window)[len(window) * 99 // 100]
            self._delay_s = min(max(slow, self._least_s), self._most_s)


class HedgeBudget:
    """percent: of a hundred questions so many may be doubled."""

    __slots__ = ("_each", "_tokens")

    def __init__(self, percent: int) -> None:
        self._each = percent / 100
        self._tokens = _BURST if percent else 0.0

    def asked(self) -> None:
        """A question was asked."""
        self._tokens = min(self._tokens + self._each, _BURST)

    def take(self) -> bool:
        """Whether this one may be doubled; counts it."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
