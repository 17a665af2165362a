"""Asking other nodes: which of several, when another one as well, and when none.

Owns: the choice among the members that a caller names, hedging within its budget, signing. Does not own: connections and
back-off (koscache.carrier.peer_pool), the body of an answer (koscache.carrier.peer_response), which members have something
(the ring), what an answer means (peer_wire names it, the carrier decides).

Invariant: of one question at most two copies are under way, and none when ask() has returned or was cancelled; whoever is
slower is let go of before its body is sent.

    ask: A ──▶ head ........................................ A answers
         A ──▶ (no connection, broken, 404, 5xx) B ──▶ head .. B answers
         A ──▶ … p99 … B, what it has at hand ──▶ head ....... B answers, A is closed (if the budget allows)
         A ──▶ … hedge_most … A, are you there? ──▶ yes ...... A may take its time: perhaps it waits for the origin
                                               └▶ … silence: A has failed, B is asked

Who is asked while another may still answer does not ask the origin: else slow peers would double what the origin sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec

from kos import metrics
from kos.clock import Clock
from kos.config import Cluster
from kos.errors import KosError, OriginBroken
from kos.tasks import Tasks
from koscache.carrier import peer_wire
from koscache.carrier.peer_attempt import Asker, Attempt, Question
from koscache.carrier.peer_latency import HedgeBudget, Latencies
from koscache.carrier.peer_pool import Peer
from koscache.carrier.peer_response import PeerResponse
from koscache.carrier.peer_wire import Ask, AskAhead, AskBlock, AskObject, Failed, PeerBroken
from koscache.cluster.view import View
from koscache.content import Record

__all__ = ["PeerResponse", "PeerUnavailable", "Peers", "failed_of"]

#: Up to here a body is worth less than the wake-ups that splicing it costs: it is read together with the head.
_SMALL_BYTES: Final = 32 * 1024
#: Read at first where more follows: a head with a checksum, and little of the body, which is to stay in the socket.
_HEAD_BYTES: Final = 1024
#: After so long at least without a head a member is asked whether it lives: a busy loop is no dead one.
_PATIENCE_LEAST_S: Final = 1.0
#: A hint that says nothing, and is answered at once by whoever is there.
_NOTHING: Final = AskAhead("", "", Record("", 0, "", (), (), True, b"", 0.0, 0), ())
_NOT_HERE: Final = peer_wire.status_of(peer_wire.not_here(""))


class PeerUnavailable(KosError):
    """None of the members that were asked answered; the message says why of each."""


async def failed_of(response: PeerResponse) -> Failed:
    """What an answer other than 200 says; it is done with afterwards. Never raises but for cancellation."""
    try:
        return peer_wire.decode(await response.read(peer_wire.FAILED_BYTES_MAX), Failed)
    except (OriginBroken, PeerBroken):
        return peer_wire.not_here(f"{response.member} answered {response.status}")
    finally:
        response.release()


class Peers:
    """One per worker; all calls on the worker's loop.

    name: this member's. secret: of the cluster. tasks: owns connections being opened. local_host: the address that
    connections come from; None: the kernel's choice.
    """

    def __init__(
        self, settings: Cluster, name: str, secret: bytes, clock: Clock, tasks: Tasks, local_host: str | None
    ) -> None:
        self._settings = settings
        self._name = name
        self._secret = secret
        self._clock = clock
        self._local_host = local_host
        self._asker = Asker(tasks, clock, settings.read_timeout_s)
        self._peers: dict[str, Peer] = {}
        self._budget = HedgeBudget(settings.hedges)
        self._latencies = {path: Latencies(settings.hedge_least_s, settings.hedge_most_s) for path in peer_wire.NAMES}

    def update(self, view: View) -> None:
        """Who is a member, and where, from now on. Idle connections to those who are gone are closed, questions to them
        fail; bodies under way go on."""
        others = {member.name: member for member in view.others(self._name)}
        for name, peer in list(self._peers.items()):
            now = others.get(name)
            if now is None or (now.peer, now.incarnation) != (peer.member.peer, peer.member.incarnation):
                self._drop(name, peer)
        for name, member in others.items():
            if name not in self._peers:
                self._peers[name] = Peer(member, self._settings, self._clock, self._local_host)

    def well(self, member: str) -> bool:
        """Whether it is a member and does not back off after failures."""
        peer = self._peers.get(member)
        return peer is not None and peer.well

    async def ask(self, members: Sequence[str], path: str, ask: Ask, *, hedge: bool = True) -> PeerResponse:
        """The answer of the first of the members who can give one; release() or close() it.

        Members that back off are passed over unless all do. Another status than 200 comes back as well, if none had anything
        better: see failed_of(). What makes a member work (ahead, take) is asked of one alone. Raises PeerUnavailable.
        """
        request = self._request(path, ask, members[0] if members else "")
        known = [self._peers[name] for name in members if name in self._peers]
        candidates = [peer for peer in known if peer.well] or known
        if not candidates:
            raise PeerUnavailable("no other member")
        small = not isinstance(ask, AskBlock) or ask.stop - ask.start <= _SMALL_BYTES
        first_bytes = _HEAD_BYTES + _SMALL_BYTES if small else _HEAD_BYTES
        question = Question(
            peer_wire.NAMES[path],
            request,
            partial(self._at_hand, path, ask),
            self._probe,
            first_bytes,
            self._latencies[path],
        )
        self._budget.asked()
        hedge = hedge and isinstance(ask, AskBlock | AskObject)
        race = _Race(
            self._asker, question, candidates, self._budget if hedge and len(candidates) > 1 else None,
            max(_PATIENCE_LEAST_S, self._settings.hedge_most_s),
        )  # fmt: skip
        try:
            return await race.run()
        finally:
            race.close()

    def _request(self, path: str, ask: Ask, to: str) -> bytes:
        encoded = peer_wire.encode(ask)
        if len(encoded) > peer_wire.ASK_BYTES_MAX:
            raise PeerUnavailable(f"a question of {len(encoded)} bytes")
        auth = peer_wire.sign(self._secret, self._name, to, path, encoded, self._clock.now())
        return b"GET %b HTTP/1.1\r\nHost: kos\r\nx-kos-auth: %b\r\nx-kos-ask: %b\r\n\r\n" % (
            path.encode(), auth.encode(), encoded,
        )  # fmt: skip

    def _probe(self, to: str) -> Question:
        request, latencies = self._request(peer_wire.AHEAD, _NOTHING, to), self._latencies[peer_wire.AHEAD]
        return Question(
            peer_wire.NAMES[peer_wire.AHEAD], request, lambda: request, self._probe, _SMALL_BYTES, latencies
        )

    def _at_hand(self, path: str, ask: Ask) -> bytes:
        assert isinstance(ask, AskBlock | AskObject)
        return self._request(path, msgspec.structs.replace(ask, cached=True), "")

    def close(self) -> None:
        """Closes idle connections and gives up questions; bodies under way are their readers'."""
        for name, peer in list(self._peers.items()):
            self._drop(name, peer)

    def _drop(self, name: str, peer: Peer) -> None:
        del self._peers[name]
        peer.close()
        for attempt in [each for each in self._asker.running if each.peer is peer]:
            attempt.fail("no member any more")


class _Race:
    """One question to the candidates, one after another, and once to two of them. budget: None for no hedge. patience_s: after
    so long without a head the one who is asked is asked whether it lives."""

    def __init__(
        self,
        asker: Asker,
        question: Question,
        candidates: Sequence[Peer],
        budget: HedgeBudget | None,
        patience_s: float,
    ) -> None:
        self._patience_s = patience_s
        self._asked: Attempt | None = None
        self._probe: Attempt | None = None
        self._impatient: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._asker = asker
        self._question = question
        self._left = list(reversed(candidates))
        self._budget = budget
        self._running: list[Attempt] = []
        self._changed: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._won = False
        self._declined: PeerResponse | None = None
        self._reasons: list[str] = []

    async def run(self) -> PeerResponse:
        self._start()
        if self._budget is not None:
            self._timer = self._loop.call_later(self._question.latencies.delay_s, self._hedge)
        while True:
            over = next((attempt for attempt in self._running if attempt.over), None)
            if over is not None:
                self._running.remove(over)
                response = self._better(over)
                if response is not None:
                    self._won = True
                    return response
            elif self._running:
                self._changed = self._loop.create_future()
                await self._changed
            elif self._left:
                self._start()
            elif self._declined is not None:
                response, self._declined = self._declined, None
                return response
            else:
                raise PeerUnavailable("; ".join(self._reasons))

    def close(self) -> None:
        """Whoever still runs has lost, or is not wanted any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._end_probe()
        for attempt in self._running:
            attempt.close(lost=self._won)
        if self._declined is not None:
            self._declined.discard()

    def _better(self, over: Attempt) -> PeerResponse | None:
        """The answer of an attempt, if it does; what does not is kept in case that there is nothing better."""
        response = over.response
        if response is None:
            self._reasons.append(over.reason)
            if over.peer in self._left:
                self._left.remove(over.peer)  # it did not even say what it has at hand
            return None
        if response.status != _NOT_HERE and response.status < 500:
            return response
        if self._declined is None:
            self._declined = response
        elif self._declined.status == _NOT_HERE:
            self._declined.discard()
            self._declined = response
        else:
            response.discard()
        return None

    def _start(self) -> None:
        """The next in order, for good."""
        self._end_probe()
        self._asked = Attempt(self._asker, self._question, self._left.pop(), self._wake)
        self._running.append(self._asked)
        self._impatient = self._loop.call_later(self._patience_s, self._ask_whether_it_lives)

    def _hedge(self) -> None:
        """Another one, for what it has at hand; it keeps its place in the order, should the first fail."""
        assert self._budget is not None
        if self._left and self._running and self._budget.take():
            metrics.PEER_HEDGES.labels(self._question.path).inc()
            at_hand = self._question.hedge()
            self._running.append(Attempt(self._asker, self._question, self._left[-1], self._wake, at_hand))
            self._wake()

    def _ask_whether_it_lives(self) -> None:
        asked = self._asked
        if asked is None or asked.over:
            return
        self._probe = Attempt(self._asker, self._question.probe(asked.peer.member.name), asked.peer, self._lives)
        self._impatient = self._loop.call_later(self._patience_s, self._is_silent)

    def _lives(self) -> None:
        """Or it cannot be asked at all, which the attempt itself will find out."""
        probe = self._probe
        if probe is None or not probe.over:
            return  # over before its constructor has returned: _is_silent looks again
        self._end_probe()
        if probe.response is not None:
            probe.response.discard()
            self._impatient = self._loop.call_later(self._patience_s, self._ask_whether_it_lives)

    def _is_silent(self) -> None:
        probe, asked = self._probe, self._asked
        if probe is None or asked is None or asked.over:
            return
        if probe.over:
            self._lives()
        else:
            self._end_probe()
            asked.fail("does not answer")

    def _end_probe(self) -> None:
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None
        probe, self._probe = self._probe, None
        if probe is not None and not probe.over:
            probe.close(lost=False)

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
