"""Any order of events: the lease table answers every question once, has one leader a key, and counts its bytes right."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from koscache import ipc
from koscache.content import Extent, Record
from koscache.ipc import BlockOutcome, OpenOutcome, PassReason
from koscache.leases import (
    NO_LEASE,
    Abandon,
    Command,
    Here,
    Leases,
    Reserve,
    Send,
    StoreBlock,
    StoreOpen,
)

FILLS_MAX = 300
CONTENTS = [bytes([each]) * 16 for each in range(2)]
RECORD = Record('"e"', 100, "", (), (), False, CONTENTS[0], 1.0, 9)
workers = st.integers(1, 4)
ANSWERS = (ipc.OpenLead, ipc.OpenEnded, ipc.BlockLead, ipc.BlockFollow, ipc.BlockHere, ipc.BlockPass, ipc.Done)


class LeaseMachine(RuleBasedStateMachine):
    """The model: which questions are owed an answer, who leads what, what the store was asked for."""

    worker = Bundle("worker")

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases(fills_max_bytes=FILLS_MAX, small_bytes=10, timeout_s=60, waiting_max=8, touches_max=4)
        self.now = 0.0
        self.asks = 0
        self.extents = 0
        self.alive: dict[int, int] = {}  # slot -> worker number
        self.numbers = 0
        self.owed: dict[tuple[int, int], str] = {}
        self.leads_open: dict[int, int] = {}
        self.leads_block: dict[int, tuple[int, int | None]] = {}
        self.reserving: dict[int, Reserve] = {}
        self.storing_open: list[int] = []
        self.storing_block: list[int] = []
        self.out: set[Extent] = set()
        self.used: set[Extent] = set()

    def _worker(self, slot: int) -> int:
        if slot not in self.alive:
            self.numbers += 1
            self.alive[slot] = self.numbers
        return self.alive[slot]

    def _ask(self, worker: int, kind: str) -> int:
        self.asks += 1
        self.owed[worker, self.asks] = kind
        return self.asks

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self._sent(command.worker, command.message)
            elif isinstance(command, Reserve):
                assert command.lease not in self.reserving
                self.reserving[command.lease] = command
            elif isinstance(command, StoreOpen):
                self.storing_open.append(command.lease)
            elif isinstance(command, StoreBlock):
                self.storing_block.append(command.lease)
                if command.extent is not None:
                    self.out.remove(command.extent)
            elif isinstance(command, Abandon):
                self.out.remove(command.extent)

    def _sent(self, worker: int, message: ipc.Message) -> None:
        assert worker in self.alive.values(), "nothing is said to the dead"
        if isinstance(message, ANSWERS):
            del self.owed[worker, message.ask]  # KeyError: answered twice, or never asked
        if isinstance(message, ipc.OpenLead) and message.lease != NO_LEASE:
            self.leads_open[message.lease] = worker
        if isinstance(message, ipc.BlockLead):
            assert message.lease not in self.leads_block
            if message.extent is not None:
                assert message.extent in self.out
                assert message.extent not in self.used, "an extent is granted once"
                self.used.add(message.extent)
            self.leads_block[message.lease] = (worker, None if message.extent is None else message.extent.offset)

    @rule(slot=workers, key=st.sampled_from("kl"), fence=st.integers(1, 2))
    def ask_open(self, slot: int, key: str, fence: int) -> None:
        worker = self._worker(slot)
        self._take(self.leases.ask_open(worker, ipc.AskOpen(self._ask(worker, "open"), "b", key, fence), self.now))

    @rule(slot=workers, outcome=st.sampled_from(OpenOutcome), at=st.integers(0, 99))
    def open_done(self, slot: int, outcome: OpenOutcome, at: int) -> None:
        worker = self._worker(slot)
        leading = [lease for lease, leader in self.leads_open.items() if leader == worker]
        lease = leading[at % len(leading)] if leading else at
        self.leads_open.pop(lease, None)
        record = RECORD if outcome is OpenOutcome.STORED else None
        message = ipc.OpenDone(self._ask(worker, "done"), lease, outcome, "", record)
        self._take(self.leases.open_done(worker, message, self.now))

    @rule(stored=st.booleans())
    def open_stored(self, stored: bool) -> None:
        if self.storing_open:
            self._take(self.leases.open_stored(self.storing_open.pop(0), stored))

    @rule(
        slot=workers,
        content=st.sampled_from(CONTENTS),
        number=st.integers(0, 2),
        touch=st.booleans(),
    )
    def ask_block(self, slot: int, content: bytes, number: int, touch: bool) -> None:
        worker = self._worker(slot)
        ask = self._ask(worker, "block")
        length = 5 if number == 2 else 100  # the last block is a small one
        message = ipc.AskBlock(ask, "b", "k", content, number, length, touch)
        self._take(self.leases.ask_block(worker, message, self.now))

    @rule(result=st.sampled_from(["extent", "extent", "extent", "here", "refused"]))
    def reserved(self, result: str) -> None:
        if not self.reserving:
            return
        lease = next(iter(self.reserving))
        asked = self.reserving.pop(lease)
        answer: Any
        if result == "here":
            answer = Here.HERE
        elif result == "refused":
            answer = PassReason.STORE_REFUSED
        elif asked.inline:
            answer = None
        else:
            self.extents += 1
            answer = Extent(1, 4096 * self.extents, asked.length, "/s/1")
            self.out.add(answer)
        self._take(self.leases.reserved(lease, answer, self.now))

    @rule(slot=workers, at=st.integers(0, 99), watermark=st.integers(0, 200))
    def progress(self, slot: int, at: int, watermark: int) -> None:
        worker = self._worker(slot)
        self._take(self.leases.progress(worker, ipc.Progress(self._led(worker, at), watermark), self.now))

    @rule(slot=workers, at=st.integers(0, 99))
    def block_done(self, slot: int, at: int) -> None:
        worker = self._worker(slot)
        lease = self._led(worker, at)
        leader = self.leads_block.pop(lease, None)
        body = b"01234" if leader is not None and leader[1] is None else None
        message = ipc.BlockDone(self._ask(worker, "done"), lease, 5, body)
        self._take(self.leases.block_done(worker, message, self.now))

    @rule(slot=workers, at=st.integers(0, 99), outcome=st.sampled_from(BlockOutcome))
    def block_failed(self, slot: int, at: int, outcome: BlockOutcome) -> None:
        worker = self._worker(slot)
        lease = self._led(worker, at)
        self.leads_block.pop(lease, None)
        self._take(self.leases.block_failed(worker, ipc.BlockFailed(lease, outcome)))

    @rule(stored=st.booleans())
    def block_stored(self, stored: bool) -> None:
        if self.storing_block:
            self._take(self.leases.block_stored(self.storing_block.pop(0), stored))

    @rule(slot=workers)
    def dies(self, slot: int) -> None:
        worker = self.alive.pop(slot, None)
        if worker is None:
            return
        self.owed = {key: kind for key, kind in self.owed.items() if key[0] != worker}
        self.leads_open = {lease: leader for lease, leader in self.leads_open.items() if leader != worker}
        self.leads_block = {lease: led for lease, led in self.leads_block.items() if led[0] != worker}
        self._take(self.leases.worker_gone(worker, self.now))

    @rule(seconds=st.sampled_from([1, 61]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self._take(self.leases.expire(self.now))

    def _led(self, worker: int, at: int) -> int:
        leading = [lease for lease, led in self.leads_block.items() if led[0] == worker]
        return leading[at % len(leading)] if leading else at + 10_000

    @invariant()
    def bytes_are_bounded(self) -> None:
        assert 0 <= self.leases.granted_bytes <= FILLS_MAX
        if not self.leases.fills:
            assert self.leases.granted_bytes == 0

    def teardown(self) -> None:
        """Everything ends: whoever is owed an answer gets it, nothing is left."""
        for _ in range(200):
            while self.reserving:
                self.reserved("refused")
            while self.storing_open:
                self.open_stored(True)
            while self.storing_block:
                self.block_stored(True)
            if not self.leases.opens and not self.leases.fills:
                break
            for lease, worker in list(self.leads_open.items()):
                del self.leads_open[lease]
                message = ipc.OpenDone(self._ask(worker, "done"), lease, OpenOutcome.UNAVAILABLE)
                self._take(self.leases.open_done(worker, message, self.now))
            self.time_passes(61)
        assert not self.owed, self.owed
        assert (self.leases.opens, self.leases.fills, self.leases.granted_bytes) == (0, 0, 0)
        assert not self.out, "every extent was committed or abandoned"


LeaseMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestLeases = LeaseMachine.TestCase
