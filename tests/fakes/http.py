"""Requests byte for byte, for what no S3 library would send: signed by botocore, written to a socket as they are."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node

TIMEOUT_S = 30.0


@dataclass
class Signed:
    """A request ready to be sent. head and body can be spoiled before."""

    port: int
    head: bytes
    body: bytes

    def open(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)
        connection.sendall(self.head + self.body)
        return connection


@dataclass
class Exchange:
    """What came back: status 0 if the connection was closed without an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def code(self) -> str:
        found = re.search(rb"<Code>([^<]*)</Code>", self.body)
        return found.group(1).decode() if found else ""


def signed(
    node: Node,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    payload: str = "UNSIGNED-PAYLOAD",
    body: bytes = b"",
    secret_key: str = SECRET_KEY,
    length: int | None = -1,
) -> Signed:
    """path is raw, with its query. length: of Content-Length; -1 is the body's own, None leaves it out."""
    request = AWSRequest(method=method, url=node.s3_url + path, headers=dict(headers or {}))
    request.headers["x-amz-content-sha256"] = payload
    request.context["payload_signing_enabled"] = False
    auth = _FixedPayload(Credentials(ACCESS_KEY, secret_key), "s3", "us-east-1")
    auth.payload_hash = payload
    auth.add_auth(request)
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{node.s3_port}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if length is not None and (body or length != -1 or method in ("PUT", "POST")):
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return Signed(node.s3_port, "\r\n".join([*lines, "", ""]).encode(), body)


class _FixedPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    payload_hash = "UNSIGNED-PAYLOAD"

    def payload(self, request: AWSRequest) -> str:
        return self.payload_hash


def exchange(request: Signed, *, half_close: bool = False) -> Exchange:
    """Send, and read the answer to its end (Content-Length, or the end of the connection)."""
    with request.open() as connection:
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return read_answer(connection, head_only=request.head.startswith(b"HEAD "))


def read_answer(connection: socket.socket, *, head_only: bool = False) -> Exchange:
    received = b""
    while True:
        while b"\r\n\r\n" not in received:
            piece = _receive(connection)
            if not piece:
                return Exchange(0, body=received)
            received += piece
        head, _, received = received.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 100:
            break
    lines = head.decode("latin-1").split("\r\n")[1:]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = 0 if head_only or status in (204, 304) else int(headers.get("content-length", "-1"))
    while length < 0 or len(received) < length:
        piece = _receive(connection)
        if not piece:
            break
        received += piece
    return Exchange(status, headers, received)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""
