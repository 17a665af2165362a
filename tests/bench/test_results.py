"""The arithmetic of a result, and what its line says."""

from __future__ import annotations

import json
import math

import pytest

from bench import results
from bench.results import Outcome, Ratio


def _two_sides() -> Outcome:
    outcome = Outcome()
    for ours, theirs in ((20.0, 10.0), (30.0, 12.0), (22.0, 8.0)):
        outcome.add("kos_cpu_us", ours)
        outcome.add("nginx_cpu_us", theirs)
    return outcome


def test_a_ratio_is_that_of_the_medians_and_of_the_best_rounds() -> None:
    outcome = _two_sides()
    outcome.compare("cpu", "kos_cpu_us", "nginx_cpu_us", at_most=2.5)
    assert outcome.ratios["cpu"] == Ratio(22 / 10, 20 / 8, at_most=2.5)
    assert outcome.ratios["cpu"].held is True


def test_the_best_of_a_rate_is_the_highest() -> None:
    outcome = Outcome()
    for rate in (90.0, 110.0, 100.0):
        outcome.add("kos_mb_s", rate, high_is_good=True)
    series = outcome.series("kos_mb_s")
    assert (series.best, series.median) == (110.0, 100.0)


@pytest.mark.parametrize(
    ("ratio", "held"),
    [
        (Ratio(1.5, 1.4, at_most=1.5), True),
        (Ratio(1.51, 1.4, at_most=1.5), False),
        (Ratio(0.9, 0.9, at_least=0.9), True),
        (Ratio(0.89, 0.95, at_least=0.9), False),
        (Ratio(7.0, 7.0), None),
    ],
)
def test_a_limit_is_held_by_the_median(ratio: Ratio, held: bool | None) -> None:
    assert ratio.held is held
    assert ratio.as_json().get("held") is held


def test_a_yardstick_of_nothing_gives_infinity_and_no_exception() -> None:
    assert results.quotient(1.0, 0.0) == math.inf


def test_a_limit_on_a_quantity_looks_at_the_worst_round() -> None:
    outcome = Outcome()
    outcome.add("peak_mb", 100.0)
    outcome.add("peak_mb", 151.0)
    outcome.limit("peak", "peak_mb", at_most=150.0)
    assert outcome.ratios["peak"].held is False


def test_lines_are_appended_and_quick_ones_never_count_as_results(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    outcome = _two_sides()
    outcome.compare("cpu", "kos_cpu_us", "nginx_cpu_us")
    for quick in (False, True, False):
        path = results.append(results.line_of("hot_get", outcome, quick=quick, seconds=1.0))
    assert len(path.read_text().splitlines()) == 3
    found = results.lines("hot_get")
    assert [line["quick"] for line in found] == [False, False]
    for name in ("date", "commit", "machine", "values", "ratios"):
        assert name in found[0]
    assert json.loads(json.dumps(found[0]))["machine"]["cores"] >= 1
