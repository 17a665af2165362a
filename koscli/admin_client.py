"""Asks a node's admin port. Standard library only, so that commands which just ask start quickly.

Owns: the option --admin, one GET or POST, and saying plainly why there is no answer. Does not own: what the answer means.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Mapping
from typing import Any, Final

from kos.errors import KosError

DEFAULT_ADMIN: Final = "http://127.0.0.1:9001"
TIMEOUT_S: Final = 15.0
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024


class AdminError(KosError):
    """The node did not answer, or answered that it cannot."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--admin", default=DEFAULT_ADMIN, metavar="URL", help=f"the node's admin port ({DEFAULT_ADMIN})"
    )
    parser.add_argument("--json", action="store_true", help="the answer as the node gives it")


def get(admin: str, path: str, query: Mapping[str, str] | None = None, accept: Collection[int] = (200,)) -> Any:
    """The decoded JSON answer. Raises AdminError for any status outside accept, or none."""
    return _ask("GET", admin, path, query, accept)


def post(admin: str, path: str, query: Mapping[str, str]) -> Any:
    """As get(), of what changes something."""
    return _ask("POST", admin, path, query, (200,))


def _ask(method: str, admin: str, path: str, query: Mapping[str, str] | None, accept: Collection[int]) -> Any:
    if not admin.startswith(("http://", "https://")):
        admin = f"http://{admin}"
    url = f"{admin.rstrip('/')}{path}"
    if query:
        # A key may hold bytes that are no UTF-8 on the command line: they travel as they are.
        url += "?" + urllib.parse.urlencode(query, errors="surrogateescape")
    try:
        # The header is what a web page cannot send (kos.node.admin).
        status, body = _fetch(urllib.request.Request(url, method=method, headers={"x-kos-admin": "1"}))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise AdminError(f"{admin}: no answer: {reason}") from error
    if status not in accept:
        raise AdminError(f"{admin}: status {status}: {_reason(body)}")
    try:
        return json.loads(body)
    except ValueError as error:
        raise AdminError(f"{admin}: the answer is not JSON; is this the admin port of a kos node?") from error


def _fetch(request: urllib.request.Request) -> tuple[int, bytes]:
    # No proxy from the environment: an admin port is near.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read(ANSWER_BYTES_MAX)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(ANSWER_BYTES_MAX)


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip()
