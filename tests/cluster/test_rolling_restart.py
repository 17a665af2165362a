"""All nodes are restarted, one after the other, under load: no client notices that its own retries cannot hide."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conditions import eventually
from tests.fakes.cluster import Cluster, cluster
from tests.fakes.network import S3_PORT, RelayedNetwork
from tests.fakes.node import client, phase

KEYS = 100
SETTINGS: dict[str, Any] = {
    "workers": 2,
    "cache": {"size": "256MiB", "block_size": "256KiB", "segment_size": "4MiB"},
    "rules": [{"match": "*", "freshness": "1h", "local_copy": "always"}],
    "limits": {"drain": "5s"},
}


def hit_ratio(them: Cluster, bodies: dict[str, bytes]) -> float:
    """Of one read of everything through every node; the bytes must be right."""

    def read(index: int) -> int:
        hits = 0
        for key, body in bodies.items():
            answer = them[index].request("GET", "b", key, expect=body)
            assert answer.status == 200, (key, answer)
            hits += answer.phase == "hit"
        return hits

    with ThreadPoolExecutor(len(them)) as pool:
        return sum(pool.map(read, range(len(them)))) / len(them) / len(bodies)


def test_no_request_fails_and_the_cache_is_warm_again(tmp_path: Path) -> None:
    rng = random.Random(11)
    bodies = {f"k{n:03d}": rng.randbytes(rng.randrange(1_000, 400_000)) for n in range(KEYS)}
    with cluster(tmp_path, 4, settings=SETTINGS) as them:
        for key, body in bodies.items():
            them.origin.put("b", key, body)
        assert isinstance(them.network, RelayedNetwork)
        port = them.network.balance([(node.place.host, S3_PORT) for node in them])
        eventually(lambda: hit_ratio(them, bodies) == 1.0, "everything is everywhere")
        stopping, done = threading.Event(), [0] * 6

        def load(n: int) -> None:
            # As SDKs are set up: standard retries, keep-alive connections to one address for all nodes.
            kos = client(f"http://127.0.0.1:{port}", retries={"mode": "standard", "max_attempts": 5})
            chooser = random.Random(n)
            while not stopping.is_set():
                key = chooser.choice(list(bodies))
                if chooser.random() < 0.1:
                    body = chooser.randbytes(50_000)
                    kos.put_object(Bucket="written", Key=f"{n}", Body=body)
                    assert kos.get_object(Bucket="written", Key=f"{n}")["Body"].read() == body
                else:
                    answer = kos.get_object(Bucket="b", Key=key)
                    assert phase(answer) != "none"
                    assert answer["Body"].read() == bodies[key]
                done[n] += 1

        them.origin.create_bucket("written")
        with ThreadPoolExecutor(len(done)) as pool:
            loads = [pool.submit(load, n) for n in range(len(done))]
            try:
                for node in them:
                    before = sum(done)
                    assert node.stop() == 0, node.name
                    eventually(lambda before=before: sum(done) > before + 50, "the load goes on without it")
                    node.start()
                    them.agree()
                    assert not any(each.done() for each in loads)
            finally:
                stopping.set()
            for each in loads:
                each.result()
        began = time.monotonic()
        eventually(lambda: hit_ratio(them, bodies) >= 0.99, "the cache is as warm as it was", 60)
        print(f"{sum(done)} operations; warm again after {time.monotonic() - began:.1f} s")
