"""Listings through the cache: one question to the origin for all who ask it at a time, and its answer kept for a while.

Owns: whether a page may be used (fence, rule, stale_if_error), flights (one request per question and fence values in this
worker), how much memory pages may take. Does not own: what a question is (kos.s3.listing), the pages on disk
(kosproxy.pages), the fence and why it is enough (koscache.directories), the client's answer (kosproxy.handlers.list).

Invariant: a page is used only under the fence values that were read before its origin request began, and, unless the
origin is down, only while it is fresh by the rule at the time the client came.

    client A: page? none ─▶ values v ─▶ flight(question, v) ─▶ GET ─▶ page(v), kept for all workers
    client B: the same flight, if it began no longer ago than the rule trusts a page
    a write of a key below the prefix: v ▶ w.  client C: flight(question, w), never A's

What the origin answers is passed on and kept as its bytes; nothing is listed anew. The flight belongs to the worker: a
client that goes away takes nothing from the others.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kos.clock import Clock
from kos.config_values import MIB
from kos.errors import OriginBroken, OriginError, OriginRefused, OriginUnavailable, S3Error
from kos.origin.lane import OriginLane
from kos.origin.response import OriginResponse
from kos.rules import ListingRule, Rules
from kos.s3.listing import Question
from kos.s3.object_response import for_everybody
from kos.tasks import Tasks, TasksClosed
from koscache.carrier import Phase, Reason
from kosproxy.pages import PAGE_BYTES_MAX, Page, Pages
from kosproxy.render import passed_on

_log: Final = logging.getLogger("kosproxy.listings")

#: Requests on their way or being written to disk; a worker has 64 connections to the origin.
_FLIGHTS_MAX: Final = 256
#: Pages on their way, all together. One more than that is passed through to those who asked.
_FLYING_BYTES_MAX: Final = 64 * MIB
#: Pages on their way to clients, each counted for every client that takes it.
_SENDING_BYTES_MAX: Final = 128 * MIB
#: An error is a short document, and a listing has few headers.
_ERROR_BYTES: Final = 1 * MIB
_HEADERS_BYTES: Final = 16 * 1024
#: A body that breaks off is asked for once more: none of it has left.
_ATTEMPTS: Final = 2


class Fences(Protocol):
    """What is asked of koscache.carrier.Carrier."""

    def listing_values(self, bucket: str, prefix: str) -> tuple[int, int]: ...


class Found(NamedTuple):
    """An answer. age_s: None when the origin was asked just now. origin_requests: that this client caused."""

    page: Page
    phase: Phase
    reason: Reason
    age_s: float | None
    origin_requests: int


class Passed(NamedTuple):
    """No answer: the client's own request is to be passed through. reason: why."""

    reason: str


class Failed(NamedTuple):
    """No answer: the origin refused or is down, and nothing may be served stale."""

    failure: S3Error | OriginError
    reason: str
    origin_requests: int


@dataclass(slots=True, eq=False)
class _Landing:
    """What a flight brought: a page (to keep, or to pass on only), or why there is none."""

    page: Page | None = None
    keep: bool = False
    failure: S3Error | OriginError | None = None
    passed: Passed | None = None

    @property
    def down(self) -> bool:
        """Whether the origin could not say what it lists."""
        failure = self.failure
        if isinstance(failure, OriginRefused):
            return failure.status == 429 or failure.status >= 500
        return failure is not None


@dataclass(slots=True, eq=False)
class _Flight:
    """began, since: when, before the request, in epoch and in monotonic seconds. held_bytes: of its body so far.
    requests: that it took."""

    question: Question
    key: bytes
    values: tuple[int, int]
    operation: str
    began: float
    since: float
    landed: asyncio.Future[_Landing]
    held_bytes: int = 0
    requests: int = 0


class _TooMuch(Exception):
    """The answer is longer than is ever kept, or than there is room for now. Its text is the reason."""


class Listings:
    """One per worker; all calls on its loop. tasks: owner of the flights."""

    def __init__(
        self, pages: Pages, fences: Fences, origin: OriginLane, rules: Rules, clock: Clock, tasks: Tasks
    ) -> None:
        self._pages = pages
        self._fences = fences
        self._origin = origin
        self._rules = rules
        self._clock = clock
        self._tasks = tasks
        #: the newest flight of each question under each pair of fence values, until its page is on disk
        self._flights: dict[tuple[bytes, tuple[int, int]], _Flight] = {}
        self._flying = 0
        self._flying_bytes = 0
        self._sending_bytes = 0

    @property
    def flights(self) -> int:
        """Under way now."""
        return self._flying

    async def find(self, question: Question, operation: str) -> Found | Passed | Failed:
        """The answer to a question. operation: S3's name of it, for the metrics. Cancelling it cancels no flight."""
        prefix = question.prefix or ""
        rule = self._rules.listing(question.bucket, prefix)
        key, bucket = question.key, question.bucket
        arrived = self._clock.monotonic()
        keeps = rule.fresh_s > 0 or rule.stale_if_error_s > 0
        before: tuple[int, int] | None = None
        flight = self._joined(key, self._fences.listing_values(bucket, prefix), arrived, rule)
        if flight is None:
            kept = await self._pages.get(key) if keeps else None
            # The fence is read now: what was answered while the disk was asked must be seen.
            values = self._fences.listing_values(bucket, prefix)
            now = self._clock.now()
            if kept is not None and kept.values == values and _fresh(kept.validated_at, now, rule):
                return Found(kept, Phase.HIT, Reason.FRESH, max(now - kept.validated_at, 0.0), 0)
            if kept is not None:
                # Not held while the origin is asked: a thousand clients may wait, each would hold a page of its own.
                before, kept = kept.values, None
            flight = self._joined(key, values, arrived, rule)
        mine = flight is None
        if flight is None:
            if self._flying >= _FLIGHTS_MAX or self._flying_bytes >= _FLYING_BYTES_MAX:
                return Passed("busy")
            flight = self._start(question, key, values, operation, rule if keeps else None)
        already = flight.landed.done()
        landing = await asyncio.shield(flight.landed)
        requests = flight.requests if mine else 0
        if landing.page is not None:
            if already:
                age_s = max(self._clock.now() - flight.began, 0.0)
                return Found(landing.page, Phase.HIT, Reason.FRESH, age_s, 0)
            return Found(landing.page, Phase.MISS, _why(before, flight.values), None, requests)
        if landing.passed is not None:
            return landing.passed
        assert landing.failure is not None
        if not landing.down:
            return Failed(landing.failure, "refused", requests)
        kept = await self._pages.get(key) if rule.stale_if_error_s > 0 else None
        if kept is not None and kept.values == self._fences.listing_values(bucket, prefix):
            age_s = self._clock.now() - kept.validated_at
            if 0 <= age_s <= rule.fresh_s + rule.stale_if_error_s:
                return Found(kept, Phase.STALE, Reason.ORIGIN_DOWN, age_s, requests)
        return Failed(landing.failure, Reason.ORIGIN_DOWN, requests)

    def take(self, size: int) -> bool:
        """Room for so many bytes on their way to a client, until give_back(size). False: there is none now."""
        if self._sending_bytes and self._sending_bytes + size > _SENDING_BYTES_MAX:
            return False
        self._sending_bytes += size
        return True

    def give_back(self, size: int) -> None:
        """The bytes have left, or will not."""
        self._sending_bytes -= size

    # --- flights ----------------------------------------------------------------------------------------------------

    def _joined(self, key: bytes, values: tuple[int, int], arrived: float, rule: ListingRule) -> _Flight | None:
        """A flight that is as good as one that begins now. arrived: monotonic seconds. One that began after the client
        came, while it was looked for on disk, always is."""
        flight = self._flights.get((key, values))
        if flight is None or arrived - flight.since >= rule.fresh_s:
            return None
        if flight.landed.done() and flight.landed.result().page is None:
            return None
        return flight

    def _start(
        self, question: Question, key: bytes, values: tuple[int, int], operation: str, rule: ListingRule | None
    ) -> _Flight:
        landed: asyncio.Future[_Landing] = asyncio.get_running_loop().create_future()
        flight = _Flight(question, key, values, operation, self._clock.now(), self._clock.monotonic(), landed)
        try:
            self._tasks.spawn(self._fly(flight, rule), f"{operation} {question.bucket}")
        except TasksClosed:
            raise _closing() from None
        self._flights[key, values] = flight
        self._flying += 1
        return flight

    async def _fly(self, flight: _Flight, rule: ListingRule | None) -> None:
        """One request for all who joined. They are told how it ended in every case, also when this task is cancelled.

        rule: by which the page is worth keeping; None: it is not.
        """
        landing = _Landing(failure=_closing())
        try:
            try:
                landing = await self._ask(flight)
            except _TooMuch as much:
                landing = _Landing(passed=Passed(str(much)))
            except (S3Error, OriginError) as failure:
                landing = _Landing(failure=failure)
            except Exception:
                landing = _Landing(failure=S3Error("InternalError"))
                raise
            finally:
                flight.landed.set_result(landing)
            if rule is not None and landing.keep and landing.page is not None:
                keep_s = rule.fresh_s + rule.stale_if_error_s
                await self._pages.put(flight.key, landing.page, None if keep_s == math.inf else keep_s)
        finally:
            self._flying -= 1
            self._flying_bytes -= flight.held_bytes
            if self._flights.get((flight.key, flight.values)) is flight:
                del self._flights[flight.key, flight.values]

    async def _ask(self, flight: _Flight) -> _Landing:
        while True:
            try:
                return await self._ask_once(flight)
            except OriginBroken:
                if flight.requests >= _ATTEMPTS:
                    raise
            self._flying_bytes -= flight.held_bytes
            flight.held_bytes = 0

    async def _ask_once(self, flight: _Flight) -> _Landing:
        flight.requests += 1
        question = flight.question
        response = await self._origin.request(
            "GET",
            question.bucket,
            None,
            query=question.query(),
            headers=question.headers(),
            operation=flight.operation,
        )
        async with response:
            headers = tuple(pair for pair in passed_on(response.headers) if for_everybody(pair[0].lower()))
            if response.status != 200:
                return _Landing(failure=OriginRefused(response.status, headers, await response.read(_ERROR_BYTES)))
            body = await self._body(flight, response)
        page = Page(flight.values, flight.began, headers, body)
        return _Landing(page, _may_be_kept(response.headers, page))

    async def _body(self, flight: _Flight, response: OriginResponse) -> bytes:
        if (response.content_length or 0) > PAGE_BYTES_MAX:
            raise _TooMuch("too_large")
        pieces: list[bytes] = []
        async for piece in response.pieces():
            flight.held_bytes += len(piece)
            self._flying_bytes += len(piece)
            if flight.held_bytes > PAGE_BYTES_MAX:
                raise _TooMuch("too_large")
            if self._flying_bytes > _FLYING_BYTES_MAX:
                raise _TooMuch("busy")
            pieces.append(piece)
        return b"".join(pieces)


def _fresh(validated_at: float, now: float, rule: ListingRule) -> bool:
    """As koscache.content.judge: from the future (the clock was set back) it has no known age."""
    return rule.fresh_s == math.inf or 0.0 <= now - validated_at < rule.fresh_s


def _why(before: tuple[int, int] | None, values: tuple[int, int]) -> Reason:
    """before: the values of the page that there was."""
    if before is None:
        return Reason.COLD
    return Reason.EXPIRED if before == values else Reason.FENCED


def _may_be_kept(headers: Mapping[str, str], page: Page) -> bool:
    """Whether it is a whole listing, as far as its ends show, that the origin lets others see."""
    control = headers.get("cache-control", "").lower()
    if "no-store" in control or "private" in control or "content-encoding" in headers:
        return False
    if sum(len(name) + len(value) for name, value in page.headers) > _HEADERS_BYTES:
        return False
    # A proxy's "200 here is a page about an error", or an answer that was cut off with no length to tell.
    return b"<ListBucketResult" in page.body[:1024] and page.body.rstrip().endswith(b"</ListBucketResult>")


def _closing() -> OriginUnavailable:
    return OriginUnavailable("the worker is closing")
