"""The members of a cluster at one moment, as one node knows them.

Owns: Member and View, values that travel: from the control store or the configuration to the daemon, from daemon to
daemon, from the daemon to its workers. Does not own: where they come from (koscache.cluster.membership).

Invariant: a view is never changed; a later one of the same cluster has a higher version. Whoever is in no view any more
has been expelled or has left, and comes back under a new incarnation.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec


class MemberState(enum.StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"  # answers and listens like any other, but has no place on the ring


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One node. incarnation: of its membership, new whenever it joins after it was out; peer, cluster: HOST:PORT of its
    workers and of its daemon, as others reach them; weight: its share of keys against the others'."""

    name: str
    incarnation: int
    peer: str
    cluster: str
    weight: int
    state: MemberState = MemberState.ACTIVE


class View(msgspec.Struct, frozen=True, array_like=True):
    """version: 0 for a static cluster. members: by name, in that order."""

    version: int
    members: tuple[Member, ...]

    def find(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def others(self, name: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.name != name)


NOBODY = View(0, ())

#: A view that is newer by so much is one of a control store that had forgotten members, and was lifted beyond what was known.
LEAP: Final = 500_000
