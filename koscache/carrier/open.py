"""Finding out which version of an object there is: from the index, or by asking the origin once for all who want to know.

Owns: flights (one question to the origin per bucket, key and fence value in this worker; the daemon makes it one per
node), what a flight's result means for each who waited, stale_if_error. Does not own: which request is sent and how its
answer is judged (first), the bytes (blocks, body).

Invariant: nobody gets a record that was validated before it was allowed to be: a flight is joined only under the same
fence value, and its record is used only if it is fresh by the rule at the time the reader came.

    reader A: index: nothing ─▶ flight ─▶ daemon: you lead ─▶ GET ─▶ record ─▶ index
    reader B (same worker):  ───▶ joins the flight ────────────────────▶ the same record, the block growing
    reader C (other worker): ───▶ flight ─▶ daemon: wait ──────────────▶ OpenEnded(record)
    a write: fence 7 ▶ 8.  reader D: flight of its own (fence 8): never A's answer, which may be older than the write.

The request belongs to the worker: whoever started a flight may go away, the others get its result all the same.

In a cluster a flight asks the key's home (koscache.carrier.upstream), unless this node is that, or asks for a peer (direct):
then the origin. A flight that asks the origin never waits for one that asks a peer, so no two nodes wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from typing import Any

from kos.config import ALWAYS, Rule
from kos.errors import S3Error
from kos.s3 import ranges
from kos.tasks import TasksClosed
from koscache import ipc
from koscache.carrier.ask_origin import Answer, ask_origin, find_block
from koscache.carrier.blocks import Blocks
from koscache.carrier.context import Context
from koscache.carrier.fetch import refused, service_unavailable
from koscache.carrier.first import First, Kind, is_small, is_weak, plan
from koscache.carrier.ticket import Ticket
from koscache.carrier.types import Opened, Phase, Reason, Want
from koscache.content import Freshness, Record, block_count, body_checksum, judge, rule_of, split_name
from koscache.ipc import OpenOutcome, Refusal
from koscache.leases import NO_LEASE

#: How often an open looks again before it says "try later": a key that is written all the time fences every record.
_ATTEMPTS = 8
#: Turns in which the key's home is asked.
_VIA_HOME_MAX = 3
#: So many blocks are looked at to tell a hit from a miss in x-kos-cache.
_LOOKED_AT_BLOCKS = 16
#: What a refusal without a document says beside its status.
_TOLD_WITH_OURS = frozenset({"allow", "last-modified", "x-amz-delete-marker", "x-amz-version-id"})
#: What sets the daemon's leases on questions to a home apart from those on questions to the origin.
_VIA_HOME = 1 << 63
_WHY = {
    Freshness.ABSENT: Reason.COLD,
    Freshness.EXPIRED: Reason.EXPIRED,
    Freshness.FENCED: Reason.FENCED,
    Freshness.FRESH: Reason.CHECKSUMS,
}


@dataclass(slots=True, eq=False)
class _Flight:
    """One question and all who wait for it. gone: it is in the table no more. insist: as in ipc.AskOpen. direct: it is put to
    the origin, not to the key's home."""

    bucket: str
    key: str
    fence: int
    known: Record | None
    want: Want
    why: Reason
    direct: bool
    landed: asyncio.Future[Answer]
    gone: asyncio.Future[None]
    alone: bool = False
    insist: bool = False
    wanted: bool = True

    def land(self, answer: Answer) -> None:
        if not self.landed.done():
            self.landed.set_result(answer)
            if not self.wanted and answer.ticket is not None:
                answer.ticket.disown()

    def leave(self) -> None:
        """Who started it went away: its answer's body is nobody's, but for a block's fill."""
        self.wanted = False
        if self.landed.done():
            ticket = self.landed.result().ticket
            if ticket is not None:
                ticket.disown()


class Opener:
    def __init__(self, context: Context, blocks: Blocks) -> None:
        self._context = context
        self._blocks = blocks
        self._flights: dict[tuple[str, str, int, bool], _Flight] = {}

    @property
    def flights(self) -> int:
        return len(self._flights)

    async def open(self, bucket: str, key: str, want: Want, *, direct: bool = False) -> Opened:
        """See Carrier.open."""
        context = self._context
        upstream = context.upstream
        arrived = context.clock.now()
        requests = 0
        for attempt in range(_ATTEMPTS):
            rule = context.rule(bucket, key)  # trust comes and goes, and flights go by the present one
            fence = context.reader.fence.value_of(bucket, key)
            record = context.reader.record(bucket, key)
            now = context.clock.now()
            arrived = min(arrived, now)  # the clock may have been set back meanwhile
            freshness, age_s = judge(record, fence, now, rule.freshness)
            why, usable = _WHY[freshness], None
            if record is not None and (
                freshness is Freshness.FRESH
                or (freshness is Freshness.EXPIRED and arrived <= record.validated_at <= now)
            ):
                if not _lacks_checksums(record, want):
                    return self._found(bucket, key, want, record, age_s, requests)
                why, usable = Reason.CHECKSUMS, record
            # After a few turns without a use for it what others say is no help, whatever is wrong with it.
            to_origin = direct or upstream.alone or upstream.at_home(bucket, key) or attempt >= _VIA_HOME_MAX
            flight, mine = self._join(bucket, key, fence, record, want, why, to_origin, insist=attempt > 0)
            try:
                answer = await asyncio.shield(flight.landed)
            except asyncio.CancelledError:
                if mine:
                    flight.leave()
                raise
            if mine:
                requests += answer.requests
            if usable is not None and answer.outcome is OpenOutcome.UNAVAILABLE:
                return self._found(bucket, key, want, usable, age_s, 0)  # rather without checksums than not at all
            if answer.outcome is OpenOutcome.UNAVAILABLE and not direct and not upstream.alone:
                # Down for this node, perhaps not for all. Each asks for himself: no flight waits for another node's.
                answer, mine = await self._elsewhere(flight, answer, want), True
            stale = record if freshness is Freshness.EXPIRED else None
            opened = await self._conclude(flight, mine, answer, rule, want, arrived, stale)
            if opened is not None:
                opened.origin_requests += requests
                return opened
            await asyncio.shield(flight.gone)  # else the next turn would join the same flight
        raise S3Error("SlowDown", "The object changes faster than it can be read.", headers={"Retry-After": "1"})

    async def _elsewhere(self, flight: _Flight, answer: Answer, want: Want) -> Answer:
        upstream = self._context.upstream
        if flight.direct and self._context.reader.fence.trusted():
            other = await upstream.ask_homes(flight.bucket, flight.key, flight.fence, flight.known, want)
            if other is not None and other.outcome is not OpenOutcome.UNAVAILABLE:
                return other
        if flight.known is not None or not self._context.reader.fence.trusted():
            return answer  # our own is as good as another's, or none is good enough
        other = await upstream.ask_homes(flight.bucket, flight.key, flight.fence, None, want, stale=True)
        return answer if other is None or other.outcome is not OpenOutcome.STORED else other

    # --- what is known ----------------------------------------------------------------------------------------------

    def _found(self, bucket: str, key: str, want: Want, record: Record, age_s: float, requests: int) -> Opened:
        opened = Opened(bucket, key, record, Phase.HIT, Reason.FRESH, age_s, requests, want)
        if requests:
            opened.phase, opened.reason, opened.age_s = Phase.REVALIDATED, Reason.CHECKSUMS, None
        elif not want.head_only and not self._all_here(record, want):
            opened.phase, opened.reason = Phase.MISS, Reason.BLOCK
            if self._another_has(bucket, key, record, want):
                opened.phase = Phase.PEER
        return opened

    def _another_has(self, bucket: str, key: str, record: Record, want: Want) -> bool:
        """Whether the first block that is not here is another node's to give."""
        start, stop = 0, record.size
        if want.range is not None:
            start, stop = ranges.resolve(want.range, record.size)
        block = self._context.cache.block_bytes
        numbers = range(start // block, min(block_count(stop, block), start // block + _LOOKED_AT_BLOCKS))
        missing = next((number for number in numbers if self._blocks.here(record, number) is None), None)
        return missing is not None and self._context.upstream.remote(bucket, key, record, missing)

    def _all_here(self, record: Record, want: Want) -> bool:
        start, stop = 0, record.size
        if want.range is not None:
            try:
                start, stop = ranges.resolve(want.range, record.size)
            except S3Error:
                return True  # a 416 needs no bytes
        block = self._context.cache.block_bytes
        first = start // block
        last = min(block_count(stop, block), first + _LOOKED_AT_BLOCKS)
        return all(self._blocks.here(record, number) is not None for number in range(first, last))

    def _join(
        self, bucket: str, key: str, fence: int, known: Record | None, want: Want, why: Reason, direct: bool,
        *, insist: bool,
    ) -> tuple[_Flight, bool]:  # fmt: skip
        at = (bucket, key, fence, direct)
        flight = self._flights.get(at)
        if flight is not None:
            return flight, False
        flight = self._new(bucket, key, fence, known, want, why, direct)
        flight.insist = insist
        self._flights[at] = flight
        try:
            self._context.tasks.spawn(self._fly(flight, at), "open")
        except TasksClosed:
            del self._flights[at]
            raise S3Error("ServiceUnavailable", "Shutting down.", headers={"Retry-After": "1"}) from None
        return flight, True

    def _new(
        self, bucket: str, key: str, fence: int, known: Record | None, want: Want, why: Reason, direct: bool
    ) -> _Flight:
        loop = asyncio.get_running_loop()
        return _Flight(bucket, key, fence, known, want, why, direct, loop.create_future(), loop.create_future())

    # --- what it means to one reader --------------------------------------------------------------------------------

    async def _conclude(
        self, flight: _Flight, mine: bool, answer: Answer, rule: Rule, want: Want, arrived: float, stale: Record | None
    ) -> Opened | None:
        """What a flight's answer is to this reader; None: look again."""
        record, outcome = answer.record, answer.outcome
        if outcome is OpenOutcome.STORED and record is not None and answer.phase is Phase.STALE:
            age_s = max(0.0, self._context.clock.now() - record.validated_at)
            stale_opened = self._opened(flight, mine, answer, record, want)
            stale_opened.phase, stale_opened.reason, stale_opened.age_s = Phase.STALE, Reason.ORIGIN_DOWN, age_s
            return stale_opened
        if outcome is OpenOutcome.STORED and record is not None:
            fresh = rule.freshness == math.inf or record.validated_at + rule.freshness >= arrived
            if answer.phase is not None and not fresh and answer.asked_at is not None and answer.asked_at >= arrived:
                # This node may not trust what it knows; the home, asked since, may, or has asked the origin.
                real = rule_of(self._context.rules, flight.bucket, flight.key)
                fresh = real.freshness != ALWAYS and record.validated_at + real.freshness >= arrived
            if not fresh or (_lacks_checksums(record, want) and (answer.renewed or not mine)):
                if mine and answer.ticket is not None:
                    answer.ticket.disown()
                return None
            return self._opened(flight, mine, answer, record, want)
        if outcome is OpenOutcome.NOT_STORED:
            if mine and record is not None:
                return await self._not_stored(flight, answer, record, want)
            return await self._own(flight, want, answer.reason)
        if outcome is OpenOutcome.REFUSED and answer.refusal is not None:
            if rule.freshness == ALWAYS and (answer.asked_at is None or answer.asked_at < arrived):
                return None  # it may be from before a write that nothing but the origin tells of
            raise _relayed(answer.refusal, flight.key, want)
        if outcome is OpenOutcome.UNAVAILABLE:
            return self._stale(flight, answer, rule, want, stale)
        return None

    def _opened(self, flight: _Flight, mine: bool, answer: Answer, record: Record, want: Want) -> Opened:
        opened = Opened(flight.bucket, flight.key, record, Phase.MISS, flight.why, None, 0, want)
        opened.ticket = answer.ticket if mine else None
        if answer.renewed and answer.phase is not None:
            opened.phase, opened.reason = Phase.REVALIDATED, flight.why
            opened.age_s = max(0.0, self._context.clock.now() - record.validated_at)
        elif answer.phase is not None:
            opened.phase, opened.reason = answer.phase, Reason(answer.reason)
            opened.age_s = max(0.0, self._context.clock.now() - record.validated_at)
        elif answer.renewed:
            opened.phase = Phase.REVALIDATED
        elif flight.alone:
            opened.phase = Phase.BYPASS
            opened.reason = self._why_alone()
        elif flight.why is Reason.CHECKSUMS:
            opened.phase = Phase.REVALIDATED
        elif answer.reason:
            opened.reason = Reason(answer.reason)
        return opened

    def _why_alone(self) -> Reason:
        link = self._context.link
        if link.caching:
            return Reason.BUSY
        return Reason.CACHING_OFF if link.up or not self._context.cache.enabled else Reason.DAEMON_AWAY

    async def _not_stored(self, flight: _Flight, answer: Answer, record: Record, want: Want) -> Opened:
        """The bytes of that very answer, if they are all of the body or the rest can be asked for by version."""
        ticket = answer.ticket
        by_version = record.etag != "" and not is_weak(record.etag)
        if by_version or want.head_only or (ticket is not None and _covers(ticket, record, want)):
            reason = Reason(answer.reason)
            return Opened(
                flight.bucket, flight.key, record, Phase.BYPASS, reason, None, 0, want, stored=False, ticket=ticket
            )
        if ticket is not None:
            ticket.close()
        return await self._own(flight, want, answer.reason)

    async def _own(self, flight: _Flight, want: Want, reason: str) -> Opened:
        """An answer for this reader alone: nothing of it may be shared."""
        mine = self._new(flight.bucket, flight.key, flight.fence, None, want, Reason(reason), True)
        mine.alone = True
        answer = await self._ask(mine)
        record = answer.record
        if answer.outcome is OpenOutcome.REFUSED and answer.refusal is not None:
            raise _relayed(answer.refusal, flight.key, want)
        if record is None:
            raise service_unavailable(answer.reason, answer.retry_after_s)
        return Opened(
            flight.bucket, flight.key, record, Phase.BYPASS, Reason(reason), None, answer.requests, want,
            stored=False, ticket=answer.ticket,
        )  # fmt: skip

    def _stale(self, flight: _Flight, answer: Answer, rule: Rule, want: Want, stale: Record | None) -> Opened:
        bucket, key, context = flight.bucket, flight.key, self._context
        if stale is not None and stale.fence == context.reader.fence.value_of(bucket, key):
            age_s = context.clock.now() - stale.validated_at
            if 0 <= age_s <= rule.freshness + rule.stale_if_error_s:
                return Opened(bucket, key, stale, Phase.STALE, Reason.ORIGIN_DOWN, age_s, 0, want)
        raise service_unavailable(answer.reason, answer.retry_after_s)

    # --- the flight -------------------------------------------------------------------------------------------------

    async def _fly(self, flight: _Flight, at: tuple[str, str, int, bool]) -> None:
        """One question for all who joined. They are told how it ended in every case, also when this task is cancelled."""
        link = self._context.link
        lease = NO_LEASE
        try:
            said: Any = None
            if link.caching:
                # A number that no question to the origin has: those of the two kinds never wait for each other.
                fence = flight.fence if flight.direct else flight.fence ^ _VIA_HOME
                said = await link.answer(lambda ask: ipc.AskOpen(ask, flight.bucket, flight.key, fence, flight.insist))
            if isinstance(said, ipc.OpenEnded):
                flight.land(Answer(said.outcome, said.reason, said.record, said.refusal, said.retry_after_s))
                return
            lease = said.lease if isinstance(said, ipc.OpenLead) else NO_LEASE
            flight.alone = lease == NO_LEASE
            found = self._meanwhile(flight)
            if found is not None:
                flight.land(found)
                return
            answer = await self._ask(flight)
            if flight.alone:
                if answer.outcome is OpenOutcome.REFUSED and flight.known is not None:
                    self._context.forget(flight.bucket, flight.key, flight.known)
                flight.land(answer)
                return
            mine, lease = lease, NO_LEASE
            stored = self._tell(flight, mine, answer)
            if answer.outcome is not OpenOutcome.STORED:
                self._leave_table(flight, at)  # who comes now asks for himself
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._context.cache.ipc_timeout_s):
                    await stored  # a disk that stands still: who comes now asks the daemon himself
        finally:
            if lease != NO_LEASE:
                given_up = lease
                link.ask(lambda ask: ipc.OpenDone(ask, given_up, OpenOutcome.LEADER_GAVE_UP), lambda _: None)
            flight.land(Answer(OpenOutcome.LEADER_GAVE_UP))
            self._leave_table(flight, at)

    def _leave_table(self, flight: _Flight, at: tuple[str, str, int, bool]) -> None:
        if self._flights.get(at) is flight:
            del self._flights[at]
        if not flight.gone.done():
            flight.gone.set_result(None)

    def _meanwhile(self, flight: _Flight) -> Answer | None:
        """The second look, without which two ask:

        this flight: index: nothing ................ ask ──▶ nobody leads: you lead
        another one:                 record ─▶ index, ended
        """
        context = self._context
        record = context.reader.record(flight.bucket, flight.key)
        fresh_s = context.rule(flight.bucket, flight.key).freshness
        freshness, _ = judge(record, flight.fence, context.clock.now(), fresh_s)
        if record is None or freshness is not Freshness.FRESH or flight.why is Reason.CHECKSUMS:
            return None
        return Answer(OpenOutcome.STORED, record=record)

    async def _ask(self, flight: _Flight) -> Answer:
        cache = self._context.cache
        if not flight.direct:
            answer = await self._context.upstream.ask_homes(
                flight.bucket, flight.key, flight.fence, flight.known, flight.want
            )
            if answer is not None and answer.outcome is not OpenOutcome.UNAVAILABLE:
                known, record = flight.known, answer.record
                if known is not None and record is not None and record.fence == 0 and record.content != known.content:
                    # For this question alone, and yet enough to know that ours is not the version any more.
                    self._context.forget(flight.bucket, flight.key, known)
                if answer.outcome is OpenOutcome.STORED and answer.fills and not flight.alone:
                    await find_block(
                        self._context, answer, border=answer.ticket is not None and answer.ticket.start == 0
                    )
                return answer
        if flight.why is Reason.CHECKSUMS:
            first = First("HEAD", Kind.HEAD)
        else:
            first = plan(
                flight.want,
                flight.known,
                block_bytes=cache.block_bytes,
                random_bytes=cache.random_read_bytes,
                alone=flight.alone,
            )
        return await ask_origin(
            self._context, flight.bucket, flight.key, flight.fence, flight.known, first, alone=flight.alone,
            document=not flight.want.without_document,
        )  # fmt: skip

    def _tell(self, flight: _Flight, lease: int, answer: Answer) -> asyncio.Future[bool]:
        """Asks for the block that came along first, then tells the daemon and all who wait.

        In this order, without a pause between: whoever hears of the record and asks for its block, here or in another
        worker, finds the lease taken. Done when the record is in the index: until then the flight answers for it.
        """
        record, block, body, ticket = answer.record, answer.block, answer.body, answer.ticket
        checksum, held = 0, None
        if record is not None and block is not None and body is not None:
            checksum = body_checksum(body)
            held = self._blocks.hold(record, block, body)
        elif record is not None and block is not None:
            self._blocks.ask(
                flight.bucket, flight.key, record, block, touch=False, on_request=_uncounted, ticket=ticket
            )
        elif record is not None and ticket is not None and answer.outcome is OpenOutcome.STORED and flight.direct:
            self._first_touch(record, ticket)
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def reply(message: Any) -> None:
            done = isinstance(message, ipc.Done) and message.ok
            if record is not None and block is not None:
                self._blocks.let_go(record, block, held, done)
            if not stored.done():
                stored.set_result(done)

        self._context.link.ask(
            lambda ask: ipc.OpenDone(
                ask, lease, answer.outcome, answer.reason,
                record if answer.outcome is OpenOutcome.STORED else None,
                b"" if record is None else record.content, block or 0, checksum, body, answer.refusal,
                answer.retry_after_s,
            ),
            reply,
        )  # fmt: skip
        flight.land(answer)
        return stored

    def _first_touch(self, record: Record, ticket: Ticket) -> None:
        """A small range went through; the next one in these blocks fills them."""
        block = self._context.cache.block_bytes
        if is_small(_span_of(ticket), record.size, self._context.cache.random_read_bytes):
            for number in {ticket.start // block, (ticket.stop - 1) // block}:
                self._context.link.tell(ipc.FirstTouch(record.content, number))


def _uncounted() -> None:
    """A fill's further requests (its connection broke) are nobody's in particular."""


def _span_of(ticket: Ticket) -> ranges.RangeSpec:
    return ranges.RangeSpec(ticket.start, ticket.stop - 1)


def _lacks_checksums(record: Record, want: Want) -> bool:
    return want.checksum_mode and not record.checksums_known


def _covers(ticket: Ticket, record: Record, want: Want) -> bool:
    start, stop = 0, record.size
    if want.range is not None:
        try:
            start, stop = ranges.resolve(want.range, record.size)
        except S3Error:
            return True  # a 416 needs no bytes
    return ticket.start <= start and stop <= ticket.stop


def _relayed(refusal: Refusal, key: str, want: Want) -> Exception:
    """The origin's refusal for this reader. One that came without a document (to the HEAD of another reader) gets ours,
    for a GET, with the headers that say more: that it is a delete marker, and which."""
    if not refusal.body and not want.without_document:
        name, version_id = split_name(key)
        missing = "NoSuchKey" if version_id is None else "NoSuchVersion"
        code = {403: "AccessDenied", 404: missing, 405: "MethodNotAllowed"}.get(refusal.status)
        if code is not None:
            told = {header: value for header, value in refused(refusal).headers if header.lower() in _TOLD_WITH_OURS}
            # S3 names what it has not got.
            extra = {"Key": name} if code == missing else {}
            if extra and version_id is not None:
                extra["VersionId"] = version_id
            return S3Error(code, headers=told, extra=extra)
    return refused(refusal)
