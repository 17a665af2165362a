"""Any members, any names: owners are different members in a stable order, and members that come or go disturb nobody else."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from koscache.cluster.ring import GROUP, SLACK_DIVISOR, SLACK_MAX, STAGE, Ring
from koscache.cluster.view import Member, MemberState
from koscache.content import version_name

names = st.text("abcdefghij0123456789.-", min_size=1, max_size=12)
weights = st.integers(1, 1_000_000)
keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
contents = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, 1500) | st.integers(0, 2**40)


def member(name: str, weight: int = 100, state: MemberState = MemberState.ACTIVE) -> Member:
    return Member(name, 1, f"{name}:9000", f"{name}:9001", weight, state)


any_members = st.dictionaries(names, weights, min_size=1, max_size=8).map(
    lambda found: [member(name, weight) for name, weight in found.items()]
)
equal_members = st.lists(names, min_size=2, max_size=8, unique=True).map(lambda found: [member(name) for name in found])


@given(any_members, keys, contents, numbers, st.integers(0, 10))
def test_owners_are_different_members_and_as_many_as_asked(
    nodes: list[Member], key: str, content: bytes, number: int, count: int
) -> None:
    ring = Ring(nodes)
    for all_owners, owners in (
        (ring.owners("b", key, len(nodes)), ring.owners("b", key, count)),
        (ring.block_owners("b", key, content, number, len(nodes)), ring.block_owners("b", key, content, number, count)),
    ):
        assert sorted(all_owners) == sorted(node.name for node in nodes)
        assert owners == all_owners[:count]


@given(any_members, st.randoms(use_true_random=False), keys, contents, numbers)
def test_only_names_and_weights_of_active_members_count(
    nodes: list[Member], random: Random, key: str, content: bytes, number: int
) -> None:
    ring = Ring(nodes)
    others = [Member(node.name, 7, "elsewhere:1", "elsewhere:2", node.weight) for node in nodes]
    others.append(member("draining", 500, MemberState.DRAINING))
    random.shuffle(others)
    same = Ring(others)
    assert same.members == ring.members
    assert same.owners("b", key) == ring.owners("b", key)
    assert same.block_owners("b", key, content, number) == ring.block_owners("b", key, content, number)
    assert [same.share(name) for name in ring.members] == [ring.share(name) for name in ring.members]


@given(equal_members, st.data(), st.lists(keys, min_size=1, max_size=20))
def test_who_leaves_is_missed_by_nobody_else(nodes: list[Member], data: st.DataObject, some: list[str]) -> None:
    """The order of the others stays as it was, so a key whose home remains keeps it; read backwards, whoever joins takes
    keys to itself alone."""
    gone = data.draw(st.sampled_from(nodes))
    before, after = Ring(nodes), Ring(node for node in nodes if node is not gone)
    for key in some:
        order = before.owners("b", key, len(nodes))
        assert after.owners("b", key, len(nodes)) == tuple(name for name in order if name != gone.name)


@given(any_members, keys, names)
def test_versions_live_with_their_key(nodes: list[Member], key: str, version: str) -> None:
    ring = Ring(nodes)
    assert ring.owners("b", version_name(key, version)) == ring.owners("b", key)


@given(any_members, contents, st.lists(numbers, min_size=1, max_size=20))
def test_what_was_asked_before_changes_nothing(nodes: list[Member], content: bytes, some: list[int]) -> None:
    ring = Ring(nodes)
    for number in some:
        assert ring.block_owners("b", "k", content, number) == Ring(nodes).block_owners("b", "k", content, number)


@given(any_members, contents, st.integers(0, 3), st.sampled_from([STAGE, 2 * STAGE, GROUP]))
def test_no_node_gets_much_more_than_its_share_of_a_stage(
    nodes: list[Member], content: bytes, group: int, stage: int
) -> None:
    """Its share and the slack, rounded up. When all nodes are full at once, what is left, fewer blocks than nodes, goes
    anywhere."""
    ring = Ring(nodes)
    slack = min(SLACK_MAX, len(nodes) ** 2 / SLACK_DIVISOR)
    first = group * GROUP
    counted = Counter(ring.block_owners("b", "k", content, first + at, 1)[0] for at in range(stage))
    excess = {name: max(0.0, got - (stage * ring.share(name) + slack + 1 + 1e-9)) for name, got in counted.items()}
    assert sum(excess.values()) < len(nodes)
