"""Asks the daemon of this node what operators want to know of the cluster: for the admin port, in the supervisor's process.

Owns: one connection for each question, which status an answer has over HTTP. Does not own: the answers
(koscache.cluster.operations), how long they may take (kos.node.admin).

Invariant: a connection holds nothing up: what the daemon tells all who are connected is acknowledged at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from kos.config import Config
from kos.node.admin import AskCluster
from koscache import ipc
from koscache.cluster.operations import Wrong

#: What went wrong, as Operations names it, as HTTP does.
_STATUSES: Final = {Wrong.QUESTION: 400, Wrong.UNKNOWN: 404, Wrong.REFUSED: 409, Wrong.AWAY: 503, Wrong.FAILED: 500}
#: The admin port's words for the topics, where they differ.
_TOPICS: Final = {"status": "cluster"}
_ASK: Final = 1


def asker(settings: Config) -> AskCluster:
    """The answerer of /v1/cluster; never raises but for cancellation."""
    cache = settings.cache

    async def ask(topic: str, question: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        asked = _Question(ipc.AskCluster(_ASK, _TOPICS.get(topic, topic), msgspec.json.encode(question)))
        try:
            with ipc.socket_address(cache.dir) as path:
                transport, _ = await asyncio.get_running_loop().create_unix_connection(
                    lambda: ipc.Connection(lambda: asked, ipc.ToWorker, cache.ipc_message_bytes, cache.ipc_queue_bytes),
                    path,
                )
        except OSError as error:
            return 503, {"error": f"the daemon is away: {error.strerror or error}"}
        try:
            said = await asked.answer
        finally:
            transport.close()
        if said is None:
            return 503, {"error": "the daemon is away: it ended the connection"}
        if said.failed:
            return 503, {"error": said.failed}
        answer = msgspec.json.decode(said.body, type=dict[str, Any])
        wrong = answer.get("wrong")
        return (200 if wrong is None else _STATUSES[Wrong(wrong)]), answer

    return ask


class _Question:
    """The end of a connection on which one thing is asked. answer: None if the connection ends without one."""

    def __init__(self, question: ipc.AskCluster) -> None:
        self._question = question
        self.answer: asyncio.Future[ipc.ClusterSaid | None] = asyncio.get_running_loop().create_future()

    def connected(self, connection: ipc.Connection) -> None:
        connection.send(self._question)

    def received(self, connection: ipc.Connection, message: Any) -> None:
        if isinstance(message, ipc.ClusterSaid):
            self._end(message)
        elif isinstance(message, ipc.Evicted):
            # To the daemon whoever is connected may have segments open; this process has none.
            for segment in message.segments:
                connection.send(ipc.Released(segment))

    def lost(self, connection: ipc.Connection, reason: str) -> None:
        self._end(None)

    def _end(self, said: ipc.ClusterSaid | None) -> None:
        if not self.answer.done():
            self.answer.set_result(said)
