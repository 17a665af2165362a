"""wrk as the load: many prepared requests over keep-alive connections.

Owns: the Lua script that sends given targets in turn, and reading wrk's summary. Does not own: the targets.

Invariant: an answer that is no 200, or a socket error, fails the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.client import Address
from bench.processes import FAVOUR, favour
from bench.results import BenchFailed

_SCRIPT: Final = """
local prepared = {}
local at = 0
init = function(args)
  for target in io.lines(args[1]) do
    prepared[#prepared + 1] = wrk.format("GET", target)
  end
end
request = function()
  at = at % #prepared + 1
  return prepared[at]
end
done = function(summary, latency, requests)
  local e = summary.errors
  local fields = '{"requests": %d, "bytes": %d, "micros": %d, "errors": %d, "bad": %d, "p50_us": %d, "p99_us": %d}'
  io.write("\\nSUMMARY " .. string.format(fields, summary.requests, summary.bytes, summary.duration,
    e.connect + e.read + e.write + e.timeout, e.status, latency:percentile(50), latency:percentile(99)) .. "\\n")
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw. size: all bytes received, those of unfinished answers included."""

    requests: int
    size: int
    seconds: float
    p50_us: int
    p99_us: int

    def answers_of(self, body_bytes: int) -> float:
        """Answers, unfinished ones counted by their share where that matters (large bodies)."""
        return max(float(self.requests), self.size / body_bytes) if body_bytes >= 1 << 20 else float(self.requests)


def load(
    to: Address,
    targets: Sequence[str],
    *,
    connections: int,
    seconds: int,
    under: Path,
    core: int | None = None,
    scheme: str = "http",
) -> Load:
    """Send the targets in turn for `seconds`; raises BenchFailed where wrk is missing or an answer was wrong.

    scheme: https too; wrk looks at no certificate.
    """
    binary = shutil.which("wrk")
    if binary is None:
        raise BenchFailed("wrk is not installed (Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory(prefix="wrk-", dir=under) as directory:
        script, urls = Path(directory, "targets.lua"), Path(directory, "targets.txt")
        script.write_text(_SCRIPT)
        urls.write_text("\n".join(targets) + "\n")
        pin = ["taskset", "-c", str(core)] if core is not None else []
        wrk = [
            binary,
            "-t1",
            f"-c{connections}",
            f"-d{seconds}s",
            "--timeout",
            "30s",
            "-s",
            str(script),
            f"{scheme}://{to}",
        ]
        with subprocess.Popen(
            [*pin, *wrk, "--", str(urls)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as running:
            if os.environ.get(FAVOUR):
                favour([running.pid])
            try:
                said, _ = running.communicate(timeout=seconds + 60)
            finally:
                if running.poll() is None:
                    running.kill()
    _, found, summary = said.partition("SUMMARY ")
    if not found:
        raise BenchFailed(f"wrk failed: {said}")
    seen = json.loads(summary)
    if seen["errors"] or seen["bad"] or not seen["requests"]:
        raise BenchFailed(f"wrong answers under load: {seen}")
    return Load(seen["requests"], seen["bytes"], seen["micros"] / 1e6, seen["p50_us"], seen["p99_us"])
