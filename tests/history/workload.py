"""Clients that read and write at random through kos, each time through any of its nodes.

Owns: which operation comes next and through which node (from one seed), the requests, the counting of outcomes. Does not
own: the judgement (ledger), the nodes' processes (tests.fakes.node, tests.fakes.cluster), the origin (tests.fakes.origin),
what goes wrong meanwhile (the tests).

Invariant: every operation ends within OPERATION_TIMEOUT_S or the run fails: nothing may hang.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import re
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote_plus, urlencode
from xml.sax.saxutils import escape

import aiohttp
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from yarl import URL

from tests.fakes.node import ACCESS_KEY, SECRET_KEY
from tests.history.ledger import Ledger, Place, Read, content

OPERATION_TIMEOUT_S = 40.0
#: How often an operation is chosen. behind: a write around kos.
WEIGHTS = {"get": 50, "range": 25, "put": 9, "delete": 2, "leave": 4, "behind": 10}
#: The same, with everything that changes an object and with listings.
ALL_WEIGHTS = {**WEIGHTS, "multipart": 3, "copy": 3, "delete_many": 1, "listing": 6}
_CHANGES = ("put", "delete", "multipart", "copy", "delete_many")
SIZES = (0, 1, 500, 9_000, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000, 400_000)


@dataclass
class Workload:
    """One run. s3_urls: of the nodes, when it runs. freshness of a bucket decides whether it may be overwritten in behind
    kos' back. read_everywhere: each write is followed at once by a read through every node."""

    s3_urls: list[str]
    origin: Any
    ledger: Ledger
    seed: int
    keys_per_bucket: int = 12
    weights: dict[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    read_everywhere: bool = False
    violations: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    #: the first few answers with 5xx, in words
    refusals: list[str] = field(default_factory=list)
    #: the longest operation of each kind, in seconds
    longest: dict[str, float] = field(default_factory=dict)
    #: operations that came to an end, whatever the answer
    done: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._auth_credentials = Credentials(ACCESS_KEY, SECRET_KEY)
        self._urls: dict[tuple[str, ...], URL] = {}
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
        async with _session() as session, asyncio.TaskGroup() as group:
            for n in range(clients):
                group.create_task(self._client(session, random.Random(f"{self.seed} {n}")), name=f"client {n}")

    async def sweep(self) -> None:
        """Read every key once through every node."""

        async def read(place: Place, base: str) -> None:
            try:
                await self._read(session, self.rng, place, None, base)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as broken:
                self.outcomes[f"get broken: {type(broken).__name__}"] += 1

        async with _session() as session:
            for place in self.places():
                await asyncio.gather(*(read(place, base) for base in self.s3_urls))

    def stop(self) -> None:
        """Let run() come to its end: what has begun is finished, nothing else begins."""
        self._remaining = 0

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        places = self.places()
        while self._remaining > 0 and not self.violations:
            self._remaining -= 1
            # A few keys are hot, so that operations on one key overlap.
            place = places[min(int(rng.expovariate(6.0) * len(places)), len(places) - 1)]
            kind = rng.choices(list(self.weights), weights=list(self.weights.values()), k=1)[0]
            began = time.monotonic()
            try:
                await getattr(self, f"_{kind}")(session, rng, place)
                self.outcomes[kind] += 1
                self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - began)
                self.done += 1
                if self.read_everywhere and kind in _CHANGES:
                    await asyncio.gather(*(self._read(session, rng, place, None, at) for at in self.s3_urls))
            except aiohttp.ClientConnectorError:
                # No worker listens just now: that is no operation, and asking in a tight loop would only slow their start.
                self.outcomes["refused"] += 1
                self._remaining += self._remaining > 0
                await asyncio.sleep(0.05)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as broken:
                self.outcomes[f"{kind} broken: {type(broken).__name__}"] += 1
            except TimeoutError:
                self.violations.append(f"{kind} {place} did not end within {OPERATION_TIMEOUT_S} s")

    def _url(
        self,
        rng: random.Random,
        method: str,
        place: Place,
        query: dict[str, str] | None = None,
        base: str | None = None,
    ) -> URL:
        """base: of which node; of any without it."""
        base = base or rng.choice(self.s3_urls)
        asked = "?" + urlencode(query, quote_via=quote) if query else ""
        # Mostly the same URL again, as a job does that was handed a list of them; now and then a new one.
        named = (base, method, *place, asked)
        known = self._urls.get(named)
        if known is not None and rng.random() < 0.98:
            return known
        path = f"/{place[0]}" + (f"/{quote(place[1], safe='/~')}" if place[1] else "")
        request = AWSRequest(method=method, url=base + path + asked)
        S3SigV4QueryAuth(self._auth_credentials, "s3", "us-east-1", expires=3600).add_auth(request)
        url = URL(request.url, encoded=True)
        if "uploadId" not in asked:
            self._urls[named] = url
        return url

    def _path_of(self, rng: random.Random, place: Place) -> str:
        return f"{rng.choice(self.s3_urls)}/{place[0]}/{quote(place[1], safe='/~')}"

    async def _get(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        await self._read(session, rng, place, None)

    async def _range(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        start = rng.choice([0, rng.randrange(400_000), 65_500, 16_000])
        await self._read(session, rng, place, (start, start + rng.choice([1, 100, 2_000, 70_000, 300_000])))

    async def _read(
        self,
        session: aiohttp.ClientSession,
        rng: random.Random,
        place: Place,
        wanted: tuple[int, int] | None,
        base: str | None = None,
    ) -> None:
        headers = {} if wanted is None else {"Range": f"bytes={wanted[0]}-{wanted[1] - 1}"}
        url = self._url(rng, "GET", place, base=base)
        began = time.monotonic()
        async with session.get(url, headers=headers) as answer:
            body = await answer.read()
            note = answer.headers.get("x-kos-cache", "")
            read = Read(place, began, time.monotonic(), answer.status, answer.headers.get("ETag"), body, wanted, note)
        self.outcomes[f"read {answer.status} {note.partition(';')[0]}"] += 1
        if answer.status == 500 and b"<Code>InternalError</Code>" in body:
            self.violations.append(f"{place} {wanted}: kos failed inside: {body!r}")
        if answer.status in (500, 502, 503, 504) and len(self.refusals) < 20:
            self.refusals.append(f"{began:.3f} {url.authority} {place} {wanted}: {answer.status} {note} {body[:300]!r}")
        if answer.status in (500, 502, 503, 504) or answer.status == 416:
            return
        verdict = self.ledger.violation(read)
        if verdict is not None:
            self.violations.append(
                f"seed {self.seed}: {place} {wanted} from {url.authority}: {verdict} ({note}, status {read.status}, "
                f"ETag {read.etag}, began {read.began:.3f}, took {read.ended - read.began:.3f} s)\n"
                f"at the origin: {self.ledger.story(place)}\nasked of it: {self._asked(place, read.began)}"
            )

    def _asked(self, place: Place, around: float) -> str:
        """What the origin was asked of a key in the second before a moment, and since."""
        found = [r for r in list(self.origin.requests) if (r.bucket, r.key) == place and r.arrived > around - 1.0]
        told = ("range", "if-match", "if-none-match")
        return "; ".join(
            f"{r.arrived:.3f} {r.method} {r.status} {[r.headers[name] for name in told if name in r.headers]}"
            for r in found
        )

    async def _put(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        body, url = self._next_body(place, rng), self._url(rng, "PUT", place)
        began = time.monotonic()
        async with session.put(url, data=body) as answer:
            await answer.read()
        self.outcomes[f"put {answer.status}"] += 1
        if answer.status == 200:
            self.ledger.acknowledge(place, answer.headers["ETag"], began, f"put through {url.authority}")

    async def _delete(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        url = self._url(rng, "DELETE", place)
        began = time.monotonic()
        async with session.delete(url) as answer:
            await answer.read()
        self.outcomes[f"delete {answer.status}"] += 1
        if answer.status == 204:
            self.ledger.acknowledge(place, None, began, f"deleted through {url.authority}")

    async def _leave(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        """Read a little (or nothing) of an answer and close the connection."""
        async with session.get(self._url(rng, "GET", place)) as answer:
            if rng.random() < 0.5:
                await answer.content.read(1000)
            answer.close()

    async def _multipart(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        """An upload in parts, each of its requests through any node."""
        async with session.post(self._url(rng, "POST", place, {"uploads": ""})) as answer:
            made = await answer.text()
        self.outcomes[f"create upload {answer.status}"] += 1
        if answer.status != 200:
            return
        upload_id = re.findall("<UploadId>(.*?)</UploadId>", made)[0]
        parts = []
        for number in range(1, rng.randrange(1, 3) + 1):
            query = {"partNumber": str(number), "uploadId": upload_id}
            async with session.put(self._url(rng, "PUT", place, query), data=self._next_body(place, rng)) as answer:
                await answer.read()
            if answer.status != 200:
                self.outcomes[f"part {answer.status}"] += 1
                return
            parts.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(answer.headers['ETag'])}</ETag></Part>")
        document = f"<CompleteMultipartUpload>{''.join(parts)}</CompleteMultipartUpload>"
        url = self._url(rng, "POST", place, {"uploadId": upload_id})
        began = time.monotonic()
        async with session.post(url, data=document) as answer:
            done = await answer.text()
        self.outcomes[f"complete {answer.status}"] += 1
        self._acknowledge_document(place, done, began, f"completed through {url.authority}")

    async def _copy(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        """From any key of the same bucket, the same one left out: S3 refuses that."""
        sources = [each for each in self.places() if each[0] == place[0] and each != place]
        source = rng.choice(sources)
        headers = {"x-amz-copy-source": quote(f"/{source[0]}/{source[1]}", safe="/~")}
        # Headers that count must be signed: the query's signature covers host alone.
        request = AWSRequest(method="PUT", url=self._path_of(rng, place), headers=headers)
        S3SigV4QueryAuth(self._auth_credentials, "s3", "us-east-1", expires=3600).add_auth(request)
        began = time.monotonic()
        async with session.put(URL(request.url, encoded=True), headers=headers) as answer:
            done = await answer.text()
        self.outcomes[f"copy {answer.status}"] += 1
        if answer.status == 200:
            self._acknowledge_document(place, done, began, f"copied through {answer.url.authority}")

    def _acknowledge_document(self, place: Place, document: str, began: float, through: str) -> None:
        """Of a completion or a copy, which may answer 200 and then say that it failed."""
        etags = re.findall("<ETag>(.*?)</ETag>", document)
        if etags and "<Error>" not in document:
            self.ledger.acknowledge(place, etags[0].replace("&quot;", '"').replace("&#34;", '"'), began, through)

    async def _delete_many(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        keys = rng.sample([key for bucket, key in self.places() if bucket == place[0]], 3)
        objects = "".join(f"<Object><Key>{escape(key)}</Key></Object>" for key in keys)
        document = f"<Delete>{objects}</Delete>".encode()
        headers = {"Content-MD5": base64.b64encode(hashlib.md5(document).digest()).decode()}
        began = time.monotonic()
        url = self._url(rng, "POST", (place[0], ""), {"delete": ""})
        async with session.post(url, data=document, headers=headers) as answer:
            done = await answer.read()
        self.outcomes[f"delete many {answer.status}"] += 1
        if answer.status == 200:
            for deleted in ET.fromstring(done).iter():
                if deleted.tag.endswith("Deleted"):
                    (key,) = (child.text for child in deleted if child.tag.endswith("Key"))
                    self.ledger.acknowledge((place[0], key or ""), None, began, f"deleted through {url.authority}")

    async def _listing(self, session: aiohttp.ClientSession, rng: random.Random, place: Place) -> None:
        """All keys of the bucket, each judged as a read of its ETag, and those that are not there as a read that finds none."""
        url = self._url(rng, "GET", (place[0], ""), {"list-type": "2", "encoding-type": "url"})
        began = time.monotonic()
        async with session.get(url) as answer:
            page = await answer.read()
            note = answer.headers.get("x-kos-cache", "")
        ended = time.monotonic()
        self.outcomes[f"listing {answer.status} {note.partition(';')[0]}"] += 1
        if answer.status != 200:
            return
        shown = {}
        for entry in ET.fromstring(page).iter():
            if entry.tag.endswith("Contents"):
                of = {child.tag.rpartition("}")[2]: child.text or "" for child in entry}
                shown[unquote_plus(of["Key"])] = of["ETag"]
        for each in self.places():
            if each[0] == place[0]:
                verdict = self.ledger.listing_violation(each, shown.get(each[1]), began, ended)
                if verdict is not None:
                    self.violations.append(
                        f"seed {self.seed}: listing {each} from {url.authority}: {verdict} ({note}, ETag "
                        f"{shown.get(each[1])}, began {began:.3f}, took {ended - began:.3f} s)"
                    )

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


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=OPERATION_TIMEOUT_S)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
