"""What workers and the daemon say to each other over the unix socket, and how it is framed.

Owns: the messages, the frame (four bytes of length, little endian, then msgpack) and a connection that carries them.
Does not own: what any message means (koscache.leases, koscache.daemon, koscache.carrier.link).

Invariant: nothing here grows without a limit. A frame above message_bytes, a message that is none, or a peer that lets
queue_bytes pile up unread ends the connection; both ends hold every lease by connection, so ending it is always safe.

A message with a field `ask` is a question, and the answer carries the same number. All others are one way.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, cast

import msgspec

from koscache.cluster.view import View
from koscache.content import Extent, Record

_log = logging.getLogger("koscache.ipc")

#: File name of the socket in cache.dir.
SOCKET_NAME: Final = "daemon.sock"
_LENGTH_BYTES: Final = 4
#: A connection that is closed has so long to send what is queued: its peer may be stopped and never read it.
_CLOSE_S: Final = 1.0


class OpenOutcome(enum.IntEnum):
    """How the leader of an open ended."""

    STORED = 0  # the record is in the index
    NOT_STORED = 1  # no-store, private, no ETag: everyone fetches for himself
    REFUSED = 2  # the origin answered 4xx: relayed to everyone
    UNAVAILABLE = 3  # the origin cannot be reached
    LEADER_GAVE_UP = 4  # the leader's worker is closing, or something unexpected: ask again


class BlockOutcome(enum.IntEnum):
    """How a fill ended. Every way in which a leader can fail has a name."""

    COMMITTED = 0
    CHANGED = 1  # the origin has another version: nobody will ever get this block
    REFUSED = 2  # the origin answered 4xx
    UNAVAILABLE = 3  # the origin cannot be reached, or broke off more often than retries allow
    DISK_FAILED = 4  # the extent could not be written, or the commit failed
    LEADER_DIED = 5  # the leader's connection ended
    LEADER_STALLED = 6  # no sign of progress for lease_timeout
    LEADER_GAVE_UP = 7  # the leader's worker is closing


class PassReason(enum.IntEnum):
    """Why a block is not to be filled, but passed through."""

    CACHING_OFF = 0
    FILLS_MAX = 1  # all the bytes that fills may hold are granted
    FIRST_TOUCH = 2  # a small read of a cold block
    STORE_REFUSED = 3  # no room now
    BUSY = 4  # too many questions are waiting
    DAEMON_AWAY = 5  # said by the link, never by the daemon


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """An origin's error answer. Header fields as bytes: they are relayed as they came."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""


# --- worker to daemon ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=1):
    pid: int


class AskOpen(Message, frozen=True, tag=2):
    """May I ask the origin about this key? fence: the key's fence value when the reader came. insist: what another leader
    brought before this question was asked does not do (too old, or without checksums)."""

    ask: int
    bucket: str
    key: str
    fence: int
    insist: bool = False


class OpenDone(Message, frozen=True, tag=3):
    """The leader's result. body: a block small enough to travel here; content, number, checksum: which one."""

    ask: int
    lease: int
    outcome: OpenOutcome
    reason: str = ""
    record: Record | None = None
    content: bytes = b""
    number: int = 0
    checksum: int = 0
    body: bytes | None = None
    refusal: Refusal | None = None
    retry_after_s: float = 0.0


class AskBlock(Message, frozen=True, tag=4):
    """Who fills this block? touch: a small random read, which does not fill a cold block at first.

    ahead: nobody waits for it yet. record: goes onto the disk with the block, so that recovery finds it. to_origin: who leads
    it asks the origin, and not another node. serves: it is asked on behalf of another node, so it must not wait for somebody
    who may wait for that one.
    """

    ask: int
    bucket: str
    key: str
    content: bytes
    number: int
    length: int
    touch: bool = False
    ahead: bool = False
    record: Record | None = None
    to_origin: bool = True
    serves: bool = False


class Progress(Message, frozen=True, tag=5):
    """Both ways: bytes of the block up to watermark are in the file."""

    lease: int
    watermark: int


class BlockDone(Message, frozen=True, tag=6):
    """All bytes are in the extent, or (a small block) in body. checksum: xxh3_64 of them."""

    ask: int
    lease: int
    checksum: int
    body: bytes | None = None


class BlockFailed(Message, frozen=True, tag=7):
    lease: int
    outcome: BlockOutcome
    reason: str = ""


class AskVerify(Message, frozen=True, tag=8):
    """A block that recovery kept has not been read since: are its bytes right?"""

    ask: int
    content: bytes
    number: int


class Touches(Message, frozen=True, tag=9):
    """Blocks that were read, for the second chance at eviction. Lossy."""

    blocks: list[tuple[bytes, int]]


class FirstTouch(Message, frozen=True, tag=10):
    """A small read went through that needed no question."""

    content: bytes
    number: int


class WriteBegin(Message, frozen=True, tag=11):
    """Keys of these fence slots are about to be written at the origin."""

    token: int
    slots: list[int]


class WriteEnd(Message, frozen=True, tag=12):
    token: int


class Released(Message, frozen=True, tag=13):
    """The worker has no descriptor of this segment any more."""

    segment: int


class Ping(Message, frozen=True, tag=14):
    """Are you there? Sent only while an answer is owed."""

    ask: int


class AskEnd(Message, frozen=True, tag=15):
    """The writes of these tokens have ended. Done when every node of the cluster has heard of them."""

    ask: int
    tokens: list[int]


class AskCluster(Message, frozen=True, tag=16):
    """An operator's question, from the admin port; body: JSON."""

    ask: int
    topic: str
    body: bytes


class Counted(Message, frozen=True, tag=17):
    """Reads of objects that this worker has answered since it said so last, and how many of them were hits."""

    reads: int
    hits: int


# --- daemon to worker ---------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag=32):
    """caching: whether the store takes blocks now; reason: why not."""

    caching: bool
    reason: str


class Caching(Message, frozen=True, tag=33):
    on: bool
    reason: str


class OpenLead(Message, frozen=True, tag=34):
    """Ask the origin and say OpenDone. lease 0: for yourself only, and say nothing."""

    ask: int
    lease: int


class OpenEnded(Message, frozen=True, tag=35):
    """What the leader brought."""

    ask: int
    outcome: OpenOutcome
    reason: str = ""
    record: Record | None = None
    refusal: Refusal | None = None
    retry_after_s: float = 0.0


class BlockLead(Message, frozen=True, tag=36):
    """Fill it. extent None: small, send the bytes with BlockDone."""

    ask: int
    lease: int
    extent: Extent | None


class BlockFollow(Message, frozen=True, tag=37):
    """Another worker fills it; Progress and BlockEnded follow. to_origin: as it said when it asked."""

    ask: int
    lease: int
    extent: Extent | None
    watermark: int
    to_origin: bool = True


class BlockHere(Message, frozen=True, tag=38):
    """It is in the index by now."""

    ask: int


class BlockPass(Message, frozen=True, tag=39):
    ask: int
    reason: PassReason


class Followed(Message, frozen=True, tag=40):
    """Somebody reads behind you: report progress."""

    lease: int


class BlockEnded(Message, frozen=True, tag=41):
    lease: int
    outcome: BlockOutcome


class Done(Message, frozen=True, tag=42):
    """Answer to OpenDone and BlockDone (is it in the index?), AskVerify (are the bytes right?), AskEnd (has every node
    heard of it?) and Ping."""

    ask: int
    ok: bool


class Evicted(Message, frozen=True, tag=43):
    """These segments are gone: close their descriptors and say Released for each."""

    segments: list[int]


class ClusterView(Message, frozen=True, tag=44):
    """The members by now; name: this node's own."""

    name: str
    view: View


class ClusterSaid(Message, frozen=True, tag=45):
    """Answer to AskCluster. failed: why there is none."""

    ask: int
    body: bytes
    failed: str = ""


ToDaemon = (
    Hello
    | AskOpen
    | OpenDone
    | AskBlock
    | Progress
    | BlockDone
    | BlockFailed
    | AskVerify
    | Touches
    | FirstTouch
    | WriteBegin
    | WriteEnd
    | Released
    | Ping
    | AskEnd
    | AskCluster
    | Counted
)
ToWorker = (
    Welcome
    | Caching
    | OpenLead
    | OpenEnded
    | BlockLead
    | BlockFollow
    | BlockHere
    | BlockPass
    | Progress
    | Followed
    | BlockEnded
    | Done
    | Evicted
    | ClusterView
    | ClusterSaid
)

#: sun_path holds 108 bytes with the final NUL
_PATH_MAX_BYTES: Final = 107


@contextlib.contextmanager
def socket_address(cache_dir: str) -> Iterator[str]:
    """The socket's address, for the time of a bind or connect.

    A directory whose path is too long for a socket address is gone through by descriptor.
    """
    path = os.path.join(cache_dir, SOCKET_NAME)
    if len(os.fsencode(path)) <= _PATH_MAX_BYTES:
        yield path
        return
    fd = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)


_encoder = msgspec.msgpack.Encoder()


class IpcError(Exception):
    """The peer broke the protocol; the connection ends."""


def frame(message: Message) -> bytes:
    """One message as it goes over the socket."""
    out = bytearray(_LENGTH_BYTES)
    _encoder.encode_into(message, out, _LENGTH_BYTES)
    out[:_LENGTH_BYTES] = (len(out) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little")
    return bytes(out)


class Unframer:
    """Bytes as they come to messages. type_: the union that is expected."""

    def __init__(self, type_: object, message_bytes: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(cast("Any", type_))
        self._message_bytes = message_bytes
        self._held = bytearray()

    def allow(self, message_bytes: int) -> None:
        """Messages may be so long from now on."""
        self._message_bytes = message_bytes

    def feed(self, received: bytes) -> list[Any]:
        """All messages that are whole now. Raises IpcError."""
        held = self._held
        held += received
        messages: list[Any] = []
        at = 0
        while len(held) - at >= _LENGTH_BYTES:
            length = int.from_bytes(held[at : at + _LENGTH_BYTES], "little")
            if length > self._message_bytes:
                raise IpcError(f"a message of {length} bytes, at most {self._message_bytes} are allowed")
            stop = at + _LENGTH_BYTES + length
            if len(held) < stop:
                break
            try:
                messages.append(self._decoder.decode(held[at + _LENGTH_BYTES : stop]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise IpcError(f"not a message: {error}") from error
            at = stop
        del held[:at]
        return messages


class Peer(Protocol):
    """Whoever gets what a connection receives."""

    def connected(self, connection: Connection) -> None: ...
    def received(self, connection: Connection, message: Any) -> None: ...
    def lost(self, connection: Connection, reason: str) -> None: ...


class Connection(asyncio.Protocol):
    """One end of the socket. All calls on the loop's thread."""

    def __init__(self, peer: Callable[[], Peer], type_: object, message_bytes: int, queue_bytes: int) -> None:
        self._make_peer = peer
        self._peer: Peer | None = None
        self._unframer = Unframer(type_, message_bytes)
        self._message_bytes = message_bytes
        self._queue_bytes = queue_bytes
        self._transport: asyncio.Transport | None = None
        self._reason = "closed"
        #: for the peer: whose connection this is
        self.owner = 0
        self._closed = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._peer = self._make_peer()
        self._peer.connected(self)

    def data_received(self, data: bytes) -> None:
        assert self._peer is not None
        try:
            for message in self._unframer.feed(data):
                if self._transport is None:
                    return
                self._peer.received(self, message)
        except IpcError as error:
            self.abort(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is not None and self._reason == "closed":
            self._reason = repr(exc)
        peer, self._peer = self._peer, None
        if not self._closed.done():
            self._closed.set_result(None)
        if peer is not None:
            peer.lost(self, self._reason)

    def send(self, message: Message) -> bool:
        """Hands a message to the socket. False: the connection is gone, or goes now because the peer does not read."""
        transport = self._transport
        if transport is None:
            return False
        framed = frame(message)
        if len(framed) > self._message_bytes:
            # Our own bug or a limit set too low: losing this one message would leave its asker waiting forever.
            self.abort(f"own {type(message).__name__} of {len(framed)} bytes is above the limit")
            return False
        if transport.get_write_buffer_size() + len(framed) > self._queue_bytes:
            self.abort(f"peer leaves {transport.get_write_buffer_size()} bytes unread")
            return False
        transport.write(framed)
        return True

    def allow(self, message_bytes: int) -> None:
        """Messages of the other end, and of this one, may be so long from now on."""
        self._message_bytes = message_bytes
        self._unframer.allow(message_bytes)

    def pause_reading(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    def abort(self, reason: str, *, quietly: bool = False) -> None:
        """Ends the connection at once; lost() is called soon after. quietly: the caller has said so, or will."""
        if self._transport is not None:
            _log.log(logging.DEBUG if quietly else logging.WARNING, "ipc connection aborted: %s", reason)
            self._reason = reason
            self._transport.abort()
            self._transport = None

    async def close(self) -> None:
        """Sends what is queued, if the peer reads it soon, and ends."""
        if self._transport is not None:
            self._transport.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self.abort("the peer does not read")
            await asyncio.shield(self._closed)
