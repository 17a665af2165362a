"""A node is drained, stopped, started and let in again, by the command line: its warm part is with the others by then."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conditions import eventually
from tests.fakes.cluster import ClusterNode, cluster
from tests.fakes.generated import Generated

MIB = 1 << 20
SETTINGS: dict[str, Any] = {
    # Blocks are where the ring has them and nowhere else, so that what is moved is what would be missed.
    "rules": [{"match": "*", "freshness": "1h", "local_copy": "never"}],
    "cache": {"small_size": "16KiB"},
}


def kos(node: ClusterNode, *words: str, code: int = 0) -> str:
    """What the command says; its exit status must be `code`."""
    command = [sys.executable, "-m", "koscli", "cluster", *words, "--admin", node.admin_url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done
    return done.stdout + done.stderr


def state_of(name: str, *, seen_by: ClusterNode) -> str:
    members = seen_by.cluster_status()["members"]
    return next((str(each["state"]) for each in members if each["name"] == name), "none")


def owned(node: ClusterNode, key: str) -> dict[str, tuple[int, int]]:
    """Of each node: how many blocks of the object it should keep, and how many it does."""
    located = node.admin(f"/v1/cluster/locate?bucket=b&key={key}")
    return {each["name"]: (each["should_keep_count"], each["keeps_count"]) for each in located["nodes"]}


def read_all(node: ClusterNode, bodies: dict[str, bytes], large: Generated) -> None:
    for key, body in bodies.items():
        assert node.read("b", key) == body
    assert node.request("GET", "b", "large", expect=large).status == 200


@pytest.mark.parametrize("membership", ["control", pytest.param("static", marks=pytest.mark.slow)])
def test_a_drained_node_is_not_missed(tmp_path: Path, membership: str) -> None:
    bodies = {f"k{n:02d}": bytes([n]) * (2_000 + 2_000 * n) for n in range(40)}
    large = Generated("large", 40 * MIB + 5)
    with cluster(tmp_path, 3, membership=membership, settings=SETTINGS) as them:
        first, leaving, last = them
        for key, body in bodies.items():
            them.origin.put("b", key, body)
        them.origin.put("b", "large", large)
        for _ in range(2):
            read_all(first, bodies, large)

        def all_kept() -> bool:
            kept = owned(first, "large")
            return all(keeps >= should for should, keeps in kept.values()) and kept[leaving.name][0] > 0

        eventually(all_kept, "every block is at its owner")
        located = kos(first, "locate", "s3://b/large")
        assert "blocks    41 of 1.00 MiB" in located and "n2: should keep " in located
        status = kos(first, "status")
        assert status.splitlines()[0].startswith(f"3 members, membership {membership}, view ")

        assert "found node 'nobody', allowed: n1 n2 n3" in kos(first, "drain", "nobody", code=1)
        said = kos(first, "drain", leaving.name)
        assert "n2: done: " in said and "could not be" not in said
        eventually(lambda: state_of(leaving.name, seen_by=last) == "draining")
        kept = owned(last, "large")
        assert kept[leaving.name][0] == 0
        assert all(keeps >= should for should, keeps in kept.values()), "the others have its blocks"

        # In a static cluster nobody trusts his records while a member is down, so there it stays up for this.
        if membership == "control":
            leaving.stop()
            eventually(lambda: state_of(leaving.name, seen_by=last) == "none", "it has left for good")
        them.origin.forget()
        read_all(last, bodies, large)
        read_all(first, bodies, large)
        # Each new home asks once whether what it was told is still so, and no byte comes again: but where a home was slow and a
        # second node was asked as well, which has never heard of the object.
        again = [each for each in them.origin.requests if each.method == "GET" and each.status != 304]
        assert len(again) <= len(bodies) // 10, again
        assert sum(each.sent_bytes for each in again) < len(large) // 10
        if membership == "static":
            leaving.stop()
            assert "n2: there is no line to it" in kos(first, "drain", leaving.name, "--no-wait", code=1)

        leaving.start()
        eventually(lambda: state_of(leaving.name, seen_by=first) == "draining", "it drains until it is to rejoin")
        them.agree()
        kos(last, "rejoin", leaving.name)
        eventually(lambda: owned(first, "large")[leaving.name][0] > 0, "it has its share again")
        leaving.stop()
        leaving.start()
        them.agree()
        assert state_of(leaving.name, seen_by=first) == "active"


def test_the_admin_port_of_a_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as them:
        one, other = them

        def post(path: str, headers: dict[str, str]) -> tuple[int, str]:
            request = urllib.request.Request(one.admin_url + path, method="POST", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, ""
            except urllib.error.HTTPError as refusal:
                with refusal:
                    return refusal.code, json.load(refusal)["error"]

        assert post("/v1/cluster/drain?node=n2", {})[0] == 403
        assert post("/v1/cluster/drain?node=n2", {"x-kos-admin": "1", "Origin": "http://evil.example"})[0] == 403
        assert post("/v1/cluster/drain", {"x-kos-admin": "1"})[0] == 400
        assert post("/v1/cluster/drain?node=n3", {"x-kos-admin": "1"}) == (404, "found node 'n3', allowed: n1 n2")
        assert post("/v1/cluster/drain?node=n2", {"x-kos-admin": "1"}) == (200, "")
        eventually(lambda: state_of("n2", seen_by=one) == "draining")
        status, error = post("/v1/cluster/drain?node=n1", {"x-kos-admin": "1"})
        assert status == 409 and "no other node is active" in error
        listening = one.admin("/v1/status")["listen"]
        assert set(listening) == {"s3", "admin", "peer", "cluster"}

        other.pause()
        eventually(lambda: "no line" in str(one.cluster_status()["members"][0]["in_trouble"].get("n2", "")))
        assert one.ready()["ready"], "a node is ready without its cluster"
        said = kos(one, "status", code=1)
        assert "n2 does not answer n1" in said and "n1 says of n2: no line" in said
        status, error = post("/v1/cluster/rejoin?node=n2", {"x-kos-admin": "1"})
        assert (status, error) == (503, "n2: there is no line to it")
        other.resume()

        one.pause_daemon()
        with pytest.raises(TimeoutError):
            one.admin("/v1/cluster/status", timeout_s=1)
        assert one.ready()["ready"]
        one.resume()
        them.agree()
