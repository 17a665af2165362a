"""Pages of listings on disk, shared by all workers of the node: bytes in, bytes out, and never a reason to fail.

    cache.dir/listings/
      CURRENT             symbolic link to the directory in use
      lock                held while a directory is made, opened or replaced
      pages-0123abcd/     a diskcache: one SQLite database, pages in its rows

Owns: the form of a page on disk, the database and what is done when it is damaged, full, locked, slow or gone. Does not own:
which pages are asked for, whether they may be used (kosproxy.listings).

Invariant: what get() returns is what put() was given for that key, byte for byte, or None; a frame that is torn, garbled or
of another key is removed. Nothing is ever unpickled: the disk class below takes bytes only and refuses every row that holds
anything else, and names of files in rows are never followed. Trouble is a miss, is counted and logged, and then the disk is
left alone for a while; no look-up waits for it longer than _PATIENCE_S.

Why a directory is replaced and not mended: other workers may have the old database open; with a new name none of them can
mix its old mapping or write-ahead log with the new file. They see the link change and follow. Why nothing is synced: after
a reboot the fence's values are new, so that no page of before it is ever used again (koscache.directories).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import diskcache
import msgspec
from xxhash import xxh3_128_digest

from kos import metrics
from kos.clock import Clock
from kos.config_values import MIB

__all__ = ["PAGE_BYTES_MAX", "Page", "PageDisk", "PageStore", "Pages"]

_log: Final = logging.getLogger("kosproxy.pages")

#: S3's longest page: 1000 keys of 1024 bytes, each byte at most six characters (&quot;), and as many prefixes: 12 MB.
PAGE_BYTES_MAX: Final = 16 * MIB
#: One reads while the other writes; SQLite has one writer at a time anyhow.
_THREADS: Final = 2
#: So many look-ups at a time; the others wait their turn.
_LOOK_UPS: Final = 8
#: A look-up takes 0.1 ms. When it takes this long the disk is in trouble, or the machine; the origin is not slower.
_PATIENCE_S: Final = 1.0
#: The longest page on a disk that is busy with others.
_WRITE_PATIENCE_S: Final = 5.0
#: Many look-ups at a time are no trouble: who waits this long for his turn asks the origin.
_TURN_S: Final = 2.0
#: After trouble the disk is left alone for so long.
_PAUSE_S: Final = 5.0
#: Pages that wait to be written, all together; more are not kept.
_WRITING_BYTES_MAX: Final = 2 * PAGE_BYTES_MAX
#: What SQLite waits for another's lock.
_LOCK_S: Final = 0.1
#: And what opening waits for another worker that opens.
_OPENING_S: Final = 1.0

_FRAME: Final = struct.Struct("<8sQQdII")  # magic, two fence values, validated_at, bytes of headers, bytes of body
_MAGIC: Final = b"kospage\x01"
_CHECK_BYTES: Final = 16
_headers_encoder: Final = msgspec.msgpack.Encoder()
_headers_decoder: Final = msgspec.msgpack.Decoder(tuple[tuple[bytes, bytes], ...])


class Page(NamedTuple):
    """One answer. values: of the fence slots, read before the origin was asked. validated_at: epoch seconds, just before
    that. headers: of the origin's answer, end to end ones without length."""

    values: tuple[int, int]
    validated_at: float
    headers: tuple[tuple[str, str], ...]
    body: bytes


def frame(key: bytes, page: Page) -> bytes:
    """A page as it stands on disk. key: what it is kept under; the checksum covers it."""
    headers = _headers_encoder.encode([(_raw(name), _raw(value)) for name, value in page.headers])
    fixed = _FRAME.pack(_MAGIC, *page.values, page.validated_at, len(headers), len(page.body))
    framed = b"".join((fixed, headers, page.body))
    return framed + xxh3_128_digest(key + framed)


def unframe(key: bytes, framed: bytes) -> Page | None:
    """The page; None if these are not the bytes that frame() made of one for this key."""
    end = len(framed) - _CHECK_BYTES
    if end < _FRAME.size or framed[:8] != _MAGIC or xxh3_128_digest(key + framed[:end]) != framed[end:]:
        return None
    _, of_bucket, of_directory, validated_at, headers_bytes, body_bytes = _FRAME.unpack_from(framed)
    body_at = _FRAME.size + headers_bytes
    if body_at + body_bytes != end:
        return None
    try:
        headers = _headers_decoder.decode(framed[_FRAME.size : body_at])
    except msgspec.DecodeError:
        return None
    return Page(
        (of_bucket, of_directory),
        validated_at,
        tuple((_text(name), _text(value)) for name, value in headers),
        framed[body_at:end],
    )


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


class NotBytes(Exception):
    """A row holds, or is to hold, something that is not plain bytes in the row itself."""


class PageDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys and values are bytes, in the row. Nothing is pickled or unpickled, and no file beside the database is made, read
    or removed, whatever a row says."""

    def __init__(self, directory: str, **settings: object) -> None:
        """settings: as the database holds them; none of them is of use here."""
        super().__init__(directory)

    def put(self, key: object) -> tuple[memoryview, bool]:
        if type(key) is not bytes:
            raise NotBytes("a key")
        return memoryview(key), True

    def get(self, key: object, raw: object) -> bytes:
        if not raw or type(key) is not bytes:
            raise NotBytes("a key")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, memoryview]:
        if type(value) is not bytes or read:
            raise NotBytes("a value")
        return 0, diskcache.core.MODE_RAW, None, memoryview(value)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        if mode != diskcache.core.MODE_RAW or filename is not None or type(value) is not bytes or read:
            raise NotBytes("a value")
        return value

    def remove(self, file_path: str) -> None:
        """No row of ours names a file."""


class Damaged(Exception):
    """A row that is not what was put there; it is removed."""


class Unusable(Exception):
    """The database cannot be used now. kind: for the metric. replace: a new one is needed."""

    def __init__(self, kind: str, reason: str, *, replace: bool) -> None:
        super().__init__(reason)
        self.kind = kind
        self.replace = replace


class PageStore:
    """The database of the node's pages; called from threads. Raises Damaged and Unusable."""

    def __init__(self, cache_dir: str, size_bytes: int, min_free_bytes: int) -> None:
        """size_bytes: what all files below cache_dir/listings may take together. min_free_bytes: of the file system."""
        self._directory = os.path.join(cache_dir, "listings")
        self._pointer = os.path.join(self._directory, "CURRENT")
        self._min_free_bytes = min_free_bytes
        self.page_bytes_max = min(PAGE_BYTES_MAX, size_bytes // 8)
        # A quarter for the log of writes, which may hold the longest page twice, and for the page that is one too many.
        self._rows_bytes = size_bytes - size_bytes // 4
        self._log_bytes = size_bytes // 16
        self._lock = threading.Lock()
        self._opened: tuple[str, Any] | None = None
        self._trying = ""
        self._condemned = ""

    def get(self, key: bytes) -> Page | None:
        with self._using() as cache:
            try:
                framed = cache.get(key)
            except NotBytes:
                cache.delete(key)
                raise Damaged("a row that holds no bytes") from None
            if framed is None:
                return None
            page = unframe(key, framed)
            if page is None:
                cache.delete(key)
                raise Damaged("a torn or garbled page")
            return page

    def put(self, key: bytes, page: Page, keep_s: float | None) -> None:
        """keep_s: seconds after which nobody will want it; None: no such time."""
        framed = frame(key, page)
        if len(framed) > self.page_bytes_max:
            return
        with self._using() as cache:
            found = os.statvfs(self._directory)
            if found.f_bavail * found.f_frsize < self._min_free_bytes + len(framed):
                raise Unusable("disk_nearly_full", "less than cache.min_free is left", replace=False)
            cache.set(key, framed, expire=keep_s)
            # set() removes ten rows at most, however small they are beside the one that came.
            if cache.volume() > self._rows_bytes:
                cache.cull()

    def close(self) -> None:
        """Closes this thread's connection; the others' go with their threads."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()

    @contextlib.contextmanager
    def _using(self) -> Iterator[Any]:
        """The database; what goes wrong with it comes out as Unusable, and what is damaged will be replaced."""
        used = None
        try:
            used = self._cache()
            yield used[1]
        except Damaged:
            raise
        except Exception as error:
            failure = _unusable(error)
            if failure.replace:
                # The next call makes a new one, unless another worker has done so by then.
                self._condemned = used[0] if used is not None else self._trying
            raise failure from error

    def _cache(self) -> tuple[str, Any]:
        """The database that CURRENT names: a look at the link each time, some microseconds."""
        opened = self._opened
        if opened is not None and opened[0] != self._condemned and opened[0] == self._current():
            return opened
        with self._lock:
            opened = self._opened
            if opened is None or opened[0] == self._condemned or opened[0] != self._current():
                with self._alone():
                    opened = self._opened = self._open()
            return opened

    def _current(self) -> str | None:
        try:
            return os.readlink(self._pointer)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker at a time; waits for _OPENING_S at most, for it may be stopped while it holds the lock."""
        os.makedirs(self._directory, 0o750, exist_ok=True)
        with open(os.path.join(self._directory, "lock"), "ab") as lock:
            deadline = time.monotonic() + _OPENING_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Unusable("locked", "another worker opens the pages", replace=False) from None
                    time.sleep(0.01)
            yield

    def _open(self) -> tuple[str, Any]:
        current = self._current()
        if os.path.expandvars(self._directory) != self._directory:
            raise Unusable("path", "cache.dir holds a $NAME", replace=False)
        self._trying = current or ""
        if current is None or current == self._condemned or not self._is_whole(current):
            self._trying = current = self._make()
        return current, diskcache.Cache(
            os.path.join(self._directory, current),
            timeout=_LOCK_S,
            disk=PageDisk,
            size_limit=self._rows_bytes,
            eviction_policy="least-recently-stored",  # a look-up writes nothing
            statistics=0,
            cull_limit=10,
            sqlite_synchronous=0,
            # A mapped file that somebody cuts off kills the process that reads there.
            sqlite_mmap_size=0,
            sqlite_cache_size=512,
            sqlite_journal_size_limit=self._log_bytes,
            sqlite_wal_autocheckpoint=max(self._log_bytes // 4096, 1),
            # What a damaged file might make of queries.
            sqlite_trusted_schema=0,
            sqlite_cell_size_check=1,
        )

    def _is_whole(self, current: str) -> bool:
        """Whether there is a database that was made to its end and is not held locked.

        diskcache itself would try for a minute to make one out of a file that was cut off while others have it open, or
        to open one that a stopped process holds. Raises sqlite3.Error.
        """
        path = os.path.join(self._directory, current, diskcache.core.DBNAME)
        if os.path.basename(current) != current or not os.path.exists(path):
            return False
        with contextlib.closing(sqlite3.connect(path, timeout=_LOCK_S, isolation_level=None)) as probe:
            mode = probe.execute("PRAGMA journal_mode").fetchone()
            tables = {name for (name,) in probe.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if mode != ("wal",) or not tables >= {"Cache", "Settings"}:
                return False
            probe.execute("BEGIN IMMEDIATE")
            probe.execute("ROLLBACK")
        return True

    def _make(self) -> str:
        """A new empty directory that CURRENT names; all others go, whoever still has them open."""
        current = f"pages-{os.urandom(8).hex()}"
        os.mkdir(os.path.join(self._directory, current), 0o750)
        beside = f"{self._pointer}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        os.symlink(current, beside)
        os.replace(beside, self._pointer)
        for name in os.listdir(self._directory):
            if name.startswith("pages-") and name != current:
                shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)
        return current


def _unusable(error: Exception) -> Unusable:
    """What an error of the store means."""
    if isinstance(error, Unusable):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, diskcache.Timeout) or (isinstance(error, sqlite3.OperationalError) and "locked" in str(error)):
        return Unusable("locked", text, replace=False)
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        # A new one has room, and gives back what the old one took.
        return Unusable("full", text, replace=True)
    if isinstance(error, sqlite3.Error):
        return Unusable("damaged", text, replace=True)
    if isinstance(error, OSError):
        return Unusable("disk", text, replace=False)
    # Whatever a damaged settings table makes of diskcache.
    return Unusable("damaged", text, replace=True)


class Pages:
    """The store as the worker's loop uses it. Look-ups never raise, but for being cancelled."""

    def __init__(self, store: PageStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pages")
        self._turns = asyncio.Semaphore(_LOOK_UPS)
        self._writing_bytes = 0
        self._off_until = 0.0
        self.page_bytes_max = store.page_bytes_max

    @property
    def on(self) -> bool:
        """Whether the disk is tried now."""
        return self._clock.monotonic() >= self._off_until

    async def close(self) -> None:
        """Nothing new is begun. Does not wait for a disk that hangs."""
        self._off_until = float("inf")
        self._threads.submit(self._store.close)
        self._threads.shutdown(wait=False)

    async def get(self, key: bytes) -> Page | None:
        """The page of a key; None as well when the disk is in trouble, or slow."""
        if not self.on:
            return None
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            metrics.LISTING_PAGE_ERRORS.labels("busy").inc()
            return None
        if not self.on:
            self._turns.release()
            return None
        work = self._threads.submit(self._store.get, digest(key))
        work.add_done_callback(partial(self._from_thread, asyncio.get_running_loop(), self._turns.release))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.wrap_future(work)
        except TimeoutError:
            self._trouble(Unusable("slow", f"no answer within {_PATIENCE_S} s", replace=False))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(error)
        return None

    def _from_thread(self, loop: asyncio.AbstractEventLoop, give_back: Callable[[], None], work: Future[Any]) -> None:
        # What nobody waits for any more still takes its turn, or its bytes, until the disk has answered.
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(give_back)

    async def put(self, key: bytes, page: Page, keep_s: float | None) -> None:
        """Keep a page, if the disk takes it. Returns when it is kept or will not be."""
        size = len(page.body)
        if not self.on or size > self.page_bytes_max:
            return
        if self._writing_bytes + size > _WRITING_BYTES_MAX:
            metrics.LISTING_PAGE_ERRORS.labels("busy").inc()
            return
        self._writing_bytes += size
        work = self._threads.submit(self._store.put, digest(key), page, keep_s)
        work.add_done_callback(partial(self._from_thread, asyncio.get_running_loop(), partial(self._written, size)))
        try:
            async with asyncio.timeout(_WRITE_PATIENCE_S):
                await asyncio.wrap_future(work)
        except TimeoutError:
            self._trouble(Unusable("slow", f"not written within {_WRITE_PATIENCE_S} s", replace=False))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(error)

    def _written(self, size: int) -> None:
        self._writing_bytes -= size

    def _failed(self, error: Exception) -> None:
        if isinstance(error, Damaged):
            metrics.LISTING_PAGE_ERRORS.labels("row").inc()
            _log.warning("page of a listing removed", extra={"reason": str(error)})
        else:
            self._trouble(error if isinstance(error, Unusable) else _unusable(error))

    def _trouble(self, failure: Unusable) -> None:
        metrics.LISTING_PAGE_ERRORS.labels(failure.kind).inc()
        if self.on:
            _log.warning(
                "pages of listings are not kept for a while",
                extra={"reason": f"{failure.kind}: {failure}", "seconds": _PAUSE_S},
            )
            self._off_until = self._clock.monotonic() + _PAUSE_S


def digest(key: bytes) -> bytes:
    """What a question's key is kept under: 32 bytes that nobody can find another key for."""
    return blake2b(key, digest_size=32).digest()
