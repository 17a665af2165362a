"""What a run leaves behind: rounds, their ratios, and one JSON line that can be compared years later.

Owns: the shape of a result, the arithmetic of ratios and targets, the description of the machine and of the commit, and
the files results/NAME.jsonl. Does not own: measuring.

Invariant: a result is appended, never rewritten, and every ratio in it comes from rounds of one and the same run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: Where the lines go; another place for smoke tests, so that these never mix with figures.
RESULTS: Final = Path(os.environ.get("KOS_BENCH_RESULTS", str(Path(__file__).parent / "results")))
MIB: Final = 1 << 20


class BenchFailed(Exception):
    """A run that cannot yield a figure: a server that did not start, a wrong answer, a tool that is missing."""


@dataclass(frozen=True, slots=True)
class Series:
    """One quantity over the rounds of a run; `unit` is part of the name (cpu_us, mb_s, ms)."""

    rounds: tuple[float, ...]
    low_is_good: bool

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds) if self.low_is_good else max(self.rounds)

    def as_json(self) -> dict[str, Any]:
        return {
            "median": significant(self.median),
            "best": significant(self.best),
            "rounds": [significant(r) for r in self.rounds],
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over the yardstick's, and the limit that the project set itself (None: only of interest)."""

    of_medians: float
    of_best: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def held(self) -> bool | None:
        if self.at_most is not None:
            return self.of_medians <= self.at_most
        if self.at_least is not None:
            return self.of_medians >= self.at_least
        return None

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"of_medians": significant(self.of_medians), "of_best": significant(self.of_best)}
        for name, limit in (("at_most", self.at_most), ("at_least", self.at_least)):
            if limit is not None:
                line |= {name: limit, "held": self.held}
        return line


@dataclass(slots=True)
class Outcome:
    """Everything one figure measured; filled round by round, then turned into a line."""

    values: dict[str, list[float]] = field(default_factory=dict)
    high_is_good: set[str] = field(default_factory=set)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, *, high_is_good: bool = False) -> None:
        """Add one round of the quantity `name`."""
        self.values.setdefault(name, []).append(value)
        if high_is_good:
            self.high_is_good.add(name)

    def series(self, name: str) -> Series:
        return Series(tuple(self.values[name]), name not in self.high_is_good)

    def compare(
        self, name: str, ours: str, yardstick: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Set the ratio `name` = ours / yardstick, of medians and of best rounds."""
        a, b = self.series(ours), self.series(yardstick)
        self.ratios[name] = Ratio(quotient(a.median, b.median), quotient(a.best, b.best), at_most, at_least)

    def limit(self, name: str, quantity: str, *, at_most: float) -> None:
        """Set a limit on the worst round of a quantity itself (memory has no yardstick but its limit)."""
        worst = max(self.values[quantity])
        self.ratios[name] = Ratio(worst, self.series(quantity).best, at_most=at_most)


def quotient(a: float, b: float) -> float:
    """a / b, infinite where b is nothing."""
    return a / b if b else math.inf


def significant(value: float, digits: int = 4) -> float:
    """Round to significant digits: a figure of a noisy machine has no more than these."""
    return float(f"{value:.{digits}g}")


def machine() -> dict[str, Any]:
    """The machine, as far as a figure depends on it."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
    }


def commit() -> str:
    """Short commit hash of the tree this runs from, with "+" where it was changed since; "unknown" outside of git."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", "*.py"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def line_of(figure: str, outcome: Outcome, *, quick: bool, seconds: float) -> dict[str, Any]:
    """The result as one JSON object."""
    return {
        "figure": figure,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine() | {"load_1min": round(os.getloadavg()[0], 2)},
        "quick": quick,
        "seconds": round(seconds, 1),
        "values": {name: outcome.series(name).as_json() for name in outcome.values},
        "ratios": {name: ratio.as_json() for name, ratio in outcome.ratios.items()},
        "notes": outcome.notes,
    }


def append(line: dict[str, Any]) -> Path:
    """Append the line to the file of its figure; returns the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{line['figure']}.jsonl"
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def lines(figure: str) -> Sequence[dict[str, Any]]:
    """All full (not quick) results of a figure, oldest first."""
    path = RESULTS / f"{figure}.jsonl"
    if not path.exists():
        return []
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    return [line for line in found if not line["quick"]]
