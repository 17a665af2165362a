"""The supervisor, with real child processes that are a few lines of Python each."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kos import config, metrics
from kos.clock import Clock
from kos.node.admin import readiness_of
from kos.node.status import EXIT_CONFIG, ChildStatus, Report
from kos.node.supervisor import ChildSpec, Supervisor, backoff_s
from tests.conditions import until
from tests.fakes.clock import FakeClock

TELL = """\
import json, os, signal, sys, time
def tell(**report): os.write(int(os.environ["KOS_STATUS_FD"]), (json.dumps(report) + "\\n").encode())
def stop_with(code): signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
"""
READY = TELL + "stop_with(0)\ntell(state='ready')\nwhile True: signal.pause()"
DEAF = TELL + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell(state='ready')\nwhile True: signal.pause()"
SILENT = TELL + "stop_with(0)\nwhile True: signal.pause()"
CRASHES = TELL + "sys.exit(3)"
MISCONFIGURED = TELL + f"tell(state='failed', reason='listen.s3: taken'); sys.exit({EXIT_CONFIG})"

FAST = config.Supervisor(restart_base_s=0.001, restart_max_s=0.01, start_attempts=3)


def spec(name: str, code: str, **manners: object) -> ChildSpec:
    return ChildSpec(name=name, argv=(sys.executable, "-S", "-c", code), **manners)  # type: ignore[arg-type]


class Running:
    def __init__(self, supervisor: Supervisor, task: asyncio.Task[int]) -> None:
        self.supervisor = supervisor
        self.task = task

    def pid(self, index: int) -> int:
        process = self.supervisor.children[index].process
        assert process is not None
        return process.pid

    async def ready(self) -> None:
        await until(lambda: self.supervisor.ready or self.task.done())
        assert self.supervisor.ready, self.supervisor.failure


@asynccontextmanager
async def running(
    *specs: ChildSpec, settings: config.Supervisor = FAST, on_ready: Callable[[], None] = lambda: None
) -> AsyncIterator[Running]:
    supervisor = Supervisor(specs, settings, Clock(), on_ready)
    task = asyncio.ensure_future(supervisor.run())
    try:
        yield Running(supervisor, task)
    finally:
        supervisor.stop()
        supervisor.stop()
        await task
        for child in supervisor.children:
            assert child.process is None or child.process.returncode is not None


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_ready_once_all_are_and_a_clean_stop() -> None:
    said: list[str] = []
    async with running(spec("daemon", READY), spec("worker-0", READY), on_ready=lambda: said.append("ready")) as node:
        await node.ready()
        assert said == ["ready"]
        assert readiness_of(node.supervisor)["not_ready"] == []
        node.supervisor.stop()
        assert await node.task == 0
    assert said == ["ready"]


async def test_not_ready_while_one_is_starting() -> None:
    async with running(spec("daemon", SILENT), spec("worker-0", READY)) as node:
        await until(lambda: node.supervisor.children[1].ready)
        assert not node.supervisor.ready
        assert readiness_of(node.supervisor)["not_ready"] == ["daemon"]


async def test_a_killed_child_is_started_again_and_the_others_serve_on() -> None:
    async with running(spec("daemon", READY, serves=False), spec("w-kill", READY), spec("w-1", READY)) as node:
        await node.ready()
        before = node.pid(1)
        os.kill(before, signal.SIGKILL)
        await until(lambda: node.supervisor.children[1].restarts == 1)
        assert node.supervisor.ready
        await until(lambda: node.supervisor.children[1].ready)
        assert node.pid(1) != before
        assert metrics.WORKERS_RESTARTS.labels("w-kill")._value.get() == 1
        node.supervisor.stop()
        assert await node.task == 0


async def test_ready_needs_somebody_who_serves() -> None:
    slow = config.Supervisor(restart_base_s=60.0, restart_max_s=60.0)
    async with running(spec("d", READY, serves=False), spec("w", READY), settings=slow) as node:
        await node.ready()
        os.kill(node.pid(0), signal.SIGKILL)
        await until(lambda: node.supervisor.children[0].report.state == "dead")
        assert node.supervisor.ready
        os.kill(node.pid(1), signal.SIGKILL)
        await until(lambda: not node.supervisor.ready)
        assert readiness_of(node.supervisor)["parts"][1]["reason"] == "killed by SIGKILL"
        # A stop does not wait for the back-off of a minute.
        node.supervisor.stop()
        assert await asyncio.wait_for(node.task, 20) == 0


async def test_a_bad_configuration_ends_the_node_with_its_reason() -> None:
    async with running(spec("daemon", READY), spec("worker-0", MISCONFIGURED)) as node:
        assert await node.task == 2
        assert node.supervisor.failure == "worker-0 cannot start: listen.s3: taken"


async def test_crashing_at_start_ends_the_node_after_some_attempts() -> None:
    async with running(spec("daemon", READY), spec("worker-0", CRASHES)) as node:
        assert await node.task == 1
        assert node.supervisor.failure == "worker-0 failed to start 3 times; the last time: exit code 3"


async def test_a_command_that_does_not_exist() -> None:
    async with running(ChildSpec(name="worker-0", argv=("/no/such/command",))) as node:
        assert await node.task == 2
        assert "/no/such/command: No such file" in node.supervisor.failure


async def test_hanging_at_start_ends_the_node_too() -> None:
    settings = config.Supervisor(start_timeout_s=0.05, start_attempts=2, restart_base_s=0.001, restart_max_s=0.01)
    async with running(spec("worker-0", SILENT), settings=settings) as node:
        assert await node.task == 1
        assert "not ready within 0.05 s" in node.supervisor.failure


async def test_once_ready_a_bad_child_is_no_reason_to_end(tmp_path: Path) -> None:
    marker = tmp_path / "second"
    code = TELL + (
        f"import pathlib; p = pathlib.Path({str(marker)!r})\n"
        f"if p.exists(): tell(state='failed', reason='broken since'); sys.exit({EXIT_CONFIG})\n"
        "p.touch(); stop_with(0); tell(state='ready')\nwhile True: signal.pause()"
    )
    async with running(spec("w-0", READY), spec("w-1", code)) as node:
        await node.ready()
        os.kill(node.pid(1), signal.SIGKILL)
        await until(lambda: node.supervisor.children[1].restarts >= 4)
        assert node.supervisor.ready
        marker.unlink()
        await until(lambda: node.supervisor.children[1].ready)


async def test_workers_are_gone_before_the_daemon_is_told(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = TELL + (
        f"def end(*_):\n  open({str(order)!r}, 'a').write(sys.argv[1] + '\\n'); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end); tell(state='ready')\nwhile True: signal.pause()"
    )
    argv = (sys.executable, "-S", "-c", code)
    daemon = ChildSpec(name="daemon", argv=(*argv, "daemon"), stop_rank=1)
    workers = [ChildSpec(name=f"w-{n}", argv=(*argv, "worker")) for n in range(2)]
    async with running(daemon, *workers) as node:
        await node.ready()
        node.supervisor.stop()
        assert await node.task == 0
    assert order.read_text().split() == ["worker", "worker", "daemon"]


async def test_who_does_not_stop_in_time_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    async with running(spec("deaf", DEAF, stop_s=0.05)) as node:
        await node.ready()
        node.supervisor.stop()
        assert await node.task == 0
    assert any(record.getMessage().startswith("child did not stop") for record in caplog.records)


async def test_a_second_signal_ends_it_at_once() -> None:
    async with running(spec("deaf", DEAF, stop_s=3600.0)) as node:
        await node.ready()
        node.supervisor.stop()
        node.supervisor.stop()
        assert await asyncio.wait_for(node.task, 20) == 1


async def test_stopping_while_starting() -> None:
    async with running(spec("a", SILENT), spec("b", SILENT)) as node:
        node.supervisor.stop()
        assert await asyncio.wait_for(node.task, 20) == 0


async def test_what_children_say_is_heard_and_nonsense_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    code = TELL + (
        "stop_with(0); fd = int(os.environ['KOS_STATUS_FD'])\n"
        "os.write(fd, b'nonsense\\n'); os.write(fd, b'{\"state\": \"flying\"}\\n')\n"
        "os.write(fd, b'x' * 9000 + b'\\n')\n"
        "tell(state='ready', caching='off', reason='disk full', extra=1)\nwhile True: signal.pause()"
    )
    async with running(spec("worker-0", code)) as node:
        await node.ready()
        readiness = readiness_of(node.supervisor)
    assert (readiness["caching"], readiness["caching_off_reasons"]) == ("off", ["worker-0: disk full"])
    assert sum(record.getMessage() == "child said nonsense" for record in caplog.records) >= 3


async def test_hangup_goes_to_those_who_know_it(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    code = TELL + (
        f"signal.signal(signal.SIGHUP, lambda *_: open({str(heard)!r}, 'w').close())\n"
        "stop_with(0); tell(state='ready')\nwhile True: signal.pause()"
    )
    async with running(spec("worker", code, forward_hangup=True), spec("daemon", READY)) as node:
        await node.ready()
        daemon = node.pid(1)
        node.supervisor.hangup()
        await until(heard.exists)
        assert node.pid(1) == daemon
        assert node.supervisor.children[1].ready


def test_backoff_doubles_up_to_its_limit() -> None:
    settings = config.Supervisor(restart_base_s=1.0, restart_max_s=30.0)
    clock = FakeClock()
    for exits, longest in [(1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (1000, 30)]:
        assert all(longest / 2 <= backoff_s(exits, settings, clock) <= longest for _ in range(20))


async def test_children_die_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "from kos.node.status import ChildStatus\nimport os, signal\nstatus = ChildStatus.from_env()\n"
        f"open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid())); os.rename({str(pid_file)!r} + '.new', "
        f"{str(pid_file)!r})\nstatus.ready()\nwhile True: signal.pause()"
    )
    parent = (
        "import asyncio, sys\nfrom kos import config\nfrom kos.clock import Clock\n"
        "from kos.node.supervisor import ChildSpec, Supervisor\n"
        f"spec = ChildSpec(name='w', argv=(sys.executable, '-c', {child!r}))\n"
        "asyncio.run(Supervisor([spec], config.Supervisor(), Clock()).run())"
    )
    root = str(Path(__file__).parents[3])
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent, env={**os.environ, "PYTHONPATH": root})
    try:
        await until(pid_file.exists)
        pid = int(pid_file.read_text())
    finally:
        process.kill()
        await process.wait()
    await until(lambda: gone(pid))


def test_status_is_told_once_and_never_fails() -> None:
    read_fd, write_fd = os.pipe()
    status = ChildStatus(write_fd)
    status.starting("recovery")
    status.ready()
    status.ready()
    status.ready(caching=False, reason="x" * 5000)
    told = os.read(read_fd, 65536).splitlines()
    assert len(told) == 3
    assert len(told[2]) < 4096
    for number in range(5000):  # nobody reads: the pipe fills
        status.report(Report(state="ready", reason=str(number)))
    os.close(read_fd)
    status.draining()
    os.close(write_fd)
    ChildStatus(None).failed("nobody listens")
