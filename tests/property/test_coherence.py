"""The protocol of docs/consistency.md under random schedules: no read misses a write that was answered before it began."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koscache.cluster.coherence import Membership
from tests.property.coherence_model import Model

STEPS = 1200
RUNS = int(os.environ.get("KOS_MODEL_RUNS", "50"))


def run(seed: int, membership: Membership, nodes: int, steps: int = STEPS) -> Model:
    model = Model(seed, membership, nodes)
    try:
        for _ in range(steps):
            model.step()
        model.settle()
    except AssertionError as violation:
        violation.add_note(f"seed {seed}, {membership}, {nodes} nodes")
        raise
    return model


@pytest.mark.parametrize("membership", list(Membership))
@given(seed=st.integers(0, 2**32), nodes=st.integers(2, 5))
@settings(max_examples=RUNS, deadline=None)
def test_no_read_misses_a_write_answered_before_it(membership: Membership, seed: int, nodes: int) -> None:
    run(seed, membership, nodes)


@pytest.mark.parametrize("membership", list(Membership))
def test_the_model_comes_to_everything_that_it_is_for(membership: Membership) -> None:
    counts: Counter[str] = Counter()
    for seed in range(25):
        counts.update(run(seed, membership, 3).counts)
    for what in ("hit", "origin", "vouched", "for once", "answered"):
        assert counts[what] > 20, counts
    for what in ("refused", "epochs", "retired"):
        assert counts[what] > 0, counts
    if membership is Membership.CONTROL:
        assert counts["expelled"] > 5, counts
        assert counts["left"] > 0, counts
