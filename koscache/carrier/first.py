"""Which single request opens an object, and what its answer means. Pure.

Owns: the choice between HEAD, a ranged and a whole GET, the condition on the version already known, and the verdict on
the answer. Does not own: sending it (open), or the bytes (blocks, body).

Invariant: a cold object of at most one block is opened by one request, and no small range read pulls more than its range.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kos.s3.object_response import ObjectMeta, meta_from_headers
from kos.s3.ranges import RangeSpec
from koscache.carrier.types import Reason, Want
from koscache.content import NULL_VERSION, Record

#: S3 allows 8 KiB of headers with 2 KiB of user metadata among them; a message has room for twice this beside a body.
_META_MAX_BYTES: Final = 32 * 1024


class Kind(enum.Enum):
    """What the request is to bring."""

    HEAD = "head"  # the record only
    BLOCK = "block"  # the record, and a body that begins at a block's border
    OWN_RANGE = "own_range"  # the record, and exactly what the client wants


@dataclass(frozen=True, slots=True)
class First:
    """range: Range header or None. if_none_match: the ETag whose record a 304 would renew."""

    method: str
    kind: Kind
    range: str | None = None
    if_none_match: str | None = None

    def headers(self) -> list[tuple[str, str]]:
        headers = [("x-amz-checksum-mode", "ENABLED")]
        if self.range is not None:
            headers.append(("Range", self.range))
        if self.if_none_match is not None:
            headers.append(("If-None-Match", self.if_none_match))
        return headers


def plan(want: Want, record: Record | None, *, block_bytes: int, random_bytes: int, alone: bool) -> First:
    """The request to open with. record: known, but to be revalidated. alone: nothing will be stored."""
    etag = None if record is None else record.etag
    if want.checksum_mode and record is not None and not record.checksums_known:
        return First("HEAD", Kind.HEAD)  # a 304 would not bring them
    if want.head_only or (want.conditional and record is None):
        # A conditional read of something unknown is mostly answered without a body: do not have one sent for nothing.
        return First("HEAD", Kind.HEAD, None, etag)
    wanted = want.range
    if wanted is None:
        if alone or want.checksum_mode:
            return First("GET", Kind.OWN_RANGE if alone else Kind.BLOCK, None, etag)
        return First("GET", Kind.BLOCK, f"bytes=0-{block_bytes - 1}", etag)
    if alone or is_small(wanted, None if record is None else record.size, random_bytes):
        return First("GET", Kind.OWN_RANGE, str(wanted), etag)
    first = wanted.first
    if first is None:
        if record is None:
            return First("HEAD", Kind.HEAD)
        assert wanted.last is not None, "a range has at least one end"
        first = max(0, record.size - wanted.last)
    start = first // block_bytes * block_bytes
    return First("GET", Kind.BLOCK, f"bytes={start}-{start + block_bytes - 1}", etag)


def after_416(first: First) -> First | None:
    """What to ask when the range of `first` says nothing of the object; None: that cannot be."""
    if first.range is None:
        return None
    if first.kind is Kind.BLOCK and first.range.startswith("bytes=0-"):
        return First("GET", Kind.BLOCK)  # it is empty, so all of it is little
    return First("HEAD", Kind.HEAD)


def is_small(wanted: RangeSpec, size: int | None, random_bytes: int) -> bool:
    """Whether a range is short enough to pass through a cold block. size: of the object, if known."""
    if wanted.first is None:
        assert wanted.last is not None, "a range has at least one end"
        length = wanted.last
    elif wanted.last is not None:
        length = wanted.last + 1 - wanted.first
    elif size is not None:
        length = size - wanted.first
    else:
        return False
    if size is not None and min(length, size) >= size:
        return False  # all of it
    return length < random_bytes


class Verdict(enum.Enum):
    """What the answer to a First means."""

    SAME = "same"  # 304: the known version
    VERSION = "version"  # a version that may be stored
    NOT_STORED = "not_stored"  # its bytes are for this client alone
    EMPTY_OR_OUTSIDE = "empty_or_outside"  # 416: the range says nothing of this object; ask without a body
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Judged:
    verdict: Verdict
    reason: Reason
    meta: ObjectMeta | None = None


def judge_answer(first: First, status: int, headers: Mapping[str, str], version_id: str | None = None) -> Judged:
    """The verdict on an answer, from its head alone. The reason is the phase's reason for VERSION and NOT_STORED.

    version_id: which version was asked for, None for the current object. An answer that does not say that it is of that
    version comes from an origin that did not understand the question: it is passed on and not stored.
    """
    if status == 304 and first.if_none_match is not None:
        return Judged(Verdict.SAME, Reason.EXPIRED)
    if status == 416 and first.range is not None:
        return Judged(Verdict.EMPTY_OR_OUTSIDE, Reason.COLD)
    if status == 429 or status >= 500 or 100 <= status < 200 or status == 304:
        return Judged(Verdict.UNAVAILABLE, Reason.ORIGIN_DOWN)
    if status not in (200, 206):
        return Judged(Verdict.REFUSED, Reason.COLD)
    named = {name.lower(): value for name, value in headers.items()}
    etag = named.get("etag", "").strip()
    meta = _meta(status, named, headers)
    if meta is None:
        return Judged(Verdict.UNAVAILABLE, Reason.ORIGIN_DOWN)
    if not etag or is_weak(etag):
        return Judged(Verdict.NOT_STORED, Reason.NO_ETAG, meta)
    if version_id is not None and not _is_version(version_id, named.get("x-amz-version-id")):
        return Judged(Verdict.NOT_STORED, Reason.NOT_THE_VERSION, meta)
    if _is_in_motion(named, for_ever=version_id not in (None, NULL_VERSION)):
        return Judged(Verdict.NOT_STORED, Reason.IN_MOTION, meta)
    if _forbids_storing(named.get("cache-control", "")) or not _keepable(meta):
        return Judged(Verdict.NOT_STORED, Reason.NO_STORE, meta)
    return Judged(Verdict.VERSION, Reason.COLD if first.if_none_match is None else Reason.CHANGED, meta)


def _is_version(version_id: str, said: str | None) -> bool:
    # A bucket that never had versions has the null version only, and says nothing of it.
    return version_id == (NULL_VERSION if said is None else said.strip())


def _is_in_motion(named: Mapping[str, str], *, for_ever: bool) -> bool:
    """Whether the headers say what will change by itself, so that they are wrong soon. for_ever: they would be kept so.

    That an archived object is being restored is never kept: some ask again and again whether it is done, and rules may be
    `immutable`. Nothing is lost by it, as such an object cannot be read yet.
    """
    if 'ongoing-request="true"' in named.get("x-amz-restore", "").lower():
        return True
    return for_ever and named.get("x-amz-replication-status", "").strip().upper() == "PENDING"


def _meta(status: int, named: Mapping[str, str], headers: Mapping[str, str]) -> ObjectMeta | None:
    if named.get("etag", "").strip():
        return meta_from_headers(status, headers)
    # Without an ETag there is no version to name, but there is still an answer to give: an empty one stands for none.
    meta = meta_from_headers(status, {**headers, "ETag": '""'})
    return None if meta is None else ObjectMeta("", meta.size, meta.last_modified, meta.headers, meta.checksums, True)


def _forbids_storing(cache_control: str) -> bool:
    directives = {part.partition("=")[0].strip().lower() for part in cache_control.split(",")}
    return not directives.isdisjoint(("no-store", "private"))


def is_weak(etag: str) -> bool:
    """A weak ETag may name two versions that differ in their bytes, and never satisfies If-Match."""
    return etag.startswith("W/")


def _keepable(meta: ObjectMeta) -> bool:
    """Whether it can go into messages and the index: not too large, and all of it proper UTF-8 (bytes that are none are
    held as surrogates)."""
    size = 0
    try:
        for name, value in (*meta.headers, *meta.checksums, (meta.etag, meta.last_modified)):
            size += len(name.encode()) + len(value.encode())
    except UnicodeEncodeError:
        return False
    return size <= _META_MAX_BYTES
