"""Servers of a run: readiness, CPU time, and that they end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.processes import Server, children, command_line, cores, cpu_seconds, memory_bytes
from bench.results import BenchFailed

_BUSY = "import time\nfor i in range(3_000_000): pass\nprint('done', flush=True)\ntime.sleep(60)"
_PARENT = (
    "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print('up', p.pid, flush=True); p.wait()"
)  # fmt: skip


def test_a_server_is_ready_when_it_says_so_and_ends_with_the_block(tmp_path: Path) -> None:
    with Server([sys.executable, "-c", _PARENT], r"up (\d+)", tmp_path / "log") as server:
        assert server.match is not None
        child = int(server.match[1])
        assert server.pids() == [server.pid, child]
        assert child in children(os.getpid())
        assert command_line(child) == "sleep 60"
        pid = server.pid
    assert not {pid, child} & set(children(os.getpid()))
    assert command_line(pid) == ""


def test_a_server_that_ends_before_it_is_ready_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match="no such port"):
        Server([sys.executable, "-c", "print('no such port')"], "ready", tmp_path / "log")


def test_a_server_that_stays_silent_is_ended(tmp_path: Path) -> None:
    before = set(children(os.getpid()))
    with pytest.raises(BenchFailed):
        Server(["sleep", "60"], "ready", tmp_path / "log", within_s=0.1)
    assert set(children(os.getpid())) <= before


def test_cpu_time_and_memory_of_a_process_are_seen(tmp_path: Path) -> None:
    with Server([sys.executable, "-c", _BUSY], "done", tmp_path / "log") as server:
        assert 0.01 < server.cpu_seconds() < 30
        memory = memory_bytes(server.pid)
        assert memory["VmHWM"] >= memory["VmRSS"] > 1 << 20
        assert memory["Pss"] > 0
    assert cpu_seconds([server.pid]) == 0.0


def test_servers_and_clients_have_cores_of_their_own() -> None:
    at = cores()
    assert (at.server is None) == (at.others is None)
    assert at.server is None or at.server != at.others
