"""Who may ask the origin, who fills which block, who reads behind whom: the daemon's decisions, without any I/O.

Owns: open leases (one per bucket, key and fence value), block leases (one per content and number), the bytes granted to
fills, the memory of first touches. Does not own: the store, sockets, time (the shell, koscache.daemon, carries out the
commands that every event returns, and feeds back how they went).

Invariant: for each key of a lease at most one worker leads (the origin is asked once) at any moment, and every question
is answered exactly once or its worker is gone. Granted bytes never exceed fills_max.

A block lease:   ask ──▶ RESERVING ──reserved──▶ FILLING ──block_done──▶ STORING ──stored──▶ (gone, COMMITTED)
                            │ here, refused          │ failed, died, stalled    │ not stored
                            ▼                        ▼                          ▼
                         (gone)             (gone, followers told which)   (gone, DISK_FAILED)
An open lease:   ask ──▶ LEADING ──open_done STORED──▶ STORING (all told, also who asks now) ──stored──▶ (gone)
                            │ any other outcome: (gone, all told)
                            │ leader died, stalled: the first who waits leads; nobody waits: (gone)

A follower of a fill that died asks again; the first to do so leads, with a fresh extent: space that a lost leader may
still write into is never granted a second time.

Whoever asked hears of an open's record before it is in the index: a disk that stands still holds up no reader.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from koscache import ipc
from koscache.content import Extent, Record
from koscache.ipc import BlockOutcome, OpenOutcome, PassReason

#: A lease number that is none.
NO_LEASE: Final = 0

OpenKey = tuple[str, str, int]
BlockKey = tuple[bytes, int]


# --- commands: what the shell is to do ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    worker: int
    message: ipc.Message


@dataclass(frozen=True, slots=True)
class Reserve:
    """Look whether the block is here; else reserve an extent (inline: nothing to reserve). Answer with reserved()."""

    lease: int
    content: bytes
    number: int
    length: int
    inline: bool


@dataclass(frozen=True, slots=True)
class StoreOpen:
    """Put the record, and the body if there is one. Answer with open_stored()."""

    lease: int
    bucket: str
    key: str
    done: ipc.OpenDone


@dataclass(frozen=True, slots=True)
class ForgetRecord:
    """The origin does not have this object any more."""

    bucket: str
    key: str


@dataclass(frozen=True, slots=True)
class StoreBlock:
    """Commit the block. Answer with block_stored()."""

    lease: int
    bucket: str
    key: str
    content: bytes
    number: int
    extent: Extent | None
    checksum: int
    body: bytes | None
    record: Record | None


@dataclass(frozen=True, slots=True)
class Abandon:
    """The extent will never be committed."""

    extent: Extent


Command = Send | Reserve | StoreOpen | ForgetRecord | StoreBlock | Abandon


class Here(enum.Enum):
    """Result of a reservation: the block is in the index."""

    HERE = "here"


@dataclass(slots=True)
class _Open:
    key: OpenKey
    leader: int | None
    active_at: float
    ask: int = 0
    done: ipc.OpenDone | None = None
    waiting: list[tuple[int, int]] = field(default_factory=list)


class _State(enum.Enum):
    RESERVING = enum.auto()
    FILLING = enum.auto()
    STORING = enum.auto()


@dataclass(slots=True)
class _Block:
    key: BlockKey
    bucket: str
    name: str
    length: int
    leader: int | None
    ask: int
    active_at: float
    inline: bool
    record: Record | None
    to_origin: bool
    state: _State = _State.RESERVING
    extent: Extent | None = None
    watermark: int = 0
    followers: set[int] = field(default_factory=set)
    waiting: list[tuple[int, int]] = field(default_factory=list)


class Leases:
    """The table. Times are monotonic seconds given by the caller; workers are numbers that are never used again.

    fills_max_bytes: all fills together. small_bytes: blocks up to this travel in messages. waiting_max: leases, and
    questions that wait on one of them. touches_max: remembered first touches. timeout_s: a leader silent for so long
    has lost its lease. first: leases are numbered from here on. What a worker has to say of the lease of a daemon that
    died must mean nothing to the next one, or the record of one object is stored as another's: so a random number.
    """

    def __init__(
        self,
        *,
        fills_max_bytes: int,
        small_bytes: int,
        timeout_s: float,
        waiting_max: int = 65536,
        touches_max: int = 65536,
        first: int = NO_LEASE,
    ) -> None:
        self._fills_max_bytes = fills_max_bytes
        self._small_bytes = small_bytes
        self._timeout_s = timeout_s
        self._waiting_max = waiting_max
        self._touches_max = touches_max
        self._next = first
        self._opens: dict[int, _Open] = {}
        self._open_of: dict[OpenKey, int] = {}
        self._blocks: dict[int, _Block] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._touches: OrderedDict[BlockKey, None] = OrderedDict()
        self.granted_bytes = 0
        self.caching = True

    @property
    def fills(self) -> int:
        """Fills in flight."""
        return len(self._blocks)

    @property
    def opens(self) -> int:
        return len(self._opens)

    @property
    def followers(self) -> int:
        """Workers that read behind a fill of another one."""
        return sum(len(block.followers) + len(block.waiting) for block in self._blocks.values())

    # --- opens ----------------------------------------------------------------------------------------------------

    def ask_open(self, worker: int, message: ipc.AskOpen, now: float) -> list[Command]:
        key = (message.bucket, message.key, message.fence)
        number = self._open_of.get(key)
        if number is not None:
            lease = self._opens[number]
            if lease.done is None:
                if len(lease.waiting) >= self._waiting_max:
                    return [Send(worker, ipc.OpenLead(message.ask, NO_LEASE))]
                lease.waiting.append((worker, message.ask))
                return []
            if not message.insist:
                return [Send(worker, _open_ended(message.ask, lease.done))]
        if len(self._opens) >= self._waiting_max:
            return [Send(worker, ipc.OpenLead(message.ask, NO_LEASE))]
        number = self._number()
        self._opens[number] = _Open(key, worker, now)
        self._open_of[key] = number
        return [Send(worker, ipc.OpenLead(message.ask, number))]

    def open_done(self, worker: int, message: ipc.OpenDone, now: float) -> list[Command]:
        lease = self._opens.get(message.lease)
        if lease is None or lease.leader != worker or lease.done is not None:
            return [Send(worker, ipc.Done(message.ask, False))]
        if message.outcome is OpenOutcome.LEADER_GAVE_UP:
            return [Send(worker, ipc.Done(message.ask, True)), *self._next_leader(message.lease, lease, now)]
        bucket, key, _ = lease.key
        lease.ask, lease.done, lease.active_at = message.ask, message, now
        if message.outcome is OpenOutcome.STORED:
            # Stored first, so that whoever asks for the block as soon as he is told finds it.
            return [StoreOpen(message.lease, bucket, key, message), *self._tell_waiting(lease, message)]
        commands: list[Command] = []
        if message.outcome is OpenOutcome.REFUSED:
            commands.append(ForgetRecord(bucket, key))
        return [*commands, *self._end_open(message.lease, lease, stored=True), *self._tell_waiting(lease, message)]

    def open_stored(self, number: int, stored: bool) -> list[Command]:
        """The record is in the index, or the store failed."""
        lease = self._opens[number]
        assert lease.done is not None, "stored before it was done"
        return self._end_open(number, lease, stored)

    def _end_open(self, number: int, lease: _Open, stored: bool) -> list[Command]:
        del self._opens[number]
        if self._open_of.get(lease.key) == number:
            del self._open_of[lease.key]
        return [] if lease.leader is None else [Send(lease.leader, ipc.Done(lease.ask, stored))]

    def _tell_waiting(self, lease: _Open, done: ipc.OpenDone) -> list[Command]:
        waiting, lease.waiting = lease.waiting, []
        return [Send(worker, _open_ended(ask, done)) for worker, ask in waiting]

    def _next_leader(self, number: int, lease: _Open, now: float) -> list[Command]:
        if not lease.waiting:
            del self._opens[number], self._open_of[lease.key]
            return []
        # Under a new number, so that what the old leader says too late is nothing to this lease.
        del self._opens[number]
        number = self._number()
        self._opens[number] = lease
        self._open_of[lease.key] = number
        lease.leader, ask = lease.waiting.pop(0)
        lease.active_at = now
        return [Send(lease.leader, ipc.OpenLead(ask, number))]

    # --- blocks ---------------------------------------------------------------------------------------------------

    def ask_block(self, worker: int, message: ipc.AskBlock, now: float) -> list[Command]:
        if not self.caching:
            return [Send(worker, ipc.BlockPass(message.ask, PassReason.CACHING_OFF))]
        key = (message.content, message.number)
        number = self._block_of.get(key)
        if number is not None:
            block = self._blocks[number]
            if message.serves and not block.to_origin:
                return [Send(worker, ipc.BlockPass(message.ask, PassReason.BUSY))]
            return self._join(number, block, worker, message.ask)
        if message.touch and self._touch(key):
            return [Send(worker, ipc.BlockPass(message.ask, PassReason.FIRST_TOUCH))]
        # What is looked ahead to may take half: a reader that waits for its block must not find all room taken by blocks
        # that nobody waits for, or everybody would pass through, and nothing be stored, just when many read.
        room = self._fills_max_bytes // 2 if message.ahead else self._fills_max_bytes
        if self.granted_bytes + message.length > room:
            return [Send(worker, ipc.BlockPass(message.ask, PassReason.FILLS_MAX))]
        inline = message.length <= self._small_bytes
        number = self._number()
        self._blocks[number] = _Block(
            key, message.bucket, message.key, message.length, worker, message.ask, now, inline, message.record,
            message.to_origin,
        )  # fmt: skip
        self._block_of[key] = number
        self.granted_bytes += message.length
        return [Reserve(number, message.content, message.number, message.length, inline)]

    def _join(self, number: int, block: _Block, worker: int, ask: int) -> list[Command]:
        if block.state is _State.RESERVING:
            if len(block.waiting) >= self._waiting_max:
                return [Send(worker, ipc.BlockPass(ask, PassReason.BUSY))]
            block.waiting.append((worker, ask))
            return []
        commands: list[Command] = []
        if not block.followers and block.leader is not None and block.state is _State.FILLING:
            commands.append(Send(block.leader, ipc.Followed(number)))
        block.followers.add(worker)
        commands.append(Send(worker, ipc.BlockFollow(ask, number, block.extent, block.watermark, block.to_origin)))
        return commands

    def reserved(self, number: int, result: Extent | Here | PassReason | None, now: float) -> list[Command]:
        """How a Reserve went. None: inline, and not here yet."""
        block = self._blocks[number]
        assert block.state is _State.RESERVING
        asked = block.waiting if block.leader is None else [(block.leader, block.ask), *block.waiting]
        if isinstance(result, Here):
            self._drop(number, block)
            return [Send(worker, ipc.BlockHere(ask)) for worker, ask in asked]
        if isinstance(result, PassReason):
            self._drop(number, block)
            return [Send(worker, ipc.BlockPass(ask, result)) for worker, ask in asked]
        if not asked:
            self._drop(number, block)
            return [] if result is None else [Abandon(result)]
        (leader, ask), *others = asked
        block.leader, block.state, block.extent, block.active_at = leader, _State.FILLING, result, now
        block.waiting = []
        commands: list[Command] = [Send(leader, ipc.BlockLead(ask, number, result))]
        for worker, other in others:
            commands += self._join(number, block, worker, other)
        return commands

    def progress(self, worker: int, message: ipc.Progress, now: float) -> list[Command]:
        block = self._blocks.get(message.lease)
        if block is None or block.leader != worker or block.state is not _State.FILLING:
            return []
        block.active_at = now
        block.watermark = max(block.watermark, min(message.watermark, block.length))
        return [Send(follower, ipc.Progress(message.lease, block.watermark)) for follower in sorted(block.followers)]

    def block_done(self, worker: int, message: ipc.BlockDone, now: float) -> list[Command]:
        block = self._blocks.get(message.lease)
        if block is None or block.leader != worker or block.state is not _State.FILLING:
            return [Send(worker, ipc.Done(message.ask, False))]
        assert (message.body is None) is (block.extent is not None), "a small body travels, any other does not"
        block.state, block.ask, block.active_at = _State.STORING, message.ask, now
        content, number = block.key
        store = StoreBlock(
            message.lease,
            block.bucket,
            block.name,
            content,
            number,
            block.extent,
            message.checksum,
            message.body,
            block.record,
        )
        return [store]

    def block_stored(self, number: int, stored: bool) -> list[Command]:
        """How a StoreBlock went."""
        block = self._blocks[number]
        assert block.state is _State.STORING
        commands: list[Command] = []
        if block.leader is not None:
            commands.append(Send(block.leader, ipc.Done(block.ask, stored)))
        outcome = BlockOutcome.COMMITTED if stored else BlockOutcome.DISK_FAILED
        return commands + self._end_block(number, block, outcome)

    def block_failed(self, worker: int, message: ipc.BlockFailed) -> list[Command]:
        block = self._blocks.get(message.lease)
        if block is None or block.leader != worker or block.state is not _State.FILLING:
            return []
        return self._fail_block(message.lease, block, message.outcome)

    def _fail_block(self, number: int, block: _Block, outcome: BlockOutcome) -> list[Command]:
        commands = self._end_block(number, block, outcome)
        if block.extent is not None:
            commands.append(Abandon(block.extent))
        return commands

    def _end_block(self, number: int, block: _Block, outcome: BlockOutcome) -> list[Command]:
        self._drop(number, block)
        return [Send(follower, ipc.BlockEnded(number, outcome)) for follower in sorted(block.followers)]

    def _drop(self, number: int, block: _Block) -> None:
        del self._blocks[number], self._block_of[block.key]
        self.granted_bytes -= block.length

    def touched(self, message: ipc.FirstTouch) -> None:
        """A small read went through without a question; the next one fills."""
        self._touch((message.content, message.number))

    def _touch(self, key: BlockKey) -> bool:
        """True: this is the first touch that is remembered."""
        if key in self._touches:
            del self._touches[key]
            return False
        if len(self._touches) >= self._touches_max:
            self._touches.popitem(last=False)
        self._touches[key] = None
        return True

    # --- what happens to workers and time -------------------------------------------------------------------------

    def worker_gone(self, worker: int, now: float) -> list[Command]:
        """Its connection ended: everything it led or waited for goes on without it."""
        commands: list[Command] = []
        for number, lease in list(self._opens.items()):
            lease.waiting = [waiter for waiter in lease.waiting if waiter[0] != worker]
            if lease.leader == worker:
                lease.leader = None
                if lease.done is None:
                    commands += self._next_leader(number, lease, now)
        for number, block in list(self._blocks.items()):
            block.followers.discard(worker)
            block.waiting = [waiter for waiter in block.waiting if waiter[0] != worker]
            if block.leader == worker:
                block.leader = None
                if block.state is _State.FILLING:
                    commands += self._fail_block(number, block, BlockOutcome.LEADER_DIED)
        return commands

    def expire(self, now: float) -> list[Command]:
        """Takes leases from leaders that have been silent for timeout_s. What they say afterwards is refused."""
        limit = now - self._timeout_s
        commands: list[Command] = []
        for number, lease in list(self._opens.items()):
            if lease.done is None and lease.active_at < limit:
                commands += self._next_leader(number, lease, now)
        for number, block in list(self._blocks.items()):
            if block.state is _State.FILLING and block.active_at < limit:
                commands += self._fail_block(number, block, BlockOutcome.LEADER_STALLED)
        return commands

    def _number(self) -> int:
        self._next += 1
        return self._next


def _open_ended(ask: int, done: ipc.OpenDone) -> ipc.OpenEnded:
    return ipc.OpenEnded(ask, done.outcome, done.reason, done.record, done.refusal, done.retry_after_s)
