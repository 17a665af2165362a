"""Path style and virtual-hosted style on one endpoint, and the roles started one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from koscli.demo.processes import running, saw_line, tail
from tests.conditions import eventually
from tests.fakes.http import Exchange, Signed, exchange
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, START_TIMEOUT_S, Node, client, node, phase
from tests.fakes.origin import FakeOrigin
from tests.fakes.ports import free_ports

DOMAIN = "s3.kos.test"


def get(one: Node, host: str, path: str) -> Exchange:
    """A presigned GET whose Host is not the address that it is sent to, as behind a wildcard DNS name."""
    request = AWSRequest(method="GET", url=f"http://{host}:{one.s3_port}{path}")
    S3SigV4QueryAuth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1", expires=60).add_auth(request)
    target = request.url.partition(f":{one.s3_port}")[2]
    head = f"GET {target} HTTP/1.1\r\nHost: {host}:{one.s3_port}\r\n\r\n"
    return exchange(Signed(one.s3_port, head.encode(), b""))


def test_the_bucket_in_the_host_name(own_origin: FakeOrigin, own_directory: Path) -> None:
    own_origin.put("photos", "a/b c", b"virtual")
    with node(own_directory, own_origin.endpoint, {"listen": {"domain": DOMAIN}}) as one:
        for _ in range(2):
            assert get(one, f"photos.{DOMAIN}", "/a/b%20c").body == b"virtual"
            assert get(one, DOMAIN, "/photos/a/b%20c").body == b"virtual"
            assert get(one, "127.0.0.1", "/photos/a/b%20c").body == b"virtual"
        assert get(one, f"nothing.{DOMAIN}", "/a/b%20c").code == "NoSuchBucket"
        assert own_origin.count(bucket="photos", status=200) + own_origin.count(bucket="photos", status=206) == 1


def test_the_roles_started_one_by_one(own_origin: FakeOrigin, own_directory: Path) -> None:
    """A proxy alone passes reads through; with a daemon beside it, it caches."""
    own_origin.put("b", "k", b"some bytes")
    one = Node(own_directory, own_origin.endpoint)
    one.start()
    assert one.stop() == 0  # wrote the configuration, and shows that it is good
    proxy_config = own_directory / "proxy.yaml"
    (admin,) = free_ports(1)
    proxy_config.write_text(one.config_path.read_text().replace(one.admin_url.rsplit(":", 1)[1], str(admin)))
    log_path = own_directory / "roles.log"
    with log_path.open("w") as log, running("kosproxy", _command("kosproxy", proxy_config), stderr=log) as proxy:
        assert proxy.stdout is not None
        assert saw_line(proxy.stdout, "kos ready", START_TIMEOUT_S), tail(log_path)
        kos = client(one.s3_url)
        for _ in range(2):
            answer = kos.get_object(Bucket="b", Key="k")
            assert answer["Body"].read() == b"some bytes" and phase(answer) == "bypass"
        with running("koscache", _command("koscache", one.config_path), stderr=log) as cache:
            assert cache.stdout is not None
            assert saw_line(cache.stdout, "kos ready", START_TIMEOUT_S), tail(log_path)
            eventually(lambda: phase(kos.get_object(Bucket="b", Key="k")) == "hit", "the proxy found the daemon")
            _end(cache)
        _end(proxy)


def _command(module: str, config: Path) -> list[str]:
    return [sys.executable, "-m", module, "--config", str(config)]


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.wait(30) == 0
