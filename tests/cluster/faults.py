"""What can happen to one node of a cluster, each under its name, with how it ends.

Owns: doing it and undoing it. Does not own: when, and what must hold meanwhile (the tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.fakes.cluster import Cluster, ClusterNode
from tests.fakes.network import CONTROL, ORIGIN


@dataclass(frozen=True, slots=True)
class Fault:
    """strike: does it to the node; end: undoes it, as far as it does not pass by itself. stays_up: the node still answers
    clients."""

    strike: Callable[[Cluster, ClusterNode], None]
    end: Callable[[Cluster, ClusterNode], None]
    stays_up: bool = True


def _mend(them: Cluster, _: ClusterNode) -> None:
    them.network.heal()


def _one_way(them: Cluster, node: ClusterNode) -> None:
    for other in them.others(node):
        them.network.cut_one_way(node.name, other.name)


FAULTS: Final[dict[str, Fault]] = {
    "killed": Fault(lambda _, node: node.kill(), lambda _, node: node.start(), stays_up=False),
    "stopped": Fault(lambda _, node: node.stop() and None, lambda _, node: node.start(), stays_up=False),
    "paused": Fault(lambda _, node: node.pause(), lambda _, node: node.resume(), stays_up=False),
    "daemon killed": Fault(lambda _, node: node.kill_daemon(), lambda *_: None),
    "daemon paused": Fault(lambda _, node: node.pause_daemon(), lambda _, node: node.resume()),
    "worker killed": Fault(lambda _, node: node.kill_worker(), lambda *_: None),
    "without peers": Fault(lambda them, node: them.network.isolate(node.name), _mend),
    "refused by peers": Fault(lambda them, node: them.network.isolate(node.name, silently=False), _mend),
    "deaf one way": Fault(_one_way, _mend),
    "without one peer": Fault(lambda them, node: them.network.cut(node.name, them.others(node)[0].name), _mend),
    "without the control store": Fault(lambda them, node: them.network.cut(node.name, CONTROL), _mend),
    "without the origin": Fault(lambda them, node: them.network.cut(node.name, ORIGIN), _mend),
    "slow": Fault(lambda them, node: them.network.slow(node.name, delay_s=0.2, bytes_per_s=2e6), _mend),
}
