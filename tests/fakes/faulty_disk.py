"""A disk that fails in the ways the block store must survive.

Faults that the design must survive, with no wrong byte ever served:
  - any call fails with ENOSPC, EIO or EROFS, once or from then on (`fail`)
  - a write stops half way, then ENOSPC (`fail` with `short=True`)
  - power fails: of what was written since a file's last sync, any subset of 4 KiB pages is lost, in any order; files made
    since the last sync of their directory may be gone, renames may be undone (`power_loss`)
  - bytes rot, files are cut short, overwritten with garbage, or deleted (tests do that with plain file calls)
Faults that it need not survive: a disk that says "synced" and lies; pages of LMDB's file lost at a power failure are not
modelled either, because the index is dropped then.

It works on real files, so workers' plain pwrite calls work beside it; only calls through it can fail or be lost.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from koscache.disk import OsDisk

PAGE = 4096
_T = TypeVar("_T")


@dataclass
class Fault:
    """Which calls fail: of this kind, on paths that contain `path`, after `after` such calls, `times` times (None: from
    then on)."""

    call: str
    errno: int
    path: str = ""
    after: int = 0
    times: int | None = 1
    short: bool = False


class FaultyDisk(OsDisk):
    """OsDisk with faults. calls: (call, path) of everything asked, in order."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        self._before: dict[str, dict[int, bytes]] = {}  # pages as they were at the last sync
        self._made: set[str] = set()
        self._renamed: dict[str, tuple[str, bytes | None]] = {}
        self._lock = threading.RLock()
        self.free: int | None = None

    def fail(
        self, call: str, errno: int, *, path: str = "", after: int = 0, times: int | None = 1, short: bool = False
    ) -> None:
        self.faults.append(Fault(call, errno, path, after, times, short))

    def heal(self) -> None:
        self.faults.clear()

    def _asked(self, call: str, path: str) -> Fault | None:
        self.calls.append((call, path))
        for fault in self.faults:
            if fault.call != call or fault.path not in path or fault.times == 0:
                continue
            if fault.after > 0:
                fault.after -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
            return fault
        return None

    def _run(self, call: str, path: str, work: Callable[[], _T]) -> _T:
        with self._lock:
            fault = self._asked(call, path)
            if fault is not None:
                raise OSError(fault.errno, os.strerror(fault.errno))
            return work()

    def open(self, path: str, flags: int) -> int:
        def work() -> int:
            fresh = bool(flags & os.O_CREAT) and not os.path.exists(path)
            fd = OsDisk.open(self, path, flags)
            self._paths[fd] = path
            if fresh:
                self._made.add(path)
            return fd

        return self._run("open", path, work)

    def close(self, fd: int) -> None:
        with self._lock:
            self._paths.pop(fd, None)
            OsDisk.close(self, fd)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        return self._run("read", self._paths[fd], lambda: OsDisk.read(self, fd, length, offset))

    def write(self, fd: int, body: bytes | bytearray | memoryview, offset: int) -> None:
        path = self._paths[fd]
        with self._lock:
            fault = self._asked("write", path)
            if fault is not None and not fault.short:
                raise OSError(fault.errno, os.strerror(fault.errno))
            if fault is not None:
                body = bytes(body[: len(body) // 2])
            self._note(fd, path, offset, len(body))
            OsDisk.write(self, fd, body, offset)
            if fault is not None:
                raise OSError(fault.errno, os.strerror(fault.errno))

    def _note(self, fd: int, path: str, offset: int, length: int) -> None:
        pages = self._before.setdefault(path, {})
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            if page not in pages:
                pages[page] = os.pread(fd, PAGE, page * PAGE)

    def copy(self, source: int, target: int, length: int, source_offset: int, target_offset: int) -> None:
        def work() -> None:
            self._note(target, self._paths[target], target_offset, length)
            OsDisk.copy(self, source, target, length, source_offset, target_offset)

        self._run("copy", self._paths[target], work)

    def allocate(self, fd: int, length: int) -> None:
        self._run("allocate", self._paths[fd], lambda: OsDisk.allocate(self, fd, length))

    def truncate(self, fd: int, length: int) -> None:
        self._run("truncate", self._paths[fd], lambda: OsDisk.truncate(self, fd, length))

    def sync(self, fd: int) -> None:
        def work() -> None:
            self._before.pop(self._paths[fd], None)

        self._run("sync", self._paths[fd], work)

    def sync_dir(self, path: str) -> None:
        def work() -> None:
            self._made = {each for each in self._made if os.path.dirname(each) != path}
            self._renamed = {each: was for each, was in self._renamed.items() if os.path.dirname(each) != path}

        self._run("sync_dir", path, work)

    def rename(self, source: str, target: str) -> None:
        def work() -> None:
            was = None
            if os.path.exists(target):
                with open(target, "rb") as file:
                    was = file.read()
            self._renamed.setdefault(target, (source, was))
            self._made.discard(source)
            pages = self._before.pop(source, None)
            if pages is not None:
                self._before[target] = pages
            OsDisk.rename(self, source, target)

        self._run("rename", target, work)

    def unlink(self, path: str) -> None:
        def work() -> None:
            OsDisk.unlink(self, path)
            self._before.pop(path, None)
            self._made.discard(path)

        self._run("unlink", path, work)

    def list(self, path: str) -> list[str]:
        return self._run("list", path, lambda: OsDisk.list(self, path))

    def free_bytes(self, path: str) -> int:
        if self.free is not None:
            return self.free
        return self._run("free_bytes", path, lambda: OsDisk.free_bytes(self, path))

    def power_loss(self, rng: random.Random) -> None:
        """Loses a random part of what was not synced. The store that used this disk must not be used any more."""
        for path, pages in sorted(self._before.items()):
            if not os.path.exists(path):
                continue
            with open(path, "r+b") as file:
                for page, was in sorted(pages.items()):
                    if rng.random() < 0.5:
                        file.seek(page * PAGE)
                        file.write(was)
        for path in sorted(self._made):
            if os.path.exists(path) and rng.random() < 0.5:
                os.unlink(path)
        for target, (_, was) in sorted(self._renamed.items()):
            if was is not None and rng.random() < 0.5:
                with open(target, "wb") as file:
                    file.write(was)
        self._before.clear()
        self._made.clear()
        self._renamed.clear()
