"""`kos cluster status|locate|drain|rejoin`: the nodes that are one cache, who keeps what, and taking one out.

Owns: the command line, tables for people, waiting for a drain. Does not own: the answers (/v1/cluster of the admin port).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from koscli import admin_client
from koscli.admin_client import AdminError
from koscli.explain import object_of

_POLL_S: Final = 1.0
_TIMEOUT_S: Final = 3600.0
_EPOCH_CHARS: Final = 8
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        admin_client.add_options(command)
        command.set_defaults(part=_PARTS[name])
        return command

    add("status", "all members, and what is wrong between them; exit 0 if nothing is")
    locate = add("locate", "which node is home to an object, and who has which blocks of it")
    locate.add_argument("object", type=object_of, metavar="s3://BUCKET/KEY")
    locate.add_argument("--version-id", metavar="ID", help="of the version that is meant; default: the current object")
    drain = add("drain", "take a node's share of the keys from it, and move what is hot to the others")
    drain.add_argument("node", metavar="NODE")
    drain.add_argument("--no-wait", action="store_true", help="do not wait until it is moved")
    drain.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS",
        help=f"wait no longer than that, exit 1; the node goes on ({_TIMEOUT_S:g})",
    )  # fmt: skip
    rejoin = add("rejoin", "give a drained node its share back")
    rejoin.add_argument("node", metavar="NODE")


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.part(arguments)
    return code


# --- status -----------------------------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace) -> int:
    answer = admin_client.get(arguments.admin, "/v1/cluster/status")
    print(_raw(answer) if arguments.json else status_text(answer))
    return 1 if troubles(answer) else 0


def status_text(answer: Mapping[str, Any]) -> str:
    """The answer for people."""
    members, asked = answer["members"], answer["asked"]
    if not members:
        return "\n".join([f"{asked} is no member yet", *(f"  {trouble}" for trouble in troubles(answer))])
    noun = "member" if len(members) == 1 else "members"
    lines = [
        f"{len(members)} {noun}, membership {answer['membership']}, view {answer['view_version']}, as {asked} sees it"
    ]
    head = ("NAME", "STATE", "KOS", "CAPACITY", "USED", "SHARE", "HITS", "TRUSTS", "EPOCH")
    lines += _table([head, *(_row(member) for member in members)])
    wrong = troubles(answer)
    if wrong:
        lines += ["", "wrong:", *(f"  {trouble}" for trouble in wrong)]
    draining = [f"  {each['name']}: {drain_text(each['drain'])}" for each in members if each["drain"]]
    if draining:
        lines += ["", "draining:", *draining]
    return "\n".join(lines)


def troubles(answer: Mapping[str, Any]) -> list[str]:
    """What is wrong, a line each; nothing if all members hear one another and trust what they have."""
    asked, found = answer["asked"], []
    if answer["control_away"]:
        found.append(f"{asked}: the control store is away: {answer['control_away']}")
    elif not answer["members"]:
        found.append(f"{asked}: has not joined")
    for member in answer["members"]:
        name = member["name"]
        if member["error"]:
            found.append(f"{name} does not answer {asked}: {member['error']}")
            continue
        found += [f"{name} says of {other}: {how}" for other, how in sorted(member["in_trouble"].items())]
        if not member["trusting"]:
            found.append(f"{name}: may not trust its records, and asks the origin before each hit")
        if member["control_away"] and name != asked:
            found.append(f"{name}: the control store is away: {member['control_away']}")
        if member["view_version"] != answer["view_version"]:
            found.append(f"{name}: goes by view {member['view_version']}")
        if member["used_bytes"] is None:
            found.append(f"{name}: its store is not open")
    return found


def _row(member: Mapping[str, Any]) -> tuple[str, ...]:
    reads, epoch = member["reads"], member["epoch"]
    return (
        member["name"],
        member["state"],
        member["kos_version"] or "-",
        size_text(member["capacity_bytes"]),
        size_text(member["used_bytes"]),
        f"{member['share']:.1%}",
        f"{member['hits'] / reads:.1%}" if reads else "-",
        {True: "yes", False: "no"}.get(member["trusting"], "-"),
        epoch[:_EPOCH_CHARS] if epoch else "-",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first three are words, of the others' ends are below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            word.ljust(width) if at < 3 else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size_text(size_bytes: float | None) -> str:
    """Three digits or so: 1234567 -> 1.18 MiB."""
    if size_bytes is None:
        return "-"
    unit = 0
    while size_bytes >= 1024 and unit < len(_UNITS) - 1:
        size_bytes /= 1024
        unit += 1
    digits = 0 if unit == 0 or size_bytes >= 100 else 1 if size_bytes >= 10 else 2
    return f"{size_bytes:.{digits}f} {_UNITS[unit]}"


# --- locate -----------------------------------------------------------------------------------------------------------


def _locate(arguments: argparse.Namespace) -> int:
    bucket, key = arguments.object
    question = {"bucket": bucket, "key": key}
    if arguments.version_id:
        question["version_id"] = arguments.version_id
    answer = admin_client.get(arguments.admin, "/v1/cluster/locate", question)
    print(_raw(answer) if arguments.json else locate_text(answer))
    return 0


def locate_text(answer: Mapping[str, Any]) -> str:
    """The answer for people."""
    lines = [("object", f"s3://{answer['bucket']}/{answer['key']}")]
    if answer["version_id"]:
        lines.append(("version", answer["version_id"]))
    nobody = "none: no node is active"
    lines.append(("home", ", then ".join(answer["owners"]) or nobody))
    if answer["etag"] is None:
        lines.append(("record", "none: no node knows it"))
    else:
        known = " ".join(answer["known_by"])
        lines.append(("record", f"ETag {answer['etag']}, {answer['size']} bytes; known by {known}"))
        count, looked_at = answer["block_count"], answer["blocks_looked_at"]
        of = f"{count} of {size_text(answer['block_bytes'])}"
        lines.append(("blocks", of if looked_at == count else f"{of}; below, the first {looked_at}"))
        for node in answer["nodes"]:
            lines.append(("", f"{node['name']}: should keep {_blocks(node, 'should_keep', looked_at)}"))
            lines.append(("", f"{' ' * len(node['name'])}  keeps {_blocks(node, 'keeps', looked_at)}"))
    lines += [("silent", f"{name}: {why}") for name, why in sorted(answer["unreachable"].items())]
    return "\n".join(f"{name:10}{value}" for name, value in lines)


def _blocks(node: Mapping[str, Any], what: str, of: int) -> str:
    runs = node[what]
    return "unknown" if runs is None else ranges_text(runs, node[f"{what}_count"], of)


def ranges_text(runs: Sequence[Sequence[int]], count: int, of: int) -> str:
    """Half-open runs as `0 3-5 9 (5 of 256)`; with … where the node left some out."""
    words = [f"{first}" if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in runs]
    if sum(stop - first for first, stop in runs) < count:
        words.append("…")
    return " ".join([*(words or ["none"]), f"({count} of {of})"])


# --- drain, rejoin ----------------------------------------------------------------------------------------------------


def _drain(arguments: argparse.Namespace) -> int:
    node = arguments.node
    until = time.monotonic() + arguments.timeout
    answer = admin_client.post(arguments.admin, "/v1/cluster/drain", {"node": node})
    if arguments.no_wait:
        print(_raw(answer) if arguments.json else f"{node} drains; kos cluster status shows how far it is")
        return 0
    said = ""
    while True:
        member = _member(admin_client.get(arguments.admin, "/v1/cluster/status"), node)
        drain, error = member["drain"], member["error"]
        line = f"does not answer: {error}" if error else drain_text(drain) if drain else "has not begun"
        if line != said and not arguments.json:
            print(f"{node}: {line}", flush=True)
        said = line
        done = bool(drain and drain["done"])
        if done or time.monotonic() >= until:
            if arguments.json:
                print(_raw(member))
            if done and drain["ended"] != "failed":
                return 0
            raise AdminError(f"{node}: {line}" if done else f"{node}: not done within {arguments.timeout:g} s")
        time.sleep(_POLL_S)


def _member(answer: Mapping[str, Any], node: str) -> Mapping[str, Any]:
    """How a node that is to drain is. Raises AdminError if it does not any more."""
    member: Mapping[str, Any] | None = next((each for each in answer["members"] if each["name"] == node), None)
    if member is None:
        raise AdminError(f"{node} is no member any more")
    if member["state"] == "active" and member["drain"] is None and not member["error"]:
        raise AdminError(f"{node} does not drain any more: somebody has let it join again")
    return member


def drain_text(drain: Mapping[str, Any]) -> str:
    """How far it is, in one line."""
    moved = f"{drain['moved_blocks']} blocks ({size_text(drain['moved_bytes'])}) moved"
    if drain["failed_blocks"]:
        moved += f", {drain['failed_blocks']} could not be"
    left = f"about {drain['left_estimate']} left"
    if not drain["done"]:
        return f"{moved}, {left}, {'hot ones first' if drain['stage'] == 'hot' else 'the hot ones are'}"
    if drain["ended"] == "moved":
        return f"done: {moved}"
    if drain["ended"] == "time":
        return f"done, for cluster.drain is over: {moved}, {left}, which will be fetched anew"
    return f"failed, see its log: {moved}, {left}"


def _rejoin(arguments: argparse.Namespace) -> int:
    answer = admin_client.post(arguments.admin, "/v1/cluster/rejoin", {"node": arguments.node})
    print(_raw(answer) if arguments.json else f"{arguments.node} has its share of the keys again")
    return 0


def _raw(answer: Mapping[str, Any]) -> str:
    return json.dumps(answer, indent=2, ensure_ascii=False)


_PARTS: Final = {"status": _status, "locate": _locate, "drain": _drain, "rejoin": _rejoin}
