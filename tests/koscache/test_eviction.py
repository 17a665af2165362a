import random

from hypothesis import given
from hypothesis import strategies as st

from koscache.eviction import RESCUE_SHARE, Candidate, Fate, Touches, decide, holds_too_many_pins
from koscache.index import block_key
from koscache.pins import PINS_MAX, Pins

candidates = st.lists(
    st.builds(
        Candidate, region_bytes=st.integers(1, 400), alive=st.booleans(), pinned=st.booleans(), touched=st.booleans()
    ),
    max_size=30,
)


@given(candidates, st.integers(1, 2000))
def test_no_eviction_rescues_more_than_its_share(entries: list[Candidate], segment_bytes: int) -> None:
    fates = decide(entries, segment_bytes)
    moved = sum(each.region_bytes for each, fate in zip(entries, fates, strict=True) if fate.moves)
    assert moved <= segment_bytes * RESCUE_SHARE
    for each, fate in zip(entries, fates, strict=True):
        if not each.alive:
            assert fate is Fate.GOES_DEAD
        elif not each.pinned and not each.touched:
            assert fate is Fate.GOES_COLD
        elif each.pinned:
            assert fate in (Fate.MOVES_PINNED, Fate.GOES_OVER_SHARE)
        else:
            assert fate in (Fate.MOVES_TOUCHED, Fate.GOES_OVER_SHARE)


def test_pinned_entries_come_before_touched_ones() -> None:
    touched = Candidate(40, alive=True, pinned=False, touched=True)
    pinned = Candidate(40, alive=True, pinned=True, touched=False)
    assert decide([touched, pinned], 100) == [Fate.GOES_OVER_SHARE, Fate.MOVES_PINNED]
    assert not holds_too_many_pins([touched, pinned], 100)
    assert holds_too_many_pins([pinned, pinned], 100)


def test_touches_are_remembered_and_can_be_taken_back() -> None:
    touches = Touches()
    keys = [block_key(random.Random(number).randbytes(16), number) for number in range(1000)]
    for key in keys[:500]:
        touches.add(key)
    assert all(key in touches for key in keys[:500])
    assert sum(key in touches for key in keys[500:]) <= 5  # two may share a bit
    for key in keys[:500]:
        touches.discard(key)
    assert not any(key in touches for key in keys)


def test_pins_expire_and_are_counted() -> None:
    pins = Pins()
    assert pins.add(b"a", 10.0)
    assert pins.add(b"b", 20.0)
    assert pins.holds(b"a", 9.9)
    assert not pins.holds(b"a", 10.0)
    assert not pins.holds(b"c", 0.0)
    assert pins.expire(15.0) == [b"a"]
    assert len(pins) == 1
    for number in range(PINS_MAX - 1):
        assert pins.add(number.to_bytes(4, "big"), 30.0)
    assert not pins.add(b"one more", 30.0)
    assert pins.add(b"b", 40.0), "a pin that is held may be prolonged"
