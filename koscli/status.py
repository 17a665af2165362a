"""`kos status`: the parts of a node; exit 0 if it is ready, 1 if not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from koscli import admin_client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    admin_client.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    answer = admin_client.get(arguments.admin, "/v1/status")
    print(json.dumps(answer, indent=2, ensure_ascii=False) if arguments.json else text(answer))
    return 0 if answer["ready"] else 1


def text(answer: Mapping[str, Any]) -> str:
    """The answer for people."""
    ready = "ready" if answer["ready"] else f"not ready ({answer['state']})"
    lines = [f"{answer['role']} of region {answer['region']}, kos {answer['version']}: {ready}"]
    addresses = {**answer["listen"], **answer["urls"]}
    lines += [f"  {name:10}{address}" for name, address in addresses.items()]
    for part in answer["parts"]:
        pid = f"pid {part['pid']}" if part["pid"] else "not running"
        reason = f": {part['reason']}" if part["reason"] else ""
        lines.append(f"  {part['name']:10}{part['state']}, {pid}, {part['restarts']} restarts{reason}")
    lines.append(f"  {'caching':10}{answer['caching']}" + "".join(f"; {why}" for why in answer["caching_off_reasons"]))
    return "\n".join(lines)
