"""Networks in which the nodes of a test's cluster live, and in which they can be cut off from each other.

Owns: the addresses of every node, and the faults of its links: two ways to have them behind one face, Network.
Does not own: the nodes (tests.fakes.cluster), relaying (tests.fakes.relay), the origin and the control store themselves.

    RelayedNetwork     node i listens at 127.77.S.(10+i) and is reached by its peers, and reaches the origin and the control
                       store, through relays at 127.78.S.(10+i). Needs no rights. A cut link freezes or resets connections;
                       what packets, routes and timeouts of the kernel would do is not tried.
    NamespaceNetwork   each node in a network namespace of its own, with one leg in a bridge for peers (198.19.S.0/24) and one
                       in a bridge to the outside, which is the test, the origin and the control store (198.18.S.0/24).
                       A cut link loses packets. Needs root and `ip`.
    DirectNetwork      as RelayedNetwork, but with nothing between the nodes and no faults: for bytes by the GiB.

S is a number that no other test on this machine uses at the time. Places are named: nodes by their names, ORIGIN, CONTROL.

Invariant: when the block that made a network is left, however that happens, nothing that it made is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tests.fakes.relay import Relays, Target, relays

ORIGIN: Final = "origin"
CONTROL: Final = "control"

S3_PORT: Final = 9000
ADMIN_PORT: Final = 9001
PEER_PORT: Final = 9002
CLUSTER_PORT: Final = 9003
_PORTS: Final = {ORIGIN: 9100, CONTROL: 9101}
_NODES_MAX: Final = 200
_TOOL_TIMEOUT_S: Final = 20.0


class Unavailable(Exception):
    """This machine cannot do that; the message says why. A test that needs it is skipped with this reason."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is. host: where it listens for clients and on its admin port; peer_host: where it listens for peers.
    advertise: the host at which the peers reach it, at the same ports. outward: HOST:PORT of the origin and of the control
    store, as this node reaches them. command: what its command begins with."""

    name: str
    host: str
    peer_host: str
    advertise: str
    outward: dict[str, str]
    command: tuple[str, ...] = ()


class Network(ABC):
    """serve() what is outside first, then join() the nodes; then links can be cut and mended as often as one likes."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self._outside: dict[str, Target] = {}

    def serve(self, name: str, at: Target) -> None:
        """ORIGIN or CONTROL is really here."""
        assert not self.places and name in _PORTS
        self._outside[name] = at

    def join(self, name: str) -> Place:
        """A place for one more node."""
        assert name not in self.places and len(self.places) < _NODES_MAX
        place = self._join(name, len(self.places) + 11)
        self.places[name] = place
        return place

    def isolate(self, name: str, *, silently: bool = True) -> None:
        """Cut the node off from all its peers; origin, control store and clients still reach it."""
        for other in self.places:
            if other != name:
                self.cut(name, other, silently=silently)

    @abstractmethod
    def cut(self, one: str, other: str, *, silently: bool = True) -> None:
        """Nothing passes between these two any more, in either direction. silently: nobody is told; else new connections are
        refused, and open ones reset where there are relays. The second may be ORIGIN or CONTROL."""

    @abstractmethod
    def cut_one_way(self, source: str, target: str) -> None:
        """Connections that the source opens, or has opened, to the target are silent; those of the target go on."""

    @abstractmethod
    def slow(self, name: str, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        """All that passes between this node and its peers, each way, is that much later, or that slow."""

    @abstractmethod
    def heal(self) -> None:
        """As at the beginning: nothing cut, nothing slow."""

    @abstractmethod
    def _join(self, name: str, number: int) -> Place: ...


class DirectNetwork(Network):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def _join(self, name: str, number: int) -> Place:
        host = f"127.77.{self._number}.{number}"
        return Place(name, host, host, host, {each: _hostport(at) for each, at in self._outside.items()})

    def cut(self, one: str, other: str, *, silently: bool = True) -> None:
        raise Unavailable("a direct network has no faults")

    def cut_one_way(self, source: str, target: str) -> None:
        raise Unavailable("a direct network has no faults")

    def slow(self, name: str, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        raise Unavailable("a direct network has no faults")

    def heal(self) -> None:
        return


class RelayedNetwork(Network):
    def __init__(self, number: int, relays: Relays) -> None:
        super().__init__()
        self._number, self._relays = number, relays
        self._changed: set[tuple[str, str]] = set()

    def _join(self, name: str, number: int) -> Place:
        host, advertise = f"127.77.{self._number}.{number}", f"127.78.{self._number}.{number}"
        self._relays.name_source(host, name)
        for port in (PEER_PORT, CLUSTER_PORT):
            self._relays.listen(advertise, port, name, (host, port))
        for each, at in self._outside.items():
            self._relays.listen(advertise, _PORTS[each], each, at, source=name)
        outward = {each: f"{advertise}:{_PORTS[each]}" for each in self._outside}
        return Place(name, host, host, advertise, outward)

    def cut(self, one: str, other: str, *, silently: bool = True) -> None:
        for source, target in ((one, other), (other, one)):
            self._set(source, target, "silent" if silently else "refused")

    def cut_one_way(self, source: str, target: str) -> None:
        self._set(source, target, "silent")

    def slow(self, name: str, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        for other in self.places:
            if other != name:
                for source, target in ((name, other), (other, name)):
                    self._set(source, target, "open", delay_s, bytes_per_s)

    def heal(self) -> None:
        for source, target in self._changed:
            self._relays.set_link(source, target, "open")
        self._changed.clear()

    def balance(self, targets: list[tuple[str, int]]) -> int:
        """A port of 127.0.0.1 that leads to each of these in turn, to the next where one lets nobody in: as a service of
        Kubernetes does."""
        return self._relays.listen("127.0.0.1", 0, "any", targets, source="clients")

    def _set(
        self, source: str, target: str, state: str, delay_s: float = 0.0, bytes_per_s: float | None = None
    ) -> None:
        self._changed.add((source, target))
        self._relays.set_link(source, target, state, delay_s=delay_s, bytes_per_s=bytes_per_s)


class NamespaceNetwork(Network):
    """undo: takes what must be done in the end, in reverse order."""

    def __init__(self, number: int, relays: Relays, undo: contextlib.ExitStack) -> None:
        super().__init__()
        self._number, self._relays, self._undo = number, relays, undo
        self._mend: list[tuple[str, ...]] = []
        self._hosts = {"test": 1, ORIGIN: 2, CONTROL: 3}
        for bridge in (self._bridge("outside"), self._bridge("peers")):
            undo.callback(_try, "ip", "link", "del", bridge)
            _run("ip", "link", "add", bridge, "type", "bridge")
            _run("ip", "link", "set", bridge, "up")
        for host in self._hosts.values():
            _run("ip", "address", "add", f"{self._outside_host(host)}/24", "dev", self._bridge("outside"))

    def serve(self, name: str, at: Target) -> None:
        super().serve(name, at)
        self._relays.listen(self._outside_host(self._hosts[name]), _PORTS[name], name, at)

    def _join(self, name: str, number: int) -> Place:
        self._hosts[name] = number
        space = self._space(name)
        self._undo.callback(_try, "ip", "netns", "del", space)
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "set", "lo", "up")
        for leg, host in (("outside", self._outside_host(number)), ("peers", self._peer_host(number))):
            port = self._port(name, leg)
            # Links of a namespace that is deleted go a little later: ours are named again by the next test.
            self._undo.callback(_try, "ip", "link", "del", port)
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", leg, "netns", space)
            _run("ip", "link", "set", port, "master", self._bridge(leg), "up")
            _run("ip", "-n", space, "address", "add", f"{host}/24", "dev", leg)
            _run("ip", "-n", space, "link", "set", leg, "up")
        outward = {each: f"{self._outside_host(self._hosts[each])}:{_PORTS[each]}" for each in self._outside}
        peer_host = self._peer_host(number)
        command = ("ip", "netns", "exec", space)
        return Place(name, self._outside_host(number), peer_host, peer_host, outward, command)

    def cut(self, one: str, other: str, *, silently: bool = True) -> None:
        outside = other in _PORTS
        for source, target in ((one, other),) if outside else ((one, other), (other, one)):
            host = self._hosts[target]
            address = self._outside_host(host) if outside else self._peer_host(host)
            ip = ("ip", "-n", self._space(source))
            if silently:
                # Packets to a card that nobody has: they are lost without a word, as behind a switch that is down.
                on = ("dev", "outside" if outside else "peers")
                _run(*ip, "neigh", "replace", address, "lladdr", "02:00:00:00:de:ad", "nud", "permanent", *on)
                self._mend.append((*ip, "neigh", "del", address, *on))
            else:
                _run(*ip, "route", "replace", "unreachable", f"{address}/32")
                self._mend.append((*ip, "route", "del", "unreachable", f"{address}/32"))

    def cut_one_way(self, source: str, target: str) -> None:
        raise Unavailable("without its way back a TCP connection is cut in both directions")

    def slow(self, name: str, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        shape: list[str] = []
        if delay_s:
            shape = ["netem", "delay", f"{delay_s * 1000:g}ms", "limit", "100000"]
            if bytes_per_s is not None:
                shape += ["rate", f"{bytes_per_s * 8:.0f}bit"]
        elif bytes_per_s is not None:
            shape = ["tbf", "rate", f"{bytes_per_s * 8:.0f}bit", "burst", "128kb", "latency", "200ms"]
        for where in (("tc", "-n", self._space(name)), ("tc",)):
            device = "peers" if len(where) > 1 else self._port(name, "peers")
            try:
                _run(*where, "qdisc", "replace", "dev", device, "root", *shape)
            except subprocess.CalledProcessError as error:
                raise Unavailable(f"tc {shape[0]}: {error.stderr.strip()}") from error
            self._mend.append((*where, "qdisc", "del", "dev", device, "root"))

    def heal(self) -> None:
        for command in dict.fromkeys(reversed(self._mend)):
            _run(*command)
        self._mend.clear()

    def _space(self, name: str) -> str:
        return f"kos{self._number}{name}"

    def _port(self, name: str, leg: str) -> str:
        """The bridge's end of a node's leg; names of links have at most 15 characters."""
        return f"kos{self._number}{name}{leg[0]}"

    def _bridge(self, leg: str) -> str:
        return f"kos{self._number}{leg[0]}"

    def _outside_host(self, host: int) -> str:
        return f"198.18.{self._number}.{host}"

    def _peer_host(self, host: int) -> str:
        return f"198.19.{self._number}.{host}"


@contextlib.contextmanager
def direct() -> Iterator[DirectNetwork]:
    with _number() as number:
        yield DirectNetwork(number)


@contextlib.contextmanager
def relayed() -> Iterator[RelayedNetwork]:
    with _number() as number, relays() as process:
        yield RelayedNetwork(number, process)


@contextlib.contextmanager
def namespaces() -> Iterator[NamespaceNetwork]:
    """Raises Unavailable where namespaces and links cannot be made."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if shutil.which("ip") is None:
        raise Unavailable("network namespaces need `ip` (iproute2)")
    with _number() as number, relays() as process, contextlib.ExitStack() as undo:
        try:
            network = NamespaceNetwork(number, process, undo)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield network


#: by the names that tests give
NETWORKS: Final[dict[str, Callable[[], contextlib.AbstractContextManager[Network]]]] = {
    "direct": direct,
    "relays": relayed,
    "namespaces": namespaces,
}


@contextlib.contextmanager
def _number() -> Iterator[int]:
    """A number that nobody else has as long as the block lasts: who has bound its first address has it."""
    numbers = list(range(1, 255))
    random.SystemRandom().shuffle(numbers)
    for number in numbers:
        with socket.socket() as claim:
            try:
                claim.bind((f"127.77.{number}.1", S3_PORT))
            except OSError:
                continue
            yield number
            return
    raise Unavailable("254 clusters run on this machine already")


def _hostport(at: Target) -> str:
    if not isinstance(at, tuple):
        raise Unavailable("what is not one address is reached through relays only")
    return f"{at[0]}:{at[1]}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S)


def _try(*command: str) -> None:
    """What is being removed may never have been made."""
    subprocess.run(command, check=False, capture_output=True, timeout=_TOOL_TIMEOUT_S)
