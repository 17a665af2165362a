"""Every figure runs from end to end, on little; its numbers mean nothing here.

A whole node is started for each but the last, so those belong to the slow tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the figures read /proc")

_WITH_A_NODE = ["cold_get", "put", "uploads", "small_files", "memory", "hot_get", "tls_get", "peer_get"]


@pytest.mark.parametrize("name", [*(pytest.param(each, marks=pytest.mark.slow) for each in _WITH_A_NODE), "scaling"])
def test_quick(name: str, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if name in ("hot_get", "tls_get", "peer_get") and not (shutil.which("wrk") and (nginx or name != "hot_get")):
        pytest.skip("wrk or nginx is not installed")
    ran = subprocess.run(
        [sys.executable, "-m", "bench", name, "--json", "--quick"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin", "KOS_BENCH_RESULTS": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout)
    assert (line["figure"], line["quick"]) == (name, True)
    assert line["values"]
    assert line["ratios"]
    kept = json.loads((tmp_path / f"{name}.jsonl").read_text())
    assert {key: kept[key] for key in line} == line, "what is printed is kept, perhaps with tables"
