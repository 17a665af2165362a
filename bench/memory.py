"""Figure memory: what one worker holds while a thousand clients read slowly.

Owns: peak and present memory of the single worker with 1 000 slow readers of objects of 64 MiB, first while the objects
are cold (one fill, all others behind it), then hot.

Invariant: the readers are still connected, and every one has its 200, when the memory is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench import links, node
from bench.client import get
from bench.figure import Settings, say
from bench.processes import cores
from bench.results import MIB, BenchFailed, Outcome
from bench.signing import Object, presigned_get, presigned_targets
from bench.synthetic import BUCKET, key_of

SUMMARY: Final = "memory of one worker with 1 000 slow readers of 64 MiB objects"
_OBJECTS: Final = 5
_LIMIT_MB: Final = 150.0


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where a reader did not get its answer."""
    outcome = Outcome()
    at = cores()
    readers, seconds = (50, 2.0) if settings.quick else (1000, 15.0)
    size = (8 if settings.quick else 64) * MIB
    with links.far_origin(settings.under, at.others) as far:
        for turn in range(max(1, settings.rounds // 2)):
            with node.running(far.at, settings.under, core=at.server) as kos:
                get(kos.at, presigned_get(kos.at, Object(BUCKET, key_of(4096, "warm-up"))))
                _note(outcome, "idle", kos)
                for phase in ("cold", "hot"):
                    say(f"memory {phase}: round {turn + 1}")
                    objects = [Object(BUCKET, key_of(size, f"slow-{i}")) for i in range(_OBJECTS)]
                    if phase == "hot":
                        for what in objects:
                            get(kos.at, presigned_get(kos.at, what), verify_key=what.key)
                    targets = presigned_targets(kos.at, objects, readers)
                    seen = _with_readers(outcome, phase, kos, targets, seconds, settings.under)
                    if seen["answered_200"] != readers or seen["broken"]:
                        raise BenchFailed(f"slow readers were let down: {seen}")
                    outcome.notes[f"{phase}_readers"] = seen
    outcome.limit("peak_mb", "hot_peak_mb", at_most=_LIMIT_MB)
    return outcome


def _with_readers(
    outcome: Outcome, phase: str, kos: node.Node, targets: list[str], seconds: float, under: Path
) -> dict[str, float]:
    file = under / "slow-targets.txt"
    file.write_text("\n".join(targets))
    options = [
        "--to",
        str(kos.at),
        "--targets",
        str(file),
        "--connections",
        str(len(targets)),
        "--seconds",
        str(seconds),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "bench.slow_readers", *options], stdout=subprocess.PIPE, text=True
    ) as readers:
        assert readers.stdout is not None
        try:
            if readers.stdout.readline().strip() != "readers open":
                raise BenchFailed("the slow readers did not all get an answer")
            try:
                # The end of the run, with all of them still open.
                readers.wait(max(0.5, seconds - 1.0))
            except subprocess.TimeoutExpired:
                _note(outcome, phase, kos)
            text = readers.communicate(timeout=seconds + 60)[0]
        finally:
            if readers.poll() is None:
                readers.kill()
    seen: dict[str, float] = json.loads(text.partition("SUMMARY ")[2])
    return seen


def _note(outcome: Outcome, phase: str, kos: node.Node) -> None:
    memory = kos.worker_memory()
    for name, key in (("peak", "VmHWM"), ("rss", "VmRSS"), ("anonymous", "RssAnon"), ("pss", "Pss")):
        outcome.add(f"{phase}_{name}_mb", memory[key] / 1e6)
