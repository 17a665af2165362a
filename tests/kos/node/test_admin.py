"""The admin port's questions about a cluster: what is asked, who may change something, and how failures come out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from kos import config
from kos.node import ports
from kos.node.admin import Admin, AskCluster, _from_here
from kos.node.supervisor import Supervisor
from tests.conditions import until

CHANGE = {"x-kos-admin": "1"}


class Cluster:
    """Writes down what it is asked, and says what it is told to."""

    def __init__(self, status: int = 200, answer: Mapping[str, Any] | None = None) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.says = (status, answer or {"all": "well"})
        self.hangs = False

    async def __call__(self, topic: str, question: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        self.asked.append((topic, question))
        if self.hangs:
            await asyncio.Event().wait()
        return self.says


@asynccontextmanager
async def admin(tmp_path: Path, cluster: AskCluster | None, **settings: Any) -> AsyncIterator[aiohttp.ClientSession]:
    # Nothing of this needs children: the part of a supervisor that readiness is read from.
    supervisor = cast(Supervisor, SimpleNamespace(children=[], ready=True, stopping=False, was_ready=True))
    one = Admin(supervisor, config.Supervisor(**settings), tmp_path, None, {"role": "node"}, cluster)
    listening, at = ports.listen("listen.admin", "127.0.0.1:0")
    await one.start(listening)
    try:
        async with aiohttp.ClientSession(f"http://{at}") as session:
            yield session
    finally:
        await one.close()


async def ask(
    session: aiohttp.ClientSession, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    async with session.request(method, path, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())


async def test_questions_reach_the_cluster(tmp_path: Path) -> None:
    cluster = Cluster()
    async with admin(tmp_path, cluster) as session:
        assert await ask(session, "/v1/cluster/status") == (200, {"all": "well"})
        assert (await ask(session, "/v1/cluster/locate?bucket=b&key=a%2Fb%20c"))[0] == 200
        assert (await ask(session, "/v1/cluster/locate?bucket=b&key=k&version_id=v1"))[0] == 200
        assert (await ask(session, "/v1/cluster/drain?node=n%2D2", "POST", CHANGE))[0] == 200
        assert (await ask(session, "/v1/cluster/rejoin?node=n-2", "POST", CHANGE))[0] == 200
    assert cluster.asked == [
        ("status", {}),
        ("locate", {"bucket": "b", "key": "a/b c", "version_id": None}),
        ("locate", {"bucket": "b", "key": "k", "version_id": "v1"}),
        ("drain", {"node": "n-2"}),
        ("rejoin", {"node": "n-2"}),
    ]


@pytest.mark.parametrize(
    "path",
    ["/v1/cluster/locate?bucket=b", "/v1/cluster/locate?key=k", "/v1/cluster/locate?bucket=b&key=k&version_id=%00"],
)
async def test_questions_that_are_none(tmp_path: Path, path: str) -> None:
    cluster = Cluster()
    async with admin(tmp_path, cluster) as session:
        status, answer = await ask(session, path)
        assert status == 400 and answer["error"].startswith("found ")
        assert (await ask(session, "/v1/cluster/drain", "POST", CHANGE))[0] == 400
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("peer", "local", "here"),
    [
        (("127.0.0.1", 5), ("127.0.0.1", 9001), True),
        (("127.77.1.2", 5), ("127.0.0.1", 9001), True),
        (("::1", 5, 0, 0), ("::1", 9001, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), ("::ffff:127.0.0.1", 9001, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), ("::ffff:127.0.0.2", 9001, 0, 0), True),
        (("10.0.0.7", 5), ("10.0.0.7", 9001), True),
        (("fe80::1%eth0", 5, 0, 2), ("fe80::1%eth0", 9001, 0, 2), True),
        (("10.0.0.8", 5), ("10.0.0.7", 9001), False),
        (("fe80::2%eth0", 5, 0, 2), ("fe80::1%eth0", 9001, 0, 2), False),
        (("::ffff:10.0.0.8", 5, 0, 0), ("::ffff:10.0.0.7", 9001, 0, 0), False),
        (None, ("10.0.0.7", 9001), False),
    ],
)
def test_changes_are_made_from_the_node_itself(peer: object, local: object, here: bool) -> None:
    assert _from_here(peer, local) is here


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-kos-admin": ""},
        {"Content-Type": "text/plain"},
        {**CHANGE, "Origin": "http://127.0.0.1:9001"},
        {**CHANGE, "Origin": "null"},
    ],
)
async def test_no_web_page_changes_anything(tmp_path: Path, headers: dict[str, str]) -> None:
    cluster = Cluster()
    async with admin(tmp_path, cluster) as session:
        for what in ("drain", "rejoin"):
            assert (await ask(session, f"/v1/cluster/{what}?node=n", "POST", headers))[0] == 403
            async with session.get(f"/v1/cluster/{what}?node=n", headers=CHANGE) as answer:
                assert answer.status == 405
            # What a browser asks before it sends a header of the page's own: nobody says yes.
            asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
            async with session.options(f"/v1/cluster/{what}?node=n", headers=asked) as answer:
                assert answer.status == 405
                assert "Access-Control-Allow-Origin" not in answer.headers
    assert cluster.asked == []


async def test_what_the_cluster_says_of_failures_is_passed_on(tmp_path: Path) -> None:
    async with admin(tmp_path, Cluster(404, {"error": "found node 'x', allowed: n"})) as session:
        assert await ask(session, "/v1/cluster/drain?node=x", "POST", CHANGE) == (
            404,
            {"error": "found node 'x', allowed: n"},
        )


async def test_a_node_in_no_cluster(tmp_path: Path) -> None:
    async with admin(tmp_path, None) as session:
        for path in ("/v1/cluster/status", "/v1/cluster/locate?bucket=b&key=k"):
            status, answer = await ask(session, path)
            assert status == 501 and "in no cluster" in answer["error"]


async def test_a_daemon_that_does_not_answer_costs_no_readiness(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.hangs = True
    async with admin(tmp_path, cluster, admin_timeout_s=0.2) as session:
        assert await ask(session, "/v1/cluster/status") == (504, {"error": "no answer within 0.2 s"})
        asking = asyncio.create_task(ask(session, "/v1/cluster/status"))
        assert (await ask(session, "/readyz"))[1]["ready"] is True
        assert (await asking)[0] == 504


async def test_too_many_at_a_time(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.hangs = True
    async with admin(tmp_path, cluster, admin_connections=1, admin_timeout_s=5.0) as session:
        asking = asyncio.create_task(ask(session, "/v1/cluster/status"))
        await until(lambda: cluster.asked)
        assert await ask(session, "/readyz") == (503, {"error": "too many admin requests"})
        asking.cancel()
