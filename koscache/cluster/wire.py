"""What the daemons of a cluster say to each other on a line, and how each proves that it belongs to it.

Owns: the messages and the proofs. Does not own: what they mean (koscache.cluster.coherence), connections and frames
(koscache.cluster.lines; frames are those of koscache.ipc).

A line goes from the daemon that tells of its writes (W) to one that listens (A). W connects.

    A: Challenge(nonce a)
    W: Knock(who, to whom, nonce w, proof over both nonces)            4 KiB at most, for it is from a stranger
    A: Proven(who, proof over both nonces)
    W: Hello(what A must know before anything else)
    A: Welcome, when that is done
    W: Begin, End, Renewed, Ask, Ping           A: Ack, Renew, Resigned, Said, Pong           both: AskView, Viewed

Invariant: nothing that comes before a proof that holds is acted upon. What comes after is not signed: whoever can change what
two members say to each other in their network can do as he likes there.
"""

from __future__ import annotations

import hmac
from typing import Final

from koscache.cluster.view import Member, View
from koscache.ipc import Message

PROTOCOL: Final = 1
NONCE_BYTES: Final = 16
#: Of a Knock, and of whatever else a stranger sends.
STRANGER_BYTES_MAX: Final = 4096
#: A Hello may hold all slots that were passed without its reader: 65 536 of them, and those of writes under way.
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
QUEUE_BYTES_MAX: Final = 64 * 1024 * 1024


class Challenge(Message, frozen=True, tag=1):
    nonce: bytes


class Knock(Message, frozen=True, tag=18):
    """name: who connects. to: to whom, so that nobody can pass it on. daemon: a number of this run of its daemon, or of several
    between which everything was remembered."""

    protocol: int
    name: str
    to: str
    daemon: int
    nonce: bytes
    proof: bytes


class Proven(Message, frozen=True, tag=19):
    """The same, of who was connected to."""

    name: str
    daemon: int
    proof: bytes


class Hello(Message, frozen=True, tag=2):
    """version: of the view. block_bytes, slots: must be the reader's own. skipped: fence slots that were passed without the
    reader since this daemon runs; None: too many to say. under_way: writes that have begun and not ended, by number: their
    slots are marked from now on."""

    member: Member
    daemon: int
    version: int
    block_bytes: int
    slots: int
    skipped: tuple[int, ...] | None
    under_way: tuple[tuple[int, tuple[int, ...]], ...]


class Welcome(Message, frozen=True, tag=3):
    """What Hello said has been done."""

    version: int


class Refused(Message, frozen=True, tag=4):
    """The line ends. unknown: the one who connects is in no view here; only who has proven himself may say so."""

    reason: str
    unknown: bool = False


class Begin(Message, frozen=True, tag=5):
    number: int
    slots: tuple[int, ...]


class End(Message, frozen=True, tag=6):
    number: int


class Ack(Message, frozen=True, tag=7):
    """ended: of the End, else of the Begin. version: of the view of who acknowledges."""

    number: int
    ended: bool
    version: int


class Renew(Message, frozen=True, tag=8):
    """Wait for me from now on for a lease more."""

    serial: int


class Renewed(Message, frozen=True, tag=9):
    """All that was said before on this line holds for the lease that this renews."""

    serial: int
    version: int


class Resigned(Message, frozen=True, tag=15):
    """This daemon stops, and its node has ceased to trust: pass over it, and tell its next Welcome what it missed."""


class Ping(Message, frozen=True, tag=16):
    """So that silence means something."""


class Pong(Message, frozen=True, tag=17):
    pass


class AskView(Message, frozen=True, tag=11):
    """Yours is newer than mine."""


class Viewed(Message, frozen=True, tag=12):
    view: View


class Ask(Message, frozen=True, tag=13):
    """A question of operators: what is `topic`? body: JSON."""

    ask: int
    topic: str
    body: bytes


class Said(Message, frozen=True, tag=14):
    ask: int
    body: bytes


ToListener = Knock | Hello | Begin | End | Renewed | AskView | Viewed | Ask | Ping
ToWriter = Challenge | Proven | Welcome | Refused | Ack | Renew | Resigned | AskView | Viewed | Said | Pong


def proof(secret: bytes, kind: str, nonces: tuple[bytes, bytes], name: str, to: str, daemon: int) -> bytes:
    """kind: "knock" or "proven", so that neither can be played back as the other. nonces: of who was connected to, of who
    connects. name, daemon: of whose proof it is; to: for whom."""
    parts = (b"kos-line", str(PROTOCOL).encode(), kind.encode(), nonces[0].hex().encode(), nonces[1].hex().encode())
    text = b"\n".join((*parts, name.encode(), to.encode(), str(daemon).encode()))
    return hmac.digest(secret, text, "sha256")


def proves(
    given: bytes, secret: bytes, kind: str, nonces: tuple[bytes, bytes], name: str, to: str, daemon: int
) -> bool:
    return hmac.compare_digest(given, proof(secret, kind, nonces, name, to, daemon))
