"""Races of the lease table as scripts: what happens, line by line, and what the daemon must do about it.

script(leases, (event, [commands]), ...): each event is a call, each list exactly what it must return, in order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from koscache import ipc
from koscache.content import Extent, Record
from koscache.ipc import BlockOutcome, OpenOutcome, PassReason
from koscache.leases import Abandon, Command, ForgetRecord, Here, Leases, Reserve, Send, StoreBlock, StoreOpen

A, B, C = 1, 2, 3
V1 = b"version-1-------"
EXTENT, OTHER = Extent(7, 4096, 100, "/s/7"), Extent(7, 8192, 100, "/s/7")
RECORD = Record('"e"', 100, "", (), (), False, V1, 1.0, 9)

Event = Callable[[Leases], list[Command]]


def script(leases: Leases, *lines: tuple[Event, list[Command]]) -> None:
    for number, (event, commands) in enumerate(lines, 1):
        assert event(leases) == commands, f"line {number}"


@pytest.fixture
def leases() -> Leases:
    return Leases(fills_max_bytes=250, small_bytes=10, timeout_s=60, touches_max=2)


def asks_open(worker: int, ask: int, fence: int = 9, now: float = 0, insist: bool = False) -> Event:
    return lambda table: table.ask_open(worker, ipc.AskOpen(ask, "b", "k", fence, insist), now)


def open_done(worker: int, ask: int, lease: int, outcome: OpenOutcome = OpenOutcome.STORED) -> Event:
    record = RECORD if outcome is OpenOutcome.STORED else None
    return lambda table: table.open_done(worker, ipc.OpenDone(ask, lease, outcome, "cold", record), 0)


def asks_block(
    worker: int, ask: int, number: int = 0, length: int = 100, touch: bool = False, ahead: bool = False
) -> Event:
    message = ipc.AskBlock(ask, "b", "k", V1, number, length, touch, ahead)
    return lambda table: table.ask_block(worker, message, 0)


def reserved(lease: int, result: Extent | Here | PassReason | None) -> Event:
    return lambda table: table.reserved(lease, result, 0)


def progress(worker: int, lease: int, watermark: int, now: float = 0) -> Event:
    return lambda table: table.progress(worker, ipc.Progress(lease, watermark), now)


def block_done(worker: int, ask: int, lease: int, body: bytes | None = None) -> Event:
    return lambda table: table.block_done(worker, ipc.BlockDone(ask, lease, 5, body), 0)


def block_failed(worker: int, lease: int, outcome: BlockOutcome) -> Event:
    return lambda table: table.block_failed(worker, ipc.BlockFailed(lease, outcome))


def block_stored(lease: int, stored: bool = True) -> Event:
    return lambda table: table.block_stored(lease, stored)


def dies(worker: int) -> Event:
    return lambda table: table.worker_gone(worker, 0)


def store_block(lease: int, extent: Extent | None = EXTENT, body: bytes | None = None, number: int = 0) -> StoreBlock:
    return StoreBlock(lease, "b", "k", V1, number, extent, 5, body, None)


def ended(ask: int) -> ipc.OpenEnded:
    return ipc.OpenEnded(ask, OpenOutcome.STORED, "cold", RECORD)


# --- opens ------------------------------------------------------------------------------------------------------------


def test_one_asks_the_origin_and_all_get_the_record_before_it_is_in_the_index(leases: Leases) -> None:
    done = ipc.OpenDone(2, 1, OpenOutcome.STORED, "cold", RECORD)
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 1), []),
        (open_done(A, 2, 1), [StoreOpen(1, "b", "k", done), Send(B, ended(1))]),
        (asks_open(C, 1), [Send(C, ended(1))]),
        (lambda table: table.open_stored(1, True), [Send(A, ipc.Done(2, True))]),
        (asks_open(B, 2), [Send(B, ipc.OpenLead(2, 2))]),
    )


def test_a_read_after_a_write_has_another_fence_value_and_joins_nothing(leases: Leases) -> None:
    script(
        leases,
        (asks_open(A, 1, fence=9), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 1, fence=10), [Send(B, ipc.OpenLead(1, 2))]),
    )


def test_an_open_whose_leader_dies_is_led_by_the_next_and_the_dead_ones_word_counts_no_more(leases: Leases) -> None:
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 5), []),
        (asks_open(C, 6), []),
        (dies(A), [Send(B, ipc.OpenLead(5, 2))]),
        (open_done(A, 2, 1), [Send(A, ipc.Done(2, False))]),
        (dies(B), [Send(C, ipc.OpenLead(6, 3))]),
        (dies(C), []),
    )
    assert leases.opens == 0


def test_whom_a_record_does_not_do_while_it_is_stored_asks_the_origin(leases: Leases) -> None:
    done = ipc.OpenDone(2, 1, OpenOutcome.STORED, "cold", RECORD)
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (open_done(A, 2, 1), [StoreOpen(1, "b", "k", done)]),
        (asks_open(B, 1, insist=True), [Send(B, ipc.OpenLead(1, 2))]),
        (asks_open(C, 1, insist=True), []),
        (lambda table: table.open_stored(1, True), [Send(A, ipc.Done(2, True))]),
        (asks_open(A, 3), []),
        (dies(B), [Send(C, ipc.OpenLead(1, 3))]),
    )


def test_leases_are_numbered_from_where_the_caller_says() -> None:
    table = Leases(fills_max_bytes=250, small_bytes=10, timeout_s=60, first=1000)
    script(
        table, (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1001))]), (open_done(A, 2, 1), [Send(A, ipc.Done(2, False))])
    )


def test_a_leader_that_dies_while_its_record_is_stored_still_serves_those_who_wait(leases: Leases) -> None:
    done = ipc.OpenDone(2, 1, OpenOutcome.STORED, "cold", RECORD)
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 5), []),
        (open_done(A, 2, 1), [StoreOpen(1, "b", "k", done), Send(B, ended(5))]),
        (dies(A), []),
        (asks_open(C, 6), [Send(C, ended(6))]),
        (lambda table: table.open_stored(1, True), []),
    )


def test_a_refusal_forgets_the_record_and_tells_all(leases: Leases) -> None:
    refused = ipc.OpenEnded(5, OpenOutcome.REFUSED, "cold")
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 5), []),
        (
            open_done(A, 2, 1, OpenOutcome.REFUSED),
            [ForgetRecord("b", "k"), Send(A, ipc.Done(2, True)), Send(B, refused)],
        ),
    )


def test_a_leader_that_gives_up_hands_over(leases: Leases) -> None:
    script(
        leases,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 5), []),
        (
            open_done(A, 2, 1, OpenOutcome.LEADER_GAVE_UP),
            [Send(A, ipc.Done(2, True)), Send(B, ipc.OpenLead(5, 2))],
        ),
    )


def test_a_silent_leader_of_an_open_is_replaced(leases: Leases) -> None:
    script(
        leases,
        (asks_open(A, 1, now=0), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 5, now=50), []),
        (lambda table: table.expire(59), []),
        (lambda table: table.expire(61), [Send(B, ipc.OpenLead(5, 2))]),
        (lambda table: table.expire(62), []),
        (open_done(A, 2, 1), [Send(A, ipc.Done(2, False))]),
    )


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_a_fill_with_a_follower_from_beginning_to_end(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (progress(A, 1, 30), []),
        (asks_block(B, 8), [Send(A, ipc.Followed(1)), Send(B, ipc.BlockFollow(8, 1, EXTENT, 30))]),
        (asks_block(C, 9), [Send(C, ipc.BlockFollow(9, 1, EXTENT, 30))]),
        (progress(A, 1, 60), [Send(B, ipc.Progress(1, 60)), Send(C, ipc.Progress(1, 60))]),
        (block_done(A, 2, 1), [store_block(1)]),
        (
            block_stored(1),
            [
                Send(A, ipc.Done(2, True)),
                Send(B, ipc.BlockEnded(1, BlockOutcome.COMMITTED)),
                Send(C, ipc.BlockEnded(1, BlockOutcome.COMMITTED)),
            ],
        ),
    )
    assert (leases.fills, leases.granted_bytes) == (0, 0)


def test_who_asks_while_the_extent_is_reserved_waits_and_follows(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (asks_block(B, 8), []),
        (
            reserved(1, EXTENT),
            [
                Send(A, ipc.BlockLead(1, 1, EXTENT)),
                Send(A, ipc.Followed(1)),
                Send(B, ipc.BlockFollow(8, 1, EXTENT, 0)),
            ],
        ),
    )


def test_a_leader_that_dies_while_reserving_is_replaced_by_who_waits(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (asks_block(B, 8), []),
        (dies(A), []),
        (reserved(1, EXTENT), [Send(B, ipc.BlockLead(8, 1, EXTENT))]),
    )


def test_an_extent_for_nobody_is_abandoned(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (dies(A), []),
        (reserved(1, EXTENT), [Abandon(EXTENT)]),
    )
    assert leases.granted_bytes == 0


def test_a_leader_that_dies_wakes_its_followers_and_its_extent_is_never_used_again(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (asks_block(B, 8), [Send(A, ipc.Followed(1)), Send(B, ipc.BlockFollow(8, 1, EXTENT, 0))]),
        (dies(A), [Send(B, ipc.BlockEnded(1, BlockOutcome.LEADER_DIED)), Abandon(EXTENT)]),
        (asks_block(B, 9), [Reserve(2, V1, 0, 100, False)]),
        (progress(A, 1, 50), []),
        (block_done(A, 2, 1), [Send(A, ipc.Done(2, False))]),
        (reserved(2, OTHER), [Send(B, ipc.BlockLead(9, 2, OTHER))]),
    )


def test_a_leader_that_dies_after_done_is_committed_all_the_same(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (asks_block(B, 8), [Send(A, ipc.Followed(1)), Send(B, ipc.BlockFollow(8, 1, EXTENT, 0))]),
        (block_done(A, 2, 1), [store_block(1)]),
        (dies(A), []),
        (block_stored(1), [Send(B, ipc.BlockEnded(1, BlockOutcome.COMMITTED))]),
    )


@pytest.mark.parametrize("outcome", [each for each in BlockOutcome if each is not BlockOutcome.COMMITTED])
def test_every_failure_of_a_leader_reaches_its_followers_by_name(leases: Leases, outcome: BlockOutcome) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (asks_block(B, 8), [Send(A, ipc.Followed(1)), Send(B, ipc.BlockFollow(8, 1, EXTENT, 0))]),
        (block_failed(B, 1, outcome), []),  # not the leader
        (block_failed(A, 1, outcome), [Send(B, ipc.BlockEnded(1, outcome)), Abandon(EXTENT)]),
    )
    assert leases.granted_bytes == 0


def test_a_silent_leader_loses_its_lease_and_signs_of_life_keep_it(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (asks_block(B, 8), [Send(A, ipc.Followed(1)), Send(B, ipc.BlockFollow(8, 1, EXTENT, 0))]),
        (progress(A, 1, 10, now=50), [Send(B, ipc.Progress(1, 10))]),
        (lambda table: table.expire(100), []),
        (lambda table: table.expire(111), [Send(B, ipc.BlockEnded(1, BlockOutcome.LEADER_STALLED)), Abandon(EXTENT)]),
        (block_done(A, 2, 1), [Send(A, ipc.Done(2, False))]),
    )


def test_a_commit_that_fails_is_told(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (reserved(1, EXTENT), [Send(A, ipc.BlockLead(1, 1, EXTENT))]),
        (block_done(A, 2, 1), [store_block(1)]),
        (asks_block(B, 8), [Send(B, ipc.BlockFollow(8, 1, EXTENT, 0))]),
        (
            block_stored(1, False),
            [Send(A, ipc.Done(2, False)), Send(B, ipc.BlockEnded(1, BlockOutcome.DISK_FAILED))],
        ),
    )


def test_a_block_that_is_there_by_now(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1), [Reserve(1, V1, 0, 100, False)]),
        (asks_block(B, 8), []),
        (reserved(1, Here.HERE), [Send(A, ipc.BlockHere(1)), Send(B, ipc.BlockHere(8))]),
    )


def test_a_small_block_travels_in_the_message(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1, length=10), [Reserve(1, V1, 0, 10, True)]),
        (reserved(1, None), [Send(A, ipc.BlockLead(1, 1, None))]),
        (block_done(A, 2, 1, b"0123456789"), [store_block(1, None, b"0123456789")]),
        (block_stored(1), [Send(A, ipc.Done(2, True))]),
    )


def test_fills_are_bounded_by_their_bytes(leases: Leases) -> None:
    full = ipc.BlockPass(3, PassReason.FILLS_MAX)
    script(
        leases,
        (asks_block(A, 1, number=0), [Reserve(1, V1, 0, 100, False)]),
        (asks_block(A, 2, number=1), [Reserve(2, V1, 1, 100, False)]),
        (asks_block(A, 3, number=2), [Send(A, full)]),
        (asks_block(A, 4, number=2, length=50), [Reserve(3, V1, 2, 50, False)]),
        (reserved(1, PassReason.STORE_REFUSED), [Send(A, ipc.BlockPass(1, PassReason.STORE_REFUSED))]),
        (asks_block(A, 5, number=3), [Reserve(4, V1, 3, 100, False)]),
    )
    assert leases.granted_bytes == 250


def test_looking_ahead_leaves_half_of_the_room_to_those_who_wait(leases: Leases) -> None:
    script(
        leases,
        (asks_block(A, 1, number=1, ahead=True), [Reserve(1, V1, 1, 100, False)]),
        (asks_block(A, 2, number=2, ahead=True), [Send(A, ipc.BlockPass(2, PassReason.FILLS_MAX))]),
        (asks_block(B, 3, number=9), [Reserve(2, V1, 9, 100, False)]),
    )


def test_a_small_read_fills_at_its_second_touch_and_touches_are_bounded(leases: Leases) -> None:
    first = PassReason.FIRST_TOUCH
    script(
        leases,
        (asks_block(A, 1, number=0, touch=True), [Send(A, ipc.BlockPass(1, first))]),
        (asks_block(B, 1, number=0, touch=True), [Reserve(1, V1, 0, 100, False)]),
        (asks_block(A, 2, number=1, touch=True), [Send(A, ipc.BlockPass(2, first))]),
        (asks_block(A, 3, number=2, touch=True), [Send(A, ipc.BlockPass(3, first))]),
        (asks_block(A, 4, number=3, touch=True), [Send(A, ipc.BlockPass(4, first))]),
        (asks_block(A, 5, number=1, touch=True), [Send(A, ipc.BlockPass(5, first))]),  # forgotten: two are remembered
    )
    leases.touched(ipc.FirstTouch(V1, 7))
    assert asks_block(A, 6, number=7, touch=True)(leases) == [Reserve(2, V1, 7, 100, False)]


def test_caching_off_passes_everything_through(leases: Leases) -> None:
    leases.caching = False
    assert asks_block(A, 1)(leases) == [Send(A, ipc.BlockPass(1, PassReason.CACHING_OFF))]


def test_waiting_is_bounded() -> None:
    table = Leases(fills_max_bytes=1000, small_bytes=10, timeout_s=60, waiting_max=1)
    script(
        table,
        (asks_open(A, 1), [Send(A, ipc.OpenLead(1, 1))]),
        (asks_open(B, 2), []),
        (asks_open(C, 3), [Send(C, ipc.OpenLead(3, 0))]),
        (asks_open(C, 4, fence=10), [Send(C, ipc.OpenLead(4, 0))]),
        (asks_block(A, 5), [Reserve(2, V1, 0, 100, False)]),
        (asks_block(B, 6), []),
        (asks_block(C, 7), [Send(C, ipc.BlockPass(7, PassReason.BUSY))]),
    )
