"""Versions through a node against a model of a bucket with versions: any history of writes gives the right bytes.

The model is what S3 says: a list of versions per key, the last one current; a delete is a marker; removing a version is
for good; while versions are suspended, writes and deletes replace the null version. All changes go through the node but
those of `around`, after which time passes, as long as a record may be trusted.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kos.config import Rule
from kos.errors import OriginRefused
from koscache.carrier import version_name
from tests.fakes.cache_node import KIB, CacheNode, ShiftedClock

KEYS = ("a", "b/c")
SIZES = (0, 9, 4 * KIB + 1, 64 * KIB * 2 + 3)
FRESHNESS_S = 30.0
WORKERS = 2
MISSING, MARKER = 404, 405
T = TypeVar("T")

keys = st.sampled_from(KEYS)
workers = st.integers(0, WORKERS - 1)
sizes = st.sampled_from(SIZES)
#: which of all ids that ever were; the number is taken modulo how many there are
picks = st.integers(0, 1000)


@dataclass(frozen=True)
class Kept:
    version_id: str
    body: bytes | None  # None: a delete marker


class Bucket:
    """What S3 would hold."""

    def __init__(self) -> None:
        self.versions: dict[str, list[Kept]] = {key: [] for key in KEYS}
        self.ids: dict[str, list[str]] = {key: ["null", "never-was"] for key in KEYS}

    def append(self, key: str, kept: Kept) -> None:
        if kept.version_id == "null":
            self.remove(key, "null")
        elif kept.version_id not in self.ids[key]:
            self.ids[key].append(kept.version_id)
        self.versions[key].append(kept)

    def remove(self, key: str, version_id: str) -> None:
        self.versions[key] = [each for each in self.versions[key] if each.version_id != version_id]

    def current(self, key: str) -> bytes | int:
        body = self.versions[key][-1].body if self.versions[key] else None
        return MISSING if body is None else body

    def version(self, key: str, version_id: str) -> bytes | int:
        found = [each.body for each in self.versions[key] if each.version_id == version_id]
        if not found:
            return MISSING
        return MARKER if found[0] is None else found[0]


class Versions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="kos-versions-")
        self.runner = asyncio.Runner()
        self.clock = ShiftedClock()
        self.model = Bucket()
        self.random = random.Random(5)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        rules = (Rule(match="*", freshness=FRESHNESS_S),)
        self.node = CacheNode(Path(self.directory), workers=WORKERS, rules=rules, clock=self.clock)
        self.run(self.node.__aenter__())
        self.node.origin.create_bucket("b", versioned=True)

    def teardown(self) -> None:
        if hasattr(self, "node"):
            self.run(self.node.__aexit__())
        self.runner.close()
        shutil.rmtree(self.directory)

    # --- what must be seen: before a change, so that it is known, and after it ------------------------------------------

    async def read(self, name: str, worker: int) -> bytes | int:
        try:
            return await self.node.read("b", name, worker=worker)
        except OriginRefused as refused:
            return refused.status

    def look(self, key: str, worker: int) -> None:
        """The current object and every version that ever was are as the model has them."""

        async def read_all() -> list[bytes | int]:
            names = [key, *(version_name(key, each) for each in self.model.ids[key])]
            got = await asyncio.gather(*(self.read(name, worker) for name in names))
            await self.node.settled()
            return got

        expected = [self.model.current(key), *(self.model.version(key, each) for each in self.model.ids[key])]
        assert self.run(read_all()) == expected

    # --- what changes --------------------------------------------------------------------------------------------------

    def body(self, size: int) -> bytes:
        return self.random.randbytes(size)

    def put_at_origin(self, key: str, size: int) -> None:
        stored = self.node.origin.put("b", key, self.body(size))
        self.model.append(key, Kept(stored.version_id, stored.body))

    def delete_at_origin(self, key: str) -> None:
        marker = self.node.origin.store.remove("b", key)
        assert marker is not None
        self.model.append(key, Kept(marker.version_id, None))

    def remove_at_origin(self, key: str, version_id: str) -> None:
        self.node.origin.store.remove("b", key, version_id)
        self.model.remove(key, version_id)

    @rule(key=keys, size=sizes, worker=workers, reader=workers)
    def put(self, key: str, size: int, worker: int, reader: int) -> None:
        self.look(key, reader)

        async def write() -> None:
            async with self.node.workers[worker].carrier.writing("b", [key]):
                self.put_at_origin(key, size)

        self.run(write())
        self.look(key, reader)

    @rule(key=keys, worker=workers, reader=workers)
    def delete(self, key: str, worker: int, reader: int) -> None:
        self.look(key, reader)

        async def write() -> None:
            async with self.node.workers[worker].carrier.writing("b", [key]):
                self.delete_at_origin(key)

        self.run(write())
        self.look(key, reader)

    @rule(key=keys, pick=picks, worker=workers, reader=workers)
    def remove_a_version(self, key: str, pick: int, worker: int, reader: int) -> None:
        self.look(key, reader)
        self.run(self.removing(key, self.picked(key, pick), worker))
        self.look(key, reader)

    async def removing(self, key: str, version_id: str, worker: int) -> None:
        async with self.node.workers[worker].carrier.writing("b", [key], versions=[key]):
            self.remove_at_origin(key, version_id)

    @rule(key=keys, size=sizes, reader=workers)
    def around(self, key: str, size: int, reader: int) -> None:
        self.look(key, reader)
        self.put_at_origin(key, size)
        self.clock.ahead_s += FRESHNESS_S + 1
        self.look(key, reader)

    @rule(suspended=st.booleans())
    def suspend_or_enable(self, suspended: bool) -> None:
        self.node.origin.store.buckets["b"].suspended = suspended

    @rule()
    def restart_the_daemon(self) -> None:
        async def restart() -> None:
            await self.node.stop_daemon()
            await self.node.start_daemon()

        self.run(restart())

    # --- at the same time -----------------------------------------------------------------------------------------------

    def picked(self, key: str, pick: int) -> str:
        ids = self.model.ids[key]
        return ids[pick % len(ids)]

    @rule(key=keys, pick=picks, worker=workers)
    def get_a_version(self, key: str, pick: int, worker: int) -> None:
        version_id = self.picked(key, pick)
        got = self.run(self.read(version_name(key, version_id), worker))
        assert got == self.model.version(key, version_id), version_id

    @rule(key=keys, pick=picks, readers=st.lists(workers, min_size=1, max_size=4), worker=workers)
    def get_a_version_while_it_is_removed(self, key: str, pick: int, readers: list[int], worker: int) -> None:
        """Each reader gets what was there, or that it is gone; afterwards it is gone for all."""
        version_id = self.picked(key, pick)
        name, before = version_name(key, version_id), self.model.version(key, version_id)

        async def race() -> list[bytes | int]:
            reads = [asyncio.ensure_future(self.read(name, each)) for each in readers]
            await asyncio.sleep(0)
            await self.removing(key, version_id, worker)
            return await asyncio.gather(*reads)

        assert set(self.run(race())) <= {before, MISSING}
        for each in range(WORKERS):
            assert self.run(self.read(name, each)) == MISSING

    @rule(key=keys, size=sizes, readers=st.lists(workers, min_size=1, max_size=4), worker=workers)
    def get_while_it_is_overwritten(self, key: str, size: int, readers: list[int], worker: int) -> None:
        before = self.model.current(key)

        async def race() -> list[bytes | int]:
            reads = [asyncio.ensure_future(self.read(key, each)) for each in readers]
            async with self.node.workers[worker].carrier.writing("b", [key]):
                await asyncio.sleep(0)
                self.put_at_origin(key, size)
            return await asyncio.gather(*reads)

        after = self.run(race())
        assert set(after) <= {before, self.model.current(key)}
        for each in range(WORKERS):
            assert self.run(self.read(key, each)) == self.model.current(key)


Versions.TestCase.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestVersions = Versions.TestCase
