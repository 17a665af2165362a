"""kill -9 of a real process at any moment of filling, packing, sealing, evicting; then the store must be right.

A child runs the store and says what it committed; the parent kills it after so many words, perhaps damages the index,
opens the store itself and compares: every byte served is right, everything in sealed segments is still served, the
directory keeps to its size.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from koscache.disk import OsDisk
from koscache.layout import Region
from koscache.recovery import Trust
from koscache.segments import parse_segment_name, read_segment
from koscache.store import Store
from tests.fakes.block_store import KIB, Settings, Thing, disk_bytes, hits, open_store
from tests.fakes.clock import FakeClock

SIZES = (300, 1900, 9000, 16 * KIB, 50 * KIB)


def thing_of(number: int) -> Thing:
    return Thing(f"k{number}", SIZES[number % len(SIZES)])


def sealed_regions(settings: Settings) -> dict[int, list[Region]]:
    """What the footers on the disk name, by segment."""
    disk = OsDisk()
    found: dict[int, list[Region]] = {}
    directory = os.path.join(settings.dir, "segments")
    for name in os.listdir(directory):
        segment = parse_segment_name(name)
        assert segment is not None
        fd = disk.open(os.path.join(directory, name), os.O_RDONLY)
        walk = read_segment(disk, fd, segment, settings.block_bytes)
        disk.close(fd)
        if walk is not None and walk.sealed:
            found[segment] = walk.blocks
    return found


def run_and_kill(settings: Settings, begin: int, words: int) -> int:
    """Runs the child until it has said `words` words, kills it in the middle of the next; how far it came."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.fakes.store_child", settings.dir, str(begin)],
        stdout=subprocess.PIPE,
        cwd=root,
    ) as child:
        assert child.stdout is not None
        said = begin
        for _ in range(words):
            line = child.stdout.readline()
            assert line, f"the child died by itself: {child.wait()}"
            said = int(line)
        child.send_signal(signal.SIGKILL)
        for line in child.stdout.read().splitlines():
            said = int(line)
        assert child.wait() == -signal.SIGKILL
    return said


def lose_index(settings: Settings, rng: random.Random) -> str:
    how = rng.choice(["kept", "kept", "pointer", "deleted", "garbage"])
    if how == "pointer":
        os.unlink(os.path.join(settings.dir, "CURRENT"))
    for path in Path(settings.dir).glob("index-*"):
        if how == "deleted":
            shutil.rmtree(path)
        if how == "garbage":
            (path / "data.mdb").write_bytes(rng.randbytes(100_000))
    return how


def kept_of_sealed(store: Store, sealed: dict[int, list[Region]]) -> dict[int, int]:
    """By segment, how many of its entries are not found any more."""
    missing: dict[int, int] = {}
    for segment, regions in sealed.items():
        for region in regions:
            if store.locate(region.content, region.number) is None:
                missing[segment] = missing.get(segment, 0) + 1
    return missing


def rounds(tmp_path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    settings = Settings(str(tmp_path / "cache"))
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = 0
    for _ in range(count):
        said = run_and_kill(settings, said, rng.randrange(1, 250)) + 1
        assert disk_bytes(settings.dir) <= settings.size_bytes
        sealed = sealed_regions(settings)
        how = lose_index(settings, rng)
        store = open_store(settings, FakeClock(), boot_id=boot_id)
        kept = how == "kept" and store.recovery.reason != Trust.KILLS.value  # too many deaths in too short a time
        assert store.recovery.index == ("trusted" if kept else "rebuilt"), store.recovery
        missing = kept_of_sealed(store, sealed)
        # A segment whose eviction was under way may have lost entries already; there is one such at a time.
        assert len(missing) <= (1 if how == "kept" else 0), (seed, how, missing)
        assert hits(store, settings.dir, [thing_of(number) for number in range(max(0, said - 400), said + 3)]) > 0
        assert store.stats().used_bytes <= settings.size_bytes
        store.close(clean=rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_any_moment(tmp_path: Path, seed: int) -> None:
    rounds(tmp_path, seed, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 110))
def test_kill_9_at_any_moment_many_times(tmp_path: Path, seed: int) -> None:
    rounds(tmp_path, seed, 25)
