"""What the cache holds: records (what is known of an object) and blocks (slices of one version of it).

Owns: content ids, the cutting of objects into blocks, the types that travel between store, daemon and workers, and
the pure judgement of how far a record may be trusted. Does not own: where anything is kept.

Invariant: a content id names the bytes of exactly one version (bucket, key, ETag, size), so a block found under it can
never belong to another version; whatever else is stale or lost, bytes of two versions do not mix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple, Protocol

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kos.config import Rule
from kos.rules import Rules
from kos.s3.object_response import ObjectMeta, Template

CONTENT_BYTES = 16


def content_id(bucket: str, key: str, etag: str, size: int) -> bytes:
    """16 bytes that name one version of one object.

    BLAKE2b, not xxh3: keys and ETags are chosen by clients, and a collision that somebody can construct would be
    another object's bytes under right headers. It is computed once per record (Record.content), not per request.
    """
    parts = b"\0".join((_utf8(bucket), _utf8(key), _utf8(etag), b"%d" % size))
    return blake2b(parts, digest_size=CONTENT_BYTES).digest()


#: What begins the name of a version. Keys of clients that begin with it are never cached (kos.s3.operation).
VERSION_MARK: Final = "\0"
#: The version that a bucket without versions has, and that a write to one whose versions are suspended replaces.
NULL_VERSION: Final = "null"


def version_name(key: str, version_id: str) -> str:
    """What stands for the key of one version of an object wherever records are kept and asked for.

    Such a name begins with VERSION_MARK; version ids hold none, so split_name() gives back what it was made of.
    """
    assert version_id and VERSION_MARK not in version_id, "not a version id"
    return f"{VERSION_MARK}{version_id}{VERSION_MARK}{key}"


def split_name(name: str) -> tuple[str, str | None]:
    """(key, version id) of a name; (name, None) of the key of a current object."""
    if not name.startswith(VERSION_MARK):
        return name, None
    version_id, _, key = name[1:].partition(VERSION_MARK)
    return key, version_id


def part_name(content: bytes, number: int) -> str:
    """What stands for the key of a part of some content where its bounds are kept. No version has an empty id, so this
    is no version's name."""
    return f"{VERSION_MARK}{VERSION_MARK}{number}{VERSION_MARK}{content.hex()}"


def is_immutable(name: str) -> bool:
    """Whether it names a version that nothing but a write through versions_slot_hash() can change or remove."""
    return name.startswith(VERSION_MARK) and split_name(name)[1] != NULL_VERSION


def object_name(bucket: str, key: str) -> bytes:
    """The bytes that object_hash and fence slots are taken of; neither part can hold a NUL that the other could
    imitate: bucket names have none."""
    return _utf8(bucket) + b"\0" + _utf8(key)


def object_hash(bucket: str, key: str) -> bytes:
    """16 bytes, the key of the index's `objects`. Not collision proof: the value names bucket and key and is
    compared."""
    return xxh3_128_digest(object_name(bucket, key))


def object_slot_hash(bucket: str, name: str) -> int:
    """64 bits, of which the fence takes the low ones. name: a key, or a version_name().

    The null version has the slot of the current object, because a plain write may replace it; all other versions of a
    key share versions_slot_hash(), which plain writes leave alone.
    """
    if name.startswith(VERSION_MARK):
        key, version_id = split_name(name)
        if version_id != NULL_VERSION:
            return versions_slot_hash(bucket, key)
        name = key
    return xxh3_64_intdigest(object_name(bucket, name))


def versions_slot_hash(bucket: str, key: str) -> int:
    """The slot of all versions of a key but the null version."""
    return xxh3_64_intdigest(object_name(bucket, f"{VERSION_MARK}{VERSION_MARK}{key}"))


def body_checksum(body: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of a whole block, as kept in Location.checksum. Streaming: xxhash.xxh3_64().intdigest()."""
    return xxh3_64_intdigest(body)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def block_count(size: int, block: int) -> int:
    """Blocks of an object of `size` bytes; none for an empty object."""
    return -(-size // block)


def block_length(size: int, number: int, block: int) -> int:
    """Bytes in block `number` of an object of `size` bytes (the last one may be short; 0 when there is no such
    block)."""
    return max(0, min(block, size - number * block))


def split(start: int, stop: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Cuts the half-open byte range [start, stop) into (block number, offset in that block, length), in order."""
    while start < stop:
        number, offset = divmod(start, block)
        length = min(block - offset, stop - start)
        yield number, offset, length
        start += length


class Record(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """What is known of one object; immutable, replaced whole.

    etag: with its quotes. size: bytes. headers, checksums: as in ObjectMeta. validated_at: epoch seconds of the moment
    *before* the origin request that vouched for it was sent; 0 = rebuilt from disk, must be revalidated. fence: value
    of the object's fence slot read before that request; 0 matches no slot. content: content_id(bucket, key, etag, size).
    """

    etag: str
    size: int
    last_modified: str
    headers: tuple[tuple[str, str], ...]
    checksums: tuple[tuple[str, str], ...]
    checksums_known: bool
    content: bytes
    validated_at: float
    fence: int

    @cached_property
    def meta(self) -> ObjectMeta:
        """The same as the pure S3 code wants it; made once per decoded record."""
        return ObjectMeta(
            etag=self.etag,
            size=self.size,
            last_modified=self.last_modified,
            headers=self.headers,
            checksums=self.checksums,
            checksums_known=self.checksums_known,
        )

    @cached_property
    def answers(self) -> dict[str, Template]:
        """Heads of answers to plain requests, by what they ask; made by who answers, kept as long as the record."""
        return {}

    def revalidated(self, validated_at: float, fence: int) -> Record:
        """The same version, vouched for anew."""
        return msgspec.structs.replace(self, validated_at=validated_at, fence=fence)


def storable(meta: ObjectMeta) -> bool:
    """Whether the meta can be kept: header bytes that are not UTF-8 (surrogates after decoding) cannot, and are treated
    as no-store."""
    try:
        for name, value in meta.headers:
            f"{name}{value}".encode()
        f"{meta.etag}{meta.last_modified}".encode()
    except UnicodeEncodeError:
        return False
    return True


def make_record(bucket: str, key: str, meta: ObjectMeta, *, validated_at: float, fence: int) -> Record:
    """The record of an origin answer that is storable(). key: or a version_name(); versions of the same bytes share their
    blocks. See Record for when validated_at and fence must have been read."""
    return Record(
        etag=meta.etag,
        size=meta.size,
        last_modified=meta.last_modified,
        headers=meta.headers,
        checksums=meta.checksums,
        checksums_known=meta.checksums_known,
        content=content_id(bucket, split_name(key)[0], meta.etag, meta.size),
        validated_at=validated_at,
        fence=fence,
    )


@lru_cache(maxsize=256)
def _for_ever(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, freshness=math.inf)


def rule_of(rules: Rules, bucket: str, name: str) -> Rule:
    """The rule of an object, or of a version by its name: that of its key, but that a version never goes out of date.

    The null version does, because a write to a bucket whose versions are suspended replaces it.
    """
    if not name.startswith(VERSION_MARK):
        return rules.match(bucket, name)
    key, version_id = split_name(name)
    rule = rules.match(bucket, key)
    return rule if version_id == NULL_VERSION else _for_ever(rule)


class Freshness(Enum):
    """How far a record may be trusted."""

    FRESH = "fresh"  # serve
    EXPIRED = "expired"  # revalidate; may be served as stale while the origin is down
    FENCED = "fenced"  # a write went by, or it was rebuilt: revalidate, never serve as stale
    ABSENT = "absent"


def judge(record: Record | None, slot_value: int, now: float, fresh_s: float) -> tuple[Freshness, float]:
    """Freshness and age in seconds. slot_value: the fence slot's present value. fresh_s: 0 = always ask, inf =
    immutable.

    A record from the future (the clock was set back) has no known age: it is expired, unless immutable.
    """
    if record is None:
        return Freshness.ABSENT, 0.0
    age = now - record.validated_at
    if record.fence != slot_value or record.fence == 0:
        return Freshness.FENCED, max(age, 0.0)
    if fresh_s == math.inf or 0.0 <= age < fresh_s:
        return Freshness.FRESH, max(age, 0.0)
    return Freshness.EXPIRED, max(age, 0.0)


class Location(NamedTuple):
    """Where a block's bytes are. offset, length: bytes, of the body alone. checksum: xxh3_64 of the body.
    verified: False after a recovery that could not vouch for the bytes: check the checksum before first use."""

    segment: int
    offset: int
    length: int
    checksum: int
    verified: bool


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """Space reserved for one block: write bytes [offset, offset + length) of the file `path`, no byte outside, and
    commit or abandon it. Never used again for anything else when abandoned."""

    segment: int
    offset: int
    length: int
    path: str


class Refusal(Enum):
    """Why no space was reserved."""

    NO_SPACE = "no_space"  # at the size limit: evict() frees a segment, once workers have let go of it
    DISK_NEARLY_FULL = "disk_nearly_full"  # the file system has less than min_free_bytes left
    TOO_LARGE = "too_large"  # longer than a block: a bug of the caller


class Refused(msgspec.Struct, frozen=True, array_like=True):
    reason: Refusal


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """A filled extent. length: bytes written from the extent's start (<= extent.length). checksum: xxh3_64 of them.
    record goes into the entry on disk, so that it can be rebuilt; it does not replace the index's record (put_record
    does)."""

    extent: Extent
    content: bytes
    number: int
    length: int
    checksum: int
    bucket: str
    key: str
    record: Record | None


class Small(msgspec.Struct, frozen=True, array_like=True):
    """A small block that travels with its body (<= small_bytes). record, if given, is put into the index with it."""

    content: bytes
    number: int
    body: bytes
    checksum: int
    bucket: str
    key: str
    record: Record | None


class StoreConfig(Protocol):
    """What the store wants to know, all in bytes; kos.config.Cache has it."""

    @property
    def dir(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def segment_bytes(self) -> int: ...
    @property
    def index_bytes(self) -> int: ...
    @property
    def min_free_bytes(self) -> int: ...
    @property
    def small_bytes(self) -> int: ...
