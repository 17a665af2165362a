"""A node over https, as clients see it, and one whose origin speaks https."""

from __future__ import annotations

import datetime
import http.client
import json
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conditions import eventually
from tests.fakes import certificates
from tests.fakes.http import read_answer
from tests.fakes.node import Node, client, node, phase
from tests.fakes.origin import FakeOrigin

BODY = random.Random(11).randbytes(12 << 20)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, FakeOrigin]]:
    """A node whose certificate is its own, to be changed."""
    directory = tmp_path_factory.mktemp("secure")
    pair = certificates.make(directory, "own")
    files = {"tls_cert_file": str(pair.cert_file), "tls_key_file": str(pair.key_file)}
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b")
        origin.put("b", "large", BODY)
        with node(directory, origin.endpoint, {"listen": files}) as one:
            yield one, origin


@pytest.fixture
def s3(own: tuple[Node, FakeOrigin]) -> Any:
    return over_tls(own[0])


def over_tls(one: Node, **settings: Any) -> Any:
    return client(one.s3_tls_url, verify=str(one.ca_file), **settings)


def errors(one: Node) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in one.log_path.read_text().splitlines()]
    return [line for line in lines if line["level"] in ("warning", "error")]


@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_000])
def test_uploads_of_boto3_come_in_chunks_without_a_length(s3: Any, own: tuple[Node, FakeOrigin], size: int) -> None:
    """Over https boto3 signs no payload, and sends its checksum behind a body in chunks, even behind an empty one."""
    sent: list[Any] = []
    s3.meta.events.register("before-send.s3.PutObject", lambda request, **_: sent.append(request))
    s3.put_object(Bucket="b", Key=f"chunked-{size}", Body=BODY[:size])
    fields = {name.lower(): value for name, value in sent[0].headers.items()}
    assert fields["x-amz-content-sha256"] in (
        b"STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    )
    assert "content-length" not in fields
    for _ in range(3):
        answer = s3.get_object(Bucket="b", Key=f"chunked-{size}")
        assert answer["Body"].read() == BODY[:size]
    assert phase(answer) == "hit"
    stored = own[1].get("b", f"chunked-{size}")
    assert stored is not None and bytes(stored.body) == BODY[:size]


def test_hits_take_the_fast_lane(s3: Any, own: tuple[Node, FakeOrigin]) -> None:
    def fast() -> float:
        found = re.findall(r'kos_requests_total\{lane="fast",operation="GetObject".*?\} (\S+)', own[0].metrics())
        return sum(map(float, found))

    def hit() -> bool:
        answer = s3.get_object(Bucket="b", Key="large")
        assert answer["Body"].read() == BODY
        return phase(answer) == "hit"

    eventually(hit, "the object is cached")
    before = fast()
    for _ in range(5):
        assert hit()
        assert s3.get_object(Bucket="b", Key="large", Range="bytes=5-104")["Body"].read() == BODY[5:105]
    eventually(lambda: fast() >= before + 10, "all of them were counted")


def test_a_certificate_that_is_renewed(own: tuple[Node, FakeOrigin]) -> None:
    one, _ = own
    listen = one.config["listen"]
    cert_file = Path(listen["tls_cert_file"])
    pem = cert_file.read_bytes()

    def serial(connection: ssl.SSLSocket) -> str:
        return str(connection.getpeercert()["serialNumber"])  # type: ignore[index]

    def open_one() -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", one.s3_tls_port), timeout=10)
        return certificates.client_context().wrap_socket(plain, server_hostname="127.0.0.1")

    def ask(connection: ssl.SSLSocket) -> int:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return read_answer(connection).status

    with open_one() as old:
        first = serial(old)
        assert ask(old) == 403
        cert_file.write_bytes(pem[:200])
        eventually(lambda: any("certificate was not taken" in line["message"] for line in errors(one)), "it is said")
        with open_one() as still:
            assert serial(still) == first and ask(still) == 403
        certificates.make(cert_file.parent, "own", lasts=datetime.timedelta(hours=5))

        def renewed() -> bool:
            # Twice as many as there are workers do not all come to one.
            seen = []
            for _ in range(8):
                with open_one() as fresh:
                    seen.append(serial(fresh))
            return first not in seen

        eventually(renewed, "both workers serve with the new one")
        assert ask(old) == 403, "a connection keeps what it began with"
    page = one.metrics()
    until = float(re.findall(r'kos_tls_not_after_seconds\{port="s3"\} (\S+)', page)[0])
    assert until == pytest.approx(time.time() + 5 * 3600, abs=120)
    assert float(re.findall(r"(?m)^kos_tls_reload_failures_total (\S+)", page)[0]) >= 1
    assert re.findall(r'kos_tls_handshakes_total\{result="done"\} (\S+)', page)


def test_the_wrong_protocol_at_either_port(own: tuple[Node, FakeOrigin]) -> None:
    one, _ = own
    before = len(errors(one))
    plain = http.client.HTTPConnection("127.0.0.1", one.s3_tls_port, timeout=10)
    plain.request("GET", "/b/large")
    answer = plain.getresponse()
    assert answer.status == 400 and b"This port speaks https" in answer.read()
    plain.close()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", one.s3_port), timeout=10) as wire, pytest.raises(ssl.SSLError):
            certificates.client_context().wrap_socket(wire, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", one.s3_tls_port), timeout=10) as wire:
            wire.sendall(b"\0\1\2" * 50)
    with pytest.raises(ssl.SSLCertVerificationError):
        socket_context = ssl.create_default_context()
        with socket.create_connection(("127.0.0.1", one.s3_tls_port), timeout=10) as wire:
            socket_context.wrap_socket(wire, server_hostname="127.0.0.1")
    assert client(one.s3_url).get_object(Bucket="b", Key="large")["Body"].read() == BODY
    assert len(errors(one)) == before, "scanners are no news"


def test_a_response_that_is_under_way_is_finished_when_the_node_stops(tmp_path: Path) -> None:
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("b")
        origin.put("b", "large", BODY)
        with node(tmp_path, origin.endpoint) as one:
            s3 = over_tls(one)
            idle = over_tls(one)
            idle.list_buckets()
            eventually(
                lambda: phase(answer := s3.get_object(Bucket="b", Key="large")) == "hit" and answer["Body"].read(),
                "hit",
            )
            body = s3.get_object(Bucket="b", Key="large")["Body"]
            first = body.read(1000)
            assert one.process is not None
            began = time.monotonic()
            one.process.send_signal(signal.SIGTERM)
            eventually(lambda: '"draining"' in one.log_path.read_text(), "it drains")
            assert first + body.read() == BODY
            assert one.process.wait(20) == 0
            assert time.monotonic() - began < 9, "nothing waited for the end of the drain"


def test_https_alone(tmp_path: Path) -> None:
    origin = FakeOrigin()
    with origin.in_thread():
        origin.put("b", "k", b"x")
        with node(tmp_path, origin.endpoint, {"listen": {"s3": "none", "s3_tls": "127.0.0.1:0"}}) as one:
            status = json.loads(
                subprocess.run(
                    [sys.executable, "-m", "koscli", "status", "--json", "--admin", one.admin_url],
                    capture_output=True, text=True, check=True, timeout=60,
                ).stdout
            )  # fmt: skip
            assert set(status["urls"]) == {"s3_tls", "admin"}
            s3 = client(status["urls"]["s3_tls"], verify=str(one.ca_file))
            assert s3.get_object(Bucket="b", Key="k")["Body"].read() == b"x"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", one.s3_port))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tls_key_file": None}, ["listen.tls_key_file", "nothing", "s3_tls"]),
        ({"tls_cert_file": "/nonexistent/x.crt"}, ["listen.tls_cert_file", "/nonexistent/x.crt", "No such file"]),
        ({"s3_tls": None}, ["listen.tls_cert_file", "no s3_tls", "beside s3_tls"]),
        ({"s3_tls": None, "tls_cert_file": None, "tls_key_file": None, "s3": "none"}, ["listen.s3", "none"]),
        ({"tls_min_version": "1.1"}, ["listen.tls_min_version", "'1.1'", "1.2 | 1.3"]),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path: Path, change: dict[str, Any], said: list[str]) -> None:
    import yaml

    one = Node(tmp_path, "http://127.0.0.1:9")
    listen = {name: value for name, value in (one.config["listen"] | change).items() if value is not None}
    one.config_path.write_text(yaml.safe_dump(one.config | {"listen": listen}))
    for command in (["check-config", str(one.config_path)], ["up", "--config", str(one.config_path)]):
        done = subprocess.run(
            [sys.executable, "-m", "koscli", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2, done
        for word in said:
            assert word in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_check_config_says_how_long_the_certificate_holds(tmp_path: Path) -> None:
    import yaml

    one = Node(tmp_path, "http://127.0.0.1:9")
    for lasts, word in ((datetime.timedelta(days=3), "valid until"), (datetime.timedelta(days=-3), "EXPIRED")):
        pair = certificates.make(tmp_path, "checked", lasts=lasts)
        listen = one.config["listen"] | {"tls_cert_file": str(pair.cert_file), "tls_key_file": str(pair.key_file)}
        one.config_path.write_text(yaml.safe_dump(one.config | {"listen": listen}))
        command = [sys.executable, "-m", "koscli", "check-config", str(one.config_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert f"https certificate {word} 20" in done.stdout


@pytest.mark.parametrize("trust", ["right", "wrong", "none"])
def test_an_origin_that_speaks_https(tmp_path: Path, trust: str) -> None:
    origin = FakeOrigin(tls=certificates.server().context())
    settings: dict[str, Any] = {"right": {"ca_file": str(certificates.ca_file())}, "none": {"verify_tls": "false"}}.get(
        trust, {}
    )
    with origin.in_thread():
        origin.create_bucket("b")
        origin.put("b", "large", BODY)
        with node(tmp_path, origin.endpoint, {"origin": settings}) as one:
            s3 = client(one.s3_url)
            if trust == "wrong":
                began = time.monotonic()
                with pytest.raises(ClientError) as refusal:
                    s3.get_object(Bucket="b", Key="large")
                assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
                with pytest.raises(ClientError) as refusal:
                    s3.put_object(Bucket="b", Key="k", Body=b"x")
                assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
                assert time.monotonic() - began < 10
                eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in one.log_path.read_text(), "the log says why")
                return
            eventually(
                lambda: (
                    phase(answer := s3.get_object(Bucket="b", Key="large")) == "hit" and answer["Body"].read() == BODY
                ),
                "the object is cached",
            )
            s3.put_object(Bucket="b", Key="k", Body=BODY[:2_000_000])
            stored = origin.get("b", "k")
            assert stored is not None and bytes(stored.body) == BODY[:2_000_000]


def test_authorities_that_are_not_there_end_the_start(tmp_path: Path) -> None:
    one = Node(tmp_path, "https://127.0.0.1:9", {"origin": {"ca_file": str(tmp_path / "absent.pem")}})
    with pytest.raises(AssertionError):
        one.start()
    said = one.log_path.read_text()
    assert "origin.ca_file" in said and "absent.pem" in said and "Traceback" not in said
