"""The worker's end of the socket to the daemon: connected or not, never in the way.

Owns: the connection, its questions that wait for an answer, reconnecting with back-off and jitter, and the watch for a
daemon that is there but does not answer. Does not own: what messages mean (the receiver that it is given).

Invariant: every question is answered exactly once: by the daemon, or with None when the connection is or goes away.
So nobody ever waits for a daemon that will not answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from kos.clock import Clock
from kos.config import Cache
from kos.tasks import Tasks
from koscache import ipc

_log = logging.getLogger("koscache.carrier")

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0

#: Called with the answer, or None when the daemon is away. Runs inside the receive callback, in order of arrival.
OnReply = Callable[[Any], None]


class Receiver(Protocol):
    """Gets what the daemon says unasked."""

    def link_up(self) -> None: ...
    def link_down(self) -> None: ...
    def pushed(self, message: ipc.Message) -> None: ...


class Link:
    """caching, reason: what the daemon said last about the store; False and why while there is no daemon."""

    def __init__(self, cache: Cache, clock: Clock, tasks: Tasks, receiver: Receiver) -> None:
        self._cache = cache
        self._clock = clock
        self._tasks = tasks
        self._receiver = receiver
        self._connection: ipc.Connection | None = None
        self._lost = asyncio.Event()
        self._asking: dict[int, OnReply] = {}
        self._next = 0
        self._heard = False
        self._closed = False
        #: the daemon knows this worker, and was told what it must know first
        self.welcome = False
        self.caching = False
        self.reason = "daemon away"

    @property
    def up(self) -> bool:
        return self._connection is not None

    @property
    def waiting(self) -> int:
        """Questions without an answer so far."""
        return len(self._asking)

    async def start(self) -> None:
        """Tries once, so that a worker that starts beside a running daemon is connected; then keeps trying."""
        await self._connect()
        self._tasks.spawn(self._keep(), "link")
        self._tasks.spawn(self._watch(), "link-watch")

    async def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            await self._connection.close()

    # --- saying things --------------------------------------------------------------------------------------------

    def ask(self, make: Callable[[int], ipc.Message], on_reply: OnReply) -> None:
        """Sends make(ask number); on_reply is called later, or now with None when the daemon is away."""
        if self._connection is None:
            on_reply(None)
            return
        self._next += 1
        number = self._next
        self._asking[number] = on_reply
        if not self._connection.send(make(number)) and self._asking.pop(number, None) is not None:
            on_reply(None)

    async def answer(self, make: Callable[[int], ipc.Message]) -> Any:
        """As ask(), for who can wait."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def reply(message: Any) -> None:
            if not future.done():
                future.set_result(message)

        self.ask(make, reply)
        return await future

    def tell(self, message: ipc.Message) -> bool:
        """One way. False: nobody heard it."""
        return self._connection is not None and self._connection.send(message)

    # --- ipc.Peer -------------------------------------------------------------------------------------------------

    def connected(self, connection: ipc.Connection) -> None:
        self._connection = connection
        self._lost.clear()
        connection.send(ipc.Hello(os.getpid()))

    def received(self, connection: ipc.Connection, message: Any) -> None:
        self._heard = True
        ask = getattr(message, "ask", None)
        if ask is not None:
            on_reply = self._asking.pop(ask, None)
            if on_reply is not None:
                on_reply(message)
        elif isinstance(message, ipc.Welcome):
            self.caching, self.reason = message.caching, message.reason
            self._receiver.link_up()
            self.welcome = True
        elif isinstance(message, ipc.Caching):
            self.caching, self.reason = message.on, message.reason
        else:
            self._receiver.pushed(message)

    def lost(self, connection: ipc.Connection, reason: str) -> None:
        self._connection = None
        self.welcome = False
        self.caching, self.reason = False, "daemon away"
        self._lost.set()
        if not self._closed:
            _log.warning("daemon away: %s", reason)
        asking, self._asking = self._asking, {}
        for on_reply in asking.values():
            on_reply(None)
        self._receiver.link_down()

    # --- tasks ----------------------------------------------------------------------------------------------------

    async def _connect(self) -> bool:
        cache = self._cache
        loop = asyncio.get_running_loop()

        def connection() -> ipc.Connection:
            return ipc.Connection(lambda: self, ipc.ToWorker, cache.ipc_message_bytes, cache.ipc_queue_bytes)

        try:
            with ipc.socket_address(cache.dir) as path:
                async with asyncio.timeout(cache.ipc_timeout_s):
                    await loop.create_unix_connection(connection, path)
        except (OSError, TimeoutError) as error:
            _log.debug("no daemon in %s: %s", cache.dir, error)
            return False
        return True

    async def _keep(self) -> None:
        """Reconnects for ever. Jitter, so that the workers of a node do not come back in step."""
        pause = _BACKOFF_FIRST_S
        while True:
            if self._connection is not None:
                await self._lost.wait()
                pause = _BACKOFF_FIRST_S
            await self._clock.sleep(self._clock.jitter(pause / 2, pause))
            if not await self._connect():
                pause = min(2 * pause, _BACKOFF_MAX_S)

    async def _watch(self) -> None:
        """A daemon that owes answers and says nothing for ipc_timeout, though asked, is as good as away."""
        while True:
            self._heard = False
            await self._clock.sleep(self._cache.ipc_timeout_s / 2)
            if self._heard or not self._asking or self._connection is None:
                continue
            self.ask(lambda ask: ipc.Ping(ask), lambda _: None)
            await self._clock.sleep(self._cache.ipc_timeout_s / 2)
            if not self._heard and self._asking and self._connection is not None:
                self._connection.abort("daemon does not answer")
