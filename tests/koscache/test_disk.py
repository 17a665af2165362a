import errno
import os
from pathlib import Path

import pytest

from koscache.disk import OsDisk, StoreFailed, disk_errors


@pytest.fixture
def disk() -> OsDisk:
    return OsDisk()


def made(disk: OsDisk, path: Path, body: bytes = b"") -> int:
    fd = disk.open(str(path), os.O_RDWR | os.O_CREAT)
    if body:
        disk.write(fd, body, 0)
    return fd


def test_read_is_shorter_only_at_the_end(disk: OsDisk, tmp_path: Path) -> None:
    fd = made(disk, tmp_path / "a", b"0123456789")
    assert disk.read(fd, 4, 3) == b"3456"
    assert disk.read(fd, 40, 3) == b"3456789"
    assert disk.read(fd, 4, 30) == b""
    assert disk.size(fd) == 10
    disk.close(fd)


def test_a_short_write_goes_on(disk: OsDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = made(disk, tmp_path / "a")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, body, at: pwrite(fd, bytes(body)[:3], at))
    disk.write(fd, b"0123456789", 5)
    assert disk.read(fd, 100, 0) == bytes(5) + b"0123456789"
    disk.close(fd)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copy(disk: OsDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:

        def refuse(*args: object) -> int:
            raise OSError(errno.EXDEV, "no")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    body = os.urandom(3_000_000)
    source, target = made(disk, tmp_path / "a", body), made(disk, tmp_path / "b")
    disk.copy(source, target, 2_500_000, 1000, 7)
    assert disk.read(target, 2_600_000, 7) == body[1000:2_501_000]
    with pytest.raises(OSError, match="source ends"):
        disk.copy(source, target, 1000, 2_999_500, 0)
    disk.close(source)
    disk.close(target)


def test_small_things(disk: OsDisk, tmp_path: Path) -> None:
    disk.make_dir(str(tmp_path / "x" / "y"))
    disk.make_dir(str(tmp_path / "x" / "y"))
    fd = made(disk, tmp_path / "x" / "a")
    disk.allocate(fd, 10_000)
    disk.sync(fd)
    assert disk.stat(str(tmp_path / "x" / "a")) == (10_000, disk.mtime_ns(fd))
    disk.truncate(fd, 100)
    disk.close(fd)
    disk.rename(str(tmp_path / "x" / "a"), str(tmp_path / "x" / "b"))
    disk.sync_dir(str(tmp_path / "x"))
    assert sorted(disk.list(str(tmp_path / "x"))) == ["b", "y"]
    disk.unlink(str(tmp_path / "x" / "b"))
    disk.unlink(str(tmp_path / "x" / "b"))
    assert disk.free_bytes(str(tmp_path)) > 0


def test_what_failed_is_said() -> None:
    with pytest.raises(StoreFailed, match="sealing: No space left on device"), disk_errors("sealing"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
