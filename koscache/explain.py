"""What this node knows of one object, and what the next GET of it would do: for people and for the admin port.

Owns: the form of that answer. Does not own: the judgement itself (koscache.content.judge, kos.rules).

Invariant: read-only: explaining touches nothing that eviction or freshness look at, and asks no origin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from kos import log
from kos.clock import Clock
from kos.config import Config
from kos.config_values import show_duration, show_freshness
from kos.rules import Match, Rules
from koscache.content import Freshness, Record, block_count, is_immutable, judge, rule_of, version_name
from koscache.fence import Fence
from koscache.inventory import runs_of
from koscache.reader import Reader

#: a terabyte in 8 MiB blocks has 131072; more runs than this help nobody
RUNS_MAX: Final = 1000


def explainer(settings: Config) -> Callable[[str, str, str | None], Mapping[str, Any]]:
    """The answerer of /v1/explain; opens the index at its first question. It raises StoreFailed when the disk does."""
    reader = Reader(settings.cache.dir, alone=not settings.cluster.enabled)
    rules = Rules(settings.rules)
    clock = Clock()
    opened = False

    def explain(bucket: str, key: str, version_id: str | None) -> Mapping[str, Any]:
        nonlocal opened
        # A daemon that began a new index left the old one behind: follow it, questions here are rare.
        if opened:
            reader.reopen()
        else:
            reader.open()
            opened = True
        return explain_object(reader, rules, clock, settings.cache.block_bytes, bucket, key, version_id)

    return explain


def explain_object(
    reader: Reader, rules: Rules, clock: Clock, block_bytes: int, bucket: str, key: str, version_id: str | None = None
) -> dict[str, Any]:
    """record (None: not known), age in seconds, rule and why, blocks cached, and the next GET in words.

    version_id: of the version that is meant, None for the current object.
    """
    name = key if version_id is None else version_name(key, version_id)
    match = rules.explain(bucket, key)
    if is_immutable(name):
        match = dataclasses.replace(
            match, rule=rule_of(rules, bucket, name), why=f"{match.why}; but a version never goes out of date"
        )
    record = reader.record(bucket, name)
    slot_value = reader.fence.value_of(bucket, name) if record is not None else 0
    freshness, age_s = judge(record, slot_value, clock.now(), match.rule.freshness)
    answer: dict[str, Any] = {
        "rule": _rule(match),
        "record": None,
        "freshness": freshness.value,
        "blocks": None,
    }
    whole = False
    if record is not None:
        cached = sorted(number for number, _ in reader.blocks(record.content))
        count = block_count(record.size, block_bytes)
        whole = len(cached) >= count
        answer["record"] = {
            "etag": record.etag,
            "size": record.size,
            "last_modified": record.last_modified,
            "validated_at": log.timestamp(record.validated_at) if record.validated_at else None,
            "age_s": round(age_s, 3) if record.validated_at else None,
            "checksums": dict(record.checksums),
        }
        answer["blocks"] = {
            "block_bytes": block_bytes,
            "count": count,
            "cached": len(cached),
            "cached_runs": runs_of(cached)[:RUNS_MAX],
        }
    answer["next_get"] = _next_get(record, freshness, whole, match, reader.fence)
    return answer


def _rule(match: Match) -> dict[str, Any]:
    return {
        "index": match.index,
        "match": match.rule.match,
        "freshness": show_freshness(match.rule.freshness),
        "stale_if_error": show_duration(match.rule.stale_if_error_s),
        "why": match.why,
    }


def _next_get(record: Record | None, freshness: Freshness, whole: bool, match: Match, fence: Fence) -> str:
    if record is None and not fence.alone:
        return "peer or miss: asks the key's home in the cluster, or the origin where this node is that"
    if record is None:
        return "miss: asks the origin for the object and fills its blocks"
    if not fence.trusted():
        return (
            "revalidation: this node may not hear of every write in the cluster; until it does, the origin confirms all"
        )
    if freshness is Freshness.FRESH:
        if whole:
            return "hit: served from this node's store, the origin is not asked"
        if not fence.alone:
            return "peer or miss of blocks: the record is fresh; blocks that are not here come from the nodes that keep them"
        return "miss of blocks: the record is fresh, blocks that are not here are read from the origin (If-Match)"
    if freshness is Freshness.FENCED:
        return "revalidation: written since it was last validated (or rebuilt after a restart); never served stale"
    stale = show_duration(match.rule.stale_if_error_s)
    return f"revalidation: older than the rule allows (If-None-Match); origin down: served stale for up to {stale}"
