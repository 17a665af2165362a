"""What operators ask of a cluster: through the daemons' sockets and lines, and what goes wrong said by name."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos.clock import Clock
from kos.config import Cluster, Control, Listen, Member
from kos.control.errors import ControlUnavailable
from kos.node.admin import AskCluster
from kos.s3.object_response import ObjectMeta
from kos.tasks import Tasks
from koscache import ipc
from koscache.cluster.admin import asker
from koscache.content import content_id, make_record
from koscache.daemon import Daemon
from koscache.store import Store
from tests.conditions import until
from tests.fakes.cache_node import KIB, settings
from tests.fakes.ports import free_ports


class Nodes:
    """Daemons of one cluster on this loop, and what asks each as the admin port does."""

    def __init__(self, directory: Path, count: int, membership: str = "static", **cluster: Any) -> None:
        ports = free_ports(2 * count)
        members = tuple(
            Member(name=f"n{at + 1}", peer=f"127.0.0.1:{ports[2 * at]}", cluster=f"127.0.0.1:{ports[2 * at + 1]}")
            for at in range(count)
        )
        options: dict[str, Any] = {
            "membership": membership, "secret": "a secret of the cluster", "lease_s": 1.0, "member_lease_s": 3.0,
            "heartbeat_s": 0.2, "drain_s": 5.0,
        }  # fmt: skip
        self.configs = [
            msgspec.structs.replace(
                settings(directory / member.name, "http://127.0.0.1:1"),
                cluster=Cluster(name=member.name, **(options | cluster)),
                listen=Listen(peer=member.peer, cluster=member.cluster),
                members=members if membership == "static" else (),
                control=Control(url=f"sqlite:///{directory}/control.db"),
            )
            for member in members
        ]
        self.daemons: list[Daemon | None] = [None] * count
        self.asks: list[AskCluster] = [asker(config) for config in self.configs]

    async def start(self, at: int) -> None:
        config, clock = self.configs[at], Clock()
        daemon = Daemon(config, lambda: Store.open(config.cache, clock), clock, Tasks(f"daemon-{at}"))
        self.daemons[at] = daemon
        await daemon.start()

    async def stop(self, at: int) -> None:
        daemon, self.daemons[at] = self.daemons[at], None
        if daemon is not None:
            await daemon.close()

    async def ask(self, at: int, topic: str, **question: Any) -> Mapping[str, Any]:
        status, answer = await self.asks[at](topic, question)
        assert status == 200, answer
        return answer

    async def states(self, at: int) -> dict[str, str]:
        return {member["name"]: member["state"] for member in (await self.ask(at, "status"))["members"]}

    async def well(self, at: int) -> bool:
        members = (await self.ask(at, "status"))["members"]
        running = sum(daemon is not None for daemon in self.daemons)
        return len(members) == running and all(
            member["trusting"] and not member["in_trouble"] and not member["error"] for member in members
        )


@contextlib.asynccontextmanager
async def nodes(directory: Path, count: int, membership: str = "static", **cluster: Any) -> AsyncIterator[Nodes]:
    them = Nodes(directory, count, membership, **cluster)
    try:
        for at in range(count):
            await them.start(at)
        for at in range(count):
            await until(lambda at=at: them.well(at))  # type: ignore[misc]
        yield them
    finally:
        for at in range(count):
            await them.stop(at)


async def test_status_has_every_member(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3) as them:
        answer = await them.ask(0, "status")
        assert (answer["asked"], answer["membership"], answer["control_away"]) == ("n1", "static", "")
        assert [member["name"] for member in answer["members"]] == ["n1", "n2", "n3"]
        for member in answer["members"]:
            assert member["share"] == pytest.approx(1 / 3)
            assert (member["capacity_bytes"], member["drain"], member["reads"]) == (64 << 20, None, 0)
            assert 0 < member["used_bytes"] <= 64 << 20
            assert len(member["epoch"]) == 16


async def test_hits_are_counted(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as them:
        with ipc.socket_address(them.configs[1].cache.dir) as path:
            _, writer = await asyncio.open_unix_connection(path)
        writer.write(ipc.frame(ipc.Counted(10, 7)) + ipc.frame(ipc.Counted(10, 8)))

        async def counted() -> bool:
            member = (await them.ask(0, "status"))["members"][1]
            return (member["reads"], member["hits"]) == (20, 15)

        await until(counted)
        writer.close()


@pytest.mark.parametrize("membership", ["static", "control"])
async def test_drain_and_rejoin_from_another_node(tmp_path: Path, membership: str) -> None:
    async with nodes(tmp_path, 3, membership) as them:
        assert await them.ask(0, "drain", node="n2") == {"node": "n2", "state": "draining"}
        for at in range(3):
            await until(lambda at=at: _is(them, at, n2="draining"))  # type: ignore[misc]
        assert Path(them.configs[1].cache.dir, "draining").exists()
        answer = await them.ask(2, "status")
        assert [member["share"] for member in answer["members"]] == [0.5, 0.0, 0.5]

        async def moved() -> bool:
            drain = (await them.ask(2, "status"))["members"][1]["drain"]
            return bool(drain and drain["done"] and drain["ended"] == "moved")

        await until(moved)
        assert (await them.ask(0, "drain", node="n2"))["state"] == "draining", "again is as good"

        await them.stop(1)
        if membership == "control":
            await until(lambda: _is(them, 0, n2=None))
        await them.start(1)
        for at in range(3):
            await until(lambda at=at: _is(them, at, n2="draining"))  # type: ignore[misc]
            await until(lambda at=at: them.well(at))  # type: ignore[misc]

        assert await them.ask(2, "rejoin", node="n2") == {"node": "n2", "state": "active"}
        for at in range(3):
            await until(lambda at=at: _is(them, at, n2="active"))  # type: ignore[misc]
        assert not Path(them.configs[1].cache.dir, "draining").exists()
        assert (await them.ask(2, "status"))["members"][1]["drain"] is None
        await them.stop(1)
        await them.start(1)
        await until(lambda: _is(them, 0, n2="active"))


async def _is(them: Nodes, at: int, **wanted: str | None) -> bool:
    states = await them.states(at)
    return all(states.get(name) == state for name, state in wanted.items())


async def test_a_draining_node_that_stops_stays_out_however_long_that_takes(tmp_path: Path) -> None:
    """Its heartbeats end before it leaves: one after it would join again."""
    async with nodes(tmp_path, 2, "control", heartbeat_s=0.1) as them:
        await them.ask(0, "drain", node="n2")
        await until(lambda: _is(them, 0, n2="draining"))
        stopping = asyncio.create_task(them.stop(1))
        await until(lambda: _is(them, 0, n2=None))
        await stopping
        assert await them.states(0) == {"n1": "active"}


async def test_a_node_that_was_expelled_while_it_drained_drains_still(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2, "control") as them:
        await them.ask(1, "drain", node="n2")
        await until(lambda: _is(them, 0, n2="draining"))
        daemon = them.daemons[1]
        assert daemon is not None and daemon._hub is not None and daemon._hub._control is not None
        before = daemon._hub.me.incarnation
        await daemon._hub._control._store.leave("n2", before, daemon._hub._control._holder)
        await until(lambda: daemon._hub is not None and daemon._hub.me.incarnation > before)
        await until(lambda: _is(them, 0, n2="draining"))


async def test_what_cannot_be_done_is_said_by_name(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as them:
        ask = them.asks[0]
        assert await ask("drain", {"node": "n9"}) == (
            404,
            {"error": "found node 'n9', allowed: n1 n2", "wrong": "unknown"},
        )
        assert (await ask("locate", {"bucket": "b"}))[0] == 400
        assert (await ask("locate", {"bucket": 1, "key": []}))[0] == 400
        status, answer = await ask("nothing", {})
        assert status == 400 and answer["error"].startswith("found topic 'nothing', allowed: status")
        await them.ask(0, "drain", node="n2")
        await until(lambda: _is(them, 0, n2="draining"))
        status, answer = await ask("drain", {"node": "n1"})
        assert (status, answer["wrong"]) == (409, "refused")
        await them.stop(1)
        await until(lambda: _silent(them))
        assert await ask("rejoin", {"node": "n2"}) == (503, {"error": "n2: there is no line to it", "wrong": "away"})
        (_, other) = (await them.ask(0, "status"))["members"]
        assert (other["error"], other["used_bytes"]) == ("there is no line to it", None)
        await them.stop(0)
        status, answer = await ask("status", {})
        assert status == 503 and answer["error"].startswith("the daemon is away: ")


async def _silent(them: Nodes) -> bool:
    return bool((await them.ask(0, "status"))["members"][1]["error"])


async def test_a_control_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(tmp_path, 2, "control") as them:

        async def away(*_: Any) -> Any:
            raise ControlUnavailable("no answer within 3 s")

        daemon = them.daemons[1]
        assert daemon is not None and daemon._hub is not None and daemon._hub._control is not None
        monkeypatch.setattr(daemon._hub._control._store, "set_state", away)
        assert await them.asks[0]("drain", {"node": "n2"}) == (
            503, {"error": "n2: the control store is away: no answer within 3 s", "wrong": "away"},
        )  # fmt: skip
        assert not Path(them.configs[1].cache.dir, "draining").exists()


async def test_a_node_in_no_cluster(tmp_path: Path) -> None:
    config = settings(tmp_path, "http://127.0.0.1:1")
    daemon = Daemon(config, lambda: Store.open(config.cache, Clock()), Clock(), Tasks("daemon"))
    await daemon.start()
    assert await asker(config)("status", {}) == (503, {"error": "this node is in no cluster"})
    await daemon.close()


async def test_evictions_do_not_wait_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection of the admin port has no segment open, and says so, however long its answer takes."""
    async with nodes(tmp_path, 1) as them:
        daemon = them.daemons[0]
        assert daemon is not None
        released: list[int] = []
        monkeypatch.setattr(daemon._keeper, "released", released.append)
        assert daemon._operations is not None
        answering = asyncio.Event()

        async def slow(topic: str, body: bytes) -> bytes:
            await answering.wait()
            return b"{}"

        monkeypatch.setattr(daemon._operations, "answer", slow)
        asking = asyncio.create_task(them.asks[0]("status", {}))
        await until(lambda: daemon._sessions)
        daemon._evicted([7])
        await until(lambda: released == [7])
        answering.set()
        assert await asking == (200, {})


async def test_locate(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3) as them:
        block, size = 64 * KIB, 40 * 64 * KIB
        nothing = await them.ask(0, "locate", bucket="b", key="k", version_id=None)
        assert (nothing["etag"], nothing["nodes"], nothing["known_by"]) == (None, [], [])
        assert nothing["home"] == nothing["owners"][0] in ("n1", "n2", "n3")
        record = make_record("b", "k", ObjectMeta('"e"', size, "", ()), validated_at=1.0, fence=1)
        third = them.daemons[2]
        assert third is not None
        assert await third._keeper.learn([("b", "k", record)]) is None
        answer = await them.ask(0, "locate", bucket="b", key="k")
        assert (answer["etag"], answer["size"], answer["block_count"]) == ('"e"', size, 40)
        assert (answer["known_by"], answer["block_bytes"], answer["unreachable"]) == (["n3"], block, {})
        should = [
            number for node in answer["nodes"] for first, stop in node["should_keep"] for number in range(first, stop)
        ]
        assert sorted(should) == list(range(40))
        assert [node["keeps"] for node in answer["nodes"]] == [[], [], []]
        assert record.content == content_id("b", "k", '"e"', size)
        await them.stop(1)
        await until(lambda: _silent(them))
        answer = await them.ask(0, "locate", bucket="b", key="k")
        assert answer["unreachable"] == {"n2": "there is no line to it"}
        assert [node["keeps_count"] for node in answer["nodes"]] == [0, None, 0]


async def test_an_answer_that_cannot_be_given_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(tmp_path, 1) as them:
        daemon = them.daemons[0]
        assert daemon is not None and daemon._operations is not None

        async def long(_: dict[str, Any]) -> dict[str, Any]:
            return {"text": "x" * them.configs[0].cache.ipc_message_bytes}

        async def buggy(_: dict[str, Any]) -> dict[str, Any]:
            raise LookupError("never thought of")

        monkeypatch.setitem(daemon._operations._topics, "cluster", (dict, long))
        status, answer = await them.asks[0]("status", {})
        assert status == 500 and "cache.ipc_message allows" in answer["error"]
        monkeypatch.setitem(daemon._operations._topics, "cluster", (dict, buggy))
        status, answer = await them.asks[0]("status", {})
        assert status == 500 and answer["error"].startswith("failed unexpectedly")


async def test_what_a_home_is_told_is_kept_as_what_must_be_confirmed(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as them:
        daemon = them.daemons[1]
        assert daemon is not None and daemon._operations is not None and daemon._fence is not None
        better = make_record(
            "b", "k", ObjectMeta('"new"', 5, "", ()), validated_at=2e9, fence=daemon._fence.value_of("b", "k")
        )
        told = make_record("b", "k", ObjectMeta('"old"', 5, "", ()), validated_at=1e9, fence=77)
        body = msgspec.json.encode({"records": [("b", "k", told), ("b", "other", told)]})
        await daemon._keeper.learn([("b", "k", better)])
        assert json.loads(await daemon._operations.answer("learn", body)) == {}
        found = [await daemon._keeper.look("b", name, None) for name in ("k", "other")]
        assert [record.etag for record, _ in found if record] == ['"new"', '"old"']  # type: ignore[misc]
        kept = found[1][0]  # type: ignore[index]
        assert (kept.fence, kept.validated_at) == (0, 0.0)
        assert "error" in json.loads(await daemon._operations.answer("learn", b'{"records": [["b", "k", 1]]}'))
