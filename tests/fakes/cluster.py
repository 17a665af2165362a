"""A cluster of real nodes (`kos up`, with their daemons and workers) on this machine, and what can be done to it.

Owns: the nodes' configurations, their processes and signals, and what is asked of them: bytes, metrics, who is a member.
Does not own: the network and its faults (tests.fakes.network), disks (tests.fakes.slow_disk), the origin.

    with cluster(tmp_path, 5) as them:
        them.origin.put("b", "k", b"...")
        them[0].read("b", "k")                             # raw, presigned; them[0].s3 is a boto3 client
        them.network.isolate("n2"); them[1].pause(); them[2].kill(); them[3].kill_daemon()
        them.network.heal(); them[1].resume(); them[2].start(); them.agree()

Invariant: when the block is left, all processes are gone, paused ones too; no wait is longer than its time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import psutil
import yaml
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from prometheus_client.parser import text_string_to_metric_families

from koscache.disk import OsDisk
from koscache.index import Environment, decode_location, index_path, read_pointer
from koscli.demo.processes import running, saw_line, tail
from tests.conditions import eventually
from tests.fakes.generated import Generated
from tests.fakes.network import (
    ADMIN_PORT,
    CLUSTER_PORT,
    CONTROL,
    NETWORKS,
    ORIGIN,
    PEER_PORT,
    S3_PORT,
    Network,
    Place,
)
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, START_TIMEOUT_S, Node, client
from tests.fakes.origin import FakeOrigin

SECRET: Final = "one secret for all of them"
READ_TIMEOUT_S: Final = 60.0
_PIECE_BYTES: Final = 256 * 1024
_MIB: Final = 1 << 20

#: What all nodes of a test have in common unless it says otherwise: small stores, little patience.
SETTINGS: Final[dict[str, Any]] = {
    "workers": 1,
    "cache": {"size": "512MiB", "block_size": "1MiB", "segment_size": "16MiB", "index_size": "16MiB"},
    "origin": {
        "connect_timeout": "1s",
        "read_timeout": "5s",
        "retries": 2,
        "retry_base": "20ms",
        "breaker_open": "500ms",
    },
    "rules": [{"match": "*", "freshness": "1h"}],
    "cluster": {"lease": "1s", "member_lease": "3s", "heartbeat": "500ms", "write_wait": "10s", "read_timeout": "3s"},
    "supervisor": {"restart_base": "100ms", "restart_max": "500ms"},
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back of a raw request; body empty where it was checked instead of kept."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def phase(self) -> str:
        """hit, miss, revalidated, stale or bypass."""
        return self.headers.get("x-kos-cache", "none").partition(";")[0]


class WrongBytes(AssertionError):
    """An answer of the right length and the wrong content."""


class ClusterNode(Node):
    """One node. `place` is where it is in the network."""

    def __init__(self, place: Place, directory: Path, settings: dict[str, Any]) -> None:
        directory.mkdir(parents=True)
        super().__init__(directory, f"http://{place.outward[ORIGIN]}", settings)
        # The config of one node alone comes with https, which no test of clusters is about.
        self.config["listen"] = settings["listen"]
        self.place = place
        self.name = place.name
        self.s3_url = f"http://{place.host}:{S3_PORT}"
        self.s3_port = S3_PORT
        self.admin_url = f"http://{place.host}:{ADMIN_PORT}"
        self.paused: list[int] = []

    # -- life --------------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the process without waiting for it."""
        assert self.process is None
        self.config_path.write_text(yaml.safe_dump(self.config))
        command = [*self.place.command, sys.executable, "-m", "koscli", "up", "--config", str(self.config_path)]
        log = self._stack.enter_context(self.log_path.open("a"))
        self.process = self._stack.enter_context(running(f"kos up ({self.name})", command, stderr=log))

    def await_ready(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        if not saw_line(self.process.stdout, "kos ready", START_TIMEOUT_S):
            raise AssertionError(f"{self.name} did not become ready:\n{tail(self.log_path, 60)}")

    def start(self) -> None:
        self.launch()
        self.await_ready()

    def stop(self) -> int:
        self.resume()
        return super().stop()

    @property
    def up(self) -> bool:
        """It was started and neither stopped nor killed since."""
        return self.process is not None

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        assert self.process is not None
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.paused = []
        super().stop()
        eventually(lambda: all(map(ended, pids)), f"the processes of {self.name} are gone")

    def kill_daemon(self) -> None:
        """SIGKILL to the daemon alone; the supervisor starts another."""
        os.kill(self.daemon_pid(), signal.SIGKILL)

    def kill_worker(self) -> None:
        os.kill(self.worker_pids()[0], signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP to all of its processes: its connections stay, nothing answers."""
        self._stop_running(self.pids())

    def pause_daemon(self) -> None:
        self._stop_running([self.daemon_pid()])

    def resume(self) -> None:
        """Let go on what was paused."""
        for pid in self.paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.paused = []

    def _stop_running(self, pids: list[int]) -> None:
        # The supervisor first: it must not see a child stop.
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.paused.append(pid)

    def pids(self) -> list[int]:
        """The supervisor's, then its children's."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [self.process.pid, *(child.pid for child in children)]

    def _children(self, package: str) -> list[int]:
        found = []
        for pid in self.pids()[1:]:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if any(package in word for word in psutil.Process(pid).cmdline()):
                    found.append(pid)
        return found

    # -- requests ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def s3(self) -> Any:
        """A boto3 client of this node alone, one try a request."""
        return client(self.s3_url, max_pool_connections=64, read_timeout=READ_TIMEOUT_S, connect_timeout=5)

    def url(self, method: str, bucket: str, key: str = "", query: dict[str, str] | None = None) -> str:
        """A presigned URL, good for an hour."""
        return presigned(self.s3_url, method, bucket, key, query)

    def request(
        self,
        method: str,
        bucket: str,
        key: str = "",
        *,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        expect: bytes | Generated | None = None,
        offset: int = 0,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> Answer:
        """One request on a connection of its own. Raises OSError or HTTPException if it breaks, TimeoutError if it hangs.

        expect: compare the body of a 200 or 206 with these bytes from `offset` on as it comes, and keep none of it; raises
        WrongBytes.
        """
        connection = HTTPConnection(self.place.host, S3_PORT, timeout=timeout_s)
        try:
            target = self.url(method, bucket, key, query)[len(self.s3_url) :]
            connection.request(method, target, body, headers or {})
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            if expect is None or answer.status not in (200, 206):
                return Answer(answer.status, named, answer.read())
            at = offset
            while piece := answer.read(_PIECE_BYTES):
                right = (
                    expect.holds(at, piece) if isinstance(expect, Generated) else expect[at : at + len(piece)] == piece
                )
                if not right:
                    raise WrongBytes(f"{self.name}: {bucket}/{key}: wrong bytes in [{at}, {at + len(piece)})")
                at += len(piece)
            if at - offset != int(named["content-length"]):
                raise HTTPException(f"{at - offset} bytes of {named['content-length']}")
            return Answer(answer.status, named)
        finally:
            connection.close()

    def read(self, bucket: str, key: str) -> bytes:
        """The whole object, which must be there."""
        answer = self.request("GET", bucket, key)
        assert answer.status == 200, (self.name, answer)
        return answer.body

    # -- what it says of itself ----------------------------------------------------------------------------------------

    def admin(self, path: str, timeout_s: float = 5.0) -> Any:
        """The JSON of its admin port, whatever the status."""
        try:
            with urllib.request.urlopen(self.admin_url + path, timeout=timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return json.load(refusal)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with at least these labels."""
        total = 0.0
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def stored_bytes(self) -> int:
        """The sum of the lengths of all blocks that its index has."""
        directory = self.config["cache"]["dir"]
        pointer = read_pointer(OsDisk(), directory)
        assert pointer is not None, f"{directory} has no index"
        path = index_path(directory, pointer.index)
        environment = Environment.attach(path, pointer.map_bytes, writable=False)
        try:
            with environment.read() as txn:
                found = [decode_location(key, value) for key, value in txn.cursor(environment.blocks)]
        finally:
            environment.detach()
        return sum(location.length for location in found if location is not None)

    def complaints(self, lines: int = 12) -> str:
        """The last of what its log says that is more than information, for a test that failed."""
        if not self.log_path.exists():
            return ""
        said = [
            line for line in self.log_path.read_text(errors="replace").splitlines() if '"level": "info"' not in line
        ]
        return "\n".join(line[:600] for line in said[-lines:])

    def cluster_status(self) -> dict[str, Any]:
        return dict(self.admin("/v1/cluster/status"))


def ended(pid: int) -> bool:
    """Whether the process is gone, or waits for nothing but its parent's asking."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def presigned(s3_url: str, method: str, bucket: str, key: str = "", query: dict[str, str] | None = None) -> str:
    """A URL signed in its query, good for an hour, path style."""
    path = f"/{bucket}" + (f"/{quote(key, safe='/~')}" if key else "")
    asked = "?" + urlencode(query, quote_via=quote) if query else ""
    request = AWSRequest(method=method, url=f"{s3_url}{path}{asked}")
    S3SigV4QueryAuth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1", expires=3600).add_auth(request)
    return str(request.url)


class Cluster:
    """The nodes, in order; their network; their origin."""

    def __init__(self, nodes: list[ClusterNode], network: Network, origin: FakeOrigin) -> None:
        self.nodes, self.network, self.origin = nodes, network, origin

    def __getitem__(self, index: int) -> ClusterNode:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[ClusterNode]:
        return iter(self.nodes)

    def others(self, *nodes: ClusterNode) -> list[ClusterNode]:
        return [node for node in self.nodes if node not in nodes]

    def start(self) -> None:
        """Start all that are not up, at the same time, and wait until they are ready and know of each other."""
        started = [node for node in self.nodes if not node.up]
        for node in started:
            node.launch()
        for node in started:
            node.await_ready()
        self.agree()

    def stop(self) -> None:
        """SIGTERM to all that are up, at the same time."""
        up = [node for node in self.nodes if node.up]
        if up:
            with ThreadPoolExecutor(len(up)) as pool:
                list(pool.map(lambda node: node.stop(), up))

    def agree(
        self, *, among: list[ClusterNode] | None = None, count: int | None = None, timeout_s: float = 30.0
    ) -> None:
        """Wait until each of these nodes (default: all that are up) says that it is complete among `count` members (default:
        all that are up) and that none of them is in trouble."""
        nodes = among if among is not None else [node for node in self.nodes if node.up]
        if not nodes or nodes[0].config["cluster"]["membership"] == "off":
            return
        wanted = count if count is not None else len(nodes)
        for node in nodes:
            eventually(lambda node=node: agrees(node, wanted), f"{node.name} sees {wanted} members", timeout_s)

    def heal(self) -> None:
        """End every fault: the network's and the origin's, paused and dead nodes; wait until all agree."""
        self.network.heal()
        self.origin.heal()
        for node in self.nodes:
            node.resume()
        self.start()


def agrees(node: ClusterNode, count: int) -> bool:
    """Whether this node has an answer of so many members, each of which trusts its records and misses none of the others."""
    try:
        members = node.cluster_status().get("members", [])
    except (OSError, ValueError):
        return False
    well = [each for each in members if each.get("trusting") and not each.get("in_trouble") and not each.get("error")]
    return len(members) == len(well) == count


@contextlib.contextmanager
def cluster(
    directory: Path,
    count: int,
    *,
    membership: str = "static",
    control: tuple[str, Any] | None = None,
    network: str = "relays",
    settings: dict[str, Any] | None = None,
    each: Callable[[int], dict[str, Any]] = lambda index: {},
    weights: list[int] | None = None,
    origin: FakeOrigin | None = None,
    start: bool = True,
) -> Iterator[Cluster]:
    """count nodes n1, n2 ... that are up and agree; their origin is a FakeOrigin in a thread, unless one is given.

    control: of the control store, for membership "control": a URL with {host} in the place of HOST:PORT, and where that
    really is; without one SQLite, which no network fault can reach. settings: merged into the configuration of all nodes;
    each: of node `index`. Raises tests.fakes.network.Unavailable.
    """
    with contextlib.ExitStack() as stack:
        if origin is None:
            origin = stack.enter_context(FakeOrigin().in_thread())
        net = stack.enter_context(NETWORKS[network]())
        net.serve(ORIGIN, ("127.0.0.1", origin.port))
        if control is not None:
            net.serve(CONTROL, control[1])
        places = [net.join(f"n{index + 1}") for index in range(count)]
        members = [
            {
                "name": place.name,
                "peer": f"{place.advertise}:{PEER_PORT}",
                "cluster": f"{place.advertise}:{CLUSTER_PORT}",
                "weight": 100 if weights is None else weights[index],
            }
            for index, place in enumerate(places)
        ]
        nodes = []
        for index, place in enumerate(places):
            own: dict[str, Any] = {
                "listen": {
                    "s3": f"{place.host}:{S3_PORT}",
                    "admin": f"{place.host}:{ADMIN_PORT}",
                    "peer": f"{place.peer_host}:{PEER_PORT}",
                    "cluster": f"{place.peer_host}:{CLUSTER_PORT}",
                },
                "cluster": {
                    "membership": membership,
                    "name": place.name,
                    "secret": SECRET,
                    "advertise": place.advertise,
                },
                "log": {"access": "off"},
            }
            if membership == "static":
                own["members"] = members
            else:
                own["cluster"]["weight"] = members[index]["weight"]
                url = f"sqlite:///{directory}/control.db" if control is None else control[0]
                own["control"] = {"url": url.format(host=place.outward.get(CONTROL, ""))}
            wanted = functools.reduce(merge, (SETTINGS, own, settings or {}, each(index)))
            nodes.append(ClusterNode(place, directory / place.name, wanted))
        them = Cluster(nodes, net, origin)
        stack.callback(them.stop)
        try:
            if start:
                them.start()
            yield them
        except Exception:
            for node in nodes:
                print(f"--- {node.name}\n{node.complaints()}")
            raise


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mapping by mapping; anything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
