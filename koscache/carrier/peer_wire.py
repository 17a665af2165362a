"""What workers of different nodes say to each other on the peer port: HTTP/1.1, the question in one header.

Owns: the questions and what answers them, their encoding, and the signature that proves a question is a member's. Does not
own: connections (koscache.carrier.peers), serving (kosproxy.peering), what is done with an answer.

    GET /kos/1/object    x-kos-ask: AskObject   which version there is, and a slice of it
    GET /kos/1/block     x-kos-ask: AskBlock    a slice of one block of one version
    GET /kos/1/checksum  x-kos-ask: AskBlock    the checksum of the whole block, once it is in the store
    GET /kos/1/ahead     x-kos-ask: AskAhead    have these blocks brought; 204 at once

Every question carries x-kos-auth: "<member> <epoch ms> <hex HMAC-SHA256>". Whoever is asked answers from its own store or the
origin and never asks a third node, so questions cannot go round in circles.

200: the bytes, Content-Length known. x-kos-said: Said (to an object), x-kos-checksum: 16 hex digits (to a block that is
whole in the store: xxh3_64 of all of it). Any other status: a body of one Failed. A connection that breaks off in the body is
a failure of the rest.

Invariant: nothing here is believed that is not signed with the cluster's secret by a clock at most SKEW_S away. Answers are
not signed: who can answer in a member's place can do whatever the network lets him.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Final, TypeVar

import msgspec

from koscache.content import Record
from koscache.ipc import OpenOutcome, Refusal

OBJECT: Final = "/kos/1/object"
BLOCK: Final = "/kos/1/block"
CHECKSUM: Final = "/kos/1/checksum"
AHEAD: Final = "/kos/1/ahead"

#: Clocks of one cluster may be so far apart. A question that is heard again within that time only reads.
SKEW_S: Final = 300.0
#: A key of 1 KiB and an ETag, twice over in base64.
ASK_BYTES_MAX: Final = 32 * 1024


class PeerBroken(Exception):
    """What came is not of this protocol, or not signed as it must be."""


class AskObject(msgspec.Struct, frozen=True, array_like=True):
    """As koscache.carrier.types.Want, for one name. first, last: of its range, both None for none. gone: an ETag that the
    origin has no more, so a record with it must not be the answer. whole_block: send as much of the first block as there is,
    for the asker fills it. stale: a record that may be served only because the origin is down is better than none."""

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
    """

    bucket: str
    name: str
    record: Record
    number: int
    start: int
    stop: int
    cached: bool = False
    fill: bool = False


class AskAhead(msgspec.Struct, frozen=True, array_like=True):
    """These blocks of the version will be asked for soon."""

    bucket: str
    name: str
    record: Record
    numbers: tuple[int, ...]


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """Why there are no bytes. outcome: as of an open; NOT_STORED: ask the origin yourself; LEADER_GAVE_UP: not here, try
    another. changed: the origin has another version."""

    outcome: OpenOutcome
    reason: str = ""
    refusal: Refusal | None = None
    retry_after_s: float = 0.0
    changed: bool = False


Ask = AskObject | AskBlock | AskAhead
A = TypeVar("A", AskObject, AskBlock, AskAhead, Said, Failed)

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


def sign(secret: bytes, member: str, path: str, ask: bytes, now: float) -> str:
    """The value of x-kos-auth. now: epoch seconds."""
    stamp = f"{member} {int(now * 1000)}"
    return f"{stamp} {_digest(secret, stamp, path, ask)}"


def signer(secret: bytes, value: str, path: str, ask: bytes, now: float) -> str:
    """The member whose signature it is. Raises PeerBroken."""
    stamp, _, digest = value.rpartition(" ")
    member, _, at = stamp.partition(" ")
    if not hmac.compare_digest(digest.encode(), _digest(secret, stamp, path, ask).encode()):
        raise PeerBroken("the signature is wrong: is cluster.secret the same on all nodes?")
    if not at.isdigit() or abs(int(at) / 1000 - now) > SKEW_S:
        raise PeerBroken(f"signed at another time: clocks may be {SKEW_S:g} s apart")
    return member


def _digest(secret: bytes, stamp: str, path: str, ask: bytes) -> str:
    return hmac.digest(secret, b"\n".join((b"kos-peer-1", stamp.encode(), path.encode(), ask)), "sha256").hex()
