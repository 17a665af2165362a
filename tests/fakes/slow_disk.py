"""A real disk that is slow on demand: a file system of its own in a file, whose block device the kernel throttles.

Owns: the image, the loop device, the mount and the control group. Does not own: whose files are on it, who is in the group.

How: ext4 on a loop device, mounted `sync`, so that a write is on the device before the call returns, and is charged to
whoever wrote. A control group (v1 blkio, or v2 io, whichever there is) bounds the bytes per second that its processes read
and write there. Reads of what the page cache holds stay fast, as on any slow disk; cool() makes the cache forget.

Needs root, mkfs.ext4, a loop device and the control group's controller; Unavailable says what is missing.

Invariant: when the block is left the image is unmounted and gone, however it was left; nobody may hold files open then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tests.conditions import eventually
from tests.fakes.network import Unavailable

_V1: Final = Path("/sys/fs/cgroup/blkio")
_V2: Final = Path("/sys/fs/cgroup")
_TOOL_TIMEOUT_S: Final = 60.0


class SlowDisk:
    """directory: where it is mounted."""

    def __init__(self, directory: Path, device: str, group: Path) -> None:
        self.directory = directory
        self._group = group
        major, minor = os.major(os.stat(device).st_rdev), os.minor(os.stat(device).st_rdev)
        self._number = f"{major}:{minor}"

    def charge(self, pids: Iterable[int]) -> None:
        """The disk is slow for these processes, and for those that they will start."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self._group / "cgroup.procs").write_text(str(pid))

    def slow(self, bytes_per_s: int) -> None:
        """From now on reads and writes are no faster, until heal()."""
        self._limit(bytes_per_s)
        self.cool()

    def heal(self) -> None:
        self._limit(0)

    def cool(self) -> None:
        """Let the page cache forget the files, as far as they are written out and not mapped."""
        for path in self.directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _limit(self, bytes_per_s: int) -> None:
        if (self._group / "io.max").exists():
            most = str(bytes_per_s) if bytes_per_s else "max"
            (self._group / "io.max").write_text(f"{self._number} rbps={most} wbps={most}")
            return
        for way in ("read", "write"):
            (self._group / f"blkio.throttle.{way}_bps_device").write_text(f"{self._number} {bytes_per_s}")


@contextlib.contextmanager
def slow_disk(directory: Path, size_bytes: int) -> Iterator[SlowDisk]:
    """A disk of this size, not slow yet, mounted below this directory. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("a disk of its own needs root")
    if shutil.which("mkfs.ext4") is None or shutil.which("losetup") is None:
        raise Unavailable("a disk of its own needs mkfs.ext4 and losetup")
    image, mounted = directory / "disk.img", directory / "disk"
    mounted.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        group = undo.enter_context(_group(f"kos-disk-{os.getpid()}-{directory.name}"))
        undo.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        try:
            _run("mkfs.ext4", "-q", "-m", "0", str(image))
            device = _run("losetup", "--find", "--show", str(image)).strip()
            undo.callback(_run, "losetup", "--detach", device)
            _run("mount", "-o", "sync", device, str(mounted))
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        # Lazily: a process that was killed a moment ago may not have let go of its files yet.
        undo.callback(_run, "umount", "--lazy", str(mounted))
        disk = SlowDisk(mounted, device, group)
        try:
            yield disk
        finally:
            disk.heal()


@contextlib.contextmanager
def _group(name: str) -> Iterator[Path]:
    controllers = _V2 / "cgroup.controllers"
    try:
        if controllers.exists():
            if "io" not in controllers.read_text().split():
                raise Unavailable("the io controller of control groups is not there")
            (_V2 / "cgroup.subtree_control").write_text("+io")
            root = _V2
        elif _V1.is_dir():
            root = _V1
        else:
            raise Unavailable("there are no control groups for disks")
        group = root / name
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"control groups: {error}") from error
    try:
        yield group
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text(), "the processes of the group have ended")
        group.rmdir()


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S)
    return done.stdout
