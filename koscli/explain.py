"""`kos explain s3://bucket/key`: record, age, rule and why, blocks, and what the next GET would do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from koscli import admin_client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("object", type=object_of, metavar="s3://BUCKET/KEY")
    parser.add_argument("--version-id", metavar="ID", help="of the version that is meant; default: the current object")
    admin_client.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    bucket, key = arguments.object
    question = {"bucket": bucket, "key": key}
    if arguments.version_id:
        question["version_id"] = arguments.version_id
    answer = admin_client.get(arguments.admin, "/v1/explain", question)
    print(json.dumps(answer, indent=2, ensure_ascii=False) if arguments.json else text(answer))
    return 0


def object_of(word: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key; the key is taken as it stands, not percent-decoded."""
    scheme, _, rest = word.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise argparse.ArgumentTypeError(f"found {word!r}, allowed: s3://BUCKET/KEY")
    return bucket, key


def text(answer: Mapping[str, Any]) -> str:
    """The answer for people: a line a fact."""
    rule, record, blocks = answer["rule"], answer["record"], answer["blocks"]
    lines = [
        ("object", f"s3://{answer['bucket']}/{answer['key']}"),
        *([("version", answer["version_id"])] if answer.get("version_id") else []),
        ("rule", f'match "{rule["match"]}", freshness {rule["freshness"]}, stale if error {rule["stale_if_error"]}'),
        ("", rule["why"]),
    ]
    if record is None:
        lines.append(("record", "none"))
    else:
        lines += [
            ("record", f"ETag {record['etag']}, {record['size']} bytes, last modified {record['last_modified']}"),
            ("age", _age(record) + f" ({answer['freshness']})"),
            ("blocks", _blocks(blocks)),
        ]
    lines.append(("next GET", answer["next_get"]))
    return "\n".join(f"{name:10}{value}" for name, value in lines)


def _age(record: Mapping[str, Any]) -> str:
    if record["validated_at"] is None:
        return "never validated since the store was recovered"
    return f"{record['age_s']:.1f} s, validated at {record['validated_at']}"


def _blocks(blocks: Mapping[str, Any]) -> str:
    said = f"{blocks['cached']} of {blocks['count']} cached, {blocks['block_bytes']} bytes each"
    if 0 < blocks["cached"] < blocks["count"]:
        runs = blocks["cached_runs"]
        shown = ", ".join(f"{first}" if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in runs[:10])
        said += f": {shown}{', …' if len(runs) > 10 else ''}"
    return said
