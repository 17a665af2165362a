"""What workers of different nodes say to each other on the peer port: HTTP/1.1, the question in one header.

Owns: the questions and what answers them, which bytes they mean, their encoding, and the signature that proves a question
is a member's. Does not own: connections (koscache.carrier.peers), serving (kosproxy.peering), what is done with an answer.

    GET /kos/1/object    x-kos-ask: AskObject   which version there is, and a slice of it
    GET /kos/1/block     x-kos-ask: AskBlock    a slice of one block of one version
    GET /kos/1/checksum  x-kos-ask: AskBlock    the checksum of the whole block, once it is in the store
    GET /kos/1/ahead     x-kos-ask: AskAhead    have these blocks brought; 204 at once
    GET /kos/1/take      x-kos-ask: AskTake     have them brought from a member that leaves; 204 at once, 503: not now

Every question carries x-kos-auth: "<member> <epoch ms> <hex HMAC-SHA256>". Whoever is asked answers from its own store or the
origin and never asks a third node, so questions cannot go round in circles.

200: the bytes, Content-Length known. x-kos-said: Said (to an object), x-kos-checksum: 16 hex digits (if the block, or an
object's first one, is whole in the store: xxh3_64 of all of it). Any other status: a body of one Failed, as encode() makes it;
401: the signature is wrong, 400: not of this protocol. A connection that breaks off in the body is a failure of the rest.

The head leaves as soon as it is known what will be sent, before there is a byte of it: how long it takes says how well the
member is, and not its origin.

Invariant: nothing here is believed that is not signed with the cluster's secret by a clock at most SKEW_S away. Answers are
not signed: who can answer in a member's place can do whatever the network lets him.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, TypeVar

import msgspec

from kos.errors import S3Error
from kos.s3 import ranges
from kos.s3.prepared_hmac import PreparedHmac
from koscache.content import Record, block_length
from koscache.ipc import OpenOutcome, Refusal

OBJECT: Final = "/kos/1/object"
BLOCK: Final = "/kos/1/block"
CHECKSUM: Final = "/kos/1/checksum"
AHEAD: Final = "/kos/1/ahead"
TAKE: Final = "/kos/1/take"
#: What the counts call them.
NAMES: Final = {OBJECT: "object", BLOCK: "block", CHECKSUM: "checksum", AHEAD: "ahead", TAKE: "take"}

ASK_HEADER: Final = "x-kos-ask"
AUTH_HEADER: Final = "x-kos-auth"
SAID_HEADER: Final = "x-kos-said"
CHECKSUM_HEADER: Final = "x-kos-checksum"

#: Clocks of one cluster may be so far apart. A question that is heard again within that time only reads.
SKEW_S: Final = 300.0
#: What has a node bring blocks that nobody waits for is signed for that node alone; to any other it is no question.
_FOR_ONE: Final = frozenset({AHEAD, TAKE})
#: Of an encoded question or Said. A record has at most 32 KiB of names and values (carrier.first), which msgpack frames by
#: up to 5 bytes each; beside it there are bucket, key and version id, 2 KiB. base64 makes 4 bytes of 3: 52 KiB at most.
ASK_BYTES_MAX: Final = 60 * 1024
#: Of the head of a question or an answer.
HEAD_BYTES_MAX: Final = 64 * 1024
#: Of an encoded Failed: a Refusal's document of 64 KiB and its headers of 16 KiB, in base64.
FAILED_BYTES_MAX: Final = 128 * 1024


class PeerBroken(Exception):
    """What came is not of this protocol, or not signed as it must be."""


class AskObject(msgspec.Struct, frozen=True, array_like=True):
    """As koscache.carrier.types.Want, for one name. first, last: of its range, both None for none. gone: an ETag that the
    origin has no more, so a record with it must not be the answer. whole_block: send as much of the first block as there is,
    for the asker fills it. stale: a record that may be served only because the origin is down is better than none. cached:
    only what can be said without asking the origin."""

    bucket: str
    name: str
    head_only: bool = False
    ranged: bool = False
    first: int | None = None
    last: int | None = None
    checksum_mode: bool = False
    conditional: bool = False
    document: bool = False
    gone: str = ""
    whole_block: bool = False
    stale: bool = False
    cached: bool = False


class Said(msgspec.Struct, frozen=True, array_like=True):
    """The version that there is. age_s: how long ago the origin vouched for it. storable: the asker may keep the record;
    else it holds for this one question. start, stop: which slice of the object the body is. phase, reason: as in
    x-kos-cache. origin_requests: how many this question made."""

    record: Record
    age_s: float
    storable: bool
    start: int
    stop: int
    phase: str
    reason: str
    origin_requests: int = 0


class AskBlock(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [start, stop) of block `number`, counted from the block's start, of the version that record names.

    cached: only if it is in the store. fill: the asker keeps what it gets, so it is worth filling here at once.
    block_bytes: cache.block_size of the asker; 0: not said. Block numbers of another size name other bytes.
    """

    bucket: str
    name: str
    record: Record
    number: int
    start: int
    stop: int
    cached: bool = False
    fill: bool = False
    block_bytes: int = 0


class AskAhead(msgspec.Struct, frozen=True, array_like=True):
    """These blocks of the version will be asked for soon. block_bytes: as in AskBlock."""

    bucket: str
    name: str
    record: Record
    numbers: tuple[int, ...]
    block_bytes: int = 0


class AskTake(msgspec.Struct, frozen=True, array_like=True):
    """These blocks of the version have become the asked member's, and the member `source`, which drains, has them in its
    store. block_bytes: as in AskBlock."""

    bucket: str
    name: str
    record: Record
    numbers: tuple[int, ...]
    source: str
    block_bytes: int = 0


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """Why there are no bytes. outcome: as of an open; NOT_STORED: ask the origin yourself; LEADER_GAVE_UP: not here, try
    another. changed: the origin has another version."""

    outcome: OpenOutcome
    reason: str = ""
    refusal: Refusal | None = None
    retry_after_s: float = 0.0
    changed: bool = False


Ask = AskObject | AskBlock | AskAhead | AskTake

UNSIGNED: Final = 401
NOT_PROTOCOL: Final = 400
_STATUSES: Final = {
    OpenOutcome.NOT_STORED: 409,
    OpenOutcome.REFUSED: 422,
    OpenOutcome.UNAVAILABLE: 503,
    OpenOutcome.LEADER_GAVE_UP: 404,
}


def status_of(failed: Failed) -> int:
    """Which status says it."""
    return 409 if failed.changed else _STATUSES.get(failed.outcome, 500)


def not_here(reason: str) -> Failed:
    return Failed(OpenOutcome.LEADER_GAVE_UP, reason)


def not_stored(reason: str) -> Failed:
    return Failed(OpenOutcome.NOT_STORED, reason)


def unavailable(reason: str, retry_after_s: float) -> Failed:
    return Failed(OpenOutcome.UNAVAILABLE, reason, retry_after_s=retry_after_s)


def changed(reason: str) -> Failed:
    return Failed(OpenOutcome.LEADER_GAVE_UP, reason, changed=True)


def refused(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Failed:
    """The origin's refusal; body empty: it came without a document, or with one that the asker makes as well."""
    fields = tuple((n.encode("utf-8", "surrogateescape"), v.encode("utf-8", "surrogateescape")) for n, v in headers)
    return Failed(OpenOutcome.REFUSED, refusal=Refusal(status, fields, body))


def block_slice(ask: AskBlock, block_bytes: int) -> tuple[int, int]:
    """Which bytes of the object are asked for, half-open, at least one. Raises PeerBroken: there are none such."""
    length = block_length(ask.record.size, ask.number, block_bytes) if ask.number >= 0 else 0
    if not 0 <= ask.start < ask.stop <= length:
        raise PeerBroken(f"no bytes {ask.start}-{ask.stop} in block {ask.number} of an object of {ask.record.size}")
    begin = ask.number * block_bytes
    return begin + ask.start, begin + ask.stop


def object_slice(ask: AskObject, size: int, block_bytes: int) -> tuple[int, int]:
    """Which bytes of an object of that size come with the answer, half-open; equal for none.

    Of the first block only: the others have other homes. None either where they would mostly be for nothing: a conditional
    read mostly ends without a body, and a range outside of the object always does.
    """
    if ask.head_only or ask.conditional or not size:
        return 0, 0
    start, stop = 0, size
    if ask.ranged:
        try:
            start, stop = ranges.resolve(ranges.RangeSpec(ask.first, ask.last), size)
        except S3Error:
            return 0, 0
    if start >= block_bytes:
        return 0, 0
    return (0 if ask.whole_block else start), min(size if ask.whole_block else stop, block_bytes)


A = TypeVar("A", AskObject, AskBlock, AskAhead, AskTake, Said, Failed)

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """As the value of a header: base64url of msgpack."""
    return base64.urlsafe_b64encode(_encoder.encode(message))


def decode(value: bytes, kind: type[A]) -> A:
    """Raises PeerBroken."""
    try:
        return msgspec.msgpack.decode(base64.urlsafe_b64decode(value), type=kind)
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise PeerBroken(f"not a {kind.__name__}: {error}") from error


def sign(secret: bytes, member: str, to: str, path: str, ask: bytes, now: float) -> str:
    """The value of x-kos-auth. to: the member that is asked, if it is one alone. now: epoch seconds."""
    stamp = f"{member} {int(now * 1000)}"
    return f"{stamp} {_digest(secret, stamp, to, path, ask)}"


def signer(secret: bytes, value: str, to: str, path: str, ask: bytes, now: float) -> str:
    """The member whose signature it is. Raises PeerBroken. value: as it came, whatever it is; to: this member."""
    stamp, _, digest = value.rpartition(" ")
    member, _, at = stamp.partition(" ")
    # What is not ASCII no member has sent; compare_digest() would refuse it by another exception.
    if not value.isascii() or not hmac.compare_digest(digest, _digest(secret, stamp, to, path, ask)):
        raise PeerBroken("the signature is wrong: is cluster.secret the same on all nodes?")
    if not at.isdigit() or abs(int(at) / 1000 - now) > SKEW_S:
        raise PeerBroken(f"signed at another time: clocks may be {SKEW_S:g} s apart")
    return member


def _digest(secret: bytes, stamp: str, to: str, path: str, ask: bytes) -> str:
    target = f"{path} {to}" if path in _FOR_ONE else path
    return _key(secret).digest(b"\n".join((b"kos-peer-1", stamp.encode(), target.encode(), ask))).hex()


@lru_cache(maxsize=4)
def _key(secret: bytes) -> PreparedHmac:
    return PreparedHmac(secret, "sha256")
