"""The one thread that touches the store: calls from the loop, gathered into batches, answered on the loop.

Owns: the thread, the queue in front of it, batching (group commit), evicting when a reservation finds no room. Does not
own: what is decided (leases), what a failing store means for the node (daemon).

Invariant: calls of one kind for one key reach the store in the order they were made, one at a time, and each is answered
exactly once, also when the store failed: with the StoreFailed.

While one batch is in work the next one gathers. So a lone commit waits for nothing, and a thousand at once share a few
transactions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Protocol

from kos.tasks import Tasks
from koscache.content import Commit, Extent, Location, Record, Refusal, Refused, Small
from koscache.disk import StoreFailed
from koscache.inventory import ObjectsPage, Place, SegmentPage
from koscache.ipc import PassReason
from koscache.leases import Here
from koscache.store import ScrubReport, Stats

_log: Final = logging.getLogger("koscache.keeper")

#: One transaction holds at most so many calls: a bound on its time, far above what a batch reaches.
_BATCH_MAX: Final = 1024
_CALL_BYTES: Final = 512


class Storing(Protocol):
    """The part of koscache.store.Store that is used here."""

    def reserve(self, content: bytes, number: int, length: int) -> Extent | Refused: ...
    def commit(self, commits: list[Commit]) -> list[bool]: ...
    def abandon(self, extent: Extent) -> None: ...
    def put_small(self, smalls: list[Small]) -> list[bool]: ...
    def put_record(self, bucket: str, key: str, record: Record) -> bool: ...
    def drop_record(self, bucket: str, key: str) -> None: ...
    def locate(self, content: bytes, number: int) -> Location | None: ...
    def record(self, bucket: str, key: str) -> Record | None: ...
    def segments(self) -> list[int]: ...
    def of_segment(self, segment: int, start: int, hot: bool) -> SegmentPage: ...
    def of_objects(self, start: Place, hot: bool) -> ObjectsPage: ...
    def numbers(self, content: bytes) -> list[int]: ...
    def touched(self, blocks: list[tuple[bytes, int]]) -> None: ...
    def evict(self, need_bytes: int = 0) -> list[int]: ...
    def released(self, segment: int) -> None: ...
    def verify(self, content: bytes, number: int) -> bool: ...
    def scrub_step(self, budget_bytes: int) -> ScrubReport: ...
    def probe(self) -> None: ...
    def stats(self) -> Stats: ...
    def close(self) -> None: ...


class DiskNearlyFull(StoreFailed):
    """Not the store's fault: the file system has less than min_free left."""


@dataclass(slots=True, eq=False)
class _Call:
    """kind: neighbours of the kinds "commit" and "small" go to the store together, by `item`. answer: on the loop."""

    kind: str
    run: Callable[[Storing], Any]
    answer: Callable[[Any], None]
    item: Any = None
    size_bytes: int = _CALL_BYTES


def _ignore(_: Any) -> None:
    """Nobody waits for this one."""


class Keeper:
    """open_store: runs in the thread; may raise StoreFailed. evicted, failed: called on the loop.

    queue_bytes: above so many bytes of waiting calls, full() says so (and the daemon reads no more from workers).
    """

    def __init__(
        self,
        open_store: Callable[[], Storing],
        tasks: Tasks,
        *,
        queue_bytes: int,
        evicted: Callable[[list[int]], None],
        failed: Callable[[StoreFailed], None],
        drained: Callable[[], None],
    ) -> None:
        self._open_store = open_store
        self._tasks = tasks
        self._queue_bytes = queue_bytes
        self._evicted = evicted
        self._failed = failed
        self._drained = drained
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._store: Storing | None = None
        self._calls: list[_Call] = []
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._was_full = False
        self._closing = False

    async def open(self) -> None:
        """Opens the store (which recovers it). Raises StoreFailed; may be tried again."""
        self._store = await asyncio.get_running_loop().run_in_executor(self._thread, self._open_store)

    @property
    def is_open(self) -> bool:
        return self._store is not None

    async def reopen(self) -> None:
        """Closes the store and opens it again, which brings back what the disk has. Raises StoreFailed; then it is shut."""

        def again(old: Storing | None) -> Storing:
            if old is not None:
                try:
                    old.close()
                except StoreFailed as error:
                    _log.warning("store not closed cleanly", extra={"reason": error.reason})
            return self._open_store()

        store, self._store = self._store, None
        self._store = await asyncio.get_running_loop().run_in_executor(self._thread, again, store)

    def start(self) -> None:
        self._tasks.spawn(self._work(), "keeper")

    async def close(self) -> None:
        """Carries out what is queued and closes the store, leaving its clean mark."""
        self._closing = True
        loop = asyncio.get_running_loop()
        while self._calls:
            await self._one_batch()
        if self._store is not None:
            store, self._store = self._store, None
            try:
                await loop.run_in_executor(self._thread, store.close)
            except StoreFailed as error:
                _log.error("store not closed cleanly", extra={"reason": error.reason})
        self._thread.shutdown(wait=True)

    @property
    def full(self) -> bool:
        return self._waiting_bytes > self._queue_bytes

    # --- calls ----------------------------------------------------------------------------------------------------

    def reserve(self, content: bytes, number: int, length: int, inline: bool, answer: Callable[[Any], None]) -> None:
        """answer: Extent, Here, a PassReason, None (inline: nothing to reserve) or StoreFailed."""
        self._add(_Call("reserve", lambda store: _reserve(store, content, number, length, inline), answer))

    def commit(self, commit: Commit, answer: Callable[[Any], None]) -> None:
        self._add(_Call("commit", lambda store: store.commit([commit])[0], answer, commit))

    def put_small(self, small: Small, answer: Callable[[Any], None]) -> None:
        call = _Call("small", lambda store: store.put_small([small])[0], answer, small, _CALL_BYTES + len(small.body))
        self._add(call)

    def put_record(self, bucket: str, key: str, record: Record, answer: Callable[[Any], None]) -> None:
        self._add(_Call("record", lambda store: store.put_record(bucket, key, record), answer))

    def drop_record(self, bucket: str, key: str) -> None:
        self._add(_Call("drop", lambda store: store.drop_record(bucket, key), _ignore))

    def abandon(self, extent: Extent) -> None:
        self._add(_Call("abandon", lambda store: store.abandon(extent), _ignore))

    def touched(self, blocks: list[tuple[bytes, int]]) -> None:
        self._add(_Call("touched", lambda store: store.touched(blocks), _ignore, None, _CALL_BYTES + 32 * len(blocks)))

    def released(self, segment: int) -> None:
        self._add(_Call("released", lambda store: store.released(segment), _ignore))

    def verify(self, content: bytes, number: int, answer: Callable[[Any], None]) -> None:
        self._add(_Call("verify", lambda store: store.verify(content, number), answer))

    async def scrub(self, budget_bytes: int) -> ScrubReport | StoreFailed:
        result: ScrubReport | StoreFailed = await self._ask("scrub", lambda store: store.scrub_step(budget_bytes))
        return result

    async def stats(self) -> Stats | StoreFailed:
        """Also gives room back to the file system when it is short of it."""
        result: Stats | StoreFailed = await self._ask("stats", lambda store: store.stats())
        return result

    async def segments(self) -> list[int] | StoreFailed:
        """See koscache.inventory; of_segment() and of_objects() as well."""
        result: list[int] | StoreFailed = await self._ask("segments", lambda store: store.segments())
        return result

    async def of_segment(self, segment: int, start: int, *, hot: bool) -> SegmentPage | StoreFailed:
        result: SegmentPage | StoreFailed = await self._ask("page", lambda store: store.of_segment(segment, start, hot))
        return result

    async def of_objects(self, start: Place, *, hot: bool) -> ObjectsPage | StoreFailed:
        result: ObjectsPage | StoreFailed = await self._ask("page", lambda store: store.of_objects(start, hot))
        return result

    async def look(self, bucket: str, key: str, content: bytes | None) -> tuple[Record | None, list[int]] | StoreFailed:
        """The record of an object, and which blocks of a version are here."""

        def look(store: Storing) -> tuple[Record | None, list[int]]:
            return store.record(bucket, key), [] if content is None else store.numbers(content)

        result: tuple[Record | None, list[int]] | StoreFailed = await self._ask("look", look)
        return result

    async def learn(self, records: Sequence[tuple[str, str, Record]]) -> StoreFailed | None:
        """Keeps what is not known better: bucket, key and record of each."""

        def learn(store: Storing) -> None:
            for bucket, key, record in records:
                store.put_record(bucket, key, record)

        result: StoreFailed | None = await self._ask("learn", learn)
        return result

    async def check(self, content: bytes, number: int) -> bool:
        """As verify(), for who can wait. False as well when the store failed."""
        return await self._ask("verify", lambda store: store.verify(content, number)) is True

    async def probe(self) -> StoreFailed | None:
        """Whether the disk takes writes (again)."""
        result: StoreFailed | None = await self._ask("probe", lambda store: store.probe(), quiet=True)
        return result

    async def _ask(self, kind: str, run: Callable[[Storing], Any], *, quiet: bool = False) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer(result: Any) -> None:
            if not future.done():
                future.set_result(result)

        self._add(_Call("probe" if quiet else kind, run, answer))
        return await future

    def _add(self, call: _Call) -> None:
        self._calls.append(call)
        self._waiting_bytes += call.size_bytes
        self._was_full = self._was_full or self.full
        self._wake.set()

    # --- the thread -----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            while self._calls and not self._closing:
                await self._one_batch()

    async def _one_batch(self) -> None:
        batch, self._calls = self._calls[:_BATCH_MAX], self._calls[_BATCH_MAX:]
        self._waiting_bytes -= sum(call.size_bytes for call in batch)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, _run_batch, self._store, batch)
        try:
            results, gone, failure = await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread goes on; whoever asked is answered all the same, before the store is closed.
            running.add_done_callback(lambda done: self._answer(batch, *done.result()))
            raise
        self._answer(batch, results, gone, failure)

    def _answer(self, batch: list[_Call], results: list[Any], gone: list[int], failure: StoreFailed | None) -> None:
        for call, result in zip(batch, results, strict=True):
            if isinstance(result, StoreFailed) and call.kind != "probe":
                failure = failure or result
            call.answer(result)
        if gone:
            self._evicted(gone)
        if failure is not None:
            self._failed(failure)
        if self._was_full and self._waiting_bytes < self._queue_bytes // 2:
            self._was_full = False
            self._drained()


def _run_batch(store: Storing | None, batch: list[_Call]) -> tuple[list[Any], list[int], StoreFailed | None]:
    """In the thread: the calls' results in order, the segments that had to go, and what failed in the background."""
    if store is None:
        return [StoreFailed("the store is not open")] * len(batch), [], None
    results: list[Any] = []
    for kind, group in groupby(batch, key=lambda call: call.kind):
        calls = list(group)
        if kind == "commit":
            results += _together(store.commit, calls)
        elif kind == "small":
            results += _together(store.put_small, calls)
        else:
            results += [_alone(store, call) for call in calls]
    gone = _guarded(store.evict)
    if isinstance(gone, StoreFailed):
        return results, [], gone  # the segments that went are named by the next call
    return results, gone, None


def _together(put: Callable[[list[Any]], list[bool]], calls: list[_Call]) -> list[Any]:
    done = _guarded(lambda: put([call.item for call in calls]))
    return [done] * len(calls) if isinstance(done, StoreFailed) else list(done)


def _alone(store: Storing, call: _Call) -> Any:
    return _guarded(lambda: call.run(store))


def _guarded(run: Callable[[], Any]) -> Any:
    """What the store answers, or the StoreFailed. A bug in the store is one too: if it ended the thread's work, whoever
    asked would wait for ever."""
    try:
        return run()
    except StoreFailed as error:
        return error
    except Exception as error:
        _log.exception("the store failed unexpectedly")
        return StoreFailed(f"unexpected: {error!r}")


def _reserve(store: Storing, content: bytes, number: int, length: int, inline: bool) -> Any:
    location = store.locate(content, number)
    if location is not None and location.verified:
        return Here.HERE
    if inline:
        return None
    reserved = store.reserve(content, number, length)
    if isinstance(reserved, Refused) and reserved.reason is Refusal.DISK_NEARLY_FULL:
        return DiskNearlyFull("disk nearly full")
    return reserved if isinstance(reserved, Extent) else PassReason.STORE_REFUSED
