import os
import subprocess
import sys
from pathlib import Path

import pytest

from koscache.content import version_name
from koscache.fence import FENCE_BYTES, FOREVER_NS, LISTING_SLOTS, SLOTS, Fence, boot_ns


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


# --- in a cluster -----------------------------------------------------------------------------------------------------


def in_ns(seconds: float) -> int:
    return boot_ns() + int(seconds * 1e9)


@pytest.fixture
def member(tmp_path: Path) -> Fence:
    return Fence.open(str(tmp_path), "boot", alone=False)


def test_a_new_fence_of_a_cluster_trusts_nothing(member: Fence) -> None:
    assert not member.trusted()
    assert not member.vouching(5)
    assert (member.trusted_until_ns, member.incarnation, member.epoch) == (0, 0, 0)


def test_alone_it_trusts_and_vouches_whatever_the_file_says(tmp_path: Path, member: Fence) -> None:
    member.mark([5])
    alone = Fence.open(str(tmp_path), "boot")
    assert alone.trusted()
    assert alone.vouching(5)


def test_it_trusts_and_vouches_until_then(member: Fence) -> None:
    member.trust(in_ns(60), in_ns(-1))
    assert member.trusted()
    assert not member.vouching(5)
    member.trust(in_ns(-1), in_ns(60))
    assert not member.trusted()
    assert member.vouching(5)
    member.trust(FOREVER_NS, FOREVER_NS)
    assert member.trusted()
    assert member.trusted_until_ns == FOREVER_NS
    member.trust(0, 0)
    assert not member.trusted()
    assert not member.vouching(5)


def test_nothing_is_vouched_for_while_it_is_marked(member: Fence) -> None:
    member.trust(FOREVER_NS, FOREVER_NS)
    member.mark([5, 6])
    member.mark([5])
    assert not member.vouching(5)
    assert member.vouching(7)
    assert member.trusted()
    member.unmark([5, 6])
    assert not member.vouching(5)
    assert member.vouching(6)
    member.unmark([5])
    assert member.vouching(5)


def test_marks_that_cannot_be_counted_stay(member: Fence) -> None:
    """Two writes must not unmark the third: who cannot count them vouches for nothing."""
    member.trust(FOREVER_NS, FOREVER_NS)
    for _ in range(300):
        member.mark([5])
    for _ in range(300):
        member.unmark([5])
    assert not member.vouching(5)
    member.unmark([6])  # one that is not marked
    assert member.vouching(6)
    member.mark([6])
    assert not member.vouching(6)


def test_slots_of_listings_have_no_marks(member: Fence) -> None:
    member.mark([SLOTS, SLOTS + LISTING_SLOTS - 1])
    member.unmark([SLOTS, SLOTS + LISTING_SLOTS - 1])
    member.bump_all([SLOTS + LISTING_SLOTS - 1])
    member.trust(FOREVER_NS, FOREVER_NS)
    assert member.vouching(SLOTS - 1)
    assert member.vouching(0)


def test_a_daemon_that_starts_vouches_for_nothing_and_trusts_as_before(member: Fence) -> None:
    member.trust(FOREVER_NS, FOREVER_NS)
    member.mark([5])
    member.bump(5)
    value = member.value(5)
    member.stop_vouching()
    assert member.trusted()
    assert not member.vouching(5)
    assert not member.vouching(6)
    assert member.value(5) == value
    member.trust(FOREVER_NS, FOREVER_NS)
    assert member.vouching(5)


def test_an_epoch_changes_the_value_of_every_slot_and_no_slot(member: Fence) -> None:
    before = [member.value(slot) for slot in range(SLOTS + LISTING_SLOTS)]
    member.new_epoch()
    epoch = member.epoch
    after = [member.value(slot) for slot in range(SLOTS + LISTING_SLOTS)]
    assert not any(one == other for one, other in zip(before, after, strict=True))
    assert {one ^ other for one, other in zip(before, after, strict=True)} == {epoch}
    member.new_epoch()
    assert member.epoch != epoch
    assert member.value(5) not in (before[5], after[5])


def test_values_within_an_epoch_are_one_value_to_all_who_ask(member: Fence) -> None:
    member.new_epoch()
    slot = member.slot("b", "k")
    assert member.bump(slot) == member.value(slot) == member.value_of("b", "k")
    assert member.listing_values("b", "d/") == tuple(map(member.value, member.listing_slots("b", "d/")))


def test_bump_all_changes_these_and_no_others(member: Fence) -> None:
    member.new_epoch()
    last = SLOTS + LISTING_SLOTS - 1
    before = {slot: member.value(slot) for slot in (3, 4, 5, SLOTS, last)}
    member.bump_all([3, 5, last])
    changed = {slot for slot, value in before.items() if member.value(slot) != value}
    assert changed == {3, 5, last}
    once = member.value(3)
    member.bump_all([3])
    assert member.value(3) not in (once, before[3])
    member.bump_all([])


def test_unused_values_are_never_given_twice(member: Fence) -> None:
    values = [member.unused_value() for _ in range(10_000)]
    assert len(set(values)) == len(values)
    assert 0 not in values
    assert member.value(5) not in values


def test_the_incarnation_is_remembered_with_the_epoch_and_lost_with_the_boot(tmp_path: Path, member: Fence) -> None:
    member.incarnation = 2**63 - 1
    member.new_epoch()
    member.trust(FOREVER_NS, FOREVER_NS)
    again = Fence.open(str(tmp_path), "boot", alone=False)
    assert (again.incarnation, again.epoch) == (2**63 - 1, member.epoch)
    assert again.trusted()
    rebooted = Fence.open(str(tmp_path), "next boot", alone=False)
    assert (rebooted.incarnation, rebooted.epoch, rebooted.trusted_until_ns) == (0, 0, 0)
    assert not rebooted.trusted()


def test_another_process_sees_trust_marks_epoch_and_incarnation(tmp_path: Path, member: Fence) -> None:
    member.mark([5])
    member.trust(in_ns(600), in_ns(600))
    member.new_epoch()
    member.incarnation = 7
    script = (
        "import sys; from koscache.fence import Fence; f = Fence.open(sys.argv[1], 'boot', alone=False);"
        "print(f.trusted(), f.vouching(5), f.vouching(6), f.epoch, f.incarnation, f.value(5)); sys.stdout.flush();"
        "sys.stdin.readline(); print(f.trusted(), f.vouching(6), f.epoch, f.value(5)); f.mark([8])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        saw = other.stdout.readline().split()
        assert saw == ["True", "False", "True", str(member.epoch), "7", str(member.value(5))]
        member.trust(0, 0)
        member.new_epoch()
        other.stdin.write("\n")
        other.stdin.close()
        assert other.stdout.readline().split() == ["False", "False", str(member.epoch), str(member.value(5))]
    member.trust(in_ns(600), in_ns(600))
    assert not member.vouching(8)


def test_the_clock_of_leases_is_one_for_all_processes() -> None:
    before = boot_ns()
    out = subprocess.run(
        [sys.executable, "-c", "from koscache.fence import boot_ns; print(boot_ns())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert before < int(out.stdout) < boot_ns()
