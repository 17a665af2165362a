"""What holding a body costs."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from kos import config
from kos.s3.head import RequestHead
from kos.s3.operation import parse
from kos.s3.sigv4 import Identity, Payload
from kosproxy.inbound import Inbound

SIZE = 256 * 1024


class Dripping(Inbound):
    """A body that comes two bytes at a time."""

    async def _received(self) -> AsyncIterator[bytes]:
        for n in range(0, SIZE, 2):
            yield n.to_bytes(4, "big")[1:3]


async def test_a_body_in_small_pieces_is_held_in_its_own_length() -> None:
    async def asked() -> None:
        return

    head = RequestHead("PUT", "/bucket/k", "", {"content-length": str(SIZE)})
    parts = SimpleNamespace(config=SimpleNamespace(limits=config.Limits()))
    exchange = cast(Any, SimpleNamespace(head=head, parts=parts, continue_body=asked))
    identity = Identity("key", Payload.UNSIGNED, None, "", "", "", b"", False)
    inbound = Dripping(exchange, parse(head), identity)
    tracemalloc.start()
    try:
        body = await inbound.read(SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(body) == SIZE and body[-2:] == (SIZE - 2).to_bytes(4, "big")[1:3]
    assert peak < 4 * SIZE
