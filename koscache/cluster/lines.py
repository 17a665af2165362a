"""The connections between the daemons of a cluster: made, proven, watched, and made again.

Owns: a line to every member that is wanted, the listening side, the handshake with its proofs, pings, the end of a line on which
nothing is heard. Does not own: what is said on them (hub, coherence).

Invariant: whoever is spoken to has proven that he knows the cluster's secret. On one line everything is heard in the order
in which it was said, or the line is lost and says so, once.

    out: connect ─Challenge─▶ Knock ─Proven─▶ Hello, stands ─┐     in: accept, Challenge ─Knock─▶ Proven ─Hello─▶ stands ─┐
          ▲                                                  │lost                                                        │lost
          └──────────────── a pause, doubling ◀──────────────┘                                               (forgotten) ◀┘
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any, Final, Protocol

from kos import config
from kos.clock import Clock
from kos.log import Seldom
from kos.tasks import Tasks, TasksClosed
from koscache.cluster import wire
from koscache.cluster.coherence import Greeting, ProtocolBroken
from koscache.cluster.view import Member
from koscache.fence import SLOTS
from koscache.ipc import Connection, Message

_log: Final = logging.getLogger("koscache.cluster")

#: From connecting to both proofs: two round trips.
_HANDSHAKE_S: Final = 5.0
_PAUSE_FIRST_S: Final = 0.05
_PAUSE_MAX_S: Final = 1.0
#: Nothing heard for so many pings: the line is given up. What is only slow answers within two.
_SILENT_PINGS: Final = 3
#: Of a reason that another gives, in our log.
_REASON_MAX: Final = 200
#: Strangers that have connected and not proven anything yet.
_UNPROVEN_MAX: Final = 256


class Talk(Protocol):
    """What is made of what is heard. ProtocolBroken ends the line."""

    @property
    def me(self) -> Member: ...
    @property
    def daemon(self) -> int: ...
    def greet(self, name: str) -> Greeting: ...
    def told(self, name: str, message: Any) -> None: ...
    def lost(self, name: str, reason: str) -> None: ...
    def refused(self, name: str, reason: str) -> None: ...
    def known(self, name: str) -> bool: ...
    def hello(self, hello: wire.Hello) -> None: ...
    def listening(self, name: str) -> None: ...
    def heard(self, name: str, message: Any) -> None: ...
    def left(self, name: str, reason: str) -> None: ...


class _Out:
    """A line of ours, from the connection to its end."""

    def __init__(self, lines: Lines, member: Member) -> None:
        self._lines = lines
        self.member = member
        self.connection: Connection | None = None
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.greeted_at = 0.0
        self._nonces: tuple[bytes, bytes] | None = None
        self.heard_at = lines.clock.monotonic()

    @property
    def stands(self) -> bool:
        return self.greeted.done()

    def connected(self, connection: Connection) -> None:
        self.connection = connection

    def received(self, connection: Connection, message: Any) -> None:
        self.heard_at = self._lines.clock.monotonic()
        try:
            self._received(connection, message)
        except ProtocolBroken as broken:
            connection.abort(str(broken))

    def _received(self, connection: Connection, message: Any) -> None:
        talk, name = self._lines.talk, self.member.name
        if isinstance(message, wire.Pong):
            return
        if isinstance(message, wire.Refused):
            reason = message.reason[:_REASON_MAX]
            if message.unknown and self.stands:
                talk.refused(name, reason)
            raise ProtocolBroken(f"it refuses this node: {reason}")
        if self.stands:
            talk.told(name, message)
        elif isinstance(message, wire.Challenge) and self._nonces is None:
            self._knock(connection, message)
        elif isinstance(message, wire.Proven) and self._nonces is not None:
            self._greet(connection, message, self._nonces)
        else:
            raise ProtocolBroken(f"{type(message).__name__} before its time")

    def _knock(self, connection: Connection, challenge: wire.Challenge) -> None:
        talk, to = self._lines.talk, self.member.name
        self._nonces = nonces = challenge.nonce, os.urandom(wire.NONCE_BYTES)
        me, daemon = talk.me.name, talk.daemon
        proof = wire.proof(self._lines.secret, "knock", nonces, me, to, daemon)
        connection.send(wire.Knock(wire.PROTOCOL, me, to, daemon, nonces[1], proof))

    def _greet(self, connection: Connection, proven: wire.Proven, nonces: tuple[bytes, bytes]) -> None:
        lines, talk, name = self._lines, self._lines.talk, self.member.name
        if proven.name != name:
            raise ProtocolBroken(f"it calls itself {proven.name}")
        if not wire.proves(proven.proof, lines.secret, "proven", nonces, name, talk.me.name, proven.daemon):
            raise ProtocolBroken("its proof is wrong: is cluster.secret the same on both?")
        connection.allow(wire.MESSAGE_BYTES_MAX)
        greeting = talk.greet(name)
        self.greeted.set_result(None)
        self.greeted_at = lines.clock.monotonic()
        connection.send(
            wire.Hello(
                talk.me, talk.daemon, greeting.version, lines.block_bytes, SLOTS, greeting.skipped, greeting.under_way
            )
        )

    def lost(self, connection: Connection, reason: str) -> None:
        self.connection = None
        if self.stands:
            self._lines.talk.lost(self.member.name, reason)
        if not self.ended.done():
            self.ended.set_result(reason)


class _In:
    """A line of a member's. name: of who has proven himself; said: he has said Hello."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.name: str | None = None
        self.said = False
        self.connection: Connection | None = None
        self._over = False
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._daemon = 0
        self.since = self.heard_at = lines.clock.monotonic()

    def connected(self, connection: Connection) -> None:
        self.connection = connection
        self._lines.arrived(self)
        connection.send(wire.Challenge(self._nonce))

    def received(self, connection: Connection, message: Any) -> None:
        if self._over:
            return  # of the same packet
        self.heard_at = self._lines.clock.monotonic()
        try:
            if isinstance(message, wire.Ping):
                connection.send(wire.Pong())
            elif self.name is not None and self.said:
                self._lines.talk.heard(self.name, message)
            elif self.name is not None and isinstance(message, wire.Hello):
                self._hello(message, self.name)
            elif self.name is None and isinstance(message, wire.Knock):
                self._knock(connection, message)
            else:
                raise ProtocolBroken(f"{type(message).__name__} before its time")
        except ProtocolBroken as broken:
            self._refuse(connection, str(broken))

    def _refuse(self, connection: Connection, reason: str, *, unknown: bool = False) -> None:
        """Nothing is heard on it any more; it ends when this has been read, or soon."""
        self._over = True
        connection.pause_reading()
        connection.send(wire.Refused(reason, unknown=unknown))
        self._lines.end_later(connection, reason)

    def _knock(self, connection: Connection, knock: wire.Knock) -> None:
        lines, me = self._lines, self._lines.talk.me.name
        nonces = self._nonce, knock.nonce
        if knock.protocol != wire.PROTOCOL:
            raise ProtocolBroken(f"protocol {knock.protocol}, here {wire.PROTOCOL}: upgrade one after the other")
        if knock.to != me or not wire.proves(knock.proof, lines.secret, "knock", nonces, knock.name, me, knock.daemon):
            raise ProtocolBroken("the proof is wrong: is cluster.secret the same on both?")
        known = lines.talk.known(knock.name)
        daemon = lines.talk.daemon
        proof = wire.proof(lines.secret, "proven", nonces, me, knock.name, daemon)
        connection.send(wire.Proven(me, daemon, proof))
        if not known:
            self._refuse(connection, f"no member is called {knock.name} here", unknown=True)
            return
        self.name, self._daemon = knock.name, knock.daemon
        connection.allow(wire.MESSAGE_BYTES_MAX)

    def _hello(self, hello: wire.Hello, name: str) -> None:
        lines, talk = self._lines, self._lines.talk
        if (hello.member.name, hello.daemon) != (name, self._daemon):
            raise ProtocolBroken("it says Hello for somebody else")
        if (hello.block_bytes, hello.slots) != (lines.block_bytes, SLOTS):
            raise ProtocolBroken(f"cache.block_size is {hello.block_bytes} there and {lines.block_bytes} here")
        before = lines.ins.get(name)
        if before is not None and before.connection is not None:
            before.connection.abort("it has begun a new line")
        # From here on what we reply to the member goes this way; should it not be let in, nobody is replied to.
        lines.proven(self)
        try:
            talk.hello(hello)
        except BaseException:
            del lines.ins[name]
            raise
        self.said = True
        talk.listening(name)

    def lost(self, connection: Connection, reason: str) -> None:
        self.connection = None
        self._lines.gone(self, reason)


class Lines:
    """All lines of one daemon. secret: the cluster's. local_host: what outgoing connections are bound to; None: anything."""

    def __init__(
        self,
        talk: Talk,
        secret: bytes,
        *,
        block_bytes: int,
        ping_s: float,
        connect_timeout_s: float,
        local_host: str | None,
        clock: Clock,
        tasks: Tasks,
    ) -> None:
        self.talk = talk
        self.secret = secret
        self.block_bytes = block_bytes
        self.clock = clock
        self._ping_s = ping_s
        self._connect_timeout_s = connect_timeout_s
        self._local = None if local_host is None else (local_host, 0)
        self._tasks = tasks
        self._outs: dict[str, _Out] = {}
        self._keeping: dict[str, tuple[Member, asyncio.Task[None]]] = {}
        self.ins: dict[str, _In] = {}
        self._unproven: dict[_In, None] = {}
        self._refusals = Seldom(clock)
        self._server: asyncio.Server | None = None
        self._closed = False

    async def start(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self._connection(_In(self), wire.ToListener), sock=listening)
        self._tasks.spawn(self._watch(), "lines")

    async def close(self) -> None:
        """What is queued is sent, if it is read soon."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for _, task in self._keeping.values():
            task.cancel()
        every: list[_Out | _In] = [*self._outs.values(), *self.ins.values(), *self._unproven]
        await asyncio.gather(*(line.connection.close() for line in every if line.connection is not None))

    def _connection(self, peer: _In | _Out, heard: object) -> Connection:
        return Connection(lambda: peer, heard, wire.STRANGER_BYTES_MAX, wire.QUEUE_BYTES_MAX)

    # --- saying things --------------------------------------------------------------------------------------------------

    def tell(self, name: str, message: Message) -> bool:
        """On our line to the member. False: there is none."""
        out = self._outs.get(name)
        return out is not None and out.stands and out.connection is not None and out.connection.send(message)

    def reply(self, name: str, message: Message) -> bool:
        """On the member's line to us."""
        inn = self.ins.get(name)
        return inn is not None and inn.connection is not None and inn.connection.send(message)

    def end_later(self, connection: Connection, reason: str) -> None:
        """Ends it when what was sent is read, or soon."""
        self._say_refused(reason)
        with contextlib.suppress(TasksClosed):
            self._tasks.spawn(connection.close(), "refused")

    def _say_refused(self, reason: str) -> None:
        if (left_out := self._refusals.left_out()) is not None:
            _log.warning("line refused", extra={"reason": reason, "more": left_out})

    # --- lines of ours --------------------------------------------------------------------------------------------------

    def follow(self, wanted: Mapping[str, Member]) -> None:
        """To these members, and no others, lines are to stand."""
        for name, (member, task) in list(self._keeping.items()):
            now = wanted.get(name)
            if now is None or (now.cluster, now.incarnation) != (member.cluster, member.incarnation):
                del self._keeping[name]
                task.cancel()
                self.cut(name, "no member any more" if now is None else "it has moved")
        if self._closed:
            return
        for name, member in wanted.items():
            if name not in self._keeping:
                self._keeping[name] = member, self._tasks.spawn(self._keep(member), f"line to {name}")

    def cut(self, name: str, reason: str) -> None:
        """Ends the lines to and from the member."""
        for line in (self._outs.get(name), self.ins.get(name)):
            if line is not None and line.connection is not None:
                line.connection.abort(reason)

    def restart(self, name: str) -> None:
        """Ends our line to the member, so that a new one begins with a new Hello."""
        out = self._outs.get(name)
        if out is not None and out.connection is not None:
            out.connection.abort("to say Hello anew")

    async def _keep(self, member: Member) -> None:
        pause_s = _PAUSE_FIRST_S
        said = ""
        while True:
            out = _Out(self, member)
            self._outs[member.name] = out
            try:
                reason = await self._run(out)
            finally:
                if out.connection is not None and not self._closed:
                    out.connection.abort("given up")
                if self._outs.get(member.name) is out:
                    del self._outs[member.name]
            if out.stands and self.clock.monotonic() - out.greeted_at > pause_s:
                pause_s = _PAUSE_FIRST_S  # else it was greeted and turned away at once, and will be again
            if reason != said:
                _log.warning("no line to a member", extra={"member": member.name, "reason": reason})
                said = "" if out.stands else reason
            await self.clock.sleep(self.clock.jitter(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    async def _run(self, out: _Out) -> str:
        """Connects, and stays until the line is lost. Why it was."""
        loop = asyncio.get_running_loop()
        try:
            host, port = config.split_address(out.member.cluster)
            async with asyncio.timeout(self._connect_timeout_s):
                await loop.create_connection(
                    lambda: self._connection(out, wire.ToWriter), host, port, local_addr=self._local
                )
        except (OSError, TimeoutError, ValueError) as error:
            return f"{out.member.cluster}: {error or 'no answer'}"
        await asyncio.wait((out.greeted, out.ended), timeout=_HANDSHAKE_S, return_when=asyncio.FIRST_COMPLETED)
        if not out.stands and not out.ended.done():
            return "no proof in time"
        if out.stands:
            _log.info("line to a member stands", extra={"member": out.member.name})
        return await asyncio.shield(out.ended)

    # --- lines of others ------------------------------------------------------------------------------------------------

    def arrived(self, line: _In) -> None:
        """Of strangers the one that came first goes when there are too many: a member proves itself within moments."""
        if len(self._unproven) >= _UNPROVEN_MAX:
            # Not one that has shown a proof already, if there is any other.
            first = next((each for each in self._unproven if each.name is None), next(iter(self._unproven)))
            del self._unproven[first]
            if first.connection is not None:
                self._say_refused("too many strangers at a time")
                first.connection.abort("too many strangers at a time", quietly=True)
        self._unproven[line] = None

    def proven(self, line: _In) -> None:
        self._unproven.pop(line, None)
        assert line.name is not None
        self.ins[line.name] = line

    def gone(self, line: _In, reason: str) -> None:
        self._unproven.pop(line, None)
        if line.name is not None and self.ins.get(line.name) is line:
            del self.ins[line.name]
            if line.said:
                self.talk.left(line.name, reason)

    # --- silence --------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Pings, and ends lines on which nothing is heard. A process that was stopped itself hears everybody out first."""
        looked_at = self.clock.monotonic()
        while True:
            await self.clock.sleep(self._ping_s)
            now = self.clock.monotonic()
            slept = now - looked_at > 2 * self._ping_s
            looked_at = now
            for name, out in list(self._outs.items()):
                if out.stands and out.connection is not None:
                    self._look(out, now, slept, name)
                    self.tell(name, wire.Ping())
            for name, inn in list(self.ins.items()):
                self._look(inn, now, slept, name)
            for stranger in list(self._unproven):
                if now - stranger.since > _HANDSHAKE_S and stranger.connection is not None:
                    self._say_refused("no proof in time")
                    stranger.connection.abort("no proof in time", quietly=True)

    def _look(self, line: _In | _Out, now: float, slept: bool, name: str) -> None:
        if slept:
            line.heard_at = now
        elif now - line.heard_at > _SILENT_PINGS * self._ping_s and line.connection is not None:
            _log.warning("member is silent", extra={"member": name, "for_s": round(now - line.heard_at, 1)})
            line.connection.abort("silent")
