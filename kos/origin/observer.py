"""What the origin lane tells about itself, and the metrics that come of it.

Owns: the port Observer and its one real implementation. Does not own: names and meaning of the metrics (kos.metrics).
Invariant: nothing here can fail a request; label values come from fixed sets.
"""

from __future__ import annotations

from typing import Any, Protocol

from kos import metrics
from kos.origin.breaker import State


class Observer(Protocol):
    def answered(self, operation: str, status: int, seconds: float) -> None:
        """The head of an answer came, `seconds` after the request was begun."""

    def failed(self, reason: str) -> None:
        """An attempt ended without an answer, or its body broke off."""

    def breaker(self, state: State) -> None: ...


class Metrics:
    """Counts into kos.metrics; labelled children are looked up once, not per request."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], Any] = {}
        self._seconds: dict[str, Any] = {}
        self._state = State.CLOSED
        metrics.BREAKER_STATE.set(State.CLOSED.value)

    def answered(self, operation: str, status: int, seconds: float) -> None:
        key = (operation, status)
        counter = self._requests.get(key)
        if counter is None:
            counter = self._requests[key] = metrics.ORIGIN_REQUESTS.labels(operation, str(status))
        counter.inc()
        histogram = self._seconds.get(operation)
        if histogram is None:
            histogram = self._seconds[operation] = metrics.ORIGIN_SECONDS.labels(operation)
        histogram.observe(seconds)

    def failed(self, reason: str) -> None:
        metrics.ORIGIN_ERRORS.labels(reason).inc()

    def breaker(self, state: State) -> None:
        if state is self._state:
            return
        self._state = state
        metrics.BREAKER_STATE.set(state.value)
