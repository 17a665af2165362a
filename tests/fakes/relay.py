"""A process of TCP relays between named places, whose links can be cut, frozen, delayed and throttled while they run.

Owns: the relays' process (`python -m tests.fakes.relay --control FD`) and Relays, which starts, commands and ends it. Does
not own: which places there are and what their names mean (tests.fakes.network).

A relay listens at an address and passes every connection on to one target. Whose connection it is, the source, is told
by the address that it comes from, or fixed for the relay. A link is a pair (source, target) and has a state:

    open     bytes pass; delay_s and bytes_per_s hold for each direction, the rate for all its connections together
    refused  its connections are reset, and so is every new one
    silent   nothing passes and nobody is told: connections freeze as they are, new ones are accepted and lead nowhere. When
             the link opens again they go on, as TCP does when a cable is plugged in again

Commands and answers are JSON, one on a line, over a socket pair whose other end is the test's; when that closes, the
process ends.

Invariant: a direction holds at most HELD_BYTES_MAX besides what the kernel's buffers hold: who sends faster than the
link carries is held back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, cast

HELD_BYTES_MAX: Final = 4 << 20
CONNECT_TIMEOUT_S: Final = 10.0
COMMAND_TIMEOUT_S: Final = 20.0
COMMAND_BYTES_MAX: Final = 1 << 20

#: HOST and PORT, the path of a unix socket, or several of the first kind: whichever lets a connection in, in turn.
Target = tuple[str, int] | str | list[tuple[str, int]]


class Link:
    """All connections from one source to one target. clear: nothing is in the way, so bytes pass as they come."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self.pairs: set[Pair] = set()
        self.bytes_passed = 0
        self.set("open", 0.0, math.inf)

    def set(self, state: str, delay_s: float, bytes_per_s: float) -> None:
        assert state in ("open", "refused", "silent"), state
        self.state, self.delay_s, self.bytes_per_s = state, delay_s, bytes_per_s
        self.clear = state == "open" and not delay_s and math.isinf(bytes_per_s)
        self.free_at = {True: 0.0, False: 0.0}
        for pair in list(self.pairs):
            pair.changed()

    def due(self, upwards: bool, count: int, now: float) -> float:
        """When the last of these bytes comes out at the other end."""
        self.free_at[upwards] = max(self.free_at[upwards], now) + count / self.bytes_per_s
        return self.free_at[upwards] + self.delay_s


class Way(asyncio.Protocol):
    """One end of a relayed connection, and the direction that begins there: what it reads comes out at `other`."""

    def __init__(self, pair: Pair, upwards: bool) -> None:
        self.pair, self.upwards = pair, upwards
        self.transport: asyncio.Transport | None = None
        self.other: Way | None = None
        #: (due, bytes), b"" at the end of the stream
        self._line: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stops: set[str] = set()
        #: the end of the stream has come out at the other end
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._stops:
            self.transport.pause_reading()
        if self.upwards:
            self.pair.accepted(self.transport)

    def data_received(self, data: bytes) -> None:
        link = self.pair.link
        assert link is not None
        link.bytes_passed += len(data)
        if link.clear and not self._line:
            self._deliver(data)
            return
        now = self.pair.relays.loop.time()
        self._line.append((link.due(self.upwards, len(data), now), data))
        self._held += len(data)
        if self._held >= HELD_BYTES_MAX:
            self.stop("full")
        self.pump()

    def eof_received(self) -> bool:
        link = self.pair.link
        assert link is not None
        self._line.append((link.due(self.upwards, 0, self.pair.relays.loop.time()), b""))
        self.pump()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.pair.lost()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.stop("taker")

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.go("taker")

    def stop(self, why: str) -> None:
        """Read no more until go(why)."""
        if not self._stops and self.transport is not None:
            self.transport.pause_reading()
        self._stops.add(why)

    def go(self, why: str) -> None:
        had = bool(self._stops)
        self._stops.discard(why)
        if had and not self._stops and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def pump(self) -> None:
        """Deliver what is due, and see to it that the rest will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        link = self.pair.link
        if link is None or link.state != "open":
            return
        loop = self.pair.relays.loop
        while self._line and (link.clear or self._line[0][0] <= loop.time()):
            _, data = self._line.popleft()
            self._held -= len(data)
            self._deliver(data)
        if self._held < HELD_BYTES_MAX:
            self.go("full")
        if self._line:
            self._timer = loop.call_at(self._line[0][0], self.pump)

    @property
    def delivered(self) -> bool:
        return not self._line

    def _deliver(self, data: bytes) -> None:
        transport = None if self.other is None else self.other.transport
        if transport is None or transport.is_closing():
            return
        if data:
            transport.write(data)
        else:
            with contextlib.suppress(OSError):  # it was reset, and its end is not told yet
                transport.write_eof()
            self.ended = True
            self.pair.ended()
        if not self._line and self.transport is None:
            self.pair.lost()

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            sock = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it is closed already
                # Closing with a linger time of zero sends a reset.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.transport.abort()


class Pair:
    """One relayed connection: both its ends."""

    def __init__(self, relays: _Process, relay: _Relay) -> None:
        self.relays, self.relay = relays, relay
        self.link: Link | None = None
        self.up = Way(self, True)
        self.down: Way | None = None
        self._dialling: asyncio.Task[None] | None = None
        self.up.stop("no target yet")

    def accepted(self, transport: asyncio.Transport) -> None:
        source = self.relay.source
        if source is None:
            source = self.relays.sources.get(transport.get_extra_info("peername")[0], "")
        self.link = self.relays.link(source, self.relay.target)
        self.link.pairs.add(self)
        self.changed()

    def changed(self) -> None:
        """The link's state is another one now."""
        assert self.link is not None
        ways = [way for way in (self.up, self.down) if way is not None]
        if self.link.state == "refused":
            self._abort()
        elif self.link.state == "silent":
            for way in ways:
                way.stop("silent")
        else:
            if self.down is None and self._dialling is None:
                self._dialling = self.relays.loop.create_task(self._dial())
            for way in ways:
                way.go("silent")
                way.pump()
            self.lost()

    async def _dial(self) -> None:
        loop, to = self.relays.loop, self.relay.to
        down = Way(self, False)
        down.other, self.up.other = self.up, down
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if isinstance(to, str):
                    await loop.create_unix_connection(lambda: down, to)
                else:
                    await self._dial_one_of(down, [to] if isinstance(to, tuple) else to)
        except (OSError, TimeoutError):
            self._abort()
            return
        self.down = down
        if self.up.transport is None:
            self._abort()
        elif self.link is not None and self.link.state == "silent":
            down.stop("silent")
        self.up.go("no target yet")

    async def _dial_one_of(self, down: Way, targets: list[tuple[str, int]]) -> None:
        for left in reversed(range(len(targets))):
            self.relay.turn += 1
            try:
                await self.relays.loop.create_connection(lambda: down, *targets[self.relay.turn % len(targets)])
                return
            except ConnectionRefusedError:
                if not left:
                    raise

    def lost(self) -> None:
        """An end is gone: so goes the other, once it was given what was on its way; not over a link that is silent."""
        if self.link is None or self.link.state == "silent":
            return
        if self.up.transport is None and self.down is None and self._dialling is None:
            self._forget()
            return
        if self.down is None or (self.up.transport is not None and self.down.transport is not None):
            return
        gone, left = (self.up, self.down) if self.up.transport is None else (self.down, self.up)
        if left.transport is not None and gone.delivered:
            left.transport.close()
        if self.up.transport is None and self.down.transport is None:
            self._forget()

    def ended(self) -> None:
        """One direction is through; with both nothing more will come, and what was written is sent before it closes."""
        if self.down is not None and self.up.ended and self.down.ended:
            for way in (self.up, self.down):
                if way.transport is not None:
                    way.transport.close()

    def _abort(self) -> None:
        if self._dialling is not None and self._dialling is not asyncio.current_task():
            self._dialling.cancel()
        self.up.abort()
        if self.down is not None:
            self.down.abort()
        elif self.up.other is not None:
            self.up.other.abort()
        self._forget()

    def _forget(self) -> None:
        if self.link is not None:
            self.link.pairs.discard(self)


class _Relay:
    """One listening address. source: of all who connect there; None: told by their address."""

    def __init__(self, target: str, to: Target, source: str | None) -> None:
        self.target, self.to, self.source = target, to, source
        self.turn = 0


class _Process:
    """The process of relays: its links, and what it is told."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sources: dict[str, str] = {}
        self._links: dict[tuple[str, str], Link] = {}

    def link(self, source: str, target: str) -> Link:
        if (source, target) not in self._links:
            self._links[source, target] = Link(source, target)
        return self._links[source, target]

    async def serve(self, control: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=control, limit=COMMAND_BYTES_MAX)
        while line := await reader.readline():
            try:
                answer = await self._do(**json.loads(line))
            except OSError as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _do(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "listen":
            return await self._listen(**arguments)
        if do == "source":
            self.sources[arguments["host"]] = arguments["name"]
            return {}
        if do == "link":
            rate = arguments["bytes_per_s"]
            link = self.link(arguments["source"], arguments["target"])
            link.set(arguments["state"], arguments["delay_s"], math.inf if rate is None else rate)
            return {}
        assert do == "count", do
        return {"links": [[e.source, e.target, len(e.pairs), e.bytes_passed] for e in self._links.values()]}

    async def _listen(self, host: str, port: int, target: str, to: Any, source: str | None) -> dict[str, Any]:
        if isinstance(to, list):
            to = (to[0], to[1]) if isinstance(to[0], str) else [(at[0], at[1]) for at in to]
        relay = _Relay(target, to, source)
        server = await self.loop.create_server(lambda: Pair(self, relay).up, host, port, backlog=1024)
        return {"port": server.sockets[0].getsockname()[1]}


class Relays:
    """The process from the test's side. All methods may be called from any thread; each waits at most COMMAND_TIMEOUT_S."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._answers = control.makefile("rb")
        self._lock = threading.Lock()

    def listen(self, host: str, port: int, target: str, to: Target, source: str | None = None) -> int:
        """Relay from this address to `to`, which is the place named target; the port (of a free one, for port 0)."""
        return int(self._ask(do="listen", host=host, port=port, target=target, to=to, source=source)["port"])

    def name_source(self, host: str, name: str) -> None:
        """Whoever connects from this address is the place of this name."""
        self._ask(do="source", host=host, name=name)

    def set_link(
        self, source: str, target: str, state: str, *, delay_s: float = 0.0, bytes_per_s: float | None = None
    ) -> None:
        """See the module's docstring for the states. bytes_per_s: None for as fast as it goes."""
        self._ask(do="link", source=source, target=target, state=state, delay_s=delay_s, bytes_per_s=bytes_per_s)

    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Of each link that was ever used or set: (open connections, bytes that passed both ways)."""
        return {(source, target): (open_, count) for source, target, open_, count in self._ask(do="count")["links"]}

    def _ask(self, **command: Any) -> dict[str, Any]:
        with self._lock:
            self._control.sendall(json.dumps(command).encode() + b"\n")
            line = self._answers.readline()
        assert line, "the process of relays has ended"
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer


@contextlib.contextmanager
def relays() -> Iterator[Relays]:
    """A process of relays; it is gone when the block is left."""
    ours, theirs = socket.socketpair()
    ours.settimeout(COMMAND_TIMEOUT_S)
    with ours:
        with theirs:
            command = [sys.executable, "-m", "tests.fakes.relay", "--control", str(theirs.fileno())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        try:
            yield Relays(ours)
        finally:
            ours.close()
            process.kill()
            process.wait()


async def _serve(fd: int) -> None:
    await _Process().serve(socket.socket(fileno=fd))


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.relay")
    parser.add_argument("--control", type=int, required=True, metavar="FD")
    asyncio.run(_serve(parser.parse_args().control))
    os._exit(0)  # the test is gone: nothing is worth closing


if __name__ == "__main__":
    main()
