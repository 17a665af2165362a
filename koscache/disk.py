"""The disk port: every system call that the block store makes on its own files goes through here.

Owns: the Disk protocol, its plain implementation over os, and StoreFailed, which every disk error becomes at the
store's border. Does not own: what is written where (segments, recovery), nor LMDB's own files (index).

Invariant: a write either wrote all of its bytes or raised; nothing here retries, hides or guesses.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from kos.errors import KosError

_COPY_PIECE: Final = 1 << 20


class StoreFailed(KosError):
    """The store's disk or index failed (ENOSPC, EIO, EROFS, a full or broken index ...).

    What was being done did not happen; what is in the store stays right. The caller turns caching off and serves on.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class SegmentGone(KosError):
    """The segment was evicted: treat the block as absent."""

    def __init__(self, segment: int) -> None:
        self.segment = segment
        super().__init__(f"segment {segment:016x} is gone")


class Disk(Protocol):
    """Files by descriptor. Everything raises OSError and nothing else."""

    def open(self, path: str, flags: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def size(self, fd: int) -> int: ...
    def mtime_ns(self, fd: int) -> int: ...
    def stat(self, path: str) -> tuple[int, int]:
        """(size in bytes, mtime in ns)."""
        ...

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Up to length bytes; shorter only at the end of the file."""
        ...

    def write(self, fd: int, body: bytes | bytearray | memoryview, offset: int) -> None:
        """All of it or OSError."""
        ...

    def copy(self, source: int, target: int, length: int, source_offset: int, target_offset: int) -> None:
        """All of it, inside the kernel where it can, or OSError."""
        ...

    def allocate(self, fd: int, length: int) -> None: ...
    def truncate(self, fd: int, length: int) -> None: ...
    def sync(self, fd: int) -> None:
        """fdatasync."""
        ...

    def sync_dir(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None:
        """An absent file is no error."""
        ...

    def list(self, path: str) -> list[str]: ...
    def make_dir(self, path: str) -> None:
        """With its parents; an existing one is no error."""
        ...

    def free_bytes(self, path: str) -> int:
        """What an unprivileged process may still allocate on the file system."""
        ...


class OsDisk:
    """Disk over the os module."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o640)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def mtime_ns(self, fd: int) -> int:
        return os.fstat(fd).st_mtime_ns

    def stat(self, path: str) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns

    def read(self, fd: int, length: int, offset: int) -> bytes:
        piece = os.pread(fd, length, offset)
        if len(piece) == length or not piece:
            return piece
        pieces = [piece]
        got = len(piece)
        while got < length:
            piece = os.pread(fd, length - got, offset + got)
            if not piece:
                break
            pieces.append(piece)
            got += len(piece)
        return b"".join(pieces)

    def write(self, fd: int, body: bytes | bytearray | memoryview, offset: int) -> None:
        written = os.pwrite(fd, body, offset)
        length = len(body)
        while written < length:  # a short write is legal, and usual just before ENOSPC
            written += os.pwrite(fd, memoryview(body)[written:], offset + written)

    def copy(self, source: int, target: int, length: int, source_offset: int, target_offset: int) -> None:
        done = 0
        while done < length:
            try:
                step = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
            except OSError:  # not on this file system, or across two: the plain way then says if it is a real error
                step = 0
            if step == 0:
                piece = self.read(source, min(_COPY_PIECE, length - done), source_offset + done)
                if not piece:
                    raise OSError(5, "source ends before the bytes to copy")
                self.write(target, piece, target_offset + done)
                step = len(piece)
            done += step

    def allocate(self, fd: int, length: int) -> None:
        os.posix_fallocate(fd, 0, length)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return

    def list(self, path: str) -> list[str]:
        return os.listdir(path)

    def make_dir(self, path: str) -> None:
        os.makedirs(path, mode=0o750, exist_ok=True)

    def free_bytes(self, path: str) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turns an OSError into StoreFailed that says what was being done."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{doing}: {error.strerror or error}") from error


def lock_directory(cache_dir: str) -> int:
    """The descriptor whose closing (or whose process' end) lets go of the lock. Raises StoreFailed if another has it."""
    with disk_errors("opening the lock file"):
        fd = os.open(os.path.join(cache_dir, "LOCK"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreFailed(f"{cache_dir} is in use by another daemon") from error
    return fd
