"""One member of the cluster as a worker sees it: the connections to it, and how well it is.

Owns: opening connections, keeping idle ones, their number, backing off after failures. Does not own: which member is asked
(koscache.carrier.peers), what is said on a connection (koscache.carrier.peer_connection).

Invariant: at most `connections` are open or being opened; whoever waits for one waits for connect_timeout_s at most. A
member that failed is asked by one at a time until it has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import Final

from kos.clock import Clock
from kos.config import Cluster, split_address
from koscache.carrier.peer_connection import PeerConnection
from koscache.cluster.view import Member

#: An idle connection is closed after so long, before the other end does it (kosproxy.peering keeps them for longer).
IDLE_S: Final = 30.0
#: The first pause after a failure, and the longest.
_PAUSE_S: Final = 0.2
_PAUSE_MAX_S: Final = 5.0
#: include/uapi/linux/in.h; valid for IPv6 as well
_IP_BIND_ADDRESS_NO_PORT: Final = 24
#: So many hedges in a row that it lost without one answer count as a failure: it accepts connections and says nothing.
_LOSSES_MAX: Final = 5


class NoConnection(Exception):
    """There is none to this member, and why. busy: because we have too many."""

    def __init__(self, reason: str, *, busy: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy


class Peer:
    """See the module. All calls on the loop's thread."""

    def __init__(self, member: Member, settings: Cluster, clock: Clock, local_host: str | None) -> None:
        self.member = member
        self._settings = settings
        self._clock = clock
        self._local_host = local_host
        self._loop = asyncio.get_running_loop()
        self._idle: list[PeerConnection] = []  # the last given back is taken first
        self._open = 0  # idle, in use, or being opened
        self._waiting: deque[asyncio.Future[PeerConnection | None]] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._failures = 0
        self._losses = 0
        self._probing = False
        self._retry_at = 0.0
        self.closed = False

    # --- how well it is -------------------------------------------------------------------------------------------

    @property
    def well(self) -> bool:
        """Whether it may be asked: it has not failed lately, or it is time to try again and nobody does."""
        return not self._failures or (not self._probing and self._clock.monotonic() >= self._retry_at)

    def begin(self) -> bool:
        """A question begins. True: it is the one that finds out whether the member is well again."""
        if self._failures and not self._probing and self._clock.monotonic() >= self._retry_at:
            self._probing = True
            return True
        return False

    def answered(self) -> None:
        self._failures = self._losses = 0
        self._probing = False

    def lost(self, probe: bool) -> None:
        """Another one was faster. That says little, unless it happens every time."""
        self._losses += 1
        if probe or self._losses >= _LOSSES_MAX:
            self.failed(probe)

    def given_up(self, probe: bool) -> None:
        """The question was withdrawn."""
        if probe:
            self._probing = False

    def failed(self, probe: bool) -> None:
        """No answer. What fails while it is backed off already began before that and says nothing new."""
        now = self._clock.monotonic()
        if probe:
            self._probing = False
        elif self._failures and now < self._retry_at:
            return
        pause = min(_PAUSE_S * 2**self._failures, _PAUSE_MAX_S)
        self._failures = min(self._failures + 1, 16)
        self._losses = 0
        self._retry_at = now + self._clock.jitter(pause / 2, pause)
        self.drop_idle()  # they lead to whatever did not answer

    # --- connections ----------------------------------------------------------------------------------------------

    def take_now(self) -> PeerConnection | None:
        """An idle connection."""
        return self._idle.pop() if self._idle else None

    async def take(self, *, new: bool = False) -> PeerConnection:
        """A connection. new: one that was not used before. Raises NoConnection."""
        if self.closed:
            raise NoConnection("no member any more")
        if not new and self._idle:
            return self._idle.pop()
        if new and self._open >= self._settings.connections and self._idle:
            self._idle[0].close()
        if self._open >= self._settings.connections:
            waiting: asyncio.Future[PeerConnection | None] = self._loop.create_future()
            self._waiting.append(waiting)
            try:
                async with asyncio.timeout(self._settings.connect_timeout_s):
                    connection = await waiting
            except BaseException as error:
                self._waited_in_vain(waiting)
                if isinstance(error, TimeoutError):
                    timeout_s = self._settings.connect_timeout_s
                    raise NoConnection(f"all connections in use for {timeout_s:g} s", busy=True) from error
                raise
            if connection is not None:
                return connection  # perhaps not new: but one is better than none
        else:
            self._open += 1
        try:
            return await self._connect()
        except BaseException:
            self._one_less()
            raise

    def give(self, connection: PeerConnection, keep: bool) -> None:
        """Done with it. keep: it may be used again."""
        if not keep or self.closed or connection.closed:
            connection.close()
            return
        connection.rest()
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                connection.watch(None)
                waiting.set_result(connection)
                return
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(IDLE_S, self._sweep_idle)

    def drop_idle(self) -> None:
        for connection in list(self._idle):
            connection.close()

    def close(self) -> None:
        """It is no member any more. Bodies under way go on; their connections are closed when they are given back."""
        self.closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self.drop_idle()
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(NoConnection("no member any more"))

    def _waited_in_vain(self, waiting: asyncio.Future[PeerConnection | None]) -> None:
        """Whoever waited is gone: what it was given goes on to the next."""
        if waiting.cancelled() or not waiting.done():
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
        elif waiting.exception() is None:
            connection = waiting.result()
            if connection is None:
                self._one_less()
            else:
                self.give(connection, keep=True)

    def _one_less(self) -> None:
        """A connection is gone, or did not come about: another one may be opened."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return  # in its place
        self._open -= 1

    def _closed(self, connection: PeerConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._one_less()

    def _sweep_idle(self) -> None:
        self._sweep = None
        now = self._loop.time()
        for connection in [each for each in self._idle if now - each.idle_since >= IDLE_S]:
            connection.close()
        if self._idle:
            self._sweep = self._loop.call_at(self._idle[0].idle_since + IDLE_S, self._sweep_idle)

    async def _connect(self) -> PeerConnection:
        timeout_s = self._settings.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                sock = await self._connected()
        except TimeoutError as error:
            raise NoConnection(f"no connection within {timeout_s:g} s") from error
        except OSError as error:
            raise NoConnection(f"no connection: {error.strerror or error}") from error
        return PeerConnection(self._loop, sock, self._closed)

    async def _connected(self) -> socket.socket:
        family, address = await self._resolve(*split_address(self.member.peer))
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._local_host is not None:
                ours, source = await self._resolve(self._local_host, 0)
                if ours == family:
                    # The port is chosen when it is known where to: else all peers together have 28 000.
                    sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                    sock.bind(source)
            await self._loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _resolve(self, host: str, port: int) -> tuple[int, tuple[str, int]]:
        """Family and address; of a name that is none, by asking for it in a thread."""
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                socket.inet_pton(family, host)
                return family, (host, port)
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        return family, (str(where[0]), int(where[1]))
