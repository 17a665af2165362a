"""Body checks over generated bodies, cuts and values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3.checksums import ALGORITHMS, HEADER_PREFIX, BodyCheck
from kos.s3.sigv4 import Payload

bodies = st.lists(st.binary(max_size=100), max_size=6)


def values_of(pieces: list[bytes]) -> dict[str, str]:
    check = BodyCheck({}, Payload.UNSIGNED, None, None, also=ALGORITHMS)
    for piece in pieces:
        check.update(piece)
    check.finish()
    return check.computed


@given(bodies)
def test_values_do_not_depend_on_how_a_body_is_cut(pieces: list[bytes]) -> None:
    assert values_of(pieces) == values_of([b"".join(pieces)])


@given(bodies, st.binary(max_size=100), st.sampled_from(sorted(ALGORITHMS)))
def test_a_promise_holds_for_its_own_body_only(pieces: list[bytes], other: bytes, algorithm: str) -> None:
    name = HEADER_PREFIX + algorithm
    value = values_of(pieces)[name]
    check = BodyCheck({name: value}, Payload.UNSIGNED, None, None)
    check.update(other)
    try:
        check.finish()
        assert other == b"".join(pieces)
    except S3Error as error:
        assert error.code == "BadDigest" and other != b"".join(pieces)


@given(st.sampled_from([*(HEADER_PREFIX + name for name in ALGORITHMS), "content-md5"]), st.text(max_size=60))
def test_any_text_as_a_value_is_a_promise_or_refused(name: str, text: str) -> None:
    try:
        BodyCheck({name: text}, Payload.UNSIGNED, None, None)
    except S3Error as error:
        assert error.code == ("InvalidDigest" if name == "content-md5" else "InvalidRequest")
