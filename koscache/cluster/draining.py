"""Moving what a node keeps to those who have taken over its share, while it drains.

    every block of the store, what was read first (koscache.inventory)
      ─▶ its owner on the ring without this node
      ─▶ take: the owner fetches it from here ......... 503: it has enough to do, ask again
      ─▶ checksum: is it in the owner's store? ........ then it counts as moved
    and with the first block of an object, which is its home's: learn, so that the home has its record too

Owns: when moving begins and ends, the order of blocks, how many are on their way, progress. Does not own: who drains (the view),
how an owner fetches (koscache.carrier), the store.

Invariant: it costs warmth alone if any of it goes wrong. What could not be moved is fetched from the origin by who needs it; a
block that is counted as moved was seen in its owner's store. At most _AT_A_TIME batches of _BATCH_BYTES are on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from kos import log
from kos.clock import Clock
from kos.config import Config, split_address
from kos.errors import KosError
from kos.tasks import Tasks, TasksClosed
from koscache.cluster.ring import Ring
from koscache.cluster.view import NOBODY, MemberState, View
from koscache.content import Record
from koscache.disk import StoreFailed
from koscache.eviction import Touches
from koscache.index import block_key
from koscache.inventory import Held, Place
from koscache.keeper import Keeper

if TYPE_CHECKING:
    from koscache.carrier.peer_wire import Ask
    from koscache.carrier.peers import Peers

_log: Final = logging.getLogger("koscache.cluster")

#: Blocks are moved in batches: of one object to one owner. 64 MiB are on their way in blocks of 8 MiB: enough for 10 Gbit/s
#: at 50 ms each, and little beside what clients read meanwhile.
_AT_A_TIME: Final = 8
_BATCH_BYTES: Final = 8 << 20
_BATCH_MAX: Final = 64
#: A batch that its owner has accepted should be there by then.
_TAKE_S: Final = 10.0
#: An owner that has no room for so long, or does not answer, is done without for as long: else all would wait for it.
_BUSY_S: Final = 30.0
_TRIES: Final = 6
_PAUSE_FIRST_S: Final = 0.1
_PAUSE_MAX_S: Final = 2.0
#: A store that fails is asked again so often: it is being mended.
_STORE_S: Final = 1.0


#: member, topic, body -> body; raises KosError when it cannot be asked
AskDaemon = Callable[[str, str, bytes], Awaitable[bytes]]


class Rings:
    """The ring of the newest view that was asked for, made in a thread: a large one takes a second."""

    def __init__(self) -> None:
        self._view = NOBODY
        self._ring = Ring(())

    async def of(self, view: View) -> Ring:
        if view.members != self._view.members:
            ring = await asyncio.to_thread(Ring, view.members)
            self._view, self._ring = view, ring
            return ring
        return self._ring


class Progress(msgspec.Struct):
    """since: when it began, RFC 3339. left_estimate: blocks that have not been looked at. failed_blocks: those that their
    owners did not take. stage: "hot" while what was read is moved, then "rest". ended: why it is done: "moved", or "time" when
    cluster.drain was over, or "failed"."""

    since: str
    moved_blocks: int = 0
    moved_bytes: int = 0
    failed_blocks: int = 0
    left_estimate: int = 0
    stage: str = "hot"
    done: bool = False
    ended: str = ""


class Batch(NamedTuple):
    """Blocks of one version that have one owner: their numbers, and how long each is."""

    owner: str
    bucket: str
    name: str
    record: Record
    blocks: tuple[tuple[int, int], ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(number for number, _ in self.blocks)

    @property
    def length(self) -> int:
        return sum(length for _, length in self.blocks)


class Draining:
    """follow() with each view of this node; the rest happens by itself. All on the daemon's loop."""

    def __init__(
        self,
        settings: Config,
        keeper: Keeper,
        rings: Rings,
        name: str,
        ask_daemon: AskDaemon,
        clock: Clock,
        tasks: Tasks,
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._rings = rings
        self._name = name
        self._ask_daemon = ask_daemon
        self._clock = clock
        self._tasks = tasks
        self._drain: _Drain | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, view: View) -> None:
        """The members are these: begins to move when this node is one that drains, stops when it is not any more."""
        me = view.find(self._name)
        if me is None:
            return
        if me.state is not MemberState.DRAINING:
            if self._task is not None:
                _log.info("no longer draining")
                self._task.cancel()
            self._drain = self._task = None
        elif self._drain is not None:
            self._drain.follow(view)
        else:
            self._drain = _Drain(
                self._settings, self._keeper, self._rings, self._name, view, self._ask_daemon, self._clock, self._tasks
            )
            with contextlib.suppress(TasksClosed):
                self._task = self._tasks.spawn(self._drain.run(), "drain")

    def progress(self) -> dict[str, Any] | None:
        """See Progress; None while this node does not drain."""
        return None if self._drain is None else msgspec.structs.asdict(self._drain.progress)


class _Drain:
    """One time that this node drains. run() once."""

    def __init__(
        self,
        settings: Config,
        keeper: Keeper,
        rings: Rings,
        name: str,
        view: View,
        ask_daemon: AskDaemon,
        clock: Clock,
        tasks: Tasks,
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._rings = rings
        self._name = name
        self._view = view
        self._ask_daemon = ask_daemon
        self._clock = clock
        self._tasks = tasks
        self._until = clock.monotonic() + settings.cluster.drain_s
        self._peers: Peers | None = None
        self._given_up: dict[str, float] = {}
        self._deaf: set[str] = set()
        #: blocks that were looked at; two may share a bit, then the second stays
        self._seen = Touches()
        self._seen_count = 0
        self.progress = Progress(log.timestamp(clock.now()))

    def follow(self, view: View) -> None:
        self._view = view
        if self._peers is not None:
            self._peers.update(view)

    async def run(self) -> None:
        progress = self.progress
        _log.info("draining", extra={"for_s": self._settings.cluster.drain_s})
        ended = "failed"
        try:
            self._peers = self._make_peers()
            moved = await self._move(hot=True)
            if moved:
                progress.stage = "rest"
                moved = await self._move(hot=False)
            if moved:
                progress.left_estimate = 0
            ended = "moved" if moved else "time"
        finally:
            progress.ended, progress.done = ended, True
            if self._peers is not None:
                self._peers.close()
            _log.info("moving ended", extra=msgspec.structs.asdict(progress))

    def _make_peers(self) -> Peers:
        # Here, for few daemons ever need it, and it brings with it what workers are made of.
        from koscache.carrier.peers import Peers

        cluster = self._settings.cluster
        host, _ = split_address(self._settings.listen.peer)
        local_host = None if host in ("0.0.0.0", "::") else host
        assert cluster.secret is not None, "checked with the configuration"
        peers = Peers(cluster, self._name, cluster.secret.encode(), self._clock, self._tasks, local_host)
        peers.update(self._view)
        return peers

    @property
    def _over(self) -> bool:
        return self._clock.monotonic() >= self._until

    # --- what there is ----------------------------------------------------------------------------------------------------

    async def _pages(self, hot: bool) -> AsyncGenerator[list[Held], None]:
        """The newest first; then what segments do not name. Empty ones while the store fails."""
        segments = await self._keeper.segments()
        for segment in [] if isinstance(segments, StoreFailed) else segments:
            at: int | None = 0
            while at is not None:
                entries = await self._keeper.of_segment(segment, at, hot=hot)
                if isinstance(entries, StoreFailed):
                    yield await self._nothing()
                else:
                    at = entries.next
                    yield entries.held
        place: Place | None = Place()
        while place is not None:
            objects = await self._keeper.of_objects(place, hot=hot)
            if isinstance(objects, StoreFailed):
                yield await self._nothing()
            else:
                place = objects.next
                yield objects.held

    async def _nothing(self) -> list[Held]:
        await self._clock.sleep(_STORE_S)
        return []

    # --- moving -----------------------------------------------------------------------------------------------------------

    async def _move(self, hot: bool) -> bool:
        """False: there was no time for all of it."""
        await self._estimate()
        async with contextlib.aclosing(self._pages(hot)) as pages:
            async for held in pages:
                if self._over:
                    return False
                await self._move_page([each for each in held if self._is_new(each)])
        return not self._over

    async def _move_page(self, held: list[Held]) -> None:
        # Nobody is given what was found after a crash and not looked at since.
        sound = [each for each in held if each.verified or await self._keeper.check(each.record.content, each.number)]
        ring = await self._rings.of(self._view)
        batches = await asyncio.to_thread(batches_of, ring, sound)
        self._count([], len(held) - sum(len(batch.blocks) for batch in batches))
        await self._teach(batches)
        left = iter(batches)
        await asyncio.gather(*(self._hand_over(left) for _ in range(_AT_A_TIME)))

    async def _teach(self, batches: list[Batch]) -> None:
        """The new homes of a page's objects: what is known of them. Who does not hear of it asks the origin."""
        lessons: dict[str, list[tuple[str, str, Record]]] = {}
        for batch in batches:
            if 0 in batch.numbers:
                lessons.setdefault(batch.owner, []).append((batch.bucket, batch.name, batch.record))
        for owner, records in lessons.items():
            await self._tell(owner, records)

    async def _tell(self, owner: str, records: list[tuple[str, str, Record]]) -> None:
        body, pause_s = msgspec.json.encode({"records": records}), _PAUSE_FIRST_S
        # Its line may just be beginning: when this daemon has started, or said anew that it drains.
        for left in reversed(range(_TRIES if owner not in self._deaf else 1)):
            try:
                await self._ask_daemon(owner, "learn", body)
                self._deaf.discard(owner)
                return
            except KosError as error:
                reason = str(error)
            if left:
                await self._clock.sleep(self._clock.jitter(pause_s / 2, pause_s))
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        self._deaf.add(owner)
        _log.warning("records not told", extra={"to": owner, "records": len(records), "reason": reason})

    async def _estimate(self) -> None:
        stats = await self._keeper.stats()
        if not isinstance(stats, StoreFailed):
            self.progress.left_estimate = max(0, stats.blocks - self._seen_count)

    def _is_new(self, held: Held) -> bool:
        key = block_key(held.record.content, held.number)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    async def _hand_over(self, batches: Iterator[Batch]) -> None:
        """One after the other of what is left."""
        for batch in batches:
            if self._over:
                return
            taken = await self._take(batch)
            self._count(taken, len(batch.blocks) - len(taken))

    def _count(self, moved: list[int], failed: int) -> None:
        """moved: lengths of blocks."""
        progress, count = self.progress, len(moved) + failed
        progress.moved_blocks += len(moved)
        progress.moved_bytes += sum(moved)
        progress.failed_blocks += failed
        progress.left_estimate = max(0, progress.left_estimate - count)
        self._seen_count += count

    async def _take(self, batch: Batch) -> list[int]:
        """Lengths of those blocks that the owner has now."""
        from koscache.carrier import peer_wire as wire

        owner, bucket, name, record, blocks = batch
        block_bytes = self._settings.cache.block_bytes
        take = wire.AskTake(bucket, name, record, batch.numbers, self._name, block_bytes)
        now = self._clock.monotonic()
        if now < self._given_up.get(owner, now):
            return []
        if not await self._insist(owner, wire.TAKE, take, min(self._until, now + _BUSY_S), again=503):
            self._given_up[owner] = self._clock.monotonic() + _BUSY_S
            return []
        until = min(self._until, self._clock.monotonic() + _TAKE_S)
        taken = []
        for number, length in blocks:
            there = wire.AskBlock(bucket, name, record, number, 0, length, block_bytes=block_bytes)
            if await self._insist(owner, wire.CHECKSUM, there, until, again=404):
                taken.append(length)
        return taken

    async def _insist(self, owner: str, path: str, ask: Ask, until: float, *, again: int) -> bool:
        """Asks until the answer is yes. again: a status that means not yet."""
        from koscache.carrier.peers import PeerUnavailable, failed_of

        assert self._peers is not None, "made first"
        pause_s, tries = _PAUSE_FIRST_S, _TRIES
        reason = "not in time"
        while self._clock.monotonic() < until:
            try:
                response = await self._peers.ask([owner], path, ask, hedge=False)
            except PeerUnavailable as error:
                reason, tries = str(error), tries - 1
                if not tries:
                    break
            else:
                if response.status in (200, 204):
                    response.release()
                    return True
                failed = await failed_of(response)
                reason = failed.reason
                if response.status != again:
                    break
            await self._clock.sleep(self._clock.jitter(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        _log.warning("not moved", extra={"to": owner, "reason": reason})
        return False


def batches_of(ring: Ring, held: list[Held]) -> list[Batch]:
    """The blocks by version and owner, in the order of their first ones; without those that nobody is to own. Takes long: not
    for the loop."""
    batches: list[Batch] = []
    growing: dict[tuple[str, str, str, bytes], int] = {}
    for each in held:
        content = each.record.content
        for owner in ring.block_owners(each.bucket, each.name, content, each.number, 1):
            key = (owner, each.bucket, each.name, content)
            at = growing.get(key)
            more = ((each.number, each.length),)
            if at is not None and _has_room(batches[at], each.length):
                batches[at] = batches[at]._replace(blocks=batches[at].blocks + more)
            else:
                growing[key] = len(batches)
                batches.append(Batch(owner, each.bucket, each.name, each.record, more))
    return batches


def _has_room(batch: Batch, length: int) -> bool:
    return batch.length + length <= _BATCH_BYTES and len(batch.blocks) < _BATCH_MAX
