"""A carrier of objects in one file, for tests of the proxy that want no daemon and no origin.

Put objects with put(); age() makes a record so and so old; hide() takes blocks out of the store, so that reads of them
"fill" (come as BytesPiece). What it hands out is counted: `borrowed` is 0 when every piece was given back, `open_bodies`
and `open_opened` when everything was closed. `writes` holds what was written while which keys were fenced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from kos.errors import OriginRefused, S3Error
from kos.rules import Rule
from kos.s3.object_response import ObjectMeta
from koscache.carrier import (
    BytesPiece,
    Changed,
    FilePiece,
    Freshness,
    Opened,
    Peek,
    Phase,
    Piece,
    Reason,
    Record,
    Sight,
    Want,
    Writing,
)
from koscache.content import Location, make_record
from koscache.reader import Found

BLOCK: Final = 65536
#: the wall clock of tests.fakes.proxy, which stands still
NOW: Final = 1_790_000_000.25


@dataclass(slots=True)
class Stored:
    record: Record
    offset: int
    freshness: Freshness = Freshness.FRESH
    age_s: float = 5.0
    hidden: bool = False


@dataclass
class FakeCarrier:
    """See the module. Has the public face of koscache.carrier.Carrier as far as the proxy uses it."""

    path: Path
    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)
    borrowed: int = 0
    open_bodies: int = 0
    open_opened: int = 0
    opens: int = 0
    #: exceptions to raise from open(), then from the body after so many pieces
    open_fails: list[Exception] = field(default_factory=list)
    body_fails: list[tuple[int, Exception]] = field(default_factory=list)
    writes: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    fenced: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    #: for each write, the keys of which it may have changed versions
    #: of each write whether its end is known, so that the fence need not be passed once more later
    settled: list[bool] = field(default_factory=list)
    version_writes: list[tuple[str, ...]] = field(default_factory=list)
    caching: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        self.path.touch()
        self.fd = os.open(self.path, os.O_RDWR)
        self.end = 0

    def close_file(self) -> None:
        os.close(self.fd)

    def put(self, bucket: str, key: str, body: bytes, meta: ObjectMeta) -> Stored:
        os.pwrite(self.fd, body, self.end)
        stored = Stored(make_record(bucket, key, meta, validated_at=NOW - 5.0, fence=1), self.end)
        self.objects[bucket, key] = stored
        self.end += len(body)
        return stored

    # -- the carrier's face

    def peek(self, bucket: str, key: str, now: float | None = None) -> Peek:
        stored = self.objects.get((bucket, key))
        if stored is None:
            return Peek(None, Freshness.ABSENT, 0.0, Rule(match="*"), None)
        first = None if stored.hidden else Location(1, stored.offset, min(stored.record.size, BLOCK), 0, True)
        return Peek(stored.record, stored.freshness, stored.age_s, Rule(match="*"), first)

    def sight(self, bucket: str, key: str, start: int, stop: int) -> Sight | None:
        peeked = self.peek(bucket, key)
        if peeked.record is None or peeked.first is None or stop > peeked.first.length:
            return None
        found = Found(peeked.record, 0, peeked.first, 1)
        return Sight(found, peeked.first, 1, 0.0, float("inf"), start, stop)

    def still(self, sight: Sight, now: float) -> bool:
        stored = next((each for each in self.objects.values() if each.record is sight.found.record), None)
        return stored is not None and not stored.hidden and stored.freshness is Freshness.FRESH

    def read_again(self, sight: Sight, buffer: memoryview) -> memoryview | None:
        into = buffer[: sight.stop - sight.start]
        os.preadv(self.fd, (into,), sight.location.offset + sight.start)
        return into

    def piece(self, record: Record, location: Location, start: int, stop: int) -> FilePiece | None:
        if stop > location.length:
            return None
        self.borrowed += 1
        return FilePiece(self.fd, location.offset + start, stop - start, location.segment)

    def cached(self, record: Record, bucket: str, key: str, start: int, stop: int) -> list[FilePiece] | None:
        stored = self.objects[bucket, key]
        if stored.hidden:
            return None
        pieces = list(self._pieces(stored, start, stop))
        self.borrowed += len(pieces)
        return pieces

    def give_back(self, pieces: Iterable[FilePiece]) -> None:
        self.borrowed -= len(list(pieces))

    async def open(self, bucket: str, key: str, want: Want) -> Opened:
        self.opens += 1
        if self.open_fails:
            raise self.open_fails.pop(0)
        stored = self.objects.get((bucket, key))
        if stored is None:
            raise OriginRefused(404, [("content-type", "application/xml")], b"<Error><Code>NoSuchKey</Code></Error>")
        self.open_opened += 1
        hit = (want.head_only or not stored.hidden) and stored.freshness is Freshness.FRESH
        return Opened(
            bucket,
            key,
            stored.record,
            Phase.HIT if hit else Phase.MISS,
            Reason.FRESH if hit else Reason.BLOCK,
            age_s=stored.age_s if stored.freshness is Freshness.FRESH else None,
            want=want,
            ticket=cast(Any, _FakeTicket(self)),
        )

    def body(self, opened: Opened, start: int, stop: int) -> FakeBody:
        self.open_bodies += 1
        return FakeBody(self, self.objects[opened.bucket, opened.key], start, stop)

    @contextlib.asynccontextmanager
    async def writing(
        self, bucket: str, keys: Sequence[str], *, versions: Collection[str] = (), bucket_itself: bool = False
    ) -> AsyncIterator[Writing]:
        self.fenced.append((bucket, tuple(keys)))
        self.version_writes.append(tuple(versions))
        settled = False
        writing = Writing()
        try:
            yield writing
            settled = writing.end_known
        except S3Error as refused:
            settled = refused.status < 500
            raise
        finally:
            self.settled.append(settled)
            self.fenced.remove((bucket, tuple(keys)))
            self.writes.append((bucket, tuple(keys)))

    def _pieces(self, stored: Stored, start: int, stop: int) -> Iterable[FilePiece]:
        while start < stop:
            length = min(BLOCK - start % BLOCK, stop - start)
            yield FilePiece(self.fd, stored.offset + start, length, 0)
            start += length


class _FakeTicket:
    def __init__(self, carrier: FakeCarrier) -> None:
        self._carrier = carrier

    def disown(self) -> None:
        self._carrier.open_opened -= 1


class FakeBody:
    def __init__(self, carrier: FakeCarrier, stored: Stored, start: int, stop: int) -> None:
        self.origin_requests = 0
        self._carrier = carrier
        self._stored = stored
        self._pieces = iter(carrier._pieces(stored, start, stop))
        self._given = 0

    def __aiter__(self) -> FakeBody:
        return self

    async def __anext__(self) -> Piece:
        fails = self._carrier.body_fails
        if fails and fails[0][0] == self._given:
            raise fails.pop(0)[1]
        self._given += 1
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        if self._stored.hidden:
            return BytesPiece(os.pread(piece.fd, piece.length, piece.offset))
        return piece

    async def aclose(self) -> None:
        self._carrier.open_bodies -= 1


__all__ = ["BLOCK", "Changed", "FakeCarrier", "Stored"]
