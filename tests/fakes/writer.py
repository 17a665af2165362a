"""A worker's server between a client that speaks raw HTTP and a programmable origin, for tests of writes.

    with writer(tmp_path, trailing_checksums=False, relay_buffer_bytes=...) as setup:
        answer = ask(setup, signed("PUT", "/bucket/k", length=5), b"hello")
    ... setup.origin.requests ... setup.carrier.writes ... setup.proxy.lines
The cache is tests.fakes.carrier: it notes what a write makes it forget. Options of limits; retries=n attempts again.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kos import config
from kos.clock import Clock
from kos.origin.credentials import Credentials, StaticCredentials
from kos.origin.lane import OriginLane
from kos.s3.sigv4 import canonical_query, sign_headers
from tests.fakes.carrier import FakeCarrier
from tests.fakes.origin import FakeOrigin
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY, Proxy

HOST = "kos.test"
UNSIGNED = "UNSIGNED-PAYLOAD"


@dataclass
class Setup:
    proxy: Proxy
    carrier: FakeCarrier
    origin: FakeOrigin


@contextlib.contextmanager
def writer(
    directory: Path,
    *,
    trailing_checksums: bool = True,
    retries: int = 1,
    connections: int = 64,
    clock: Clock | None = None,
    **limits: Any,
) -> Iterator[Setup]:
    """limits: options of config.Limits. clock: the worker's; it stands still at NOW if none is given."""
    origin = FakeOrigin()
    with origin.in_thread():
        origin.create_bucket("bucket")
        settings = config.Origin(
            endpoint=origin.endpoint,
            retries=retries,
            retry_base_s=0.01,
            read_timeout_s=5.0,
            connections=connections,
            trailing_checksums=trailing_checksums,
        )
        carrier = FakeCarrier(directory / "store")

        def lane() -> OriginLane:
            return OriginLane(settings, StaticCredentials(Credentials("origin", "secret", None)), Clock())

        bounds = config.Limits(**({"body_timeout_s": 0.5} | limits))
        proxied = Proxy(carrier, origin=lane, origin_settings=settings, limits=bounds, clock=clock)
        with proxied.running() as proxy:
            yield Setup(proxy, carrier, origin)
        assert carrier.fenced == []
        carrier.close_file()


def signed(
    method: str,
    path: str,
    query: tuple[tuple[str, str], ...] = (),
    headers: dict[str, str] | None = None,
    payload: str = UNSIGNED,
    length: int | None = None,
) -> bytes:
    lines = {"host": HOST, **(headers or {})}
    text = canonical_query(list(query))
    common: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1", "now": NOW}
    lines |= sign_headers(method, path, text, lines, session_token=None, payload_hash=payload, **common)
    if length is not None:
        lines["content-length"] = str(length)
    target = path + ("?" + text if text else "")
    return (f"{method} {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        found = re.search(rb"<Code>(\w+)</Code>", self.body)
        return found[1].decode() if found else ""


class Client:
    def __init__(self, setup: Setup) -> None:
        self.socket = socket.create_connection(("127.0.0.1", setup.proxy.port), timeout=20)
        self.file = self.socket.makefile("rb")

    def send(self, *data: bytes) -> Client:
        for piece in data:
            self.socket.sendall(piece)
        return self

    def answer(self, head_only: bool = False) -> Answer:
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline().rstrip(b"\r\n")) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        if head_only or status in (100, 204, 304):
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
            return Answer(status, headers, body)
        return Answer(status, headers, self.file.read(int(headers["content-length"])))

    def abort(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.socket.close()


def ask(setup: Setup, *data: bytes, head_only: bool = False) -> Answer:
    client = Client(setup)
    answer = client.send(*data).answer(head_only)
    client.abort()
    return answer
