"""Where what is not in this node's store comes from: another node that keeps it, or the origin.

Owns: this worker's view of the cluster and its ring, the order in which nodes and the origin are asked, whether what another
node keeps is copied here, and turning a peer's answer into what the origin's would have been. Does not own: connections
(peers), what is done with an answer (open, body, fill).

Invariant: who asks on behalf of a peer (direct) asks the origin alone, so no question is passed on twice. Without a cluster
the origin is all there is, and nothing here costs anything.

    a version     its home ─▶ the next on the ring ─▶ the origin           at home: the origin ─▶ the next on the ring
    a block       its owner ─▶ the next on the ring ─▶ the origin          at the owner: the same
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from kos.config import Config
from kos.errors import OriginUnavailable
from kos.rules import Rules
from kos.tasks import Tasks, TasksClosed
from koscache.carrier import peer_wire as wire
from koscache.carrier.ask_origin import Answer
from koscache.carrier.fetch import refused
from koscache.carrier.peer_response import checksum_of
from koscache.carrier.peers import PeerResponse, Peers, PeerUnavailable, failed_of
from koscache.carrier.ticket import Ticket
from koscache.carrier.types import Changed, Phase, Reason, Want
from koscache.cluster.ring import Ring
from koscache.cluster.view import NOBODY, View
from koscache.content import Record, object_name, rule_of
from koscache.index import block_key
from koscache.ipc import OpenOutcome
from koscache.touchmap import TouchMap

if TYPE_CHECKING:
    from kos.clock import Clock

_log: Final = logging.getLogger("koscache.carrier")

#: Versions that the origin was found to have no more, so that a home that does not know it yet is told.
_GONE_MAX: Final = 1024
#: Hints to other nodes that are on their way; more are left out.
_HINTS_MAX: Final = 64


class Upstream:
    """One per worker; all calls on its loop. peers, touches: None where there is no cluster."""

    def __init__(
        self,
        config: Config,
        rules: Rules,
        peers: Peers | None,
        touches: TouchMap | None,
        clock: Clock,
        tasks: Tasks,
        here: Callable[[bytes, int], object],
    ) -> None:
        """here: says whether this node's store has a block; None if not."""
        self._here = here
        self._rules = rules
        self._peers = peers
        self._touches = touches
        self._clock = clock
        self._tasks = tasks
        self._block_bytes = config.cache.block_bytes
        self._name = ""
        self._view = NOBODY
        self._ring = Ring(())
        self._gone: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._bad: OrderedDict[tuple[bytes, int], None] = OrderedDict()
        self._hints = 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody else to ask."""
        return self._peers is None or self._ring.members in ((), (self._name,))

    def close(self) -> None:
        if self._peers is not None:
            self._peers.close()

    # --- the cluster ----------------------------------------------------------------------------------------------------

    def viewed(self, name: str, view: View) -> None:
        """The members by now. A large ring takes a second to make: in a thread, and until then the old one serves."""
        if self._peers is None:
            return
        self._name, self._view = name, view
        self._peers.update(view)
        with contextlib.suppress(TasksClosed):
            self._tasks.spawn(self._make_ring(view), "ring")

    async def _make_ring(self, view: View) -> None:
        ring = await asyncio.to_thread(Ring, view.members)
        if view is self._view:
            self._ring = ring

    # --- who --------------------------------------------------------------------------------------------------------------

    def homes(self, bucket: str, key: str) -> tuple[str, ...]:
        """Nodes to be asked for a version, this one among them in its place."""
        return self._ring.owners(bucket, key)

    def at_home(self, bucket: str, key: str) -> bool:
        """Whether this node is the one that asks the origin for all."""
        homes = self.homes(bucket, key)
        return not homes or homes[0] == self._name

    def owners(self, bucket: str, key: str, record: Record, number: int) -> tuple[str, ...]:
        """As homes(), of a block."""
        return self._ring.block_owners(bucket, key, record.content, number)

    def remote(self, bucket: str, key: str, record: Record, number: int) -> bool:
        """Whether another node keeps the block, and can be asked."""
        if self.alone or (record.content, number) in self._bad:
            return False
        owners = self.owners(bucket, key, record, number)
        return owners[0] != self._name and any(self._well(owner) for owner in owners if owner != self._name)

    def _well(self, name: str) -> bool:
        return self._peers is not None and self._peers.well(name)

    def _others(self, owners: Sequence[str]) -> list[str]:
        return [owner for owner in owners if owner != self._name]

    # --- copies -----------------------------------------------------------------------------------------------------------

    def copies(self, bucket: str, key: str, record: Record, number: int) -> bool:
        """Whether a block of another node is to be kept here as well, now that it is read. Counts as a touch."""
        return self._copies(bucket, key, block_key(record.content, number))

    def copies_first(self, bucket: str, key: str) -> bool:
        """As copies(), of the first block of what is not known yet."""
        return self._copies(bucket, key, object_name(bucket, key))

    def will_copy(self, bucket: str, key: str, record: Record, number: int) -> bool:
        """What copies() would say. No touch."""
        policy = rule_of(self._rules, bucket, key).local_copy
        if policy != "hot" or self._touches is None:
            return policy == "always"
        return self._touches.seen(block_key(record.content, number))

    def touched_first(self, record: Record) -> None:
        """The first block of what was not known when it was asked for has been read: copies() is to know."""
        if self._touches is not None:
            self._touches.touch(block_key(record.content, 0))

    def _copies(self, bucket: str, key: str, name: bytes) -> bool:
        policy = rule_of(self._rules, bucket, key).local_copy
        if policy != "hot" or self._touches is None:
            return policy == "always"
        return self._touches.touch(name)

    # --- what has gone ------------------------------------------------------------------------------------------------------

    def gone(self, bucket: str, key: str, etag: str) -> None:
        """The origin has not got this version of it any more."""
        if self._peers is None:
            return
        self._gone[bucket, key] = etag
        self._gone.move_to_end((bucket, key))
        if len(self._gone) > _GONE_MAX:
            self._gone.popitem(last=False)

    def bad(self, record: Record, number: int) -> None:
        """Another node's block was not what its checksum says: from now on the origin is asked for it."""
        self._bad[record.content, number] = None
        if len(self._bad) > _GONE_MAX:
            self._bad.popitem(last=False)

    # --- a version ----------------------------------------------------------------------------------------------------------

    async def ask_homes(
        self, bucket: str, key: str, fence: int, known: Record | None, want: Want, *, stale: bool = False
    ) -> Answer | None:
        """What the other nodes say of a version; None: none of them can tell. fence: the slot's value by now.

        Raises nothing but CancelledError.
        """
        if self._peers is None:
            return None
        others = self._others(self.homes(bucket, key))
        if not others:
            return None
        spec = want.range
        gone = self._gone.get((bucket, key), "")
        # What is here already need not be sent: most likely the version is the same.
        head_only = want.head_only or (known is not None and self._here(known.content, 0) is not None)
        copy = not head_only and self.copies_first(bucket, key)
        ask = wire.AskObject(
            bucket, key, head_only, spec is not None, None if spec is None else spec.first,
            None if spec is None else spec.last, want.checksum_mode, want.conditional, not want.without_document,
            gone, copy, stale,
        )  # fmt: skip
        asked_at = self._clock.now()
        try:
            response = await self._peers.ask(others, wire.OBJECT, ask)
        except PeerUnavailable as error:
            _log.info("no other node tells of an object", extra={"reason": str(error)})
            return None
        if response.status != 200:
            return await self._declined(response, asked_at)
        try:
            said = wire.decode(response.headers.get(wire.SAID_HEADER, "").encode(), wire.Said)
        except wire.PeerBroken:
            response.close()
            return None
        if gone and said.record.etag != gone:
            self._gone.pop((bucket, key), None)
        record = msgspec.structs.replace(
            said.record, validated_at=asked_at - said.age_s, fence=fence if said.storable else 0
        )
        answer = Answer(
            OpenOutcome.STORED, reason_of(said.reason), record, requests=said.origin_requests, asked_at=asked_at
        )
        answer.phase = Phase.MISS if said.origin_requests else Phase.PEER
        if said.phase == Phase.STALE:
            answer.phase = Phase.STALE
        answer.fills = copy
        if said.start < said.stop and response.content_length == said.stop - said.start:
            answer.ticket = Ticket(response, said.start, said.stop, of_origin=False)
            if said.start == 0 and not copy:
                self.touched_first(record)
        else:
            response.release()
        answer.renewed = known is not None and record.content == known.content and answer.ticket is None
        return answer

    async def _declined(self, response: PeerResponse, asked_at: float) -> Answer | None:
        failed = await failed_of(response)
        if failed.changed or failed.outcome in (OpenOutcome.LEADER_GAVE_UP, OpenOutcome.STORED):
            return None
        return Answer(failed.outcome, failed.reason, None, failed.refusal, failed.retry_after_s, asked_at=asked_at)

    # --- bytes of a block ---------------------------------------------------------------------------------------------------

    async def ask_owners(
        self, bucket: str, key: str, record: Record, start: int, stop: int, *, fill: bool, only: str | None = None
    ) -> PeerResponse | None:
        """Bytes [start, stop) of the object, which lie in one block, from a node that keeps it; None: from none of them.

        fill: they are to be kept here. only: ask this member and no other. Raises Changed, OriginRefused,
        OriginUnavailable (the origin's own state, as a peer found it).
        """
        if self._peers is None:
            return None
        number, offset = divmod(start, self._block_bytes)
        others = [only] if only is not None else self._others(self.owners(bucket, key, record, number))
        if not others:
            return None
        ask = wire.AskBlock(
            bucket, key, record, number, offset, offset + stop - start, only is not None, fill, self._block_bytes
        )
        try:
            response = await self._peers.ask(others, wire.BLOCK, ask)
        except PeerUnavailable as error:
            _log.info("no other node has a block", extra={"reason": str(error)})
            return None
        if response.status == 200 and response.content_length == stop - start:
            return response
        if response.status == 200:
            response.close()
            return None
        failed = await failed_of(response)
        if failed.changed:
            raise Changed(failed.reason)
        if failed.refusal is not None:
            raise refused(failed.refusal)
        if failed.outcome is OpenOutcome.UNAVAILABLE:
            raise OriginUnavailable(failed.reason, retry_after_s=failed.retry_after_s)
        return None

    async def checksum(self, bucket: str, key: str, record: Record, number: int, member: str) -> int | None:
        """What the member's store has of a block that it has just sent; None: it cannot tell."""
        assert self._peers is not None, "there was an answer"
        ask = wire.AskBlock(bucket, key, record, number, 0, 1, True, False, self._block_bytes)
        try:
            response = await self._peers.ask([member], wire.CHECKSUM, ask, hedge=False)
        except PeerUnavailable:
            return None
        if response.status != 200:
            response.close()
            return None
        response.release()
        return checksum_of(response)

    def hint(self, bucket: str, key: str, record: Record, numbers: Sequence[int]) -> None:
        """Tells the owners of these blocks that they will be asked for soon. Lossy."""
        if self._peers is None:
            return
        by_owner: dict[str, list[int]] = {}
        for number in numbers:
            owner = self.owners(bucket, key, record, number)[0]
            if owner != self._name and self._well(owner):
                by_owner.setdefault(owner, []).append(number)
        for owner, theirs in by_owner.items():
            if self._hints >= _HINTS_MAX:
                return
            ask = wire.AskAhead(bucket, key, record, tuple(theirs), self._block_bytes)
            with contextlib.suppress(TasksClosed):
                self._tasks.spawn(self._hint(owner, ask), "hint")

    async def _hint(self, owner: str, ask: wire.AskAhead) -> None:
        assert self._peers is not None
        self._hints += 1
        try:
            response = await self._peers.ask([owner], wire.AHEAD, ask, hedge=False)
            response.release()
        except PeerUnavailable as error:
            _log.debug("hint not taken", extra={"reason": str(error)})
        finally:
            self._hints -= 1


def reason_of(said: str) -> Reason:
    """A peer of another version may have reasons that are none here."""
    try:
        return Reason(said)
    except ValueError:
        return Reason.FRESH
