"""What the parts of a carrier share.

Owns: the bundle of ports (configuration, reader, origin, clock, tasks, link), the write threads and the fill buffers.
Does not own: any decision.

Invariant: one per worker; everything in it may be used from the loop's thread, the buffers' bytes from a write thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from kos.clock import Clock
from kos.config import ALWAYS, Cache, Config, Rule
from kos.origin.response import OriginResponse
from kos.rules import Rules
from kos.tasks import Tasks
from koscache.carrier.link import Link
from koscache.content import Record, rule_of, split_name
from koscache.reader import Reader

if TYPE_CHECKING:
    from koscache.carrier.upstream import Upstream

#: What the origin is asked to add to every answer.
CHECKSUM_MODE = ("x-amz-checksum-mode", "ENABLED")
#: S3's names of the requests, for the metrics
_OPERATIONS: Final = {"GET": "GetObject", "HEAD": "HeadObject"}


class Origin(Protocol):
    """The part of kos.origin.lane.OriginLane that the carrier uses."""

    async def request(
        self,
        method: str,
        bucket: str | None,
        key: str | None,
        *,
        query: Sequence[tuple[str, str]] = (),
        headers: Sequence[tuple[str, str]] = (),
        retry: bool = False,
        operation: str | None = None,
    ) -> OriginResponse: ...


class BufferPool:
    """Buffers that bodies land in on their way to a file: at most buffers_max of buffer_bytes, reused.

    A fill takes one to begin with and a second one when there is one; so whoever waits waits for a fill that can end.
    """

    def __init__(self, buffer_bytes: int, buffers_max: int) -> None:
        self.buffer_bytes = buffer_bytes
        #: buffers that there are
        self.made = 0
        self._left = buffers_max
        self._free: list[bytearray] = []
        self._waiting: deque[asyncio.Future[bytearray]] = deque()

    def take_now(self) -> bytearray | None:
        """A buffer if there is one and nobody waits for it."""
        if self._waiting:
            return None
        if self._free:
            return self._free.pop()
        if self._left > 0:
            self._left -= 1
            self.made += 1
            return bytearray(self.buffer_bytes)
        return None

    async def take(self) -> bytearray:
        buffer = self.take_now()
        if buffer is not None:
            return buffer
        future: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    def give(self, buffer: bytearray) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(buffer)
                return
        self._free.append(buffer)


@lru_cache(maxsize=256)
def _confirmed(rule: Rule) -> Rule:
    """Asked for each time, and never served because the origin is down: a write may have gone by unheard."""
    return msgspec.structs.replace(rule, freshness=ALWAYS, stale_if_error_s=0.0)


@dataclass(slots=True, eq=False)
class Context:
    config: Config
    reader: Reader
    origin: Origin
    rules: Rules
    clock: Clock
    tasks: Tasks
    link: Link
    buffers: BufferPool
    peer_buffers: BufferPool
    threads: ThreadPoolExecutor
    upstream: Upstream

    @property
    def cache(self) -> Cache:
        return self.config.cache

    async def ask(
        self, method: str, bucket: str, key: str, headers: Sequence[tuple[str, str]], *, part: int | None = None
    ) -> OriginResponse:
        """The origin's answer to a read. key: or a version_name(), which is where it becomes a key and a versionId.

        part: asks for that part of an object made of parts. Raises OriginUnavailable, OriginBroken.
        """
        real_key, version_id = split_name(key)
        query: list[tuple[str, str]] = []
        if part is not None:
            query.append(("partNumber", str(part)))
        if version_id is not None:
            query.append(("versionId", version_id))
        return await self.origin.request(
            method, bucket, real_key, query=query, headers=headers, retry=True, operation=_OPERATIONS[method]
        )

    def rule(self, bucket: str, key: str) -> Rule:
        """How long a record of it may be trusted; see rule_of(). While the fence is not to be trusted: not at all."""
        rule = rule_of(self.rules, bucket, key)
        return rule if self.reader.fence.trusted() else _confirmed(rule)

    def forget(self, bucket: str, key: str, record: Record) -> None:
        """The origin has another version than the record says: the next open asks it.

        Only when nobody has done so since: many readers notice a change at once, and each further value of the slot would
        make another origin request.
        """
        fence = self.reader.fence
        slot = fence.slot(bucket, key)
        if fence.value(slot) == record.fence:
            fence.bump(slot)
        self.upstream.gone(bucket, key, record.etag)
