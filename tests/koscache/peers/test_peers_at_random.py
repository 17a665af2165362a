"""Many questions at once to members that do whatever they like; some questions are withdrawn. Whatever happens: right bytes or
a reason, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from kos.errors import OriginBroken
from koscache.carrier import peer_wire as wire
from koscache.carrier.peers import Peers, PeerUnavailable
from tests.conditions import until
from tests.fakes.peer import Behaviour, FakePeer, block, hangs, head, peers_of, says, sends

BODY = random.Random(8).randbytes(300_000)
NOT_HERE = wire.encode(wire.not_here("no"))


def behaviour(chance: random.Random) -> Behaviour:
    cut = chance.randrange(len(BODY))
    return chance.choice(
        [
            *[says(BODY)] * 8,
            *[says(NOT_HERE, 404)] * 2,
            says(BODY, 200, "Connection: close"),
            says(NOT_HERE, 503),
            sends(b""),
            sends(b"HTTP/1.1 200"),
            sends(b"garbage\r\n\r\n", close=False),
            sends(head(len(BODY)) + BODY[:cut]),
            sends(head(len(BODY)) + BODY + b"more", close=False),
            hangs(),
            hangs(head(len(BODY)) + BODY[:cut]),
        ]
    )


class Whimsical(FakePeer):
    """Chooses anew for every question."""

    def __init__(self, name: str, chance: random.Random) -> None:
        super().__init__(name)
        self._chance = chance

    @property
    def default(self) -> Behaviour:
        return behaviour(self._chance)

    @default.setter
    def default(self, _: Behaviour) -> None:
        """It has none."""


async def once(peers: Peers, chance: random.Random, names: list[str]) -> str:
    """One question and its body, taken in one of the ways; what came of it."""
    members = chance.sample(names, chance.randint(1, len(names)))
    try:
        response = await peers.ask(members, wire.BLOCK, block(len(BODY)), hedge=chance.random() < 0.8)
    except PeerUnavailable:
        return "unavailable"
    try:
        if response.status != 200:
            return "declined"
        way = chance.randrange(4)
        if way == 0:
            assert await response.read(len(BODY)) == BODY
        elif way == 1:
            got = b"".join([piece async for piece in response.pieces()])
            assert got == BODY
        elif way == 2:
            got = b""
            while len(got) < len(BODY):
                got += await response.receive(chance.randint(1, 100_000))
            assert got == BODY
        else:
            await response.receive(10)
            return "left"
        return "whole"
    except OriginBroken:
        return "broken"
    finally:
        response.release()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_members_do(seed: int) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    results: Counter[str] = Counter()
    settings = {"connections": 4, "read_timeout_s": 0.1, "connect_timeout_s": 0.5, "hedge_least_s": 0.002}
    async with (
        Whimsical("a", chance) as a,
        Whimsical("b", chance) as b,
        Whimsical("c", chance) as c,
        peers_of(a, b, c, hedges=50, hedge_most_s=0.02, **settings) as peers,
    ):
        members = (a, b, c)

        async def client() -> None:
            for _ in range(20):
                asking = asyncio.ensure_future(once(peers, chance, ["a", "b", "c"]))
                if chance.random() < 0.2:
                    await asyncio.wait([asking], timeout=chance.random() * 0.02)
                    asking.cancel()
                await asyncio.wait([asking])
                results["cancelled" if asking.cancelled() else asking.result()] += 1

        cutting = asyncio.ensure_future(cut_now_and_then(chance, members))
        await asyncio.gather(*[client() for _ in range(12)])
        cutting.cancel()
        assert results["whole"] > 20, results
        assert not peers._asker.running
        for member in members:
            peer = peers._peers[member.name]
            await until(lambda: peer._open == len(peer._idle))  # noqa: B023
            assert not peer._waiting and peer._open <= 4
            await until(lambda: member.open == len(peer._idle))  # noqa: B023
    print(dict(results))


async def cut_now_and_then(chance: random.Random, members: tuple[FakePeer, ...]) -> None:
    while True:
        await asyncio.sleep(chance.random() * 0.1)
        chance.choice(members).cut()
