"""One question to one member: a connection for it, the question, the head of the answer.

Owns: taking a connection up again that turns out to be dead, what of it counts for or against the member, the counts. Does
not own: which member, and what else is asked meanwhile (koscache.carrier.peers).

Invariant: it ends once: by a response, by a reason why there is none, or by being closed; then it holds nothing, but for
the response, which is its asker's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kos import metrics
from kos.clock import Clock
from kos.tasks import Tasks, TasksClosed
from koscache.carrier import peer_wire
from koscache.carrier.peer_connection import Asking, PeerConnection
from koscache.carrier.peer_latency import Latencies
from koscache.carrier.peer_pool import NoConnection, Peer
from koscache.carrier.peer_response import PeerResponse

#: Statuses by which a member says that it does not understand or believe us: no better than no answer.
_REFUSES_US: Final = (peer_wire.NOT_PROTOCOL, peer_wire.UNSIGNED)


@dataclass(slots=True, eq=False)
class Asker:
    """What all attempts of a worker share. timeout_s: for a head. running: those that are not over."""

    tasks: Tasks
    clock: Clock
    timeout_s: float
    running: set[Attempt] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Question:
    """path: as the counts call it. request: all of it, as it is sent. hedge: makes the same for a second member while the
    first may still answer: only what it has at hand, for else both would ask the origin. probe: makes what that
    member answers at once, if it lives. first_bytes: as in Asking. latencies: of such."""

    path: str
    request: bytes
    hedge: Callable[[], bytes]
    probe: Callable[[str], Question]
    first_bytes: int
    latencies: Latencies


class Attempt:
    """ended: called once when it is over, but not by close(); perhaps before the constructor has returned."""

    __slots__ = (
        "_again", "_asker", "_asking", "_began", "_ended", "_opening", "_probe", "_question", "_request", "over", "peer",
        "reason", "response",
    )  # fmt: skip

    def __init__(
        self, asker: Asker, question: Question, peer: Peer, ended: Callable[[], None], request: bytes | None = None
    ) -> None:
        """request: another one than the question's."""
        self._asker = asker
        self._request = question.request if request is None else request
        self._question = question
        self._ended = ended
        self._began = asker.clock.monotonic()
        self._probe = peer.begin()
        self._opening: asyncio.Task[None] | None = None
        self._asking: Asking | None = None
        self._again = False
        self.peer = peer
        self.over = False
        #: what came of it
        self.response: PeerResponse | None = None
        self.reason = ""
        asker.running.add(self)
        connection = peer.take_now()
        if connection is None:
            self._open(new=False)
        else:
            self._ask(connection)

    def fail(self, reason: str, *, ours: bool = False) -> None:
        """There will be no answer. ours: it is not the member's fault."""
        if self.over:
            return
        if ours:
            self.peer.given_up(self._probe)
        else:
            self.peer.failed(self._probe)
        self._let_go("busy" if ours else "failed")
        self.reason = f"{self.peer.member.name}: {reason}"
        self._ended()

    def close(self, *, lost: bool) -> None:
        """It is not wanted any more. lost: because another one was faster."""
        if self.over:
            if self.response is not None:
                self.response.discard()
            return
        if lost:
            self._question.latencies.add(self._asker.clock.monotonic() - self._began)
            self.peer.lost(self._probe)
        else:
            self.peer.given_up(self._probe)
        self._let_go("lost")

    def _let_go(self, result: str) -> None:
        self.over = True
        self._asker.running.discard(self)
        if self._opening is not None:
            self._opening.cancel()
        if self._asking is not None:
            self._asking.close()
        metrics.PEER_REQUEST_COUNTS.add((self._question.path, result))

    def _open(self, *, new: bool) -> None:
        try:
            self._opening = self._asker.tasks.spawn(self._connect(new), "peer")
        except TasksClosed:
            self.fail("shutting down", ours=True)

    async def _connect(self, new: bool) -> None:
        try:
            connection = await self.peer.take(new=new)
        except NoConnection as none:
            self._opening = None
            self.fail(str(none), ours=none.busy)
            return
        self._opening = None
        self._ask(connection)

    def _ask(self, connection: PeerConnection) -> None:
        question = self._question
        self._asking = Asking(connection, self._request, question.first_bytes, self._asker.timeout_s, self._heard)
        self._asking.start()

    def _heard(self) -> None:
        asking, self._asking = self._asking, None
        assert asking is not None
        connection, head = asking.connection, asking.head
        if head is None:
            if connection.used and asking.unheard and not self._again:
                # Closed by its other end while it was idle, just now: the question was not heard.
                self._again = True
                self._open(new=True)
            else:
                self.fail(asking.failure)
            return
        peer, question = self.peer, self._question
        response = PeerResponse(
            peer.member.name, connection, head, asking.early, self._asker.timeout_s, peer.give, self._broken
        )
        if head.status in _REFUSES_US:
            response.close()
            self.fail(f"answered {head.status}: does not take us for a member")
            return
        took_s = self._asker.clock.monotonic() - self._began
        question.latencies.add(took_s)
        metrics.PEER_HEAD_SECONDS.labels(question.path).observe(took_s)
        peer.answered()
        self.response = response
        self._let_go("answered" if head.status in (200, 204) else "declined")
        self._ended()

    def _broken(self) -> None:
        metrics.PEER_REQUEST_COUNTS.add((self._question.path, "broken"))
