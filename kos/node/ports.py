"""Listening addresses: taking a port before there is anybody to serve it.

Owns: conflicts found early, port 0 turned into a number that all processes of a node share.
Does not own: listening and accepting (each worker does that by itself, on a socket of its own with SO_REUSEPORT).

Invariant: a reservation never receives a connection: it is bound and does not listen.
"""

from __future__ import annotations

import os
import socket

from kos.config_values import join_address, split_address
from kos.errors import ConfigError


def reserve(option: str, address: str) -> tuple[socket.socket, str]:
    """(socket to keep, address with its real port). Raises ConfigError, naming the option, if the address is taken."""
    host, port = split_address(address)
    if port:
        # SO_REUSEPORT lets every process of this user join in, also those of another node: so try without it first.
        _bind(option, address, host, port, share=False).close()
    bound = _bind(option, address, host, port, share=True)
    return bound, join_address(host, bound.getsockname()[1])


def listen(option: str, address: str, backlog: int = 128) -> tuple[socket.socket, str]:
    """As reserve, for a port that this process serves alone."""
    host, port = split_address(address)
    bound = _bind(option, address, host, port, share=False)
    bound.listen(backlog)
    bound.setblocking(False)
    return bound, join_address(host, bound.getsockname()[1])


def _bind(option: str, address: str, host: str, port: int, *, share: bool) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{option}: {address}: {error.strerror}") from error
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(where)
    except OSError as error:
        bound.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"{option}: found {address}: {reason}, allowed: an address that is free here") from error
    return bound
