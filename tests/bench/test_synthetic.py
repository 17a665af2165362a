"""Objects whose bytes follow from their keys."""

from __future__ import annotations

import pytest

from bench import synthetic


@pytest.mark.parametrize(
    ("key", "size"),
    [("4096/x", 4096), ("0/x", 0), ("12/a/b", 12), ("x/12", None), ("12", None), ("/x", None), ("-1/x", None)],
)
def test_the_size_is_in_the_key(key: str, size: int | None) -> None:
    assert synthetic.size_of(key) == size


def test_right_bytes_match_and_wrong_ones_do_not() -> None:
    key = synthetic.key_of(100 << 20, "big")
    base = synthetic.base_of(key)
    whole = synthetic.pattern() * 2
    assert synthetic.matches(key, 0, whole[base : base + 5000])
    near_the_period = synthetic.PERIOD_BYTES - base - 100
    assert synthetic.matches(key, near_the_period, whole[synthetic.PERIOD_BYTES - 100 : synthetic.PERIOD_BYTES + 100])
    piece = bytearray(whole[base : base + 5000])
    piece[4999] ^= 1
    assert not synthetic.matches(key, 0, piece)


def test_a_block_in_anothers_place_is_noticed() -> None:
    key = synthetic.key_of(64 << 20, "blocks")
    base = synthetic.base_of(key)
    whole = synthetic.pattern() * 3
    block = 8 << 20
    second = whole[base + block : base + block + 4096]
    assert synthetic.matches(key, block, second)
    assert not any(synthetic.matches(key, number * block, second) for number in (0, 2, 3, 4, 5, 6, 7))
