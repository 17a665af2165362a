"""Which nodes keep what: the home of each key, and the places of a large object's blocks.

Owns: the ring. Does not own: who is a member (koscache.cluster.view), or what is asked of an owner (koscache.carrier).

**Keys.** Every node has points on a circle of 64 bits, in number by its weight (the library uhashring). A name is hashed to three
places on the circle, and nodes are preferred in the order in which their points follow, nearest first. With one place
this is plain consistent hashing, whose shares differ as the gaps between points do; the nearest of three evens them out
as five times as many points would (Appleton and O'Reilly, "Multi-probe consistent hashing", 2015). A name's order of the
other nodes is the same with a node as without it.

**Blocks.** A reader of a whole large object waits for the node that has most of it, and chance gives one of 8 nodes 1.4 times
its share of 512 blocks now and then. So blocks are placed by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2016): one after the other, each on the first node of its own order that has not had its share yet. What is
particular here:

- Each GROUP of blocks is placed for itself, so that a block's place depends on few others and is soon found.
- Limits grow within the group, by stages that double: objects smaller than a group are even too, and a block's place
  depends on its own and earlier stages only.
- A node's limit is rounded up or down by a hash of node and group. Rounded the same way for all, the limits would jump for
  all nodes at once wherever one joins or leaves, and up to half of all blocks with them.

docs/scaling.md has what all this yields.

Invariant: a pure function of the members' names and weights. Whatever the process, machine or version of kos, who sees the
same members finds the same owners; tests hold the values.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from heapq import heapify, heapreplace
from itertools import chain, islice, takewhile
from typing import Final

from uhashring import HashRing
from xxhash import xxh3_64_intdigest

from koscache.cluster.view import Member, MemberState
from koscache.content import object_name, split_name

#: Points of a node of mean weight. A node that weighs next to nothing has POINTS_MIN: fewer make its share a matter of luck.
POINTS: Final = 512
POINTS_MIN: Final = 16
#: Places on the circle that a name has.
PROBES: Final = 3
#: Blocks that are placed with regard to each other, and the length of the first stage; each later stage ends at twice as many.
GROUP: Final = 512
STAGE: Final = 16
#: How many blocks of a stage a node may have above its share, before rounding: nodes²/SLACK_DIVISOR, at most SLACK_MAX. Less
#: makes shares more even and moves more blocks when members change. Few nodes have large shares, which need little slack.
SLACK_DIVISOR: Final = 64
SLACK_MAX: Final = 2
#: What is remembered of earlier look-ups: owners of keys; stages, of 4 KiB at most.
_KEYS_KEPT: Final = 16384
_STAGES_KEPT: Final = 512

_CIRCLE: Final = (1 << 64) - 1


class Ring:
    """Where the active members keep what. To build one of 1000 nodes takes a second of CPU: too long for an event loop."""

    def __init__(self, members: Iterable[Member]) -> None:
        active = {member.name: member for member in members if member.state is MemberState.ACTIVE}
        #: names of the nodes that have a place, sorted
        self.members: tuple[str, ...] = tuple(sorted(active))
        self._weights = {name: max(1, active[name].weight) for name in self.members}
        self._weight = sum(self._weights.values())
        points = self._points()
        self._places = array("Q", [place for place, _ in points])
        self._names = [name for _, name in points]
        self._slack = min(SLACK_MAX << 64, (len(active) ** 2 << 64) // SLACK_DIVISOR)
        self._owners: dict[tuple[str, str, int], tuple[str, ...]] = {}
        self._stages: dict[tuple[bytes, int, int, str], tuple[str, ...]] = {}

    def share(self, name: str) -> float:
        """The part of everything that a node shall keep, 0 to 1; 0 for one that has no place."""
        return self._weights.get(name, 0) / self._weight if self._weight else 0.0

    def owners(self, bucket: str, key: str, count: int = 2) -> tuple[str, ...]:
        """Up to `count` nodes, all different, in order of preference, the key's home first; fewer where there are fewer.

        key: or a version_name(): versions live with their key.
        """
        key = split_name(key)[0]
        asked = (bucket, key, count)
        owners = self._owners.get(asked)
        if owners is None:
            owners = tuple(islice(self._order(object_name(bucket, key)), count))
            if len(self._owners) >= _KEYS_KEPT:
                self._owners.clear()
            self._owners[asked] = owners
        return owners

    def block_owners(self, bucket: str, key: str, content: bytes, number: int, count: int = 2) -> tuple[str, ...]:
        """As owners(), of one block of a content. Block 0, all there is of a small object, is where its key is."""
        if number == 0 or not self.members:
            return self.owners(bucket, key, count)
        group, at = divmod(number, GROUP)
        home = "" if group else self.owners(bucket, key, 1)[0]
        first = self._placed(content, group, max(STAGE, 1 << at.bit_length()), home)[at]
        return tuple(islice(chain((first,), self._after(first, _block_name(content, number))), count))

    def _points(self) -> list[tuple[int, str]]:
        """The circle, in order. Members go in by name, so that the same one wins where two have a point in one place."""
        total, mean = self._weight, POINTS * len(self._weights)
        points = {
            name: max(POINTS_MIN, (2 * mean * weight + total) // (2 * total)) for name, weight in self._weights.items()
        }
        # One call: the library sorts all points again for each node that is added later.
        return HashRing(points, vnodes=1, hash_fn=_point).get_points() if points else []

    def _order(self, name: bytes) -> Iterator[str]:
        """All nodes, each once, by how closely one of their points follows one of the name's places."""
        places, names = self._places, self._names
        if not places:
            return
        walks = []
        for seed in range(PROBES):
            start = xxh3_64_intdigest(name, seed)
            at = bisect(places, start) % len(places)
            walks.append(((places[at] - start) & _CIRCLE, at, start))
        heapify(walks)
        met: set[str] = set()
        while len(met) < len(self.members):
            _, at, start = walks[0]
            if names[at] not in met:
                met.add(names[at])
                yield names[at]
            at = (at + 1) % len(places)
            heapreplace(walks, ((places[at] - start) & _CIRCLE, at, start))

    def _after(self, first: str, name: bytes) -> Iterator[str]:
        """The other nodes in the name's order, from behind `first` on; those before it were full."""
        order = self._order(name)
        before = list(takewhile(lambda each: each != first, order))
        yield from order
        yield from before

    def _placed(self, content: bytes, group: int, stage: int, home: str) -> tuple[str, ...]:
        """The nodes of the first `stage` blocks of a group. home: of block 0; "" unless that is in the group."""
        asked = (content, group, stage, home)
        placed = self._stages.get(asked)
        if placed is None:
            before = self._placed(content, group, stage // 2, home) if stage > STAGE else (home,) if home else ()
            placed = self._place(content, group, stage, before)
            if len(self._stages) >= _STAGES_KEPT:
                self._stages.clear()
            self._stages[asked] = placed
        return placed

    def _place(self, content: bytes, group: int, stage: int, before: tuple[str, ...]) -> tuple[str, ...]:
        """The stage, given what came before it."""
        group_name = _block_name(content, group)

        @cache
        def limit(name: str) -> int:
            share = (stage * self._weights[name] << 64) // self._weight
            return (share + self._slack + xxh3_64_intdigest(group_name + name.encode())) >> 64

        placed, load = list(before), Counter(before)
        for at in range(len(placed), stage):
            block = _block_name(content, group * GROUP + at)
            # With little slack and bad luck in rounding all may be full: then chance decides about the last few.
            name = next((n for n in self._order(block) if load[n] < limit(n)), "") or next(self._order(block))
            placed.append(name)
            load[name] += 1
        return tuple(placed)


def _point(name: str) -> int:
    return xxh3_64_intdigest(name.encode())


def _block_name(content: bytes, number: int) -> bytes:
    return content + number.to_bytes(8, "little")
