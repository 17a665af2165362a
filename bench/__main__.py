"""`python -m bench NAME [--json] [--quick] [--rounds N] [--favour]`: run a figure and keep its line.

Owns: the command line. NAME is a figure, `all` (every figure, then the plots) or `plot`. Does not own: any measurement.

Exit status: 0 measured, 1 a run failed, 2 wrong usage. A target that was missed is said in the line, it is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench import cold_get, hot_get, memory, peer_get, put, results, scaling, small_files, tls_get, uploads
from bench.figure import Figure, Settings, say
from bench.processes import FAVOUR

FIGURES: Final[dict[str, tuple[Figure, str]]] = {
    "hot_get": (hot_get.run, hot_get.SUMMARY),
    "tls_get": (tls_get.run, tls_get.SUMMARY),
    "cold_get": (cold_get.run, cold_get.SUMMARY),
    "put": (put.run, put.SUMMARY),
    "uploads": (uploads.run, uploads.SUMMARY),
    "small_files": (small_files.run, small_files.SUMMARY),
    "peer_get": (peer_get.run, peer_get.SUMMARY),
    "memory": (memory.run, memory.SUMMARY),
    "scaling": (scaling.run, scaling.SUMMARY),
}


def measure(name: str, *, quick: bool, rounds: int) -> dict[str, Any]:
    """Run one figure in a directory of its own (below $KOS_BENCH_DIR, else the system's) and append its line."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"kos-bench-{name}-", dir=os.environ.get("KOS_BENCH_DIR")) as under:
        outcome = FIGURES[name][0](Settings(Path(under), quick, rounds))
    line = results.line_of(name, outcome, quick=quick, seconds=time.monotonic() - began)
    results.append(line)
    return line


def table(line: dict[str, Any]) -> str:
    """The line for people: medians and best rounds, then ratios with their limits."""
    rows = [f"{line['figure']}  {line['commit']}  {line['machine']['cpu']}, {line['machine']['cores']} cores"]
    rows += [f"  {name:44} {v['median']:>12} {v['best']:>12}" for name, v in line["values"].items()]
    for name, ratio in line["ratios"].items():
        limit = (
            f"<= {ratio['at_most']}" if "at_most" in ratio else f">= {ratio['at_least']}" if "at_least" in ratio else ""
        )
        verdict = {True: "held", False: "MISSED", None: ""}[ratio.get("held")]
        rows.append(f"  {name:44} {ratio['of_medians']:>12} {ratio['of_best']:>12}  {limit} {verdict}")
    return "\n".join(rows)


def main() -> int:
    """Entry point; returns the exit status."""
    options = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    options.add_argument("name", choices=[*FIGURES, "all", "plot"])
    options.add_argument("--json", action="store_true", help="print the JSON line instead of a table")
    options.add_argument("--quick", action="store_true", help="smoke test: little, and no figure")
    options.add_argument("--rounds", type=int, help="how often each side is measured (default 5, quick 1)")
    options.add_argument("--favour", action="store_true", help="let what is measured go before other work, if we may")
    asked = options.parse_args()
    if asked.favour:
        os.environ[FAVOUR] = "1"
    rounds = asked.rounds or (1 if asked.quick else 5)
    # Ended from outside, a run still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0
    for name in FIGURES if asked.name == "all" else [asked.name] if asked.name in FIGURES else []:
        try:
            line = measure(name, quick=asked.quick, rounds=rounds)
        except (results.BenchFailed, OSError) as error:
            say(f"{name}: {error!r}" if isinstance(error, OSError) else f"{name}: {error}")
            failed = 1
        else:
            print(json.dumps(line) if asked.json else table(line), flush=True)
    if asked.name in ("all", "plot"):
        from bench import plot

        for name in FIGURES:
            if (picture := plot.draw(name)) is not None:
                say(f"plot: {picture}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
