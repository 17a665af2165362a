"""After how long another one is asked, and how often."""

from __future__ import annotations

import random

import pytest

from koscache.carrier.peer_latency import HedgeBudget, Latencies


def test_the_delay_is_the_99th_percentile_within_its_bounds() -> None:
    latencies = Latencies(0.02, 1.0)
    assert latencies.delay_s == 1.0, "nothing is known yet"
    for number in range(1000):
        latencies.add(0.3 if number % 100 == 50 else 0.001)
    assert latencies.delay_s == pytest.approx(0.3)
    for _ in range(300):
        latencies.add(0.001)
    assert latencies.delay_s == 0.02
    for _ in range(300):
        latencies.add(7.0)
    assert latencies.delay_s == 1.0


@pytest.mark.parametrize("percent", [0, 1, 5, 100])
def test_the_budget_is_kept_over_any_stretch(percent: int) -> None:
    budget, chance, taken = HedgeBudget(percent), random.Random(percent), 0
    for asked in range(1, 5001):
        budget.asked()
        if chance.random() < 0.5 and budget.take():
            taken += 1
        assert taken <= 8 + asked * percent / 100
    assert (taken > 0) == (percent > 0)
