"""What the handling of a request uses of its worker.

Owns: the one place where the parts of a worker are named together. Does not own: any of them (kosproxy.worker makes and
closes them).

Invariant: made once at start; nothing in it is replaced while requests are in work.
"""

from __future__ import annotations

import secrets as random_source
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from kos.clock import Clock
from kos.config import Config
from kos.errors import S3Error
from kos.log import AccessLog
from kos.origin.lane import OriginLane
from kos.tasks import Tasks
from koscache.carrier import Carrier
from kosproxy.listings import Listings


class RequestIds:
    """Ids that no other worker gives out: a random start, then every one is another."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = random_source.randbits(64)

    def next(self) -> str:
        """16 characters as S3's own."""
        self._next = number = (self._next + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        return f"{number:016X}"


class HeldBytes:
    """Memory that bodies of requests take which are held whole; all of one worker's together are bounded."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, count: int, limit: int) -> None:
        """Raises SlowDown when that would be more than limit, unless nothing else is held."""
        if self.bytes and self.bytes + count > limit:
            raise S3Error("SlowDown", "Too many large documents at a time.", headers={"Retry-After": "1"})
        self.bytes += count

    def give_back(self, count: int) -> None:
        self.bytes -= count
        assert self.bytes >= 0


@dataclass(frozen=True, slots=True)
class Parts:
    """secrets: access key to secret key of everybody who may sign. threads: for file reads that wait for the disk.
    hashers: for hashing bodies beside the loop; threads of their own, so that no hanging disk holds up a write. tasks:
    owns writes, which outlive the client that sent them. listings: None where no page of a listing is kept."""

    config: Config
    secrets: Mapping[str, str]
    carrier: Carrier
    origin: OriginLane
    clock: Clock
    tasks: Tasks
    access_log: AccessLog
    threads: Executor
    hashers: Executor
    request_ids: RequestIds = field(default_factory=RequestIds)
    listings: Listings | None = None
    held: HeldBytes = field(default_factory=HeldBytes)
