"""Every request to the origin goes through here: signed by us, sent by an aiohttp session, retried, held back, counted.

Owns: URL and headers as they go out, connections and their bound, timeouts up to the answer's head, the order of retry
and breaker. Does not own: the signature (kos.s3.sigv4), the decisions (kos.origin.retry, kos.origin.breaker), bodies of
answers (kos.origin.response, kos.origin.sink) and of requests (kos.origin.upload).

    admit (breaker) → take a connection's place (bounded) → sign → send → head
         ▲                                                            │
         └── wait ◀── again? (retry) ◀── failure or passing 5xx ◀─────┴──▶ anything else is the caller's answer

Invariant: what was signed is what is sent, byte for byte: the path is encoded once, here, and neither yarl nor aiohttp
touches it again. No answer of the origin is an exception; only having none is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver
from multidict import CIMultiDict
from yarl import URL

from kos.clock import Clock
from kos.config import Origin
from kos.errors import ConfigError, OriginBroken, OriginUnavailable, S3Error
from kos.origin import retry as retrying
from kos.origin.breaker import Breaker, Refused, Ticket
from kos.origin.credentials import Credentials, CredentialSource, resolve_endpoint
from kos.origin.observer import Metrics, Observer
from kos.origin.response import OriginResponse
from kos.origin.retry import Failure
from kos.origin.sink import own_retries_only
from kos.origin.upload import Patience, Piece, Upload, in_pieces
from kos.s3.names import encode_key, parse_query, uri_encode
from kos.s3.sigv4 import UNSIGNED_PAYLOAD, canonical_query, sign_headers

#: aiohttp would add these of its own accord. The origin's answers must be the object's bytes, never compressed ones.
_SKIPPED_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_USER_AGENT: Final = "kos"
_KEEPALIVE_S: Final = 15.0  # S3 closes idle connections after about 20 s; ours must end first
_DNS_TTL_S: Final = 10
#: What aiohttp holds of a body that is read in pieces: at most twice this and one receive (256 KiB) per connection.
_READ_BUFFER_BYTES: Final = 64 * 1024
_HEAD_LINE_BYTES: Final = 32 * 1024
_HEADERS_MAX: Final = 256
#: Requests waiting for a connection, per connection: at 64 connections 1024 wait, more are told to come back.
_WAITING_PER_CONNECTION: Final = 16
#: An error's body is read to keep its connection for the next attempt, if it is no longer than this.
_DRAIN_BYTES: Final = 64 * 1024
#: A reason why there is no connection is logged once in so many seconds; another one at once.
_SAY_AGAIN_S: Final = 60.0
#: Answers that speak of the origin and not of the request. 500 is of the request: stores give it, again and again, to
#: single odd questions, which would keep everybody else from asking.
_UNAVAILABLE_STATUS: Final = frozenset({502, 503, 504})
#: Ours to say, whatever the caller copied from its client.
_OURS: Final = frozenset(
    {
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
        "expect",
        "authorization",
        "x-amz-date",
        "x-amz-content-sha256",
        "x-amz-security-token",
    }
)
#: Buckets that a host name can hold. Hosts know no capitals, so that "Data" would be asked as "data", another bucket;
#: other names are found nowhere. A wildcard certificate is for one label: behind https a bucket has no dots.
_LABEL: Final = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_IN_HOST: Final = {"http": re.compile(rf"{_LABEL}(?:\.{_LABEL})*"), "https": re.compile(_LABEL)}
#: Longer bodies are sent in pieces, so that their progress is seen and no timeout takes a slow link for a dead origin.
_PIECE_BYTES: Final = 64 * 1024

_log: Final = logging.getLogger("kos.origin")

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Body = bytes | bytearray | memoryview | AsyncIterable[Piece] | None


@dataclass(slots=True, kw_only=True)
class _Request:
    """What stays the same over the attempts, and the upload of the last one."""

    method: str
    path: str
    query: str
    url: URL
    headers: CIMultiDict[str]
    answer_timeout_s: float
    deadline: float
    short_body: bytes | bytearray | memoryview | None = None
    pieces: Callable[[], AsyncIterable[Piece]] | None = None
    once: bool = False  # the pieces can be had once only
    content_length: int = 0
    payload_hash: str = UNSIGNED_PAYLOAD
    operation: str = ""
    repeatable: bool = False
    upload: Upload | None = None

    @property
    def spent(self) -> bool:
        """Its body was begun and cannot be had again."""
        return self.once and self.upload is not None and self.upload.started


@dataclass(frozen=True, slots=True)
class _Failed:
    """An attempt without an answer."""

    failure: Failure
    text: str
    cause: BaseException


class OriginLane:
    """One per worker and origin; start() and close() on its loop. See request()."""

    def __init__(
        self,
        origin: Origin,
        credentials: CredentialSource,
        clock: Clock,
        *,
        observer: Observer | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._origin = origin
        self._credentials = credentials
        self._clock = clock
        self._observer = observer or Metrics()
        self._resolver = resolver
        self._policy = retrying.Policy(origin.retries, origin.retry_base_s, origin.retry_max_s)
        probe_s = origin.connect_timeout_s + origin.read_timeout_s
        self.breaker = Breaker(origin.breaker_failures, origin.breaker_open_s, probe_s)
        self._places = asyncio.Semaphore(origin.connections)
        self._waiting = 0
        self._said = ""
        self._said_at = 0.0
        self._session: aiohttp.ClientSession | None = None
        self._scheme = self._authority = self._base_path = ""
        self._timeouts = _timeouts(origin, origin.read_timeout_s)

    async def start(self) -> None:
        endpoint = self._origin.endpoint or await resolve_endpoint(self._origin.region, self._origin.profile)
        url = URL(endpoint)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"no endpoint: {endpoint!r}")
        self._scheme = url.scheme
        self._authority = url.raw_authority if not url.is_default_port() else url.host_subcomponent or url.host
        self._base_path = url.raw_path.rstrip("/")
        connector = aiohttp.TCPConnector(
            limit=self._origin.connections,
            keepalive_timeout=_KEEPALIVE_S,
            ttl_dns_cache=_DNS_TTL_S,
            ssl=_tls(self._origin) if url.scheme == "https" else True,
            resolver=self._resolver,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_SKIPPED_HEADERS,
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_BUFFER_BYTES,
            max_line_size=_HEAD_LINE_BYTES,
            max_field_size=_HEAD_LINE_BYTES,
            max_headers=_HEADERS_MAX,
        )
        own_retries_only(self._session)

    async def close(self) -> None:
        """Close all connections, also those in use."""
        if self._session is not None:
            await self._session.close()
        await self._credentials.close()

    async def request(
        self,
        method: str,
        bucket: str | None,
        key: str | None,
        *,
        query: str | Iterable[tuple[str, str]] = "",
        headers: Headers = (),
        body: Body = None,
        content_length: int | None = None,
        payload_hash: str = UNSIGNED_PAYLOAD,
        retry: bool = True,
        operation: str | None = None,
        answer_timeout_s: float | None = None,
    ) -> OriginResponse:
        """Send one request; returns when the head of the final answer is there. Use the result with `async with`.

        query: raw, or decoded pairs. headers: end-to-end ones; host, length and signature are added. body: bytes, or an
        async iterable of pieces together with content_length; the request never becomes whole if the iterable raises or
        does not give exactly that many bytes (S3Error IncompleteBody). retry: may be tried again, if method and body
        allow it at all. operation: for the metrics. answer_timeout_s: from the request's last byte to the answer's
        head; origin.read_timeout_s if None, origin.request_timeout_s for copies and completions.

        Raises OriginUnavailable (no connection, no answer in time, breaker open), OriginBroken (no proper HTTP), and
        what the body's iterator raised. HTTP errors are answers; a 5xx is returned when the attempts are used up.
        """
        pending = self._prepare(method, bucket, key, query, headers)
        pending.payload_hash = payload_hash
        pending.operation = operation or method
        pending.repeatable = retry and retrying.may_repeat(method, pending.headers.keys())
        if answer_timeout_s is not None:
            pending.answer_timeout_s = answer_timeout_s
        if body is not None:
            await self._prepare_body(pending, body, content_length)
        attempt = 0
        while True:
            attempt += 1
            outcome = await self._attempt(pending, self._admit())
            decision = retrying.decide(
                outcome.status if isinstance(outcome, OriginResponse) else outcome.failure,
                attempt=attempt,
                replayable=pending.repeatable and not pending.spent,
                policy=self._policy,
                remaining_s=pending.deadline - self._clock.monotonic(),
                jitter=self._clock.jitter,
                retry_after_s=self._retry_after_s(outcome),
            )
            if isinstance(outcome, OriginResponse):
                if not decision.again:
                    outcome.attempts = attempt
                    return outcome
                await _discard(outcome)
            elif not decision.again:
                raise _error(outcome) from outcome.cause
            await self._clock.sleep(decision.delay_s)

    def _prepare(
        self, method: str, bucket: str | None, key: str | None, query: str | Iterable[tuple[str, str]], headers: Headers
    ) -> _Request:
        """The target, encoded once: what is signed and what is sent."""
        pairs = parse_query(query) if isinstance(query, str) else list(query)
        wire_query = canonical_query(pairs) if pairs else ""
        host = self._authority
        path = self._base_path + "/"
        if bucket is not None:
            if self._origin.addressing == "virtual" and _IN_HOST[self._scheme].fullmatch(bucket):
                host = f"{bucket}.{host}"
            else:
                path += uri_encode(bucket, False) + ("/" if key is not None else "")
        if key is not None:
            path += encode_key(key)
        given = headers.items() if isinstance(headers, Mapping) else headers
        kept = [(name, value) for name, value in given if name.lower() not in _OURS]
        _check_sendable(kept)
        fields = CIMultiDict(kept)
        fields["Host"] = host
        fields.setdefault("Accept-Encoding", "identity")
        fields.setdefault("User-Agent", _USER_AGENT)
        slow = "x-amz-copy-source" in fields or (method == "POST" and any(name == "uploadId" for name, _ in pairs))
        return _Request(
            method=method,
            path=path,
            query=wire_query,
            url=URL(f"{self._scheme}://{host}{path}{'?' if wire_query else ''}{wire_query}", encoded=True),
            headers=fields,
            answer_timeout_s=self._origin.request_timeout_s if slow else self._origin.read_timeout_s,
            deadline=self._clock.monotonic() + self._origin.request_timeout_s,
        )

    async def _prepare_body(self, pending: _Request, body: Body, content_length: int | None) -> None:
        if isinstance(body, bytes | bytearray | memoryview):
            length = len(body)
            if length <= _PIECE_BYTES:
                pending.short_body = body
            else:
                pending.pieces = lambda: in_pieces(body, _PIECE_BYTES)
        elif body is not None:
            assert content_length is not None, "a body in pieces needs its length"
            length = content_length
            if length == 0:
                # The head alone makes an empty object, so the iterator has to end well before it is sent.
                await _expect_nothing(body)
                pending.short_body = b""
            else:
                pending.once = True
                pending.pieces = lambda: body
        else:
            return
        pending.content_length = length
        pending.headers["Content-Length"] = str(length)

    def _retry_after_s(self, outcome: OriginResponse | _Failed) -> float | None:
        if isinstance(outcome, _Failed):
            return None
        return retrying.parse_retry_after(outcome.headers.get("retry-after"), self._clock.now())

    # -- one attempt ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises OriginUnavailable where a request would be refused at once: to be asked before a client is made to send a
        body in vain."""
        refused = self.breaker.refusal(self._clock.monotonic())
        if refused is not None:
            raise self._refuse(refused)

    def _admit(self) -> Ticket:
        admitted = self.breaker.admit(self._clock.monotonic())
        if isinstance(admitted, Refused):
            raise self._refuse(admitted)
        self._observer.breaker(self.breaker.state)
        return admitted

    def _refuse(self, refused: Refused) -> OriginUnavailable:
        self._observer.failed("breaker")
        return OriginUnavailable(refused.reason, retry_after_s=max(refused.retry_after_s, 1.0))

    async def _attempt(self, pending: _Request, ticket: Ticket) -> OriginResponse | _Failed:
        """An answer, or how there is none; the breaker gets its ticket back on every way out."""
        begun_at = self._clock.monotonic()
        pending.upload = None
        told = False
        try:
            credentials = await self._credentials.get()
            response = await self._send_in_turn(pending, credentials)
            if response.status in _UNAVAILABLE_STATUS:
                self.breaker.failed(ticket, self._clock.monotonic(), f"status {response.status}")
            else:
                self.breaker.succeeded(ticket)
            told = True
            self._observer.answered(pending.operation, response.status, self._clock.monotonic() - begun_at)
            has_body = pending.method != "HEAD" and response.status not in (204, 304)
            return OriginResponse(
                response, has_body=has_body, read_timeout_s=self._origin.read_timeout_s, on_broken=self._body_broke
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # aiohttp keeps it with the connection, and with its frames the body and all who wait for it, until the collector
            # comes. What it says is told by now.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            if pending.upload is not None and pending.upload.error is not None:
                raise pending.upload.take_error() from None
            failed = _classify(error)
            self._observer.failed(failed.failure.value)
            self._say(failed)
            if self._origin.addressing == "path" or not isinstance(error, aiohttp.ClientConnectorDNSError):
                self.breaker.failed(ticket, self._clock.monotonic(), failed.failure.value)
                told = True
            # Else a bucket's host has no address, which says nothing of other buckets' hosts.
            return failed
        finally:
            if not told:
                self.breaker.abandoned(ticket, self._clock.monotonic())
            self._observer.breaker(self.breaker.state)

    def _say(self, failed: _Failed) -> None:
        """Log that there is no connection, which is for an operator to mend (a name, a port, a certificate): once, and
        again when the reason changes or a minute has passed."""
        if failed.failure not in (Failure.CONNECT, Failure.CONNECT_TIMEOUT):
            return
        now = self._clock.monotonic()
        if failed.text != self._said or now - self._said_at >= _SAY_AGAIN_S:
            self._said, self._said_at = failed.text, now
            _log.warning("no connection to the origin", extra={"reason": failed.text})

    async def _send_in_turn(self, pending: _Request, credentials: Credentials) -> aiohttp.ClientResponse:
        """Send with one of the bounded connections, whose place is given back together with it."""
        await self._take_place(pending)
        try:
            response = await self._send(pending, credentials)
        except BaseException:
            self._places.release()
            raise
        if response.connection is None:  # the whole body came with the head
            self._places.release()
        else:
            response.connection.add_callback(self._places.release)
        return response

    async def _take_place(self, pending: _Request) -> None:
        """One of the bounded connections; who waits too long, or in too long a queue, is told to come back.

        Not the origin's fault, hence nothing to the breaker: its connections are busy with bodies.
        """
        if not self._places.locked():
            await self._places.acquire()
            return
        if self._waiting >= _WAITING_PER_CONNECTION * self._origin.connections:
            self._observer.failed("busy")
            raise OriginUnavailable("too many requests wait for a connection to the origin")
        self._waiting += 1
        try:
            async with asyncio.timeout(pending.answer_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            self._observer.failed("busy")
            raise OriginUnavailable("all connections to the origin are busy") from None
        finally:
            self._waiting -= 1

    async def _send(self, pending: _Request, credentials: Credentials) -> aiohttp.ClientResponse:
        headers = pending.headers.copy()
        signature = sign_headers(
            pending.method,
            pending.path,
            pending.query,
            headers,
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            session_token=credentials.session_token,
            region=self._origin.region,
            now=self._clock.now(),
            payload_hash=pending.payload_hash,
        )
        headers.update(signature)
        left_s = max(pending.deadline - self._clock.monotonic(), 0.0)
        if pending.pieces is not None:
            return await self._send_pieces(pending, pending.pieces(), headers, left_s)
        if left_s < self._origin.connect_timeout_s + pending.answer_timeout_s:
            async with asyncio.timeout(left_s):
                return await self._send_once(pending, pending.short_body, headers)
        # Usually aiohttp's own timeouts end an attempt before the request's deadline could.
        return await self._send_once(pending, pending.short_body, headers)

    async def _send_once(
        self, pending: _Request, data: bytes | bytearray | memoryview | Upload | None, headers: CIMultiDict[str]
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "start() first"
        timeouts = self._timeouts
        if pending.answer_timeout_s != timeouts.sock_read:
            timeouts = _timeouts(self._origin, pending.answer_timeout_s)
        return await self._session.request(
            pending.method, pending.url, headers=headers, data=data, allow_redirects=False, timeout=timeouts
        )

    async def _send_pieces(
        self, pending: _Request, pieces: AsyncIterable[Piece], headers: CIMultiDict[str], left_s: float
    ) -> aiohttp.ClientResponse:
        patience = Patience(left_s=left_s, stall_s=self._origin.read_timeout_s, answer_s=pending.answer_timeout_s)
        pending.upload = upload = Upload(pieces, pending.content_length, patience.watch)
        try:
            async with patience.timeout():
                response = await self._send_once(pending, upload, headers)
        finally:
            patience.end()  # it knows the task
        if not upload.finished:
            # Refused before the body was sent: no more of it is wanted, and this connection has no further use.
            upload.stop()
            if response.status < 400:
                response.close()
                raise aiohttp.ClientPayloadError(f"status {response.status} before the body was sent")
        return response

    def _body_broke(self, reason: str) -> None:
        self._observer.failed("body")


def _check_sendable(pairs: list[tuple[str, str]]) -> None:
    """aiohttp would leave out, without a word, the bytes of a header that are no UTF-8; the signature knows them."""
    for _, value in pairs:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise S3Error("InvalidArgument", "A header of the request is not valid UTF-8.") from None


def _classify(error: BaseException) -> _Failed:
    """aiohttp's exceptions in our words; the order matters, they inherit from each other."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return _Failed(Failure.CONNECT_TIMEOUT, "connecting to the origin took too long", error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Failed(Failure.CONNECT, f"cannot connect to the origin: {error}", error)
    if isinstance(error, TimeoutError):  # aiohttp's timeouts are also these
        return _Failed(Failure.ANSWER_TIMEOUT, "the origin did not answer in time", error)
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError | aiohttp.InvalidURL):
        return _Failed(Failure.NOT_HTTP, f"the origin's answer is no proper HTTP: {text}", error)
    return _Failed(Failure.DISCONNECTED, f"the origin closed the connection: {text}", error)


def _error(failed: _Failed) -> OriginUnavailable | OriginBroken:
    return OriginBroken(failed.text) if failed.failure is Failure.NOT_HTTP else OriginUnavailable(failed.text)


async def _discard(response: OriginResponse) -> None:
    """Read what is left of a short error, so that its connection can be used again."""
    async with response:
        if response.content_length is not None and response.content_length <= _DRAIN_BYTES:
            with contextlib.suppress(OriginBroken):
                await response.read(_DRAIN_BYTES)


async def _expect_nothing(body: AsyncIterable[Piece]) -> None:
    async for piece in body:
        if len(piece):
            raise S3Error("IncompleteBody", "The body is longer than the 0 bytes announced.")


def _timeouts(origin: Origin, read_s: float) -> aiohttp.ClientTimeout:
    # connect takes in the look-up of the name; waiting for a place is over by then.
    connect_s = origin.connect_timeout_s
    return aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s, sock_read=read_s)


def _tls(origin: Origin) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=origin.ca_file)
    except OSError as error:
        # ssl.SSLError is one too: a file without a certificate.
        found = error.strerror or str(error)
        raise ConfigError(f"origin.ca_file: {origin.ca_file}: found {found}, allowed: certificates in PEM") from error
    if not origin.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context
