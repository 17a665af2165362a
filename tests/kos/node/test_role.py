"""A node from a configuration file to its exit code, with stand-ins for the daemon and the workers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kos import config
from kos.node.role import Role, _take_ports, children_of, raise_nofile
from koscache.__main__ import cache
from koscli.main import main
from tests.conditions import until
from tests.fakes import certificates
from tests.fakes.ports import free_ports

ROOT = Path(__file__).parents[3]
OPTIONS = {"--s3", "--s3-tls", "--peer"}

CONFIG = """\
region: test
listen: {{s3: "{s3}", admin: "127.0.0.1:0", peer: "127.0.0.1:0"}}
workers: 2
origin: {{endpoint: "http://127.0.0.1:1"}}
cache: {{dir: {dir}/cache, size: 64MiB, segment_size: 8MiB, block_size: 1MiB}}
credentials: [{{access_key: k, secret_key: geheim}}]
"""

# Daemon and worker in one: counts, tells its arguments, is ready, ends on SIGTERM.
CHILD = """\
import os, signal, sys
from kos import metrics
from kos.node.status import ChildStatus
status = ChildStatus.from_env()
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
metrics.BYTES.labels("hit").inc(5)
os.write(2, " ".join(["child", *sys.argv[1:], "\\n"]).encode())  # at once: its siblings write there too
status.ready()
while True: signal.pause()
"""

NODE = """\
import sys
from kos.node.role import Role, run_role
def explain(settings):
    def answer(bucket, key, version_id):
        if bucket == "bad": raise RuntimeError("explain failed")
        return {{"region": settings.region, "seen": [bucket, key]}}
    return answer
def cluster(settings):
    async def answer(topic, question):
        return 200, {{"topic": topic, "of": settings.region, "question": question}}
    return answer
child = (sys.executable, "-c", {child!r})
sys.exit(run_role({config!r}, Role("node", daemon=child, worker=child, explain=explain, cluster=cluster)))
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "kos.yaml"
    path.write_text(CONFIG.format(s3="127.0.0.1:0", dir=tmp_path))
    return path


class Node:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.admin = ""
        self.s3 = ""

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 60)).decode()

    async def get(self, path: str) -> tuple[int, Any]:
        def fetch() -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(self.admin + path, timeout=20) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()

        status, body = await asyncio.to_thread(fetch)
        text = body.decode()
        return status, json.loads(text) if text.startswith("{") else text


@asynccontextmanager
async def node(config_path: Path) -> AsyncIterator[Node]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        NODE.format(child=CHILD, config=str(config_path)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Node(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_from_start_to_exit(config_path: Path) -> None:
    async with node(config_path) as running:
        line = await running.line()
        match = re.fullmatch(r"kos ready s3=(http://127\.0\.0\.1:\d+) admin=(http://127\.0\.0\.1:\d+)\n", line)
        assert match is not None, line
        running.s3, running.admin = match[1], match[2]
        assert await running.get("/healthz") == (200, "ok\n")
        status, ready = await running.get("/readyz")
        assert (status, ready["ready"], ready["not_ready"], ready["caching"]) == (200, True, [], "on")
        assert [part["name"] for part in ready["parts"]] == ["daemon", "worker-0", "worker-1"]
        _, page = await running.get("/metrics")
        assert 'kos_bytes_total{source="hit"} 15.0' in page
        assert "kos_node_ready 1.0" in page
        assert await running.get("/v1/explain?bucket=b&key=a%2Fb%20c") == (
            200,
            {"bucket": "b", "key": "a/b c", "version_id": None, "region": "test", "seen": ["b", "a/b c"]},
        )
        assert (await running.get("/v1/explain?bucket=b"))[0] == 400
        assert (await running.get("/v1/explain?bucket=bad&key=k"))[0] == 500
        _, about = await running.get("/v1/status")
        assert about["listen"]["s3"] == running.s3.removeprefix("http://")
        assert "geheim" not in json.dumps(about)

        os.kill(ready["parts"][1]["pid"], signal.SIGKILL)

        async def restarted() -> bool:
            _, now = await running.get("/readyz")
            return bool(now["parts"][1]["restarts"] == 1 and not now["not_ready"])

        await until(restarted)
        # The replacement goes on counting in its predecessor's file: nothing is lost.
        assert 'kos_bytes_total{source="hit"} 20.0' in (await running.get("/metrics"))[1]
        running.process.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(running.process.communicate(), 30)
        assert running.process.returncode == 0, err.decode()
        assert out == b""
        assert f"child --config {config_path} --index 1 --s3 {about['listen']['s3']} \n" in err.decode()


async def test_http_and_https(config_path: Path, tmp_path: Path) -> None:
    pair = certificates.make(tmp_path, "node")
    tls = f'", s3_tls: "127.0.0.1:0", tls_cert_file: "{pair.cert_file}", tls_key_file: "{pair.key_file}'
    config_path.write_text(CONFIG.format(s3="127.0.0.1:0" + tls, dir=tmp_path))
    async with node(config_path) as running:
        line = await running.line()
        url = r"127\.0\.0\.1:\d+"
        match = re.fullmatch(rf"kos ready s3=http://({url}) s3_tls=https://({url}) admin=(http://{url})\n", line)
        assert match is not None, line
        running.admin = match[3]
        _, about = await running.get("/v1/status")
        assert about["urls"] == {"s3": f"http://{match[1]}", "s3_tls": f"https://{match[2]}", "admin": match[3]}
        assert match[1] != match[2]
        running.process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(running.process.communicate(), 30)
    assert f"--index 1 --s3 {match[1]} --s3-tls {match[2]} \n" in err.decode()


async def test_a_certificate_that_is_not_there(config_path: Path, tmp_path: Path) -> None:
    tls = f'", s3_tls: "127.0.0.1:0", tls_cert_file: "{tmp_path}/a.crt", tls_key_file: "{tmp_path}/a.key'
    config_path.write_text(CONFIG.format(s3="127.0.0.1:0" + tls, dir=tmp_path))
    async with node(config_path) as running:
        out, err = await asyncio.wait_for(running.process.communicate(), 60)
    assert (running.process.returncode, out) == (2, b"")
    assert err.decode().startswith(f"listen.tls_cert_file: {tmp_path}/a.crt: found No such file or directory, allowed:")


async def test_a_port_that_is_taken(config_path: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config_path.write_text(CONFIG.format(s3=address, dir=tmp_path))
        async with node(config_path) as running:
            out, err = await asyncio.wait_for(running.process.communicate(), 60)
    assert running.process.returncode == 2
    assert out == b""
    assert err.decode().startswith(f"listen.s3: found {address}: Address already in use")


async def test_a_configuration_that_is_wrong(config_path: Path) -> None:
    config_path.write_text("region: 1\n")
    async with node(config_path) as running:
        _, err = await asyncio.wait_for(running.process.communicate(), 60)
    assert running.process.returncode == 2
    assert b"origin: found nothing" in err


async def test_the_command_line_asks_a_node(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with node(config_path) as running:
        admin = (await running.line()).split("admin=")[1].strip()
        assert await asyncio.to_thread(main, ["status", "--admin", admin]) == 0
        assert "worker-1  ready" in capsys.readouterr().out
        assert await asyncio.to_thread(main, ["explain", "s3://b/é //..", "--admin", admin, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["seen"] == ["b", "é //.."]


def test_roles_alone(config_path: Path) -> None:
    settings = config.load(config_path)
    metrics_dir = Path("/m")
    alone = Role("cache", daemon=("d",))
    assert [spec.name for spec in children_of("c", settings, alone, {}, metrics_dir)] == ["daemon"]
    proxy = children_of("c", settings, Role("proxy", worker=("w",)), {"s3": "h:1"}, metrics_dir)
    assert [spec.name for spec in proxy] == ["worker-0", "worker-1"]
    proxy = children_of("c", settings, Role("proxy", worker=("w",)), {"s3_tls": "h:2"}, metrics_dir)
    assert proxy[0].argv == ("w", "--config", "c", "--index", "0", "--s3-tls", "h:2")
    proxy = children_of("c", settings, Role("proxy", worker=("w",)), {"s3": "h:1"}, metrics_dir)
    assert proxy[1].argv == ("w", "--config", "c", "--index", "1", "--s3", "h:1")


def join_cluster(config_path: Path) -> None:
    """Makes it the configuration of a node among others."""
    peer, line = free_ports(2)
    text = config_path.read_text().replace(
        'peer: "127.0.0.1:0"', f'peer: "127.0.0.1:{peer}", cluster: "127.0.0.1:{line}"'
    )
    config_path.write_text(
        f"""{text}
cluster: {{membership: static, name: n1, secret: a secret of the cluster}}
members: [{{name: n1, peer: "127.0.0.1:{peer}", cluster: "127.0.0.1:{line}"}}]
"""
    )


async def test_a_node_of_a_cluster_serves_its_peers(config_path: Path) -> None:
    join_cluster(config_path)
    async with node(config_path) as running:
        match = re.fullmatch(r"kos ready s3=http://(\S+) admin=(\S+)\n", await running.line())
        assert match is not None
        running.admin = match[2]
        _, about = await running.get("/v1/status")
        assert set(about["listen"]) == {"s3", "peer", "admin", "cluster"}
        assert set(about["urls"]) == {"s3", "admin"}, "the others are for nodes alone"
        assert await running.get("/v1/cluster/status") == (200, {"topic": "status", "of": "test", "question": {}})
        running.process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(running.process.communicate(), 30)
    assert f"--index 1 --s3 {match[1]} --peer {about['listen']['peer']} \n" in err.decode()


async def test_a_node_alone_has_no_peer_port(config_path: Path) -> None:
    async with node(config_path) as running:
        running.admin = (await running.line()).split("admin=")[1].strip()
        assert set((await running.get("/v1/status"))[1]["listen"]) == {"s3", "admin"}
        assert (await running.get("/v1/cluster/status"))[0] == 501


def test_a_cache_alone_serves_its_peers_and_a_proxy_beside_it_does_not(config_path: Path) -> None:
    def listened(role: Role) -> list[set[str]]:
        settings = config.load(config_path)
        taken = _take_ports(settings, role)
        try:
            specs = children_of("c", settings, role, taken.addresses(), Path("/m"))
            return [{word for word in spec.argv if word.startswith("--")} & OPTIONS for spec in specs]
        finally:
            taken.close()

    proxy = Role("proxy", worker=("w",), serves=("s3", "s3_tls"))
    assert listened(cache()) == [set()], "alone there is nobody to be served"
    assert listened(proxy) == [{"--s3"}, {"--s3"}]
    join_cluster(config_path)
    assert listened(cache()) == [set(), {"--peer"}, {"--peer"}]
    assert listened(proxy) == [{"--s3"}, {"--s3"}]


def test_the_limit_of_open_files_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        assert raise_nofile() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
