import os
import subprocess
import sys
from pathlib import Path

import pytest

from koscache.content import version_name
from koscache.fence import FENCE_BYTES, SLOTS, Fence


@pytest.fixture
def fence(tmp_path: Path) -> Fence:
    return Fence.open(str(tmp_path), "boot")


def test_a_bump_changes_one_slot_to_a_value_never_seen(fence: Fence) -> None:
    slot = fence.slot("b", "k")
    seen = {fence.value(slot)}
    neighbour = fence.value(slot ^ 1)
    for _ in range(1000):
        value = fence.bump(slot)
        assert fence.value(slot) == value == fence.value_of("b", "k")
        assert value not in seen
        assert value != 0
        seen.add(value)
    assert fence.value(slot ^ 1) == neighbour


def test_versions_have_a_slot_of_their_own_but_for_the_null_version(fence: Fence) -> None:
    current, versions = fence.slot("b", "k"), fence.versions_slot("b", "k")
    assert current != versions
    assert fence.slot("b", version_name("k", "v1")) == fence.slot("b", version_name("k", "v2")) == versions
    assert fence.slot("b", version_name("k", "null")) == current
    assert versions not in (fence.versions_slot("c", "k"), fence.versions_slot("b", "l"))


def test_slots_begin_different_and_never_zero(fence: Fence) -> None:
    values = [fence.value(slot) for slot in range(0, SLOTS, 64)]
    assert len(set(values)) == len(values)
    assert 0 not in values


def test_all_who_map_it_see_a_bump(tmp_path: Path, fence: Fence) -> None:
    other = Fence.open(str(tmp_path), "boot")
    assert not other.created
    slot = fence.slot("b", "k")
    assert other.bump(slot) == fence.value(slot)


def test_another_process_sees_a_bump_and_makes_other_values(tmp_path: Path, fence: Fence) -> None:
    slot = fence.slot("b", "k")
    script = (
        "import sys; from koscache.fence import Fence; f = Fence.open(sys.argv[1], 'boot');"
        "print(f.value(int(sys.argv[2])), f.bump(int(sys.argv[2])))"
    )
    before = fence.bump(slot)
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(slot)], capture_output=True, text=True, check=True
    )
    saw, made = map(int, out.stdout.split())
    assert saw == before
    assert fence.value(slot) == made != before


def test_forked_processes_do_not_make_the_same_values(fence: Fence) -> None:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, " ".join(str(fence.bump(5)) for _ in range(200)).encode())
        os._exit(0)
    mine = {fence.bump(6) for _ in range(200)}
    os.waitpid(pid, 0)
    theirs = set(map(int, os.read(reads, 1 << 16).split()))
    assert len(theirs) == 200
    assert not mine & theirs


def test_a_new_boot_changes_every_slot(tmp_path: Path, fence: Fence) -> None:
    before = [fence.value(slot) for slot in range(1000)]
    after = Fence.open(str(tmp_path), "next boot")
    assert after.created
    assert not any(after.value(slot) == was for slot, was in enumerate(before))


@pytest.mark.parametrize("damage", ["header", "short", "long", "empty"])
def test_a_damaged_file_is_replaced_not_mended(tmp_path: Path, fence: Fence, damage: str) -> None:
    path = tmp_path / "fence"
    if damage == "header":
        with path.open("r+b") as file:
            file.seek(9)
            file.write(b"\xff")
    else:
        # A file that others map is never cut: the test makes a new one in its place.
        path.unlink()
        path.write_bytes(bytes({"short": FENCE_BYTES - 1, "long": FENCE_BYTES + 1, "empty": 0}[damage]))
    assert Fence.open(str(tmp_path), "boot").created


def test_a_mapping_knows_when_the_file_is_another(tmp_path: Path, fence: Fence) -> None:
    assert fence.current()
    (tmp_path / "fence").unlink()
    assert not fence.current()
    other = Fence.open(str(tmp_path), "boot")
    assert other.current()
    assert not fence.current()


def test_the_file_has_all_its_pages(tmp_path: Path, fence: Fence) -> None:
    found = os.stat(tmp_path / "fence")
    assert found.st_size == FENCE_BYTES
    assert found.st_blocks * 512 >= FENCE_BYTES
