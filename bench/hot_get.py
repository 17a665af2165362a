"""Figure hot_get: signed GETs of cached objects, beside nginx serving the same bytes.

Owns: server CPU per request and rate for 4 KiB, 64 KiB, 1 MiB and 64 MiB; kos with one worker and nginx with one worker
on one core, wrk on the other, in turns. Every URL is presigned with a signature of its own; 4KiB_own_query: and with a
query of its own. nginx gets the bare paths.

Invariant: nothing is measured before every object is a verified hit; kos and nginx serve the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import links, nginx, node, wrk
from bench.client import Address, get
from bench.figure import Settings, say
from bench.processes import Cores, cores
from bench.results import MIB, BenchFailed, Outcome
from bench.signing import Object, presigned_get, presigned_targets
from bench.synthetic import BUCKET, base_of, key_of, pattern

SUMMARY: Final = "server CPU per hot signed GET, beside nginx"
_HIT_WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Size:
    """One kind of object: how many of them, how many URLs and connections, and the CPU it may cost over nginx's."""

    name: str
    size: int
    objects: int
    urls: int
    connections: int
    at_most: float | None
    own_query: bool = False


SIZES: Final = (
    Size("4KiB", 4 << 10, 512, 4096, 16, 2.5),
    Size("4KiB_own_query", 4 << 10, 512, 20_000, 16, None, own_query=True),  # more heads than kos remembers
    Size("64KiB", 64 << 10, 256, 2048, 16, None),
    Size("1MiB", MIB, 32, 512, 8, 1.5),
    Size("64MiB", 64 * MIB, 4, 64, 4, 1.5),
)


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where a server or wrk does not do its part."""
    outcome = Outcome()
    at = cores()
    sizes = SIZES[:1] if settings.quick else SIZES
    seconds = 1 if settings.quick else 3
    files = settings.under / "files"
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(links.far_origin(settings.under, at.others))
        kos = stack.enter_context(node.running(far.at, settings.under, core=at.server))
        targets = {size.name: _warm(kos.at, size, files) for size in sizes}
        logging = stack.enter_context(nginx.running(files, settings.under, access_log=True, core=at.server))
        silent = stack.enter_context(nginx.running(files, settings.under, access_log=False, core=at.server))
        before = far.counters()
        for size in sizes:
            for turn in range(settings.rounds):
                say(f"hot_get {size.name}: round {turn + 1} of {settings.rounds}")
                _measure(outcome, "kos", size, kos, targets[size.name], seconds, settings.under, at)
                bare = [target.partition("?")[0] for target in targets[size.name]]
                _measure(outcome, "nginx", size, logging, bare, seconds, settings.under, at)
                _measure(outcome, "nginx_without_log", size, silent, bare, seconds, settings.under, at)
            _compare(outcome, size)
        asked = {name: count - before[name] for name, count in far.counters().items() if name != "connections"}
        if asked["gets"] or asked["heads"]:
            raise BenchFailed(f"hot reads reached the origin: {asked}")
        outcome.notes["kos_cpu_by_process_s"] = kos.cpu_by_process()
    return outcome


def _objects(size: Size) -> Iterator[Object]:
    return (Object(BUCKET, key_of(size.size, f"hot-{i}")) for i in range(size.objects))


def _warm(kos: Address, size: Size, files: Path) -> list[str]:
    """Read every object through kos until it is a hit with the right bytes, and lay the same bytes out for nginx."""
    whole = memoryview(pattern() * (1 + size.size // len(pattern())))
    for what in _objects(size):
        get(kos, presigned_get(kos, what))
    for what in _objects(size):
        await_hit(kos, what)
        file = files / what.bucket / what.key
        file.parent.mkdir(parents=True, exist_ok=True)
        begin = base_of(what.key)
        file.write_bytes(b"".join(_cut(whole, begin, size.size)))
    for directory in (files, files / BUCKET, files / BUCKET / str(size.size)):
        directory.chmod(0o755)
    return presigned_targets(kos, _objects(size), size.urls, own_query=size.own_query)


def await_hit(kos: Address, what: Object) -> None:
    """Read until the object is served out of the store: a block is committed a moment after it was answered."""
    deadline = time.monotonic() + _HIT_WITHIN_S
    while True:
        seen = get(kos, presigned_get(kos, what), verify_key=what.key)
        said = seen.answer.headers.get("x-kos-cache", "")
        if said.startswith("hit"):
            return
        if time.monotonic() > deadline:
            raise BenchFailed(f"{what.key} is still no hit after {_HIT_WITHIN_S} s but {said!r}")
        time.sleep(0.05)


def _cut(whole: memoryview, begin: int, size: int) -> Iterator[memoryview]:
    first = whole[begin : begin + size]
    yield first
    if len(first) < size:
        yield whole[(begin + len(first)) % len(pattern()) :][: size - len(first)]


def _measure(
    outcome: Outcome,
    name: str,
    size: Size,
    server: node.Node | nginx.Nginx,
    targets: list[str],
    seconds: int,
    under: Path,
    at: Cores,
) -> None:
    cpu = server.cpu_seconds()
    seen = wrk.load(server.at, targets, connections=size.connections, seconds=seconds, under=under, core=at.others)
    cpu = server.cpu_seconds() - cpu
    answers = seen.answers_of(size.size)
    outcome.add(f"{name}_{size.name}_cpu_us", cpu / answers * 1e6)
    outcome.add(f"{name}_{size.name}_per_s", answers / seen.seconds, high_is_good=True)
    outcome.add(f"{name}_{size.name}_p50_us", seen.p50_us)


def _compare(outcome: Outcome, size: Size) -> None:
    kos = f"kos_{size.name}"
    outcome.compare(f"cpu_{size.name}", f"{kos}_cpu_us", f"nginx_{size.name}_cpu_us", at_most=size.at_most)
    outcome.compare(f"cpu_{size.name}_nginx_without_log", f"{kos}_cpu_us", f"nginx_without_log_{size.name}_cpu_us")
    outcome.compare(f"rate_{size.name}", f"{kos}_per_s", f"nginx_{size.name}_per_s")
