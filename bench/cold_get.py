"""Figure cold_get: the first read of a large object, over three distances to the origin.

Owns: over loopback CPU per MiB of all processes of the node, beside the bare loop of bench.floor; over the near and the
long link MB/s and time to first byte, beside a single direct stream through the same link.

Invariant: every round reads a key that the node has never seen, and the two sides take turns.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import links, node
from bench.client import Address, Timing, address, get
from bench.figure import Settings, say
from bench.processes import Server, cores, pinned
from bench.results import MIB, Outcome
from bench.shaper import LONG, NEAR, Link
from bench.signing import Object, plain_get, presigned_get
from bench.synthetic import BUCKET, key_of

SUMMARY: Final = "cold read of 1 GiB: CPU beside the floor, MB/s beside one direct stream"
#: The first request of a node pays for its first connection to the origin; it is not the figure.
_WARM_UP: Final = key_of(4096, "warm-up")


def run(settings: Settings) -> Outcome:
    """Measure all three distances; raises BenchFailed where an answer is wrong."""
    outcome = Outcome()
    size = (64 if settings.quick else 1024) * MIB
    at = cores()
    with links.far_origin(settings.under, at.others) as far:
        _loopback(outcome, settings, far, size)
        _over_link(outcome, settings, far, size, "near", NEAR, at_least=1.0)
        if not settings.quick:
            _over_link(outcome, settings, far, size, "long", LONG, at_least=4.0)
    return outcome


def _cold(to: Address, size: int, name: str, *, verify: bool = False) -> Timing:
    what = Object(BUCKET, key_of(size, name))
    return get(to, presigned_get(to, what), verify_key=what.key if verify else None)


@contextlib.contextmanager
def _floor(far: links.Far, under: Path, core: int | None) -> Iterator[tuple[Server, Address]]:
    argv = [sys.executable, "-m", "bench.floor", "--to", str(far.at), "--file", str(under / "floor.bytes")]
    with Server(argv, r"floor ready (\S+)", under / "floor.log", core=core) as server:
        assert server.match is not None
        yield server, address(server.match[1])


def _loopback(outcome: Outcome, settings: Settings, far: links.Far, size: int) -> None:
    """CPU: the server under test has one core, origin and client the other."""
    at = cores()
    for turn in range(settings.rounds):
        say(f"cold_get loopback: round {turn + 1} of {settings.rounds}")
        with (
            node.running(far.at, settings.under, core=at.server) as kos,
            _floor(far, settings.under, at.server) as (floor, floor_at),
            pinned(at.others),
        ):
            get(kos.at, presigned_get(kos.at, Object(BUCKET, _WARM_UP)))
            for name, server, to in (("kos", kos.server, kos.at), ("floor", floor, floor_at)):
                asked, cpu = far.counters(), server.cpu_seconds()
                by_process = kos.cpu_by_process()
                seen = _cold(to, size, f"loopback-{turn}")
                cpu = server.cpu_seconds() - cpu
                outcome.add(f"{name}_loopback_cpu_us_per_mib", cpu / (seen.size / MIB) * 1e6)
                outcome.add(f"{name}_loopback_mb_s", seen.mb_s, high_is_good=True)
                outcome.add(f"{name}_loopback_first_ms", seen.first_s * 1e3)
                if name == "kos":
                    after = kos.cpu_by_process()
                    outcome.notes["kos_cpu_us_per_mib_by_process"] = {
                        role: round((s - by_process.get(role, 0.0)) / (seen.size / MIB) * 1e6, 1)
                        for role, s in after.items()
                    }
                    outcome.notes["origin_requests"] = far.counters()["gets"] - asked["gets"]
            _cold(kos.at, size, f"loopback-{turn}", verify=True)
    outcome.compare("cpu_over_floor", "kos_loopback_cpu_us_per_mib", "floor_loopback_cpu_us_per_mib", at_most=1.5)
    outcome.compare("loopback_rate_over_floor", "kos_loopback_mb_s", "floor_loopback_mb_s")


def _over_link(
    outcome: Outcome, settings: Settings, far: links.Far, size: int, name: str, link: Link, *, at_least: float
) -> None:
    for turn in range(settings.rounds):
        say(f"cold_get {name}: round {turn + 1} of {settings.rounds}")
        with links.through(link, far.at, settings.under) as near_end, node.running(near_end, settings.under) as kos:
            get(kos.at, presigned_get(kos.at, Object(BUCKET, _WARM_UP)))
            what = Object(BUCKET, key_of(size, f"{name}-{turn}"))
            direct = get(near_end, plain_get(near_end, what.path))
            seen = _cold(kos.at, size, f"{name}-{turn}", verify=False)
            for side, timing in (("kos", seen), ("direct", direct)):
                outcome.add(f"{side}_{name}_mb_s", timing.mb_s, high_is_good=True)
                outcome.add(f"{side}_{name}_first_ms", timing.first_s * 1e3)
    outcome.compare(f"{name}_rate_over_direct", f"kos_{name}_mb_s", f"direct_{name}_mb_s", at_least=at_least)
    outcome.compare(f"{name}_first_byte_over_direct", f"kos_{name}_first_ms", f"direct_{name}_first_ms")
