"""Ports: taken early, shared by the workers, conflicts told by name."""

from __future__ import annotations

import socket

import pytest

from kos.config import split_address
from kos.errors import ConfigError
from kos.node import ports


def test_port_zero_becomes_a_number_that_workers_can_share() -> None:
    reserved, address = ports.reserve("listen.s3", "127.0.0.1:0")
    workers = []
    with reserved:
        for _ in range(2):
            worker = socket.socket()
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(split_address(address))
            worker.listen()
            workers.append(worker)
        client = socket.create_connection(split_address(address), timeout=5)
        client.close()
        for worker in workers:
            worker.close()
        # The reservation itself accepts nobody.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(split_address(address), timeout=5)


@pytest.mark.parametrize("take", [ports.reserve, ports.listen])
def test_a_taken_port_is_a_config_error(take: object) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"listen\.s3: found {address}: Address already in use"):
            take("listen.s3", address)  # type: ignore[operator]


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match=r"listen\.s3: found 203\.0\.113\.1:9000: Cannot assign"):
        ports.reserve("listen.s3", "203.0.113.1:9000")


def test_ipv6() -> None:
    try:
        reserved, address = ports.reserve("listen.s3", "[::1]:0")
    except ConfigError:
        pytest.skip("no IPv6 on this machine")
    with reserved:
        assert address.startswith("[::1]:")
