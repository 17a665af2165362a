"""What all figures have in common: how they are asked for and how they look.

Owns: the settings of a run. Does not own: any measurement.

Invariant: everything a figure does is bounded by its settings, in count and in time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.results import Outcome


@dataclass(frozen=True, slots=True)
class Settings:
    """quick: a smoke test of the harness, whose numbers mean nothing. rounds: how often each side is measured."""

    under: Path
    quick: bool
    rounds: int


Figure = Callable[[Settings], Outcome]


def say(text: str) -> None:
    """Tell on stderr how far a run has come; stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)
