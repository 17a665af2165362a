"""kos cluster: what it says of an answer, what it asks, and when it is content."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from koscli import cluster
from koscli.main import main

DRAIN = {
    "since": "2030-01-01T00:00:00.000Z", "moved_blocks": 120, "moved_bytes": 960 << 20, "failed_blocks": 0,
    "left_estimate": 40, "stage": "hot", "done": False, "ended": "",
}  # fmt: skip


def member(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "state": "active", "incarnation": 1, "peer": "h:1", "cluster": "h:2", "weight": 100, "share": 1 / 3,
        "kos_version": "0.1.0", "trusting": True, "epoch": "0123456789abcdef", "view_version": 17,
        "capacity_bytes": 100 << 30, "used_bytes": 3 << 29, "blocks": 5, "reads": 1000, "hits": 905, "in_trouble": {},
        "control_away": "", "writes_waiting": 0, "drain": None, "error": None,
    } | more  # fmt: skip


def silent(name: str) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("kos_version", "trusting", "epoch", "view_version", "capacity_bytes", "used_bytes", "blocks", "reads", "hits",
         "in_trouble", "control_away", "writes_waiting")
    )  # fmt: skip
    return member(name, **nothing, error="there is no line to it")


def status(*members: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "asked": "n1",
        "membership": "control",
        "view_version": 17,
        "control_away": "",
        "members": list(members),
    } | more


# --- for people -------------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_well() -> None:
    answer = status(member("n1"), member("node-2", reads=0, hits=0, capacity_bytes=1 << 40, used_bytes=0))
    assert cluster.status_text(answer).splitlines() == [
        "2 members, membership control, view 17, as n1 sees it",
        "NAME    STATE   KOS    CAPACITY      USED  SHARE   HITS  TRUSTS     EPOCH",
        "n1      active  0.1.0   100 GiB  1.50 GiB  33.3%  90.5%     yes  01234567",
        "node-2  active  0.1.0  1.00 TiB   0 bytes  33.3%      -     yes  01234567",
    ]
    assert cluster.troubles(answer) == []


def test_everything_that_can_be_wrong_is_said() -> None:
    answer = status(
        member("n1", in_trouble={"n3": "no line to it"}, control_away="no answer within 3 s"),
        member("n2", trusting=False, view_version=16, control_away="refused"),
        silent("n3"),
        member("n4", used_bytes=None, state="draining", share=0.0, drain=DRAIN),
        control_away="no answer within 3 s",
    )
    text = cluster.status_text(answer)
    assert "n3    active    -             -         -  33.3%      -       -         -" in text
    assert text.split("\nwrong:\n")[1].splitlines() == [
        "  n1: the control store is away: no answer within 3 s",
        "  n1 says of n3: no line to it",
        "  n2: may not trust its records, and asks the origin before each hit",
        "  n2: the control store is away: refused",
        "  n2: goes by view 16",
        "  n3 does not answer n1: there is no line to it",
        "  n4: its store is not open",
        "",
        "draining:",
        "  n4: 120 blocks (960 MiB) moved, about 40 left, hot ones first",
    ]


def test_a_node_that_has_not_joined() -> None:
    assert cluster.status_text(status(control_away="connection refused")).splitlines() == [
        "n1 is no member yet",
        "  n1: the control store is away: connection refused",
    ]
    assert cluster.troubles(status()) == ["n1: has not joined"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stage": "rest"}, "120 blocks (960 MiB) moved, about 40 left, the hot ones are"),
        ({"failed_blocks": 3}, "120 blocks (960 MiB) moved, 3 could not be, about 40 left, hot ones first"),
        ({"done": True, "ended": "moved", "left_estimate": 0}, "done: 120 blocks (960 MiB) moved"),
        (
            {"done": True, "ended": "time"},
            "done, for cluster.drain is over: 120 blocks (960 MiB) moved, about 40 left, which will be fetched anew",
        ),
        ({"done": True, "ended": "failed"}, "failed, see its log: 120 blocks (960 MiB) moved, about 40 left"),
    ],
)
def test_how_far_a_drain_is(change: dict[str, Any], text: str) -> None:
    assert cluster.drain_text(DRAIN | change) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(None, "-"), (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (1536 << 10, "1.50 MiB"), (12345 << 20, "12.1 GiB"),
     (500 << 30, "500 GiB"), (5000 << 40, "5000 TiB")],
)  # fmt: skip
def test_sizes(size_bytes: int | None, text: str) -> None:
    assert cluster.size_text(size_bytes) == text


def test_ranges() -> None:
    assert cluster.ranges_text([(0, 1), (3, 6), (9, 10)], 5, 12) == "0 3-5 9 (5 of 12)"
    assert cluster.ranges_text([], 0, 12) == "none (0 of 12)"
    assert cluster.ranges_text([(0, 2)], 7, 12) == "0-1 … (7 of 12)", "the node left some out"


LOCATED = {
    "bucket": "b", "key": "k", "version_id": None, "owners": ["n2", "n3"], "home": "n2", "known_by": ["n1", "n2"],
    "etag": '"e"', "size": 80 << 20, "block_bytes": 8 << 20, "block_count": 10, "blocks_looked_at": 10,
    "nodes": [
        {"name": "n1", "should_keep": [], "should_keep_count": 0, "keeps": [[0, 2]], "keeps_count": 2},
        {"name": "n2", "should_keep": [[0, 6]], "should_keep_count": 6, "keeps": [[0, 1], [3, 6]], "keeps_count": 4},
        {"name": "n3", "should_keep": [[6, 10]], "should_keep_count": 4, "keeps": None, "keeps_count": None},
    ],
    "unreachable": {"n3": "there is no line to it"},
}  # fmt: skip


def test_where_an_object_is() -> None:
    assert cluster.locate_text(LOCATED).splitlines() == [
        "object    s3://b/k",
        "home      n2, then n3",
        'record    ETag "e", 83886080 bytes; known by n1 n2',
        "blocks    10 of 8.00 MiB",
        "          n1: should keep none (0 of 10)",
        "              keeps 0-1 (2 of 10)",
        "          n2: should keep 0-5 (6 of 10)",
        "              keeps 0 3-5 (4 of 10)",
        "          n3: should keep 6-9 (4 of 10)",
        "              keeps unknown",
        "silent    n3: there is no line to it",
    ]
    unknown = LOCATED | {"etag": None, "owners": [], "version_id": "v1", "unreachable": {}}
    assert cluster.locate_text(unknown).splitlines() == [
        "object    s3://b/k",
        "version   v1",
        "home      none: no node is active",
        "record    none: no node knows it",
    ]
    assert "10000 of 8.00 MiB; below, the first 10" in cluster.locate_text(LOCATED | {"block_count": 10_000})


# --- asking -----------------------------------------------------------------------------------------------------------


class AdminPort:
    """Answers each path with what is planned for it, the last one again and again; writes down what was asked."""

    def __init__(self) -> None:
        self.plan: dict[str, list[tuple[int, Any]]] = {}
        self.asked: list[tuple[str, str, str | None]] = []

    def says(self, path: str, *answers: Any, status: int = 200) -> None:
        self.plan[path] = [(status, answer) for answer in answers]

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        port = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                port.asked.append((self.command, self.path, self.headers["x-kos-admin"]))
                planned = port.plan[self.path.partition("?")[0]]
                status, answer = planned.pop(0) if len(planned) > 1 else planned[0]
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_: Any) -> None:
                """Nobody reads it."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> AdminPort:
    monkeypatch.setattr(cluster, "_POLL_S", 0.0)
    return AdminPort()


def run(port: AdminPort, *words: str) -> int:
    with port.listening() as url:
        return main(["cluster", *words, "--admin", url])


def test_the_exit_status_says_whether_all_is_well(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.says("/v1/cluster/status", status(member("n1")))
    assert run(port, "status") == 0
    port.says("/v1/cluster/status", status(member("n1", trusting=False)))
    assert run(port, "status", "--json") == 1
    out = capsys.readouterr().out
    assert "1 member, membership control" in out
    assert json.loads(out[out.index("{") :])["members"][0]["trusting"] is False


def test_locate_asks_for_what_it_is_given(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.says("/v1/cluster/locate", LOCATED)
    assert run(port, "locate", "s3://b/a b/é", "--version-id", "v1") == 0
    assert run(port, "locate", "s3://b/k", "--json") == 0
    assert port.asked[0][1] == "/v1/cluster/locate?bucket=b&key=a+b%2F%C3%A9&version_id=v1"
    assert capsys.readouterr().out.startswith("object    s3://b/k")


def test_a_drain_is_followed_to_its_end(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.says("/v1/cluster/drain", {"node": "n2", "state": "draining"})
    done = DRAIN | {"done": True, "ended": "moved", "moved_blocks": 160, "left_estimate": 0}
    port.says(
        "/v1/cluster/status",
        status(member("n1"), member("n2", state="draining")),
        status(member("n1"), silent("n2")),
        status(member("n1"), member("n2", state="draining", drain=DRAIN)),
        status(member("n1"), member("n2", state="draining", drain=DRAIN)),
        status(member("n1"), member("n2", state="draining", drain=done)),
    )
    assert run(port, "drain", "n2") == 0
    assert port.asked[0] == ("POST", "/v1/cluster/drain?node=n2", "1")
    assert capsys.readouterr().out.splitlines() == [
        "n2: has not begun",
        "n2: does not answer: there is no line to it",
        "n2: 120 blocks (960 MiB) moved, about 40 left, hot ones first",
        "n2: done: 160 blocks (960 MiB) moved",
    ]


def test_a_drain_as_json(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.says("/v1/cluster/drain", {"node": "n2", "state": "draining"})
    done = DRAIN | {"done": True, "ended": "time"}
    port.says("/v1/cluster/status", status(member("n2", drain=DRAIN)), status(member("n2", drain=done)))
    assert run(port, "drain", "n2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["drain"]["ended"] == "time"
    assert run(port, "drain", "n2", "--json", "--no-wait") == 0
    assert json.loads(capsys.readouterr().out) == {"node": "n2", "state": "draining"}


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([status(member("n2", drain=DRAIN | {"done": True, "ended": "failed"}))], "n2: failed, see its log"),
        ([status(member("n1"))], "n2 is no member any more"),
        ([status(member("n2", state="active"))], "n2 does not drain any more"),
        ([status(member("n2", state="draining", drain=DRAIN))], "n2: not done within 0 s"),
        ([status(silent("n2"))], "n2: not done within 0 s"),
    ],
)
def test_a_drain_that_does_not_come_to_its_end(
    port: AdminPort, capsys: pytest.CaptureFixture[str], answers: list[Any], error: str
) -> None:
    port.says("/v1/cluster/drain", {"node": "n2", "state": "draining"})
    port.says("/v1/cluster/status", *answers)
    assert run(port, "drain", "n2", "--timeout", "0") == 1
    assert f"kos cluster: {error}" in capsys.readouterr().err


def test_a_node_that_is_not_there(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("drain", "rejoin"):
        port.says(f"/v1/cluster/{what}", {"error": "found node 'x', allowed: n1 n2"}, status=404)
        assert run(port, what, "x") == 1
        assert capsys.readouterr().err.endswith("status 404: found node 'x', allowed: n1 n2\n")


def test_rejoin(port: AdminPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.says("/v1/cluster/rejoin", {"node": "n2", "state": "active"})
    assert run(port, "rejoin", "n2") == 0
    assert run(port, "rejoin", "n2", "--json") == 0
    assert capsys.readouterr().out.startswith("n2 has its share of the keys again\n{")
    assert port.asked[0] == ("POST", "/v1/cluster/rejoin?node=n2", "1")


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "status", "--admin", "127.0.0.1:1"]) == 1
    assert "no answer: [Errno 111] Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["frobnicate"], ["drain"], ["locate", "b/k"], ["drain", "n", "--timeout", "soon"]]
)
def test_what_is_no_command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["cluster", *words])
    assert exit_.value.code == 2
