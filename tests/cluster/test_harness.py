"""The harness itself: what it says that it does to links, disks and processes, it does. The nodes here stand alone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conditions import eventually
from tests.fakes.cluster import WrongBytes, cluster, ended
from tests.fakes.generated import PERIOD, Generated
from tests.fakes.network import ORIGIN, Unavailable, namespaces
from tests.fakes.origin import FakeOrigin
from tests.fakes.relay import Relays, relays
from tests.fakes.slow_disk import slow_disk

MIB = 1 << 20


class Counter:
    """A server that reads all of each connection, answers how much it was, and closes."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.accepted = 0

    @property
    def at(self) -> tuple[str, int]:
        host, port = self.server.getsockname()
        return host, port

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed in the end
            while True:
                connection, _ = self.server.accept()
                self.accepted += 1
                threading.Thread(target=self._count, args=(connection,), daemon=True).start()

    def _count(self, connection: socket.socket) -> None:
        count = 0
        with connection, contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 18):
                count += len(piece)
            connection.sendall(str(count).encode())


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    thread = threading.Thread(target=counter.run, name="counter")
    thread.start()
    yield counter
    counter.server.shutdown(socket.SHUT_RDWR)
    counter.server.close()
    thread.join()


@pytest.fixture
def relay() -> Iterator[Relays]:
    with relays() as process:
        process.name_source("127.0.0.1", "a")
        yield process


def connect(port: int, timeout_s: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout_s)


def send(connection: socket.socket, count: int) -> None:
    """That many bytes and the end of the stream."""
    for at in range(0, count, MIB):
        connection.sendall(bytes(min(MIB, count - at)))
    connection.shutdown(socket.SHUT_WR)


def test_a_relay_passes_every_byte_and_both_ends(counter: Counter, relay: Relays) -> None:
    port = relay.listen("127.0.0.1", 0, "b", counter.at)
    for count in (0, 1, 300_001, 64 * MIB + 1):
        with connect(port) as connection:
            send(connection, count)
            assert connection.recv(100) == str(count).encode()
            assert connection.recv(100) == b""
    eventually(lambda: relay.counts()["a", "b"][0] == 0, "no connection is left")


def test_a_silent_link_freezes_its_connections_and_opens_again(counter: Counter, relay: Relays) -> None:
    port = relay.listen("127.0.0.1", 0, "b", counter.at)
    with connect(port) as before:
        before.sendall(b"four")
        eventually(lambda: counter.accepted == 1)
        relay.set_link("a", "b", "silent")
        before.sendall(b"more")
        before.shutdown(socket.SHUT_WR)
        with connect(port) as during:
            send(during, 3)
            for frozen in (before, during):
                frozen.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    frozen.recv(1)
            assert counter.accepted == 1
            relay.set_link("a", "b", "open")
            for frozen, count in ((before, b"8"), (during, b"3")):
                frozen.settimeout(20)
                assert frozen.recv(100) == count


def test_a_refused_link_resets_old_and_new_connections(counter: Counter, relay: Relays) -> None:
    port = relay.listen("127.0.0.1", 0, "b", counter.at)
    with connect(port) as before:
        before.sendall(b"x")
        eventually(lambda: counter.accepted == 1)
        relay.set_link("a", "b", "refused")
        with pytest.raises(ConnectionResetError):
            before.recv(1)
    with pytest.raises(ConnectionResetError), connect(port) as after:
        after.recv(1)


def test_one_address_for_several_is_whichever_lets_in(counter: Counter, relay: Relays) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = relay.listen("127.0.0.1", 0, "any", [nobody.getsockname(), counter.at])
        for _ in range(4):
            with connect(port) as connection:
                send(connection, 7)
                assert connection.recv(100) == b"7"


def test_faults_are_of_one_link_only(counter: Counter, relay: Relays) -> None:
    relay.name_source("127.0.0.2", "other")
    port = relay.listen("127.0.0.1", 0, "b", counter.at)
    relay.set_link("a", "b", "silent")
    with socket.create_connection(("127.0.0.1", port), 20, source_address=("127.0.0.2", 0)) as free:
        send(free, 5)
        assert free.recv(100) == b"5"


def test_a_slow_link_is_late_and_narrow(counter: Counter, relay: Relays) -> None:
    port = relay.listen("127.0.0.1", 0, "b", counter.at)
    relay.set_link("a", "b", "open", delay_s=0.1)
    began = time.monotonic()
    with connect(port) as connection:
        send(connection, 1)
        assert connection.recv(100) == b"1"
    assert time.monotonic() - began >= 0.2
    relay.set_link("a", "b", "open", bytes_per_s=20e6)
    began = time.monotonic()
    with connect(port) as connection:
        send(connection, 10_000_000)
        assert connection.recv(100) == b"10000000"
    assert time.monotonic() - began >= 0.5


def test_the_end_of_the_test_ends_the_relays() -> None:
    with relays():
        children = psutil.Process(os.getpid()).children()
        (process,) = [child for child in children if "tests.fakes.relay" in child.cmdline()]
    assert not process.is_running()


def test_generated_content_is_the_same_at_every_way_to_it() -> None:
    body = Generated("seed", 3 * PERIOD + 5)
    whole = b"".join(bytes(body[at : at + 1000].view()) for at in range(0, len(body), 1000))
    assert len(whole) == len(body)
    assert bytes(body[PERIOD - 3 : PERIOD + 4].view()) == whole[PERIOD - 3 : PERIOD + 4]
    assert body.holds(17, whole[17:]) and not body.holds(16, whole[17:])
    assert whole[:MIB] != whole[MIB : 2 * MIB]
    assert body.etag != Generated("other", len(body)).etag != Generated("seed", 1).etag


def test_an_origin_serves_more_than_it_holds(tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    with cluster(tmp_path, 1, membership="off", network="direct", settings={"cache": {"size": "128MiB"}}) as them:
        body = Generated("large", 2 << 30)
        them.origin.put("b", "large", body)
        for start in (0, 1_500_000_000, len(body) - 5 * MIB):
            stop = start + 5 * MIB
            wanted = {"Range": f"bytes={start}-{stop - 1}"}
            answer = them[0].request("GET", "b", "large", headers=wanted, expect=body, offset=start)
            assert answer.status == 206
        with pytest.raises(WrongBytes):
            them[0].request("GET", "b", "large", headers={"Range": "bytes=0-99"}, expect=body, offset=1)
        assert 15 * MIB <= them.origin.sent_bytes(key="large") < 300 * MIB
    assert psutil.Process().memory_info().rss - before < 200 * MIB


@pytest.mark.parametrize("network", ["relays", "namespaces"])
def test_one_node_loses_the_origin_and_the_others_do_not(tmp_path: Path, network: str) -> None:
    try:
        patience = {"origin": {"read_timeout": "1s", "retries": 0}}
        with cluster(tmp_path, 2, membership="off", network=network, settings=patience) as them:
            first, second = them
            them.origin.put("b", "k", b"bytes")
            them.network.cut(first.name, ORIGIN)
            assert first.request("GET", "b", "k").status == 503
            assert second.read("b", "k") == b"bytes"
            them.network.heal()
            eventually(lambda: first.request("GET", "b", "k").status == 200, "the origin is reached again")
            assert first.s3.get_object(Bucket="b", Key="k")["Body"].read() == b"bytes"
            assert first.metric("kos_origin_requests_total") > 0
    except Unavailable as missing:
        pytest.skip(str(missing))
    assert not [line for line in _links() if line.startswith("kos")]


def _links() -> list[str]:
    shown = subprocess.run(["ip", "-o", "link"], check=False, capture_output=True, text=True).stdout
    return [line.split(": ")[1] for line in shown.splitlines()]


def test_namespaces_lose_packets_between_two_nodes_only() -> None:
    try:
        with namespaces() as network:
            network.serve(ORIGIN, ("127.0.0.1", 9))
            places = [network.join(f"n{n}") for n in (1, 2, 3)]
            assert all(_reaches(one.command, other.peer_host) for one in places for other in places)
            network.cut("n1", "n2")
            assert not _reaches(places[0].command, places[1].peer_host)
            assert not _reaches(places[1].command, places[0].peer_host)
            assert _reaches(places[0].command, places[2].peer_host)
            assert _reaches(places[1].command, places[2].peer_host)
            network.heal()
            network.isolate("n3", silently=False)
            assert not _reaches(places[0].command, places[2].peer_host)
            assert _reaches(places[0].command, places[1].peer_host)
            assert _reaches(places[2].command, "198.18" + places[2].outward[ORIGIN][6:].partition(":")[0])
            network.heal()
            assert all(_reaches(one.command, other.peer_host) for one in places for other in places)
            network.slow("n1", bytes_per_s=1e6)
            network.heal()
    except Unavailable as missing:
        pytest.skip(str(missing))


def _reaches(command: tuple[str, ...], host: str) -> bool:
    """Whether a connection gets as far as being refused by that host itself: nobody listens on port 9."""
    program = (
        "import socket, sys\ns = socket.socket(); s.settimeout(0.5)\n"
        f"try: s.connect(('{host}', 9))\nexcept ConnectionRefusedError: sys.exit(0)\nexcept OSError: sys.exit(1)"
    )
    return subprocess.run([*command, "python3", "-c", program], check=False, timeout=20).returncode == 0


def test_a_slow_disk_is_slow_for_those_who_are_charged(tmp_path: Path) -> None:
    program = "import os, sys, time; f = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); t = time.monotonic(); "
    program += "os.pwrite(f, bytes(3_000_000), 0); print(time.monotonic() - t)"
    try:
        with slow_disk(tmp_path, 64 * MIB) as disk:
            disk.slow(2_000_000)
            held = ["sh", "-c", 'read go; exec python3 -c "$1" "$2"', "-", program, str(disk.directory / "file")]
            with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
                disk.charge([process.pid])
                took, _ = process.communicate("go\n", timeout=60)
            assert float(took) > 1.0
            disk.heal()
    except Unavailable as missing:
        pytest.skip(str(missing))
    assert not (tmp_path / "disk.img").exists()


def test_processes_are_paused_killed_and_started_again(tmp_path: Path) -> None:
    origin = FakeOrigin()
    with origin.in_thread(), cluster(tmp_path, 2, membership="off", network="direct", origin=origin) as them:
        first, second = them
        origin.put("b", "k", b"bytes")
        first.pause()
        with pytest.raises(TimeoutError):
            first.request("GET", "b", "k", timeout_s=0.5)
        assert second.read("b", "k") == b"bytes"
        first.resume()
        assert first.read("b", "k") == b"bytes"
        pids = second.pids()
        second.kill()
        assert all(map(ended, pids))
        with pytest.raises(ConnectionRefusedError):
            second.request("GET", "b", "k")
        daemon = first.daemon_pid()
        first.kill_daemon()
        eventually(lambda: first.daemon_alive() and first.daemon_pid() != daemon, "another daemon")
        them.heal()
        assert second.read("b", "k") == b"bytes"
        first.pause()  # and left so: the end must not hang
        pids = [*first.pids(), *second.pids()]
    assert all(map(ended, pids))
