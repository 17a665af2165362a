"""The fast lane: a hit is answered where its bytes arrive, without a task, a future or a request object.

Owns: deciding whether a request can be answered at once, and doing so. Does not own: any of the steps (both lanes call
the same pure functions of kos.s3 and the same carrier), the connection's state (kosproxy.server), sendfile (kosproxy.relay).

Invariant: it skips machinery, never a check. It answers 200, 206 and 304 of a fresh record whose blocks are all here;
whatever else it meets, errors included, it leaves to the slow lane as if it had never looked.

What a request costs here is what the node can carry: bench/hot_get measures it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from kos import metrics
from kos.errors import S3Error
from kos.s3 import authentication, object_response
from kos.s3 import operation as operations
from kos.s3.authentication import Claimed
from kos.s3.conditions import CONDITION_HEADERS
from kos.s3.head import RequestHead, parse_head
from kos.s3.object_response import Template
from kos.s3.operation import Handling, Operation
from koscache.carrier import FilePiece, Freshness, Phase, Reason, Record, Sight, version_name
from kosproxy.access_log import Line, LineTemplate, line_template, printable, time_text
from kosproxy.parts import Parts
from kosproxy.render import cache_note
from kosproxy.server import Connection

#: Presigned heads that are remembered parsed, and the longest of them. Only heads with a right signature are kept: a client
#: with credentials that sets out to fill them makes a worker keep 8192 x 2 KiB of heads and a few times that of what was
#: read from them.
_KNOWN_MAX: Final = 8192
_KNOWN_HEAD_BYTES: Final = 2048
#: Up to here one copy through this process costs less than setting up a sendfile.
_COPY_BYTES: Final = 32 * 1024

# Plain names for what is used on every request: to look up an enum's member costs as much as a small function.
_READ: Final = Handling.READ
_FRESH: Final = Freshness.FRESH
_HIT: Final = str(Phase.HIT)
_REASON: Final = str(Reason.FRESH)
_NOTE: Final = cache_note(_HIT, _REASON)
_STATUS: Final = {200: "200", 206: "206", 304: "304"}
_HIT_BYTES: Final = ("hit",)


class _Request(NamedTuple):
    """What a head asks for, parsed: a pure function of its bytes. name: what the carrier calls the object, or the version
    of it. plain: what of it decides the head of the answer to a plain read, None when the request has a range, conditions
    or parameters that have a say as well."""

    head: RequestHead
    operation: Operation
    claimed: Claimed
    bucket: str
    key: str
    name: str
    plain: str | None


class _Again(NamedTuple):
    """All that is the same when a head comes again and its object has not changed: see FastLane._again."""

    request: _Request
    sight: Sight
    template: Template
    validated_at: float
    labels: tuple[str, ...]
    line: LineTemplate | None


class _Served(NamedTuple):
    """What is left to be written down of a request when its last byte has gone."""

    started: float
    now: float
    request_id: str
    access_key: str
    request: _Request
    status: int


class FastLane:
    """The fast lane of one worker."""

    def __init__(self, parts: Parts) -> None:
        carrier = parts.carrier
        self._secrets = parts.secrets
        self._domain = parts.config.listen.domain
        self._version_2 = parts.config.listen.sigv2_query
        self._now = parts.clock.now
        self._monotonic = parts.clock.monotonic
        self._request_id = parts.request_ids.next
        self._peek = carrier.peek
        self._piece = carrier.piece
        self._cached = carrier.cached
        self._give_back = carrier.give_back
        self._log = parts.access_log.write if parts.access_log.enabled else None
        # Nothing else runs between filling and sending it: one buffer does for all connections.
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self._sight = carrier.sight
        self._still = carrier.still
        self._read_again = carrier.read_again
        self._known: dict[bytes, _Request] = {}
        self._repeated: dict[bytes, _Again] = {}

    def answer(self, connection: Connection, data: bytes) -> bool:
        """Answer one complete head if that can be done at once. False: nothing was done."""
        again = self._repeated.get(data)
        if again is not None:
            if self._again(connection, again):
                return True
            del self._repeated[data]
        started = self._monotonic()
        known = self._known.get(data)
        request = known or self._parse(data)
        if request is None:
            return False
        now = self._now()
        try:
            identity = request.claimed.check(self._secrets, now)
            if known is None:
                self._remember(data, request)
            record, freshness, age_s, _, first = self._peek(request.bucket, request.name, now)
            if freshness is not _FRESH or record is None:
                return False
            template = self._template(request, record)
        except S3Error:
            return False
        if template is None:
            return False
        status, start, stop, *_ = template
        pieces: Sequence[FilePiece] = ()
        if start < stop:
            piece = None if first is None else self._piece(record, first, start, stop)
            cached = self._cached(record, request.bucket, request.name, start, stop) if piece is None else (piece,)
            if cached is None:
                return False
            pieces = cached
        request_id = self._request_id()
        text = template.render(request_id, object_response.http_date(now), int(age_s))
        served = _Served(started, now, request_id, identity.access_key, request, status)
        if stop - start > _COPY_BYTES:
            done = self._relay(connection, text, pieces, served)
        else:
            done = self._copy(connection, text, pieces, stop - start, served)
        if done and known is not None and start < stop:
            self._expect_again(data, known, template, identity.access_key)
        return done

    def _again(self, connection: Connection, again: _Again) -> bool:
        """A head that came before, byte for byte, for bytes of a first block: only what may have changed is looked at.

        That is the time, the signature (computed anew), the state of the index, the fence, and whether the bytes are in
        memory. False: nothing was done.
        """
        request, sight, template, validated_at, labels, line = again
        transport = connection.transport
        if transport is None:
            return False
        now = self._now()
        if not request.claimed.holds(self._secrets, now) or not self._still(sight, now):
            return False
        age_s = int(now - validated_at) if now > validated_at else 0
        request_id = self._request_id()
        text = template.render(request_id, object_response.http_date(now), age_s)
        if sight.stop - sight.start > _COPY_BYTES:
            piece = self._piece(sight.found.record, sight.location, sight.start, sight.stop)
            access_key = request.claimed.access_key
            served = _Served(self._monotonic(), now, request_id, access_key, request, template.status)
            return piece is not None and self._relay(connection, text, (piece,), served)
        body = self._read_again(sight, self._buffer)
        if body is None:
            return False
        transport.write(b"".join((text, body)))
        connection.answered_fast()
        metrics.REQUEST_COUNTS.add(labels)
        metrics.BYTE_COUNTS.add(_HIT_BYTES, len(body))
        if self._log is not None:
            took_ms = (self._now() - now) * 1000
            if line is not None:
                self._log(line.render(time_text(now), request_id, connection.client, max(took_ms, 0.0)))
            else:
                access_key = request.claimed.access_key
                served = _Served(0.0, now, request_id, access_key, request, template.status)
                self._log(_line(served, connection.client, len(body), None, took_ms, took_ms))
        return True

    def _expect_again(self, data: bytes, request: _Request, template: Template, access_key: str) -> None:
        """A head came for the second time: the third is answered by _again, if it can be."""
        sight = self._sight(request.bucket, request.name, template.start, template.stop)
        if sight is None:
            return
        record = sight.found.record
        if self._template(request, record) != template:
            return  # it has changed in this very moment
        length = template.stop - template.start
        served = _Served(0.0, 0.0, "", access_key, request, template.status)
        line = line_template(_line(served, "", length, None, 0.0, 0.0))
        labels = (request.operation.op._name_, _STATUS[template.status], "fast", _HIT)
        if len(self._repeated) >= _KNOWN_MAX:
            del self._repeated[next(iter(self._repeated))]
        self._repeated[data] = _Again(request, sight, template, record.validated_at, labels, line)

    def _parse(self, data: bytes) -> _Request | None:
        """What a head asks for; None if it is nothing for this lane."""
        head = parse_head(data)
        if head is None:
            return None
        headers = head.headers
        if "connection" in headers and headers["connection"].lower() != "keep-alive":
            return None
        try:
            claimed = None
            if "X-Amz-Signature=" in head.raw_query or "AWSAccessKeyId=" in head.raw_query:
                claimed = authentication.claim_of(head, self._domain, version_2=self._version_2)
                if claimed.moved:
                    # Whether or not the signature is right: nothing is answered before it was checked.
                    head = authentication.unpresigned(head, claimed)
                    headers = head.headers
            operation = operations.parse(head, self._domain)
            _, handling, bucket, key, params, *_ = operation
            if handling is not _READ:
                return None
            if claimed is None:
                claimed = authentication.claim_of(head, self._domain, version_2=self._version_2)
        except S3Error:
            return None
        assert bucket is not None and key is not None
        name, version_id = key, operation.version_id
        only_version = False
        if version_id is not None:
            name = version_name(key, version_id)
            only_version = len(params) == 1
        plain = None
        if (not params or only_version) and "range" not in headers and CONDITION_HEADERS.isdisjoint(headers):
            plain = f"{head.method} {headers.get('x-amz-checksum-mode', '').upper() == 'ENABLED'}"
        return _Request(head, operation, claimed, bucket, key, name, plain)

    def _remember(self, data: bytes, request: _Request) -> None:
        """Keep a head whose signature was found right: nobody else has a say in what is kept.

        A presigned URL comes again, byte for byte; a head with an Authorization carries a date and does not.
        """
        if request.claimed.in_query and len(data) <= _KNOWN_HEAD_BYTES:
            if len(self._known) >= _KNOWN_MAX:
                del self._known[next(iter(self._known))]
            self._known[data] = request

    def _template(self, request: _Request, record: Record) -> Template | None:
        """The answer's head. Raises S3Error for an answer that is an error; None where this lane cannot give it."""
        plain = request.plain
        known = None if plain is None else record.answers.get(plain)
        if known is not None:
            return known
        head = request.head
        template = object_response.template(head, request.operation.params, record.meta, cache_note=_NOTE)
        if template is None or (
            template.status == 200
            and not record.checksums_known
            and head.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED"
        ):
            return None  # the origin has to be asked for them; a range or a 304 carries none
        if plain is not None:
            record.answers[plain] = template
        return template

    def _copy(
        self, connection: Connection, head: bytes, pieces: Sequence[FilePiece], length: int, served: _Served
    ) -> bool:
        """Send a small body, or none, by one write. The transport keeps what the kernel does not take at once."""
        transport = connection.transport
        assert transport is not None
        if length:
            body = self._read(pieces, length)
            self._give_back(pieces)
            if body is None:
                return False
            head += body
        transport.write(head)
        connection.answered_fast()
        self._record(connection, served, length, None, None)
        return True

    def _relay(self, connection: Connection, head: bytes, pieces: Sequence[FilePiece], served: _Served) -> bool:
        """Send a body by sendfile, or by copying over TLS, now or as the client takes it."""
        if not connection.quiet:
            self._give_back(pieces)
            return False
        relay = connection.relay()
        connection.in_fast = True
        first_byte = self._monotonic()

        def done(failure: BaseException | None) -> None:
            self._give_back(pieces)
            self._record(connection, served, max(0, relay.sent_bytes - len(head)), first_byte, failure)
            if failure is None:
                connection.answered_fast()
            else:
                connection.drop()

        relay.start(head, pieces, done)
        return True

    def _read(self, pieces: Sequence[FilePiece], length: int) -> memoryview | None:
        """The pieces' bytes if they are in memory; None if only the disk has them."""
        at = 0
        buffer = self._buffer
        for piece in pieces:
            stop = at + piece.length
            try:
                if os.preadv(piece.fd, (buffer[at:stop],), piece.offset, os.RWF_NOWAIT) != piece.length:
                    return None
            except OSError:
                return None
            at = stop
        return buffer[:length]

    def _record(
        self,
        connection: Connection,
        served: _Served,
        sent_bytes: int,
        first_byte: float | None,
        failure: BaseException | None,
    ) -> None:
        """Count the request and log it. first_byte: when it left; None: just now, with the last one."""
        metrics.REQUEST_COUNTS.add((served.request.operation.op._name_, _STATUS[served.status], "fast", _HIT))
        if sent_bytes:
            metrics.BYTE_COUNTS.add(_HIT_BYTES, sent_bytes)
        if self._log is not None:
            started = served.started
            total_ms = (self._monotonic() - started) * 1000
            first_ms = total_ms if first_byte is None else (first_byte - started) * 1000
            self._log(_line(served, connection.client, sent_bytes, failure, first_ms, total_ms))


def _line(
    served: _Served, client: str, sent_bytes: int, failure: BaseException | None, first_ms: float, total_ms: float
) -> Line:
    _, now, request_id, access_key, request, status = served
    return Line(
        time_text(now),
        request_id,
        client,
        access_key,
        request.operation.op._name_,
        request.bucket,
        printable(request.key),
        printable(request.head.headers.get("range")),
        status,
        None if failure is None else type(failure).__name__,
        sent_bytes,
        "fast",
        _HIT,
        _REASON,
        0,
        round(first_ms, 3),
        round(total_ms, 3),
    )
