"""Every target over its samples, over mutations of them, and (slow) as far as the fuzzer gets in a while."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
SECONDS = 20
EDITS = st.lists(
    st.tuples(
        st.integers(0, 2000),
        st.integers(0, 8),
        st.sampled_from(
            [b"", b"\r\n", b"\0", b"%", b"%ff", b"=", b"&", b"/", b";", b":", b"\xc3", b"9" * 25, b"<", b" "]
        ),
    ),
    max_size=5,
)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_samples_whole_and_cut_short(target: str) -> None:
    for sample in seeds(target):
        for stop in range(len(sample) + 1):
            TARGETS[target](sample[:stop])


@pytest.mark.parametrize("target", sorted(TARGETS))
@settings(max_examples=150, deadline=None)
@given(number=st.integers(0, 1000), edits=EDITS)
def test_mutations(target: str, number: int, edits: list[tuple[int, int, bytes]]) -> None:
    samples = seeds(target)
    data = samples[number % len(samples)]
    for place, removed, added in edits:
        at = place % (len(data) + 1)
        data = data[:at] + added + data[at + removed :]
    TARGETS[target](data)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install '.[fuzz]'")
    command = [sys.executable, "-m", "tests.fuzz.run", target, "--seconds", str(SECONDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=SECONDS + 90, check=False
    )
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, said[-6000:]
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    assert runs is not None and int(runs[1]) > 1000, said[-2000:]
