"""HMAC with a prepared key against the standard library's."""

from __future__ import annotations

import hmac
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos.s3.prepared_hmac import PreparedHmac


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
@given(key=st.binary(max_size=200), messages=st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_as_the_standard_library(algorithm: Literal["sha1", "sha256"], key: bytes, messages: list[bytes]) -> None:
    prepared = PreparedHmac(key, algorithm)
    for message in messages:
        assert prepared.digest(message) == hmac.digest(key, message, algorithm)
