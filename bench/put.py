"""Figure put: writing 64 MiB through kos, beside writing it to the origin directly.

Owns: MB/s and CPU per MiB of the node, for bodies that are not signed, bodies signed as a whole, and what boto3 sends
by itself; over loopback and over the near link.

Invariant: the same bytes go the same way on both sides, in turns; the origin has received every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bench import links, node
from bench.client import Address, put
from bench.figure import Settings, say
from bench.processes import cores
from bench.results import MIB, BenchFailed, Outcome
from bench.shaper import NEAR
from bench.signing import ACCESS_KEY, REGION, SECRET_KEY, UNSIGNED, Object, sha256_hex, signed_put
from bench.synthetic import BUCKET, key_of, pattern

SUMMARY: Final = "PUT of 64 MiB, beside direct"
_Put = Callable[[Address, Object], float]


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where a PUT is refused or bytes are missing at the origin."""
    outcome = Outcome()
    at = cores()
    size = (8 if settings.quick else 64) * MIB
    body = (pattern() + pattern())[:size]
    kinds = _kinds(body)
    with links.far_origin(settings.under, at.others) as far:
        for name, link in (("loopback", None), ("near", NEAR)):
            with links.through(link, far.at, settings.under) as near_end, node.running(near_end, settings.under) as kos:
                for kind, send in kinds.items():
                    send(kos.at, Object(BUCKET, key_of(size, f"put-{kind}")))
                    for turn in range(settings.rounds):
                        say(f"put {name} {kind}: round {turn + 1} of {settings.rounds}")
                        _round(outcome, f"{name}_{kind}", size, send, kos, near_end, far, turn)
                    outcome.compare(
                        f"{name}_{kind}_over_direct",
                        f"kos_{name}_{kind}_mb_s",
                        f"direct_{name}_{kind}_mb_s",
                        at_least=0.9,
                    )
    return outcome


def _round(
    outcome: Outcome, name: str, size: int, send: _Put, kos: node.Node, direct: Address, far: links.Far, turn: int
) -> None:
    for side, to in (("kos", kos.at), ("direct", direct)):
        received, cpu = far.counters()["bytes_received"], kos.cpu_seconds()
        seconds = send(to, Object(BUCKET, key_of(size, f"put-{name}-{turn}")))
        if side == "kos":
            outcome.add(f"kos_{name}_cpu_us_per_mib", (kos.cpu_seconds() - cpu) / (size / MIB) * 1e6)
        outcome.add(f"{side}_{name}_mb_s", size / seconds / 1e6, high_is_good=True)
        arrived = far.counters()["bytes_received"] - received
        if arrived < size:
            raise BenchFailed(f"{name}: only {arrived} of {size} bytes reached the origin by way of {side}")


def _kinds(body: bytes) -> dict[str, _Put]:
    digest = sha256_hex(body)

    def raw(payload: str) -> _Put:
        return lambda to, what: put(to, signed_put(to, what, len(body), payload), body).total_s

    return {"unsigned": raw(UNSIGNED), "signed": raw(digest), "boto3": _boto3(body)}


def _boto3(body: bytes) -> _Put:
    """boto3 with its defaults; its own hashing counts on both sides."""
    import time

    import boto3
    from botocore.config import Config

    clients: dict[Address, Any] = {}

    def send(to: Address, what: Object) -> float:
        if to not in clients:
            clients[to] = boto3.client(
                "s3",
                endpoint_url=f"http://{to}",
                aws_access_key_id=ACCESS_KEY,
                aws_secret_access_key=SECRET_KEY,
                region_name=REGION,
                config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
            )
        start = time.perf_counter()
        clients[to].put_object(Bucket=what.bucket, Key=what.key, Body=body)
        return time.perf_counter() - start

    return send
