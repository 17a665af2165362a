"""Clients that read and write at random through kos, and a spoiler that does what the world does.

Owns: which operation comes next (from one seed), the requests, the counting of outcomes. Does not own: the judgement
(ledger), the node's processes (tests.fakes.node), the origin (tests.fakes.origin).

Invariant: every operation ends within OPERATION_TIMEOUT_S or the run fails: nothing may hang.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from yarl import URL

from tests.fakes.node import ACCESS_KEY, SECRET_KEY
from tests.history.ledger import Ledger, Place, Read, content

OPERATION_TIMEOUT_S = 40.0
SIZES = (0, 1, 500, 9_000, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000, 400_000)


@dataclass
class Workload:
    """One run. freshness of a bucket decides whether the spoiler may overwrite in it behind kos' back."""

    s3_url: str
    origin: Any
    ledger: Ledger
    seed: int
    keys_per_bucket: int = 12
    violations: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._auth_credentials = Credentials(ACCESS_KEY, SECRET_KEY)
        self._urls: dict[tuple[str, Place], URL] = {}
        self._number = 0
        self._remaining = 0

    def places(self) -> list[Place]:
        return [(b, f"{b} key/é+{n}") for b in self.ledger.freshness_s for n in range(self.keys_per_bucket)]

    def fill(self) -> None:
        for place in self.places():
            self._commit_behind(place)

    async def run(self, operations: int, clients: int = 16) -> None:
        """Do `operations` in all; stop at the first violation."""
        self._remaining = operations
        timeout = aiohttp.ClientTimeout(total=OPERATION_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session,
            asyncio.TaskGroup() as group,
        ):
            for n in range(clients):
                group.create_task(self._client(session, random.Random(f"{self.seed} {n}")), name=f"client {n}")

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        places = self.places()
        while self._remaining > 0 and not self.violations:
            self._remaining -= 1
            # A few keys are hot, so that operations on one key overlap.
            place = places[min(int(rng.expovariate(6.0) * len(places)), len(places) - 1)]
            kind = rng.choices(
                ["get", "range", "put", "delete", "leave", "behind"], weights=[50, 25, 9, 2, 4, 10], k=1
            )[0]
            try:
                await getattr(self, f"_{kind}")(session, rng, place)
                self.outcomes[kind] += 1
            except aiohttp.ClientConnectorError:
                # No worker listens just now: that is no operation, and asking in a tight loop would only slow their start.
                self.outcomes["refused"] += 1
                self._remaining += 1
                await asyncio.sleep(0.05)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as broken:
                self.outcomes[f"{kind} broken: {type(broken).__name__}"] += 1
            except TimeoutError:
                self.violations.append(f"{kind} {place} did not end within {OPERATION_TIMEOUT_S} s")

    def _url(self, method: str, place: Place) -> URL:
        # Mostly the same URL again, as a job does that was handed a list of them; now and then a new one.
        known = self._urls.get((method, place))
        if known is not None and self.rng.random() < 0.98:
            return known
        path = f"/{place[0]}/{quote(place[1], safe='/~')}"
        request = AWSRequest(method=method, url=self.s3_url + path)
        S3SigV4QueryAuth(self._auth_credentials, "s3", "us-east-1", expires=3600).add_auth(request)
        url = self._urls[method, place] = URL(request.url, encoded=True)
        return url

    async def _get(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        await self._read(session, place, None)

    async def _range(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        start = rng.choice([0, rng.randrange(400_000), 65_500, 16_000])
        await self._read(session, place, (start, start + rng.choice([1, 100, 2_000, 70_000, 300_000])))

    async def _read(self, session: aiohttp.ClientSession, place: Place, wanted: tuple[int, int] | None) -> None:
        headers = {} if wanted is None else {"Range": f"bytes={wanted[0]}-{wanted[1] - 1}"}
        began = time.monotonic()
        async with session.get(self._url("GET", place), headers=headers) as answer:
            body = await answer.read()
            note = answer.headers.get("x-kos-cache", "")
            read = Read(place, began, time.monotonic(), answer.status, answer.headers.get("ETag"), body, wanted, note)
        self.outcomes[f"read {answer.status} {note.partition(';')[0]}"] += 1
        if answer.status == 500 and b"<Code>InternalError</Code>" in body:
            self.violations.append(f"{place} {wanted}: kos failed inside: {body!r}")
        if answer.status in (500, 502, 503, 504) or answer.status == 416:
            return
        verdict = self.ledger.violation(read)
        if verdict is not None:
            self.violations.append(
                f"seed {self.seed}: {place} {wanted}: {verdict} ({note}, status {read.status}, ETag {read.etag}, "
                f"took {read.ended - read.began:.3f} s)"
            )

    async def _put(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        body = self._next_body(place, rng)
        began = time.monotonic()
        async with session.put(self._url("PUT", place), data=body) as answer:
            await answer.read()
        self.outcomes[f"put {answer.status}"] += 1
        if answer.status == 200:
            self.ledger.acknowledge(place, answer.headers["ETag"], began)

    async def _delete(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        began = time.monotonic()
        async with session.delete(self._url("DELETE", place)) as answer:
            await answer.read()
        self.outcomes[f"delete {answer.status}"] += 1
        if answer.status == 204:
            self.ledger.acknowledge(place, None, began)

    async def _leave(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        """Read a little (or nothing) of an answer and close the connection."""
        async with session.get(self._url("GET", place)) as answer:
            if rng.random() < 0.5:
                await answer.content.read(1000)
            answer.close()

    async def _behind(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        if self.ledger.freshness_s[place[0]] != float("inf"):
            self._commit_behind(place)

    def _commit_behind(self, place: Place) -> None:
        if self.rng.random() < 0.1:
            self.origin.store.create_bucket(place[0])
            self.origin.store.remove(*place)
        else:
            self.origin.store.put(*place, self._next_body(place, self.rng))

    def _next_body(self, place: Place, rng: random.Random) -> bytes:
        self._number += 1
        size = rng.choice(SIZES)
        # Two empty versions would have one ETag; every version needs its own.
        return content(place[1], self._number, max(size, 12))
