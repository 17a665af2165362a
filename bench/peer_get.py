"""Figure peer_get: a GET whose block another node keeps, beside the same GET of the node that keeps it.

Owns: CPU of all processes of both nodes per GET of 8 MiB and of 64 KiB, asked of the node that keeps the block (local) and of the
one that does not and keeps no copy (spliced); and of that node and an aiohttp relay before it (aiohttp). Two nodes with one
worker each on one core, wrk on the other, in turns. Does not own: hot reads beside other servers (bench.hot_get).

Invariant: nothing is measured before every object is a hit at its owner and is not kept by the other; the origin is asked
nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from bench import links, node, wrk
from bench.client import Address, address, get
from bench.figure import Settings, say
from bench.processes import Cores, Server, cores
from bench.results import MIB, BenchFailed, Outcome
from bench.signing import Object, presigned_get, presigned_targets
from bench.synthetic import BUCKET, key_of

SUMMARY: Final = "CPU of two nodes per GET of a block of the other node, beside a local hit"
_SECRET: Final = "one secret for the two of them"
_WITHIN_S: Final = 30.0
#: Of so many in a row some lie on either node.
_TRIED_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Size:
    """One kind of object: how many of the other node's, and the CPU that they may cost over a local hit's."""

    name: str
    size: int
    objects: int
    urls: int
    connections: int
    at_most: float | None


SIZES: Final = (
    Size("8MiB", 8 * MIB, 8, 64, 4, 2.5),
    Size("64KiB", 64 << 10, 32, 256, 8, None),
)


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where a server or wrk does not do its part."""
    outcome = Outcome()
    at = cores()
    sizes = SIZES[1:] if settings.quick else SIZES
    seconds = 1 if settings.quick else 3
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(links.far_origin(settings.under, at.others))
        near, keeper = stack.enter_context(_two_nodes(far.at, settings.under, at))
        argv = [sys.executable, "-m", "bench.relay", "--to", str(keeper.at)]
        relay = stack.enter_context(Server(argv, r"relay ready (\S+)", settings.under / "relay.log", core=at.server))
        assert relay.match is not None
        kept = {size.name: _kept_by(keeper.at, near.at, size) for size in sizes}
        before = far.counters()
        for size in sizes:
            for turn in range(settings.rounds):
                say(f"peer_get {size.name}: round {turn + 1} of {settings.rounds}")

                def measure(name: str, to: Address, signed_for: Address, cpu_of: Sequence[Callable[[], float]]) -> None:
                    targets = presigned_targets(signed_for, kept[size.name], size.urls)  # noqa: B023
                    _measure(outcome, name, size, to, targets, cpu_of, seconds, settings.under, at)  # noqa: B023

                both = (near.cpu_seconds, keeper.cpu_seconds)
                measure("local", keeper.at, keeper.at, both)
                measure("spliced", near.at, near.at, both)
                measure("aiohttp", address(relay.match[1]), keeper.at, (*both, relay.cpu_seconds))
            limit = size.at_most
            outcome.compare(
                f"cpu_{size.name}", f"spliced_{size.name}_cpu_us", f"local_{size.name}_cpu_us", at_most=limit
            )
            outcome.compare(f"cpu_{size.name}_aiohttp", f"aiohttp_{size.name}_cpu_us", f"local_{size.name}_cpu_us")
            outcome.compare(f"rate_{size.name}", f"spliced_{size.name}_per_s", f"local_{size.name}_per_s")
        asked = {name: value - before[name] for name, value in far.counters().items() if name != "connections"}
        if asked["gets"] or asked["heads"]:
            raise BenchFailed(f"reads of what a node keeps reached the origin: {asked}")
    return outcome


@contextlib.contextmanager
def _two_nodes(origin: Address, under: Path, at: Cores) -> Iterator[tuple[node.Node, node.Node]]:
    """Two members of a static cluster, of which neither keeps what is the other's."""
    ports = _free_ports(4)
    members = [
        {"name": name, "peer": f"127.0.0.1:{ports[2 * i]}", "cluster": f"127.0.0.1:{ports[2 * i + 1]}"}
        for i, name in enumerate(("near", "keeper"))
    ]
    with contextlib.ExitStack() as stack:
        nodes = []
        for member in members:
            anywhere = "127.0.0.1:0"
            more: dict[str, Any] = {
                "listen": {"s3": anywhere, "admin": anywhere, "peer": member["peer"], "cluster": member["cluster"]},
                "cluster": {"membership": "static", "name": member["name"], "secret": _SECRET},
                "members": members,
                "rules": [{"match": f"{BUCKET}/*", "freshness": "immutable", "local_copy": "never"}],
            }
            nodes.append(stack.enter_context(node.running(origin, under, core=at.server, more=more)))
        yield nodes[0], nodes[1]


def _free_ports(number: int) -> list[int]:
    """Ports that were free just now: members are written down before they listen."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


def _kept_by(keeper: Address, near: Address, size: Size) -> list[Object]:
    """Objects that `keeper` has and `near` asks it for: found by asking near, for who keeps what is the nodes' own affair."""
    found: list[Object] = []
    for number in count():
        if number > _TRIED_MAX:
            raise BenchFailed(f"of {_TRIED_MAX} objects of {size.name} the other node keeps {len(found)}")
        what = Object(BUCKET, key_of(size.size, f"peer-{number}"))
        if _settled(near, what) == "peer":
            if _settled(keeper, what) != "hit":
                raise BenchFailed(f"{what.key}: from the other node, which has it not")
            found.append(what)
        if len(found) == size.objects:
            return found
    raise AssertionError("count() does not end")


def _settled(to: Address, what: Object) -> str:
    """The phase in which reads of the object end up: hit or peer."""
    deadline = time.monotonic() + _WITHIN_S
    while True:
        seen = get(to, presigned_get(to, what), verify_key=what.key)
        said = seen.answer.headers.get("x-kos-cache", "")
        phase = said.partition(";")[0]
        if phase in ("hit", "peer"):
            return phase
        if time.monotonic() > deadline:
            raise BenchFailed(f"{what.key} is still {said!r} after {_WITHIN_S} s")
        time.sleep(0.05)


def _measure(
    outcome: Outcome,
    name: str,
    size: Size,
    to: Address,
    targets: list[str],
    cpu_of: Sequence[Callable[[], float]],
    seconds: int,
    under: Path,
    at: Cores,
) -> None:
    cpu = sum(each() for each in cpu_of)
    seen = wrk.load(to, targets, connections=size.connections, seconds=seconds, under=under, core=at.others)
    cpu = sum(each() for each in cpu_of) - cpu
    answers = seen.answers_of(size.size)
    outcome.add(f"{name}_{size.name}_cpu_us", cpu / answers * 1e6)
    outcome.add(f"{name}_{size.name}_per_s", answers / seen.seconds, high_is_good=True)
    outcome.add(f"{name}_{size.name}_p50_us", seen.p50_us)
