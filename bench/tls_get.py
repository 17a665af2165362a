"""Figure tls_get: the same cached objects over https and over http, from one node.

Owns: CPU of the node per signed GET of 4 KiB, 1 MiB and 64 MiB over either, in turns; one worker on one core, wrk on the
other, connections kept open. What one handshake costs is a figure of its own here. Does not own: hot reads beside other
servers (bench.hot_get).

Invariant: nothing is measured before every object is a verified hit.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any, Final

from bench import links, node, wrk
from bench.client import Address, get
from bench.figure import Settings, say
from bench.hot_get import SIZES, Size, await_hit
from bench.processes import Cores, cores
from bench.results import BenchFailed, Outcome
from bench.signing import Object, presigned_get, presigned_targets
from bench.synthetic import BUCKET, key_of
from koscli.demo.certificate import self_signed

SUMMARY: Final = "server CPU per hot signed GET over https, beside http of the same node"
_NAMES: Final = ("4KiB", "1MiB", "64MiB")
_HANDSHAKES: Final = 300


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where a server or wrk does not do its part."""
    outcome = Outcome()
    at = cores()
    sizes = [size for size in SIZES if size.name in _NAMES]
    sizes = sizes[:1] if settings.quick else sizes
    seconds = 1 if settings.quick else 3
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(links.far_origin(settings.under, at.others))
        more = {"listen": listen_https(settings.under)}
        kos = stack.enter_context(node.running(far.at, settings.under, core=at.server, more=more))
        assert kos.secure is not None
        for size in sizes:
            objects = [Object(BUCKET, key_of(size.size, f"hot-{i}")) for i in range(size.objects)]
            for what in objects:
                get(kos.at, presigned_get(kos.at, what))
            for what in objects:
                await_hit(kos.at, what)
            sides = {"https": kos.secure, "http": kos.at}
            targets = {scheme: presigned_targets(to, objects, size.urls) for scheme, to in sides.items()}
            for turn in range(settings.rounds):
                say(f"tls_get {size.name}: round {turn + 1} of {settings.rounds}")
                for scheme, to in sides.items():
                    _measure(outcome, scheme, to, size, kos, targets[scheme], seconds, settings.under, at)
            outcome.compare(f"cpu_{size.name}", f"https_{size.name}_cpu_us", f"http_{size.name}_cpu_us")
            outcome.compare(f"rate_{size.name}", f"https_{size.name}_per_s", f"http_{size.name}_per_s")
        for _ in range(settings.rounds):
            _measure_handshakes(outcome, kos)
    return outcome


def _measure(
    outcome: Outcome,
    scheme: str,
    to: Address,
    size: Size,
    kos: node.Node,
    targets: list[str],
    seconds: int,
    under: Path,
    at: Cores,
) -> None:
    cpu = kos.cpu_seconds()
    seen = wrk.load(
        to, targets, connections=size.connections, seconds=seconds, under=under, core=at.others, scheme=scheme
    )
    cpu = kos.cpu_seconds() - cpu
    answers = seen.answers_of(size.size)
    outcome.add(f"{scheme}_{size.name}_cpu_us", cpu / answers * 1e6)
    outcome.add(f"{scheme}_{size.name}_per_s", answers / seen.seconds, high_is_good=True)


def _measure_handshakes(outcome: Outcome, kos: node.Node) -> None:
    """CPU of the node for a connection that is opened, shaken hands on and closed; none takes up a former one."""
    assert kos.secure is not None
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    cpu = kos.cpu_seconds()
    for _ in range(_HANDSHAKES):
        with (
            socket.create_connection((kos.secure.host, kos.secure.port), timeout=10) as plain,
            context.wrap_socket(plain) as secure,
        ):
            if secure.session_reused:
                raise BenchFailed("a session was taken up again")
    outcome.add("handshake_cpu_us", (kos.cpu_seconds() - cpu) / _HANDSHAKES * 1e6)


def listen_https(under: Path) -> dict[str, Any]:
    """`listen` of a node that speaks https as well, with a certificate made for it."""
    cert, key = self_signed(under)
    anywhere = "127.0.0.1:0"
    names = dict.fromkeys(("s3", "s3_tls", "admin", "peer"), anywhere)
    return {**names, "tls_cert_file": str(cert), "tls_key_file": str(key)}
