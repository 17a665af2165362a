"""What a cluster costs the origin and the network: one copy of everything, wherever and however often it is read."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conditions import eventually
from tests.fakes.cluster import Cluster, ClusterNode, cluster
from tests.fakes.generated import Generated

MIB = 1 << 20
SMALL = 1000
#: The origin is this process, and may send nothing for seconds on a machine that has much to do; who waits for it behind another
#: node must not take that one for dead.
PATIENT = {"read_timeout": "60s"}


def read_all(them: Cluster, objects: dict[str, bytes | Generated], share: float = 1.0) -> None:
    """Every object (or that share of them) through every node, in another order through each, with two readers a node."""

    def read(node: ClusterNode, keys: list[str]) -> None:
        for key in keys:
            answer = node.request("GET", "b", key, expect=objects[key])
            assert answer.status == 200, (node.name, key, answer)

    with ThreadPoolExecutor(2 * len(them)) as pool:
        reads = []
        for n, node in enumerate(them):
            keys = random.Random(n).sample(sorted(objects), int(share * len(objects)))
            reads += [pool.submit(read, node, keys[half::2]) for half in (0, 1)]
        for each in reads:
            each.result()


def settled(measure: Callable[[], list[float]]) -> list[float]:
    """The values once they have not changed for longer than the workers take to hand in their counts."""
    last: list[Any] = [measure(), time.monotonic()]

    def still() -> bool:
        value = measure()
        if value != last[0]:
            last[:] = [value, time.monotonic()]
        return bool(time.monotonic() - last[1] > 1.5)

    eventually(still, "the counts have settled")
    return list(last[0])


@pytest.mark.parametrize(
    "large_bytes", [64 * MIB, pytest.param(2 << 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_five_nodes_read_everything_from_the_origin_once(tmp_path: Path, large_bytes: int) -> None:
    rng = random.Random(7)
    objects: dict[str, bytes | Generated] = {
        f"small/{n:04d}": rng.randbytes(int(rng.lognormvariate(9, 1.2)) + 1) for n in range(SMALL)
    }
    objects["large"] = Generated("large", large_bytes)
    total = sum(map(len, objects.values()))
    weights = [60, 100, 100, 120, 120]
    settings: dict[str, Any] = {
        "cache": {
            "size": f"{max(512, 2 * large_bytes // MIB)}MiB",
            "block_size": f"{large_bytes // 256 // 1024}KiB",
            "segment_size": "68MiB",
        },
        "cluster": PATIENT,
        "rules": [{"match": "*", "freshness": "immutable", "local_copy": "never"}],
    }
    with cluster(tmp_path, 5, network="direct", weights=weights, settings=settings) as them:
        for key, body in objects.items():
            them.origin.put("b", key, body)
        read_all(them, objects)
        read_all(them, objects, 0.2)
        sent = them.origin.sent_bytes(op="GetObject")
        assert total <= sent <= 1.01 * total, f"the origin sent {sent / total:.3f} times the data"
        stored = [node.stored_bytes() for node in them]
        assert total <= sum(stored) <= 1.01 * total, stored
        for node, weight, bytes_ in zip(them, weights, stored, strict=True):
            share = bytes_ / total / (weight / sum(weights))
            assert 0.75 <= share <= 1.25, f"{node.name} keeps {share:.2f} times its share: {stored}"


@pytest.mark.parametrize(
    "size", [256 * MIB, pytest.param(4 << 30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_eight_nodes_pull_one_object_at_once(tmp_path: Path, size: int) -> None:
    settings: dict[str, Any] = {
        "cache": {"size": f"{max(512, 2 * size // MIB)}MiB", "block_size": "8MiB", "segment_size": "68MiB"},
        "cluster": PATIENT,
        "rules": [{"match": "*", "freshness": "immutable", "local_copy": "always"}],
    }
    with cluster(tmp_path, 8, network="direct", settings=settings) as them:
        body = Generated("model", size)
        them.origin.put("b", "model", body)
        with ThreadPoolExecutor(len(them)) as pool:
            answers = pool.map(lambda node: node.request("GET", "b", "model", expect=body), them)
            assert [answer.status for answer in answers] == [200] * len(them)
        sent = them.origin.sent_bytes(op="GetObject")
        assert size <= sent <= 1.01 * size, f"the origin sent {sent / size:.3f} times the object"
        ways = [(node, way) for node in them for way in ("peer", "peer_out")]
        counts = settled(lambda: [node.metric("kos_bytes_total", source=way) for node, way in ways])
        for (node, way), passed in zip(ways, counts, strict=True):
            assert passed <= 1.1 * size, f"{node.name}: {way} {passed / size:.3f} times the object"
        # What was pulled is here now: nobody is asked again.
        them.origin.forget()
        before = [node.metric("kos_bytes_total", source="peer") for node in them]
        for node in them:
            eventually(lambda node=node: node.stored_bytes() == size, f"{node.name} keeps all of it")
            assert node.request("GET", "b", "model", expect=body).phase == "hit"
        assert them.origin.requests == []
        assert [node.metric("kos_bytes_total", source="peer") for node in them] == before
