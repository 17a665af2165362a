"""Figure small_files: many objects of 10 KB, cold and hot.

Owns: requests per second and CPU per request of a node with one worker, each object read once cold and then hot over
keep-alive connections, beside reading them from the origin directly, over loopback and over the near link.

Invariant: a cold round reads keys that the node has never seen, and costs the origin one request each.
"""

from __future__ import annotations

from typing import Final

from bench import links, node
from bench.client import Address, Many, get, get_many
from bench.figure import Settings, say
from bench.processes import cores, pinned
from bench.results import BenchFailed, Outcome
from bench.shaper import NEAR
from bench.signing import Object, presigned_get
from bench.synthetic import BUCKET, key_of

SUMMARY: Final = "10 KB objects, cold and hot, beside direct"
_SIZE: Final = 10_000
_CONNECTIONS: Final = 32


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where an answer is wrong or a cold read costs more than one origin request."""
    outcome = Outcome()
    at = cores()
    count = 200 if settings.quick else 2000
    with links.far_origin(settings.under, at.others) as far:
        for name, link in (("loopback", None), ("near", NEAR)):
            with (
                links.through(link, far.at, settings.under) as near_end,
                node.running(near_end, settings.under, core=at.server) as kos,
                pinned(at.others),
            ):
                _one(kos.at, key_of(_SIZE, "warm-up"))
                for turn in range(settings.rounds):
                    say(f"small_files {name}: round {turn + 1} of {settings.rounds}")
                    _round(outcome, name, count, turn, kos, near_end, far)
            for phase in ("cold", "hot"):
                outcome.compare(f"{name}_{phase}_over_direct", f"kos_{name}_{phase}_per_s", f"direct_{name}_per_s")
    return outcome


def _one(to: Address, key: str) -> None:
    get(to, presigned_get(to, Object(BUCKET, key)), verify_key=key)


def _round(outcome: Outcome, name: str, count: int, turn: int, kos: node.Node, direct: Address, far: links.Far) -> None:
    keys = [key_of(_SIZE, f"small-{name}-{turn}-{i}") for i in range(count)]
    requests = {to: [presigned_get(to, Object(BUCKET, key)) for key in keys] for to in (kos.at, direct)}
    _note(outcome, f"direct_{name}", get_many(direct, requests[direct], _CONNECTIONS))
    for phase, origin_gets in (("cold", count), ("hot", 0)):
        asked, cpu = far.counters()["gets"], kos.cpu_seconds()
        seen = get_many(kos.at, requests[kos.at], _CONNECTIONS)
        outcome.add(f"kos_{name}_{phase}_cpu_us", (kos.cpu_seconds() - cpu) / count * 1e6)
        _note(outcome, f"kos_{name}_{phase}", seen)
        asked = far.counters()["gets"] - asked
        if asked != origin_gets:
            raise BenchFailed(f"{count} {phase} reads cost {asked} origin requests, not {origin_gets}")
    for key in keys[:: max(1, count // 20)]:
        _one(kos.at, key)


def _note(outcome: Outcome, name: str, seen: Many) -> None:
    outcome.add(f"{name}_per_s", seen.per_second, high_is_good=True)
    outcome.add(f"{name}_p50_ms", seen.quantile_ms(0.5))
    outcome.add(f"{name}_p99_ms", seen.quantile_ms(0.99))
