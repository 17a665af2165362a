"""The values that pass between the carrier and the server in front of it.

Owns: what a lookup says (Peek), what a client wants (Want), what an open brought (Opened), and the pieces of a body.
Does not own: how any of it is found out.

Invariant: a piece is bytes of exactly one version of the object, the version that the Opened it came from names.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kos.config import Rule
from kos.errors import KosError, OriginBroken
from kos.s3.ranges import RangeSpec
from koscache.carrier.ticket import Ticket
from koscache.content import Freshness, Location, Record
from koscache.reader import Found


class Phase(enum.StrEnum):
    """How a request was answered, as in x-kos-cache and in the metrics."""

    HIT = "hit"
    PEER = "peer"  # another node of the cluster had it; the origin was not asked
    MISS = "miss"
    REVALIDATED = "revalidated"
    STALE = "stale"
    BYPASS = "bypass"


class Reason(enum.StrEnum):
    """Why that phase."""

    FRESH = "fresh"
    COLD = "cold"  # no record
    BLOCK = "block"  # a record, but not all of the blocks
    EXPIRED = "expired"
    FENCED = "fenced"
    CHANGED = "changed"  # the origin has another version than the record
    CHECKSUMS = "checksums"  # the record was made from an answer without the object's checksums
    PART = "part"  # where the part lies was not known
    NO_STORE = "no_store"
    NO_ETAG = "no_etag"
    IN_MOTION = "in_motion"  # being restored, or a version that is being replicated: its headers change by themselves
    NOT_THE_VERSION = "not_the_version"  # the origin answered a versionId with something else
    DAEMON_AWAY = "daemon_away"
    CACHING_OFF = "caching_off"
    BUSY = "busy"
    ORIGIN_DOWN = "origin_down"


class Changed(KosError):
    """The origin has another version by now. Before the first piece: open again. After it: abort the connection."""


class Peek(NamedTuple):
    """What the index says of a key at this moment. age_s: seconds since the origin confirmed the record. first: where
    its first block is, None if that is not in the store."""

    record: Record | None
    freshness: Freshness
    age_s: float
    rule: Rule
    first: Location | None


class Sight(NamedTuple):
    """A slice of a first block that was served as a hit, and between which times (epoch seconds) it may be again."""

    found: Found
    location: Location
    fence: int
    valid_from: float
    valid_until: float
    start: int
    stop: int


class FilePiece(NamedTuple):
    """length bytes at offset of the open file fd; they are in the file already. segment: the borrowed segment's id."""

    fd: int
    offset: int
    length: int
    segment: int


class BytesPiece(NamedTuple):
    """Bytes that are in no file of the store. At most some hundred KiB."""

    data: bytes


class Stream(Protocol):
    """A body on its way from another node, as whoever takes a StreamPiece sees it: what is here already, and the socket that
    the rest comes to. The socket does not block; take no more of it than the piece has, and say so by took()."""

    @property
    def socket(self) -> socket.socket: ...

    @property
    def timeout_s(self) -> float:
        """For so long nothing may come."""

    def early(self, limit: int) -> memoryview:
        """At most limit bytes that are here already and come before those of the socket. Each is given out once."""

    def took(self, count: int) -> None:
        """So many bytes were taken from the socket."""

    def watch(self, readable: Callable[[], None] | None) -> None:
        """Call it from now on whenever the socket has something to say, its end included. None: no more."""

    def expect(self, count: int) -> None:
        """No need to call before so many bytes are there, or the end: a hint, only heeded where they are sure to come soon."""

    async def receive(self, limit: int) -> bytes:
        """The next bytes, from wherever they come; at least one, at most limit. OriginBroken: there will be none."""

    def broken(self, reason: str) -> OriginBroken:
        """It cannot be gone on with: closes the connection. What to tell others."""


@dataclass(slots=True, eq=False)
class StreamPiece:
    """`length` bytes that another node is sending. They are to be spliced from its socket, or read as bytes where they
    have to be seen.

    Afterwards taken says how many of them were delivered. If they are not all because the other node broke off or stalled,
    failure says why, and nothing was raised: whoever gave out the piece may go on from another source. If they are not all
    because their taker is gone, that was raised.
    """

    stream: Stream
    length: int
    taken: int = 0
    failure: OriginBroken | None = None


Piece = FilePiece | BytesPiece | StreamPiece


@dataclass(frozen=True, slots=True)
class Want:
    """What a client asks for. range: its Range header, parsed. checksum_mode: the answer may have to carry the object's
    checksums: the client sent x-amz-checksum-mode: ENABLED, and not surely for a range. conditional: it sent If-Match,
    If-None-Match, If-Modified-Since, If-Unmodified-Since or If-Range. head_only: no body is wanted. document: it was a GET
    all the same, and a refusal is to have its document."""

    head_only: bool = False
    range: RangeSpec | None = None
    checksum_mode: bool = False
    conditional: bool = False
    document: bool = False

    @property
    def without_document(self) -> bool:
        return self.head_only and not self.document


@dataclass(slots=True, eq=False)
class Opened:
    """One version of one object, found and allowed to be used for this request.

    record: the version's metadata. phase, reason: for x-kos-cache. age_s: for Age; None when the origin was asked just
    now. origin_requests: how many this open made. stored: whether its blocks may come from and go to the store. ticket: an
    origin answer that brings (part of) the body. Call close() when done with it, whether or not a body was read.
    """

    bucket: str
    key: str
    record: Record
    phase: Phase
    reason: Reason
    age_s: float | None = None
    origin_requests: int = 0
    want: Want = Want()
    stored: bool = True
    ticket: Ticket | None = None

    def close(self) -> None:
        """Gives back an origin answer that nobody reads. Cheap, idempotent, never blocks."""
        if self.ticket is not None:
            self.ticket.disown()
