"""Writes of this node's workers, from their begin until every node has heard of them or nobody waits any more.

Owns: which writes there are, who waits for their end and for how long, what is to be told again when this node is a member
again. Does not own: what is told to whom, and when a write has been heard of (coherence).

Invariant: a write is known here from begin() until it has been heard of everywhere or given up, whatever becomes of this
node's membership meanwhile: under a new Coherence it is told again from its begin on. Of one that nobody waits for its
slots are told.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kos import metrics
from koscache.cluster.coherence import SKIPPED_MAX, Coherence, Command


@dataclass(slots=True, eq=False)
class _Write:
    """number: of the present Coherence; 0 for none. ending: its end is waited for until then."""

    slots: tuple[int, ...]
    number: int = 0
    ending: asyncio.Future[bool] | None = None
    until: float = math.inf
    since: float = 0.0


class Writes:
    """carry_out: what a Coherence decides. wait_s: how long the end of a write is waited for. numbers: of the last write that was
    numbered."""

    def __init__(self, wait_s: float, now: Callable[[], float], carry_out: Callable[[list[Command]], None]) -> None:
        self._wait_s = wait_s
        self._now = now
        self._carry_out = carry_out
        self._coherence: Coherence | None = None
        self._writes: dict[int, _Write] = {}
        self._by_number: dict[int, int] = {}
        #: slots of writes that ended while this node was no member, and that others have not been told; None: too many
        self._forgotten: set[int] | None = set()
        self._handles = itertools.count(1)
        self._stopping = False
        # Random, so that what is said of a write of the daemon before means nothing to this one.
        self.numbers = secrets.randbits(40)

    @property
    def waiting(self) -> int:
        """Writes whose end is waited for."""
        return sum(write.ending is not None for write in self._writes.values())

    # --- of workers -----------------------------------------------------------------------------------------------------

    def begin(self, slots: Iterable[int]) -> int:
        """A write of these slots is about to be asked of the origin. Its handle, for end() or forget()."""
        handle = next(self._handles)
        write = _Write(tuple(slots), since=self._now())
        self._writes[handle] = write
        self._begin(handle, write)
        return handle

    def _begin(self, handle: int, write: _Write) -> None:
        if self._coherence is not None:
            write.number, commands = self._coherence.begin(write.slots, self._now())
            self.numbers = write.number
            self._by_number[write.number] = handle
            self._carry_out(commands)

    def end(self, handle: int) -> asyncio.Future[bool]:
        """The origin has answered. Done when every node has heard of it; False: not within wait_s."""
        write = self._writes[handle]
        assert write.ending is None, "a write ends once"
        now = self._now()
        write.since, write.until = now, now + self._wait_s
        write.ending = ending = asyncio.get_running_loop().create_future()
        if self._stopping:
            self._settle(handle, write, False)
        else:
            self._end(write)
        return ending

    def _end(self, write: _Write) -> None:
        if self._coherence is not None:
            now = self._now()
            self._carry_out(self._coherence.end(write.number, now, max(write.until - now, 0.0)))

    def forget(self, handle: int) -> None:
        """As end(), for nobody."""
        write = self._writes.pop(handle, None)
        if write is None:
            return
        self._by_number.pop(write.number, None)
        if self._coherence is None:
            self._remember(write.slots)
        else:
            self._carry_out(self._coherence.end(write.number, self._now(), None))

    def _remember(self, slots: Iterable[int]) -> None:
        """Others are to hear of them, for nobody's sake, when this node is a member again."""
        if self._forgotten is not None:
            self._forgotten.update(slots)
            if len(self._forgotten) > SKIPPED_MAX:
                self._forgotten = None

    # --- how they end ---------------------------------------------------------------------------------------------------

    def ended(self, number: int, ok: bool) -> None:
        """As the present Coherence says."""
        handle = self._by_number.get(number)
        if handle is not None:
            self._settle(handle, self._writes[handle], ok)

    def look(self, now: float) -> None:
        """Gives up those that have been waited for long enough."""
        for handle, write in list(self._writes.items()):
            if write.until <= now:
                self._settle(handle, write, False)

    def stop(self) -> None:
        """Those that are waited for count as not heard of, and so does whatever ends from now on."""
        self._stopping = True
        for handle, write in list(self._writes.items()):
            self._settle(handle, write, False)

    def _settle(self, handle: int, write: _Write, ok: bool) -> None:
        if write.ending is None:
            return
        del self._writes[handle]
        self._by_number.pop(write.number, None)
        if ok:
            metrics.CLUSTER_WRITE_SECONDS.observe(max(0.0, self._now() - write.since))
        else:
            metrics.CLUSTER_WRITES_REFUSED.inc()
            if self._coherence is None:
                self._remember(write.slots)
        if not write.ending.done():
            write.ending.set_result(ok)

    # --- under which Coherence ------------------------------------------------------------------------------------------

    @property
    def too_many(self) -> bool:
        """Whether more ended while this node was no member than can be told."""
        return self._forgotten is None

    def under(self, coherence: Coherence) -> None:
        """All that are known here, told from their begin on. Its numbers go on from ours."""
        self._coherence = coherence
        self._by_number.clear()
        for handle, write in self._writes.items():
            self._begin(handle, write)
            if write.ending is not None:
                self._end(write)
        if self._forgotten:
            # As one write: so that all mark its slots before anybody passes them.
            slots, self._forgotten = sorted(self._forgotten), set()
            self.forget(self.begin(slots))

    def under_none(self) -> None:
        """This node is no member. Those who wait are told again under the next one; so is what nobody waits for any more."""
        coherence, self._coherence = self._coherence, None
        if coherence is None:
            return
        if coherence.complete:
            self._forgotten = set()  # all have been told
        for number, slots in coherence.unfinished().items():
            if number not in self._by_number:
                self._remember(slots)
