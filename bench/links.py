"""The servers around the node: the origin, and the links to it.

Owns: starting bench.origin and bench.shaper as processes, the origin's counters. Does not own: what they do.

Invariant: a link's far end is always the one origin of the run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bench.client import Address, address
from bench.processes import Server
from bench.shaper import Link


@dataclass(frozen=True, slots=True)
class Far:
    """The origin's process and address."""

    server: Server
    at: Address

    def counters(self) -> dict[str, int]:
        """What the origin has been asked so far (see bench.origin.Counters)."""
        connection = http.client.HTTPConnection(self.at.host, self.at.port, timeout=10)
        try:
            connection.request("GET", "/-/counters")
            return cast("dict[str, int]", json.loads(connection.getresponse().read()))
        finally:
            connection.close()


@contextlib.contextmanager
def far_origin(directory: Path, core: int | None) -> Iterator[Far]:
    """Run the origin."""
    log = directory / "origin.log"
    with Server([sys.executable, "-m", "bench.origin"], r"origin ready (\S+)", log, core=core) as server:
        assert server.match is not None
        yield Far(server, address(server.match[1]))


@contextlib.contextmanager
def through(link: Link | None, to: Address, directory: Path, core: int | None = None) -> Iterator[Address]:
    """Yield the near end of a link to `to`; without a link that is `to` itself."""
    if link is None:
        yield to
        return
    limits = [
        option
        for name, rate in (("--rate", link.rate), ("--total", link.total))
        if not math.isinf(rate)
        for option in (name, str(rate))
    ]
    argv = [sys.executable, "-m", "bench.shaper", "--to", str(to), "--delay-ms", str(link.delay_s * 1e3), *limits]
    with Server(argv, r"shaper ready (\S+)", directory / "shaper.log", core=core) as server:
        assert server.match is not None
        yield address(server.match[1])
