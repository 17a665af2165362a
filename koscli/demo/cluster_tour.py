"""The tour of a cluster: what several nodes do together, shown step by step with boto3 and real bytes.

Owns: the steps and what each must show. Does not own: the processes (stage), printing (command), one node alone (tour).

Invariant: a step holds only if the bytes that came back were compared with those that were sent.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from koscli.demo.stage import Stage, StageNode
from koscli.demo.tour import THREADS, Step, Tour, phase_of, word

#: Workers hand in what they counted once a second.
_COUNTED_S: Final = 1.5
_SETTLE_S: Final = 15.0
_ROUNDS: Final = 20
#: What a member may be missed for before the others go on without it is 3 s in a demonstration; a client waits longer.
_PATIENCE_S: Final = 30.0


class ClusterTour(Tour):
    """The steps, in the order in which they build on each other."""

    def __init__(self, stage: Stage, *, small_count: int, large_bytes: int) -> None:
        super().__init__(stage, small_count=small_count, large_bytes=large_bytes)
        self._clients = [self._client(node.s3_url) for node in stage.nodes]

    def steps(self) -> Iterator[Step]:
        """Take the tour; a step that raises is a step that did not hold, and the tour goes on."""
        count = len(self._clients)
        small_mib = sum(map(len, self._small.values())) / 2**20
        yield self._step("the nodes know of each other", self._all_there)
        self._s3.create_bucket(Bucket=self._stage.bucket)
        yield self._step(f"upload {len(self._small)} files ({small_mib:.1f} MiB)", self._upload_small)
        yield self._step(f"upload one of {len(self._large) >> 20} MiB (multipart)", self._upload_large)
        yield self._step(f"all files read through all {count}", self._read_small_everywhere)
        yield self._step(f"the large one through all {count} at once", self._read_large_everywhere)
        yield self._step("written through one, read through all", self._write_and_read)
        yield self._step("deleted through one, gone everywhere", self._delete_and_list)
        yield self._step("x-kos-cache of a new file", self._phases)
        yield self._step("a node is killed, the others go on", self._kill)
        yield self._step("it comes back", self._come_back)

    def command(self, *words: str) -> tuple[int, str]:
        """What a `kos` command says, as a shell would run it; its exit code before that."""
        asked = [sys.executable, "-m", "koscli", *words, "--admin", self._stage.admin_url]
        done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=_PATIENCE_S)
        return done.returncode, done.stdout + done.stderr

    def _all_there(self) -> tuple[bool, str]:
        """Every node lists every node."""
        names = [node.name for node in self._stage.nodes]
        deadline = time.monotonic() + _SETTLE_S
        while not (there := all(self._lists(node, names) for node in self._stage.nodes)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return there, f"{', '.join(names)}"

    def _lists(self, node: StageNode, names: list[str]) -> bool:
        asked = [sys.executable, "-m", "koscli", "cluster", "status", "--admin", node.admin_url]
        done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=_PATIENCE_S)
        return done.returncode == 0 and all(name in done.stdout for name in names)

    def _read_small_everywhere(self) -> tuple[bool, str]:
        before = self._from_origin()
        wanted = [(client, key, body) for client in self._clients for key, body in self._small.items()]

        def get(of: tuple[Any, str, bytes]) -> tuple[bool, str]:
            body, phase = self._get_by(of[0], of[1])
            return body == of[2], phase

        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(get, wanted))
        right = all(same for same, _ in answers)
        phases = Counter(phase for _, phase in answers)
        return self._once(before, sum(map(len, self._small.values())), right, f"{dict(phases)}")

    def _read_large_everywhere(self) -> tuple[bool, str]:
        before, began = self._from_origin(), time.perf_counter()

        def get(client: Any) -> bool:
            answer = client.get_object(Bucket=self._stage.bucket, Key="datasets/large.bin")
            at = 0
            for chunk in answer["Body"].iter_chunks(1 << 20):
                if self._large[at : at + len(chunk)] != chunk:
                    return False
                at += len(chunk)
            return at == len(self._large)

        with ThreadPoolExecutor(len(self._clients)) as pool:
            right = all(pool.map(get, self._clients))
        rate = len(self._clients) * len(self._large) / 2**20 / (time.perf_counter() - began)
        return self._once(before, len(self._large), right, f"{rate:.0f} MiB/s together")

    def _once(self, before: float, size: int, right: bool, detail: str) -> tuple[bool, str]:
        """Whether the origin was asked for about as many bytes as there are, however many nodes wanted them: a node that is
        slow to answer may be passed over."""
        times = (self._from_origin() - before) / size
        return right and times < 1.25, f"origin sent {times:.2f} of it, {detail}, bytes {word(right)}"

    def _write_and_read(self) -> tuple[bool, str]:
        seen = 0
        for n in range(_ROUNDS):
            writer = self._clients[n % len(self._clients)]
            body = self._rng.randbytes(10_000 + n)
            writer.put_object(Bucket=self._stage.bucket, Key="state/latest.bin", Body=body)
            seen += sum(self._get_by(reader, "state/latest.bin")[0] == body for reader in self._clients)
        wanted = _ROUNDS * len(self._clients)
        return seen == wanted, f"{seen} of {wanted} reads saw the newest bytes"

    def _delete_and_list(self) -> tuple[bool, str]:
        bucket = self._stage.bucket
        self._clients[-1].delete_object(Bucket=bucket, Key="state/latest.bin")
        listed = [client.list_objects_v2(Bucket=bucket, Prefix="state/").get("KeyCount", 0) for client in self._clients]
        return not any(listed), f"{sum(not count for count in listed)} of {len(listed)} listings are empty"

    def _phases(self) -> tuple[bool, str]:
        key, body = "state/new.bin", self._rng.randbytes(100_000)
        self._s3.put_object(Bucket=self._stage.bucket, Key=key, Body=body)
        right, notes = True, []
        for node, client in zip(self._stage.nodes, self._clients, strict=True):
            answer = client.get_object(Bucket=self._stage.bucket, Key=key)
            right = right and answer["Body"].read() == body
            notes.append(f"{node.name} {answer['ResponseMetadata']['HTTPHeaders'].get('x-kos-cache', 'none')}")
        return right, f"x-kos-cache: {', '.join(notes)}"

    def _kill(self) -> tuple[bool, str]:
        """Of what the dead node kept, the origin brings it again; a write waits until it counts as gone."""
        dead, left = self._stage.nodes[-1], self._clients[:-1]
        self._stage.kill_node(dead)
        right = all(self._get_by(left[0], key)[0] == body for key, body in self._small.items())
        began = time.perf_counter()
        body = self._rng.randbytes(10_000)
        left[0].put_object(Bucket=self._stage.bucket, Key="state/after.bin", Body=body)
        waited = time.perf_counter() - began
        right = right and all(self._get_by(client, "state/after.bin")[0] == body for client in left)
        return right, f"{dead.name} is dead; the next write took {waited:.1f} s, bytes {word(right)}"

    def _come_back(self) -> tuple[bool, str]:
        dead, client = self._stage.nodes[-1], self._clients[-1]
        self._stage.start_nodes([dead])
        there, _ = self._all_there()
        right = self._get_by(client, "state/after.bin")[0] == self._get_by(self._s3, "state/after.bin")[0]
        return there and right, f"{dead.name} sees what was written without it: bytes {word(right)}"

    def _get_by(self, client: Any, key: str) -> tuple[bytes, str]:
        answer = client.get_object(Bucket=self._stage.bucket, Key=key)
        return answer["Body"].read(), phase_of(answer)

    def _from_origin(self) -> float:
        """Bytes that all nodes had from the origin so far, once that does not change any more."""
        return _settled(lambda: sum(_from_origin(node) for node in self._stage.nodes))


def _from_origin(node: StageNode) -> float:
    with urllib.request.urlopen(f"{node.admin_url}/metrics", timeout=_PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith('kos_bytes_total{source="origin"}'))


def _settled(measure: Callable[[], float]) -> float:
    deadline = time.monotonic() + _SETTLE_S
    value, since = measure(), time.monotonic()
    while time.monotonic() - since < _COUNTED_S and time.monotonic() < deadline:
        time.sleep(0.1)
        if (now := measure()) != value:
            value, since = now, time.monotonic()
    return value
