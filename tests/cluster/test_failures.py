"""One thing goes wrong with one node of five: the others go on, nothing stale or torn is ever read, and afterwards all is well
without anybody's help."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.faults import FAULTS
from tests.conditions import eventually, until
from tests.fakes.cluster import Cluster, ClusterNode, cluster
from tests.fakes.generated import Generated
from tests.fakes.network import Unavailable
from tests.fakes.origin import FakeOrigin
from tests.fakes.postgres import Postgres
from tests.fakes.slow_disk import slow_disk
from tests.history.ledger import Ledger
from tests.history.test_history import seed
from tests.history.workload import Workload

MIB = 1 << 20
FRESHNESS_S = {"immutable": float("inf"), "short": 0.5}
SETTINGS: dict[str, Any] = {
    "cache": {"size": "128MiB", "block_size": "64KiB", "segment_size": "4MiB", "small_size": "16KiB"},
    "rules": [
        {"match": "immutable", "freshness": "immutable", "stale_if_error": "0s"},
        {"match": "short", "freshness": "500ms", "stale_if_error": "0s"},
        {"match": "*", "freshness": "immutable", "local_copy": "never"},
    ],
}
WEIGHTS = {"get": 50, "range": 20, "put": 10, "delete": 3, "multipart": 2, "copy": 2, "delete_many": 1, "listing": 4}
#: With cluster.lease of 1 s, member_lease 3 s and read_timeout 3 s: what waits for all of them has ended by then.
LONGEST_S = 12.0
#: so long a fault lasts at least, and then until this many operations have come through beside it since it began
LASTS_S = 3.0
MUST_PASS = 200
PASSES_S = 15.0


class Scene:
    """A cluster, and the ledger of all that was written to its origin."""

    def __init__(self, them: Cluster, ledger: Ledger) -> None:
        self.them, self.ledger = them, ledger
        self._turn = 0

    def work(self, nodes: list[ClusterNode], **settings: Any) -> Workload:
        self._turn += 1
        urls = [node.s3_url for node in nodes]
        number = seed() + self._turn
        return Workload(urls, self.them.origin, self.ledger, number, weights=WEIGHTS, keys_per_bucket=8, **settings)


@contextlib.contextmanager
def scene(directory: Path, **settings: Any) -> Iterator[Scene]:
    origin = FakeOrigin()
    with origin.in_thread(), cluster(directory, 5, origin=origin, settings=SETTINGS, **settings) as them:
        ledger = Ledger(FRESHNESS_S)
        ledger.watch(origin.store)
        made = Scene(them, ledger)
        made.work(list(them)).fill()
        yield made


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("static")) as made:
        yield made


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    postgres = Postgres()
    try:
        here = f"127.0.0.1:{postgres.port}"
        url = postgres.url("postgres").replace(here, "{host}")
        control = (url, ("127.0.0.1", postgres.port))
        with scene(tmp_path_factory.mktemp("controlled"), membership="control", control=control) as made:
            yield made
    finally:
        postgres.close()


async def go_on(beside: Workload) -> None:
    """Let the fault last, and see the others come through."""
    began, loop = beside.done, asyncio.get_running_loop()
    end = loop.time() + LASTS_S

    def come_through() -> bool:
        return bool(beside.violations) or (loop.time() > end and beside.done - began > MUST_PASS)

    await until(come_through, LASTS_S + PASSES_S, f"{MUST_PASS} operations come through beside the fault")


async def suffer(made: Scene, fault: str) -> tuple[Workload, Workload]:
    """Load through the node and through the others, the fault in the middle of it, and the way back."""
    them = made.them
    victim, others = them[2], them.others(them[2])
    beside, through = made.work(others), made.work([victim])
    running = [asyncio.create_task(beside.run(10**9, 8)), asyncio.create_task(through.run(10**9, 2))]
    try:
        await until(lambda: beside.done > 200 and through.done > 20, 30, "the load is on")
        await asyncio.to_thread(FAULTS[fault].strike, them, victim)
        await go_on(beside)
        await asyncio.to_thread(FAULTS[fault].end, them, victim)
        await asyncio.to_thread(them.agree)
        ended = beside.done
        await until(lambda: beside.done > ended + 200 or beside.violations, 30, "the load goes on")
    finally:
        beside.stop()
        through.stop()
        await asyncio.gather(*running)
        await asyncio.to_thread(them.heal)
    assert not beside.violations + through.violations, "\n".join((beside.violations + through.violations)[:5])
    return beside, through


def refused(work: Workload) -> dict[str, int]:
    """What was answered with 5xx, or broke."""
    return {what: count for what, count in work.outcomes.items() if " 50" in what or "broken" in what}


def nothing_failed_beside(beside: Workload) -> None:
    """Through the other nodes every operation was carried out, in bounded time. Reads of objects that were overwritten under
    them break off: that is no failure."""
    failed = {what: count for what, count in refused(beside).items() if "broken: ClientPayloadError" not in what}
    assert not failed, f"{failed} of {beside.outcomes}: {beside.refusals}"
    assert max(beside.longest.values()) < LONGEST_S, beside.longest


@pytest.mark.parametrize("fault", ["killed", "without peers"])
async def test_with_a_static_list(static: Scene, fault: str) -> None:
    beside, through = await suffer(static, fault)
    nothing_failed_beside(beside)
    if FAULTS[fault].stays_up:
        assert through.done > 20


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"without the control store"}))
async def test_with_a_static_list_everything(static: Scene, fault: str) -> None:
    beside, _ = await suffer(static, fault)
    nothing_failed_beside(beside)


@pytest.mark.parametrize("fault", ["killed", "without the control store"])
async def test_with_a_control_store(controlled: Scene, fault: str) -> None:
    beside, _ = await suffer(controlled, fault)
    nothing_failed_beside(beside)


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(FAULTS))
async def test_with_a_control_store_everything(controlled: Scene, fault: str) -> None:
    beside, _ = await suffer(controlled, fault)
    nothing_failed_beside(beside)


async def test_a_node_without_the_origin_reads_through_its_peers(static: Scene) -> None:
    beside, through = await suffer(static, "without the origin")
    nothing_failed_beside(beside)
    assert sum(count for what, count in through.outcomes.items() if what.startswith("read 2")) > 15, through.outcomes


@pytest.mark.slow
async def test_a_slow_disk_holds_up_nobody_else(tmp_path: Path) -> None:
    with slow_disk(tmp_path, 512 * MIB) as disk:

        def each(index: int) -> dict[str, Any]:
            return {"cache": {"dir": str(disk.directory / "cache"), "min_free": "1MiB"}} if index == 2 else {}

        with scene(tmp_path / "nodes", each=each) as made:
            them = made.them
            disk.charge(them[2].pids())
            beside = made.work(them.others(them[2]))
            running = asyncio.create_task(beside.run(10**9, 8))
            try:
                await until(lambda: beside.done > 200, 30, "the load is on")
                await asyncio.to_thread(disk.slow, 200_000)
                await go_on(beside)
                disk.heal()
                await asyncio.to_thread(them.agree)
            finally:
                disk.heal()
                beside.stop()
                await running
            assert not beside.violations, "\n".join(beside.violations[:5])
            nothing_failed_beside(beside)


def test_the_loss_of_a_node_costs_the_origin_each_block_a_few_times_at_most(static: Scene) -> None:
    them, body = static.them, Generated("lost", 32 * MIB)
    block = 64 * 1024
    them.origin.put("kept", "large", body)
    for node in them:
        assert node.request("GET", "kept", "large", expect=body).status == 200
    victim = them[1]
    victim.kill()
    them.origin.forget()
    try:
        with ThreadPoolExecutor(32) as pool:
            readers = [
                pool.submit(them.others(victim)[n % 4].request, "GET", "kept", "large", expect=body) for n in range(32)
            ]
            assert [reader.result().status for reader in readers] == [200] * 32
        asked: Counter[int] = Counter()
        for request in them.origin.requests:
            if request.key == "large" and request.method == "GET":
                first, last = request.headers.get("range", "bytes=0-0").removeprefix("bytes=").split("-")
                asked.update(range(int(first) // block, int(last) // block + 1))
        assert asked and max(asked.values()) <= 3, asked.most_common(5)
        # One node of five kept a fifth of the blocks: that is what must be fetched again.
        assert sum(asked.values()) * block <= 0.4 * len(body), sum(asked.values()) * block / len(body)
    finally:
        them.heal()
    # And then it is as before: everything is where it belongs, and costs the origin nothing.
    for node in them:
        node.request("GET", "kept", "large", expect=body)
    them.origin.forget()
    for node in them:
        assert node.request("GET", "kept", "large", expect=body).status == 200
    eventually(lambda: them.origin.count(op="GetObject", key="large") <= 5, "no block is fetched again")


def versions(them: Cluster) -> list[int]:
    """Of the view that each node goes by."""
    return [each["view_version"] for each in them[0].cluster_status()["members"]]


@pytest.mark.slow
async def test_a_control_store_that_is_set_up_anew_under_a_running_cluster(tmp_path: Path) -> None:
    """All join it again with their next heartbeats; nobody need restart anything."""
    postgres = Postgres()
    try:
        control = (
            postgres.url("postgres").replace(f"127.0.0.1:{postgres.port}", "{host}"),
            ("127.0.0.1", postgres.port),
        )
        with scene(tmp_path, membership="control", control=control) as made:
            them = made.them
            beside = made.work(list(them))
            running = asyncio.create_task(beside.run(10**9, 8))
            try:
                await until(lambda: beside.done > 200, 30, "the load is on")
                before = versions(them)
                await postgres.empty("postgres")
                await go_on(beside)
                await asyncio.to_thread(them.agree)
                ended = beside.done
                await until(lambda: beside.done > ended + 200 or beside.violations, 30, "the load goes on")
            finally:
                beside.stop()
                await running
            assert not beside.violations, "\n".join(beside.violations[:5])
            nothing_failed_beside(beside)
            assert min(versions(them)) > max(before)
    finally:
        postgres.close()


@pytest.mark.slow
async def test_packets_lost_instead_of_connections_frozen(tmp_path: Path) -> None:
    """The same as a partition by relays, with what the kernel's TCP does under it."""
    try:
        with scene(tmp_path, network="namespaces") as made:
            for fault in ("without peers", "refused by peers"):
                beside, _ = await suffer(made, fault)
                nothing_failed_beside(beside)
    except Unavailable as missing:
        pytest.skip(str(missing))
