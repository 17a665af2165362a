"""The daemon of a node: hears the workers, decides by the lease table, has the store's thread carry it out.

Owns: the sockets, one session per worker, carrying out the commands of koscache.leases, telling all workers of evictions
and of caching off and on, and what a worker leaves behind when it dies. Does not own: decisions about leases (leases), the
store's thread (keeper), any byte of an object but small ones on their way into the store.

Invariant: whatever a session held is settled when its connection ends: leases go on to others, its segments count as
closed, its unfinished writes pass the fence. Nothing of it is found again.

    caching off: the store or a worker's write failed, or the disk is nearly full. Hits go on, misses pass through, and the
    daemon tries the disk until it takes writes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kos import metrics
from kos.clock import Clock
from kos.config import Config
from kos.errors import ConfigError, KosError
from kos.node import ports
from kos.tasks import Tasks, TasksClosed
from koscache import ipc
from koscache.cluster.view import View
from koscache.content import Commit, Small
from koscache.disk import StoreFailed
from koscache.fence import Fence
from koscache.ipc import BlockOutcome
from koscache.keeper import DiskNearlyFull, Keeper, Storing
from koscache.leases import Abandon, Command, ForgetRecord, Leases, Reserve, Send, StoreBlock, StoreOpen
from koscache.store import ScrubReport, Stats

if TYPE_CHECKING:
    from koscache.cluster.hub import Hub
    from koscache.cluster.operations import Operations

_log: Final = logging.getLogger("koscache.daemon")

_TICK_S: Final = 1.0
#: How often a store that failed is tried again; a failure so soon after it was thought well makes it be opened anew.
_PROBE_EVERY_S: Final = 2.0
_RELAPSE_S: Final = 30.0
_SOCKET_BACKLOG: Final = 256
_STATS_EVERY_TICKS: Final = 5


def _ignore(_: str) -> None:
    """Nobody asked to be told."""


@dataclass(slots=True, eq=False)
class _Session:
    """One worker, or the admin port. writes: by token, the fence slots of writes that it has begun and not ended. handles: the
    same writes at the hub."""

    number: int
    connection: ipc.Connection
    pid: int = 0
    writes: dict[int, list[int]] = field(default_factory=dict)
    handles: dict[int, int] = field(default_factory=dict)


class Daemon:
    """start() when the directory may be used; close() in the end. All calls on one loop.

    open_store: runs in the store's thread, raises StoreFailed (tried again later) or ConfigError (given to the caller).
    failed: called with the reason when this daemon cannot go on as it is configured.
    """

    def __init__(
        self,
        config: Config,
        open_store: Callable[[], Storing],
        clock: Clock,
        tasks: Tasks,
        failed: Callable[[str], None] = _ignore,
    ) -> None:
        self._config = config
        self._cache = config.cache
        self._clock = clock
        self._tasks = tasks
        self._leases = Leases(
            fills_max_bytes=self._cache.fills_max_bytes,
            small_bytes=self._cache.small_bytes,
            timeout_s=self._cache.lease_timeout_s,
            first=secrets.randbits(56),
        )
        self._keeper = Keeper(
            open_store,
            tasks,
            queue_bytes=self._cache.ipc_queue_bytes,
            evicted=self._evicted,
            failed=self._store_failed,
            drained=self._drained,
        )
        self._fence: Fence | None = None
        self._hub: Hub | None = None
        self._operations: Operations | None = None
        if config.cluster.enabled:
            # Not before: a node that is alone has no need of a database's 30 MB.
            from koscache.cluster.hub import Hub
            from koscache.cluster.operations import Operations

            self._operations = Operations(config, self._keeper)
            self._hub = Hub(
                config, clock, tasks,
                view_changed=self._view_changed, answers=self._operations.answer, failed=failed,
            )  # fmt: skip
            self._operations.hub = self._hub
        self._server: asyncio.Server | None = None
        self._sessions: dict[int, _Session] = {}
        self._sessions_made = 0
        self._closing_segments: dict[int, set[int]] = {}
        self._off_reason: str | None = None
        self._on_at = clock.monotonic()
        self._relapsed = False
        self._measured = (0, 0)

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def caching(self) -> bool:
        return self._off_reason is None

    @property
    def reason(self) -> str:
        """Why caching is off; empty when it is on."""
        return self._off_reason or ""

    async def start(self) -> None:
        """Recovers the store and listens. Raises ConfigError: another daemon is here, or the size is too small."""
        cache_dir = self._cache.dir
        try:
            os.makedirs(cache_dir, mode=0o750, exist_ok=True)
            with ipc.socket_address(cache_dir) as path:
                _refuse_second(path, cache_dir)
        except OSError as error:
            raise ConfigError(f"cache.dir: {cache_dir}: {error.strerror}") from error
        metrics.CACHING.set(1)
        try:
            await self._keeper.open()
        except StoreFailed as error:
            self._turn_off(error.reason)
        self._keeper.start()
        try:
            self._fence = Fence.open(cache_dir, alone=self._hub is None)
            if self._hub is not None:
                await self._hub.start(self._fence, ports.listen("listen.cluster", self._config.listen.cluster)[0])
            await self._listen(cache_dir)
        except OSError as error:
            raise ConfigError(f"cache.dir: {cache_dir}: {error.strerror}") from error
        self._tasks.spawn(self._tick(), "tick")
        if self._cache.scrub_bytes_per_s:
            self._tasks.spawn(self._scrub(), "scrub")

    async def _listen(self, cache_dir: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with ipc.socket_address(cache_dir) as path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                listener.bind(path)
                os.chmod(path, 0o660)
            listener.listen(_SOCKET_BACKLOG)
            listener.setblocking(False)
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: ipc.Connection(
                    lambda: self, ipc.ToDaemon, self._cache.ipc_message_bytes, self._cache.ipc_queue_bytes
                ),
                sock=listener,
            )
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """Takes nothing new, ends the sessions, carries out what is queued, closes the store with its clean mark."""
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions.values()):
            await session.connection.close()
        if self._hub is not None:
            await self._hub.close()
        await self._tasks.close()
        await self._keeper.close()
        fence = self._fence if self._hub is None else self._hub.fence
        if fence is not None:
            fence.close()

    # --- ipc.Peer ---------------------------------------------------------------------------------------------------

    def connected(self, connection: ipc.Connection) -> None:
        self._sessions_made += 1
        session = _Session(self._sessions_made, connection)
        self._sessions[session.number] = session
        connection.owner = session.number

    def received(self, connection: ipc.Connection, message: Any) -> None:
        session = self._sessions.get(connection.owner)
        if session is None:
            return
        handle = _HANDLERS.get(type(message))
        assert handle is not None, f"no handler for {type(message).__name__}"
        handle(self, session, message)
        if self._keeper.full:
            for each in self._sessions.values():
                each.connection.pause_reading()

    def lost(self, connection: ipc.Connection, reason: str) -> None:
        session = self._sessions.pop(connection.owner, None)
        if session is None:
            return
        _log.info("worker gone", extra={"worker_pid": session.pid, "reason": reason})
        self._do(self._leases.worker_gone(session.number, self._clock.monotonic()))
        for segment in [at for at, waiting in self._closing_segments.items() if session.number in waiting]:
            self._closed(segment, session.number)
        if self._hub is not None:
            for handle in session.handles.values():
                self._hub.writes.forget(handle)
        slots = sorted({slot for written in session.writes.values() for slot in written})
        if slots and self._fence is not None:
            self._bump(slots)
            with contextlib.suppress(TasksClosed):
                self._tasks.spawn(self._bump_later(slots), "fence")

    def _drained(self) -> None:
        for session in self._sessions.values():
            session.connection.resume_reading()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _hello(self, session: _Session, message: ipc.Hello) -> None:
        session.pid = message.pid
        session.connection.send(ipc.Welcome(self.caching, self.reason))
        if self._hub is not None and self._hub.view.members:
            session.connection.send(ipc.ClusterView(self._hub.me.name, self._hub.view))

    def _ask_open(self, session: _Session, message: ipc.AskOpen) -> None:
        self._do(self._leases.ask_open(session.number, message, self._clock.monotonic()))

    def _open_done(self, session: _Session, message: ipc.OpenDone) -> None:
        self._do(self._leases.open_done(session.number, message, self._clock.monotonic()))

    def _ask_block(self, session: _Session, message: ipc.AskBlock) -> None:
        self._do(self._leases.ask_block(session.number, message, self._clock.monotonic()))

    def _progress(self, session: _Session, message: ipc.Progress) -> None:
        self._do(self._leases.progress(session.number, message, self._clock.monotonic()))

    def _block_done(self, session: _Session, message: ipc.BlockDone) -> None:
        self._do(self._leases.block_done(session.number, message, self._clock.monotonic()))

    def _block_failed(self, session: _Session, message: ipc.BlockFailed) -> None:
        self._do(self._leases.block_failed(session.number, message))
        if message.outcome is BlockOutcome.DISK_FAILED:
            self._turn_off(message.reason)

    def _verify(self, session: _Session, message: ipc.AskVerify) -> None:
        def answer(result: Any) -> None:
            self._send(session.number, ipc.Done(message.ask, result is True))

        self._keeper.verify(message.content, message.number, answer)

    def _touches(self, session: _Session, message: ipc.Touches) -> None:
        self._keeper.touched(message.blocks)

    def _first_touch(self, session: _Session, message: ipc.FirstTouch) -> None:
        self._leases.touched(message)

    def _write_begin(self, session: _Session, message: ipc.WriteBegin) -> None:
        session.writes[message.token] = message.slots
        if self._hub is not None:
            session.handles[message.token] = self._hub.writes.begin(message.slots)

    def _write_end(self, session: _Session, message: ipc.WriteEnd) -> None:
        session.writes.pop(message.token, None)
        handle = session.handles.pop(message.token, None)
        if self._hub is not None and handle is not None:
            self._hub.writes.forget(handle)

    def _ask_end(self, session: _Session, message: ipc.AskEnd) -> None:
        hub = self._hub
        handles = [session.handles.pop(token, None) for token in message.tokens]
        for token in message.tokens:
            session.writes.pop(token, None)
        if hub is None or None in handles or not handles:
            for handle in handles:
                if hub is not None and handle is not None:
                    hub.writes.forget(handle)
            session.connection.send(ipc.Done(message.ask, False))
            return
        left = {hub.writes.end(handle) for handle in handles if handle is not None}
        number = session.number

        def heard(future: asyncio.Future[bool]) -> None:
            left.discard(future)
            outcomes.append(future.result())
            if not left:
                self._send(number, ipc.Done(message.ask, all(outcomes)))

        outcomes: list[bool] = []
        for future in list(left):
            future.add_done_callback(heard)

    def _ask_cluster(self, session: _Session, message: ipc.AskCluster) -> None:
        number = session.number

        async def answer() -> None:
            assert self._operations is not None
            try:
                body, failed = await self._operations.answer(message.topic, message.body), ""
            except KosError as error:
                body, failed = b"", str(error)
            self._send(number, ipc.ClusterSaid(message.ask, body, failed))

        if self._operations is None:
            session.connection.send(ipc.ClusterSaid(message.ask, b"", "this node is in no cluster"))
        else:
            with contextlib.suppress(TasksClosed):
                self._tasks.spawn(answer(), "operation")

    def _counted(self, session: _Session, message: ipc.Counted) -> None:
        if self._operations is not None:
            self._operations.counted(message.reads, message.hits)

    def _view_changed(self, view: View) -> None:
        assert self._hub is not None
        message = ipc.ClusterView(self._hub.me.name, view)
        for session in list(self._sessions.values()):
            session.connection.send(message)

    def _released(self, session: _Session, message: ipc.Released) -> None:
        self._closed(message.segment, session.number)

    def _ping(self, session: _Session, message: ipc.Ping) -> None:
        session.connection.send(ipc.Done(message.ask, True))

    # --- commands ---------------------------------------------------------------------------------------------------

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self._send(command.worker, command.message)
            elif isinstance(command, Reserve):
                self._reserve(command)
            elif isinstance(command, StoreBlock):
                self._store_block(command)
            elif isinstance(command, StoreOpen):
                self._store_open(command)
            elif isinstance(command, Abandon):
                self._keeper.abandon(command.extent)
            elif isinstance(command, ForgetRecord):
                self._keeper.drop_record(command.bucket, command.key)

    def _send(self, worker: int, message: ipc.Message) -> None:
        session = self._sessions.get(worker)
        if session is not None:
            session.connection.send(message)

    def _reserve(self, command: Reserve) -> None:
        def answer(result: Any) -> None:
            if isinstance(result, StoreFailed):
                result = ipc.PassReason.CACHING_OFF
            self._do(self._leases.reserved(command.lease, result, self._clock.monotonic()))

        self._keeper.reserve(command.content, command.number, command.length, command.inline, answer)

    def _store_block(self, command: StoreBlock) -> None:
        def answer(result: Any) -> None:
            self._do(self._leases.block_stored(command.lease, result is True))

        content, number, bucket, key = command.content, command.number, command.bucket, command.key
        if command.extent is None:
            assert command.body is not None, "a small block travels with its body"
            self._keeper.put_small(Small(content, number, command.body, command.checksum, bucket, key, None), answer)
        else:
            extent = command.extent
            commit = Commit(extent, content, number, extent.length, command.checksum, bucket, key, command.record)
            self._keeper.commit(commit, answer)

    def _store_open(self, command: StoreOpen) -> None:
        def answer(result: Any) -> None:
            self._do(self._leases.open_stored(command.lease, result is True))

        done = command.done
        assert done.record is not None, "an open that is stored has a record"
        if done.body is None:
            self._keeper.put_record(command.bucket, command.key, done.record, answer)
        else:
            small = Small(done.content, done.number, done.body, done.checksum, command.bucket, command.key, done.record)
            self._keeper.put_small(small, answer)

    # --- segments ---------------------------------------------------------------------------------------------------

    def _evicted(self, segments: list[int]) -> None:
        """They are out of the index; their bytes are free when every worker has closed them."""
        _log.info("evicted", extra={"segments": len(segments)})
        message = ipc.Evicted(segments)
        for segment in segments:
            self._closing_segments[segment] = set(self._sessions)
        for session in list(self._sessions.values()):
            session.connection.send(message)
        for segment in segments:
            self._closed(segment, 0)

    def _closed(self, segment: int, worker: int) -> None:
        waiting = self._closing_segments.get(segment)
        if waiting is None:
            return
        waiting.discard(worker)
        if not waiting:
            del self._closing_segments[segment]
            self._keeper.released(segment)

    # --- caching off and on -------------------------------------------------------------------------------------------

    def _store_failed(self, failure: StoreFailed) -> None:
        self._turn_off(failure.reason)

    def _turn_off(self, reason: str) -> None:
        if self._off_reason is not None:
            return
        self._off_reason = reason or "the store failed"
        self._relapsed = self._clock.monotonic() - self._on_at < _RELAPSE_S
        self._leases.caching = False
        metrics.CACHING.set(0)
        _log.error("caching off", extra={"reason": self._off_reason})
        self._say_caching()
        with contextlib.suppress(TasksClosed):
            self._tasks.spawn(self._mend(), "mend")

    def _turn_on(self) -> None:
        self._off_reason = None
        self._on_at = self._clock.monotonic()
        self._leases.caching = True
        metrics.CACHING.set(1)
        _log.warning("caching on again")
        self._say_caching()

    def _say_caching(self) -> None:
        message = ipc.Caching(self.caching, self.reason)
        for session in list(self._sessions.values()):
            session.connection.send(message)

    async def _mend(self) -> None:
        """Tries the disk until it takes writes, and there is room."""
        while True:
            await self._clock.sleep(self._clock.jitter(0.75 * _PROBE_EVERY_S, 1.25 * _PROBE_EVERY_S))
            try:
                if self._relapsed or not self._keeper.is_open:
                    self._relapsed = False
                    await self._keeper.reopen()
            except (StoreFailed, ConfigError) as error:
                self._off_reason = str(error)
                continue
            failure = await self._keeper.probe() or self._short_of_room()
            if failure is None:
                self._turn_on()
                return
            if self._off_reason != failure.reason:
                self._off_reason = failure.reason
                self._say_caching()

    def _short_of_room(self) -> StoreFailed | None:
        try:
            found = os.statvfs(self._cache.dir)
        except OSError as error:
            return StoreFailed(f"{self._cache.dir}: {error.strerror}")
        if found.f_bavail * found.f_frsize < self._cache.min_free_bytes:
            return DiskNearlyFull("disk nearly full")
        return None

    # --- tasks ------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Once a second: leases of silent leaders, free space, metrics."""
        ticks = 0
        while True:
            await self._clock.sleep(_TICK_S)
            ticks += 1
            if self._hub is not None and self._hub.fence is not self._fence:
                self._fence = self._hub.fence
                for session in list(self._sessions.values()):
                    session.connection.abort("the fence is another one")  # workers come back, and open it
            self._do(self._leases.expire(self._clock.monotonic()))
            if self.caching and self._short_of_room() is not None:
                # Evicting comes first: a batch does so, and only if that did not help caching goes off.
                await self._keeper.stats()
                failure = self._short_of_room()
                if failure is not None:
                    self._turn_off(failure.reason)
            if ticks % _STATS_EVERY_TICKS == 1 and self._keeper.is_open:
                self._measure(await self._keeper.stats())

    def _measure(self, stats: Stats | StoreFailed) -> None:
        if isinstance(stats, StoreFailed):
            return
        metrics.STORE_BYTES.set(stats.used_bytes)
        metrics.STORE_ENTRIES.set(stats.blocks)
        evicted, bad = self._measured
        if stats.evicted_blocks >= evicted and stats.bad_blocks >= bad:
            metrics.EVICTIONS.labels("space").inc(stats.evicted_blocks - evicted)
            metrics.EVICTIONS.labels("corrupt").inc(stats.bad_blocks - bad)
        self._measured = (stats.evicted_blocks, stats.bad_blocks)

    async def _scrub(self) -> None:
        """Checks a little every second; what is wrong is dropped and will be filled anew."""
        while True:
            await self._clock.sleep(_TICK_S)
            if not self.caching:
                continue
            report = await self._keeper.scrub(self._cache.scrub_bytes_per_s)
            if isinstance(report, ScrubReport) and report.bad:
                _log.error("corrupt blocks dropped", extra={"blocks": len(report.bad)})

    def _bump(self, slots: list[int]) -> None:
        fence = self._fence if self._hub is None else self._hub.fence
        if fence is not None:
            for slot in slots:
                fence.bump(slot)

    async def _bump_later(self, slots: list[int]) -> None:
        """The origin may still carry out what the dead worker asked for, until its request must have ended."""
        hub = self._hub
        handle = None if hub is None else hub.writes.begin(slots)
        await self._clock.sleep(self._config.origin.request_timeout_s)
        self._bump(slots)
        if hub is not None and handle is not None:
            hub.writes.forget(handle)


_HANDLERS: Final[dict[type, Callable[[Daemon, _Session, Any], None]]] = {
    ipc.Hello: Daemon._hello,
    ipc.AskOpen: Daemon._ask_open,
    ipc.OpenDone: Daemon._open_done,
    ipc.AskBlock: Daemon._ask_block,
    ipc.Progress: Daemon._progress,
    ipc.BlockDone: Daemon._block_done,
    ipc.BlockFailed: Daemon._block_failed,
    ipc.AskVerify: Daemon._verify,
    ipc.Touches: Daemon._touches,
    ipc.FirstTouch: Daemon._first_touch,
    ipc.WriteBegin: Daemon._write_begin,
    ipc.WriteEnd: Daemon._write_end,
    ipc.Released: Daemon._released,
    ipc.Ping: Daemon._ping,
    ipc.AskEnd: Daemon._ask_end,
    ipc.AskCluster: Daemon._ask_cluster,
    ipc.Counted: Daemon._counted,
}


def _refuse_second(path: str, cache_dir: str) -> None:
    """A socket that answers belongs to a daemon that lives; taking it away would leave two for one directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                return
            raise
    raise ConfigError(f"cache.dir: {cache_dir} is served by another daemon")
