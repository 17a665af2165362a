"""What operators want to know of a cluster and have done to it, answered by the daemon.

Owns: the topics, their bodies (JSON), gathering the answers of all members. Does not own: the admin port (kos.node.admin) and the
command line (koscli.cluster) in front of it, the decisions behind it.

    of one node     status, blocks, drain, rejoin
    of the cluster  cluster: status of every member; locate: who keeps an object; drain, rejoin with {"node": NAME}

Invariant: an answer comes within hub's time-out whatever the members do; who does not answer is said to be in trouble.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

import kos
from kos.config import Config
from kos.control.errors import ControlUnavailable
from kos.errors import KosError
from koscache.cluster.ring import Ring
from koscache.cluster.view import Member, MemberState
from koscache.content import block_count, version_name
from koscache.keeper import Keeper
from koscache.reader import Reader
from koscache.store import Stats

if TYPE_CHECKING:
    from koscache.cluster.hub import Hub

#: Blocks of one object that are named one by one.
_BLOCKS_MAX: Final = 1024
#: What one member's answer may say of the blocks that it has.
_NUMBERS_MAX: Final = 65_536


class NotUnderstood(KosError):
    """The question names nothing that there is."""


class Operations:
    """hub is set before anything is asked."""

    hub: Hub

    def __init__(self, settings: Config, keeper: Keeper) -> None:
        self._settings = settings
        self._keeper = keeper
        self._reader: Reader | None = None
        self._reads = 0
        self._hits = 0
        self._local: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "status": self._status,
            "blocks": self._blocks,
            "drain": self._drain,
            "rejoin": self._rejoin,
            "cluster": self._cluster,
            "locate": self._locate,
        }

    def counted(self, reads: int, hits: int) -> None:
        """Workers have answered so many more reads of objects, so many of them from the store."""
        self._reads += reads
        self._hits += hits

    async def answer(self, topic: str, body: bytes) -> bytes:
        """JSON in, JSON out; what went wrong is {"error": …} too, so that it can travel between daemons."""
        try:
            asked = msgspec.json.decode(body or b"{}", type=dict[str, Any])
            handle = self._local.get(topic)
            if handle is None:
                raise NotUnderstood(f"found topic {topic!r}, allowed: {' '.join(self._local)}")
            said = await handle(asked)
        except KeyError as error:
            said = {"error": f"found no {error} in the question"}
        except (KosError, msgspec.MsgspecError) as error:
            said = {"error": str(error)}
        return msgspec.json.encode(said)

    # --- of this node -----------------------------------------------------------------------------------------------------

    async def _status(self, asked: dict[str, Any]) -> dict[str, Any]:
        hub = self.hub
        stats = await self._keeper.stats() if self._keeper.is_open else None
        used = stats.used_bytes if isinstance(stats, Stats) else None
        member = hub.view.find(hub.me.name)
        return {
            "name": hub.me.name,
            "kos_version": kos.__version__,
            "state": hub.me.state if member is None else member.state,
            "trusting": hub.trusting,
            "epoch": hub.epoch,
            "view_version": hub.view.version,
            "capacity_bytes": self._settings.cache.size_bytes,
            "used_bytes": used,
            "blocks": stats.blocks if isinstance(stats, Stats) else None,
            "reads": self._reads,
            "hits": self._hits,
            "in_trouble": hub.in_trouble(),
            "control_away": hub.control_away,
            "writes_waiting": hub.writes_waiting,
        }

    async def _blocks(self, asked: dict[str, Any]) -> dict[str, Any]:
        """{"bucket", "name"} -> what the record says; with "content" (hex): which blocks of it are here."""
        reader = self._open_reader()
        record = reader.record(asked["bucket"], asked["name"])
        content = bytes.fromhex(asked["content"]) if asked.get("content") else None
        numbers = [] if content is None else [number for number, _ in reader.blocks(content)[:_NUMBERS_MAX]]
        return {
            "record": None if record is None else {"etag": record.etag, "size": record.size, "content": record.content.hex(),
                                                    "validated_at": record.validated_at},
            "numbers": numbers,
        }  # fmt: skip

    def _open_reader(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self._settings.cache.dir, alone=False)
            self._reader.open()
        else:
            self._reader.reopen()
        return self._reader

    async def _drain(self, asked: dict[str, Any]) -> dict[str, Any]:
        return await self._set_state(asked, MemberState.DRAINING, "drain")

    async def _rejoin(self, asked: dict[str, Any]) -> dict[str, Any]:
        return await self._set_state(asked, MemberState.ACTIVE, "rejoin")

    async def _set_state(self, asked: dict[str, Any], state: MemberState, topic: str) -> dict[str, Any]:
        """Of the node that is named; of this one if none is."""
        name = asked.get("node") or self.hub.me.name
        if name != self.hub.me.name:
            self._member(name)
            return await self._ask(name, topic, {})
        try:
            await self.hub.set_state(state)
        except ControlUnavailable as error:
            return {"error": f"the control store is away: {error}"}
        return {"node": name, "state": state}

    # --- of the cluster ---------------------------------------------------------------------------------------------------

    async def _cluster(self, asked: dict[str, Any]) -> dict[str, Any]:
        hub = self.hub
        ring = Ring(hub.view.members)
        answers = await self._ask_all("status", {})
        members = []
        for member in hub.view.members:
            said = answers[member.name]
            members.append(
                {
                    "name": member.name,
                    "state": member.state,
                    "incarnation": member.incarnation,
                    "peer": member.peer,
                    "cluster": member.cluster,
                    "weight": member.weight,
                    "share": ring.share(member.name) if member.name in ring.members else 0.0,
                    **{key: said.get(key) for key in (
                        "kos_version", "trusting", "epoch", "view_version", "capacity_bytes", "used_bytes", "blocks",
                        "reads", "hits", "in_trouble", "control_away", "writes_waiting", "drain", "error",
                    )},
                }
            )  # fmt: skip
        return {
            "asked": hub.me.name,
            "membership": self._settings.cluster.membership,
            "view_version": hub.view.version,
            "members": members,
        }

    async def _locate(self, asked: dict[str, Any]) -> dict[str, Any]:
        """{"bucket", "key", "version_id"?} -> home, owners, and block by block who should keep it and who does."""
        bucket, key, version_id = asked["bucket"], asked["key"], asked.get("version_id")
        name = key if version_id is None else version_name(key, version_id)
        ring = Ring(self.hub.view.members)
        owners = ring.owners(bucket, name)
        question = {"bucket": bucket, "name": name}
        records = await self._ask_all("blocks", question)
        known = {member: said["record"] for member, said in records.items() if said.get("record")}
        best = next((known[owner] for owner in owners if owner in known), None)
        if best is None and known:
            best = max(known.values(), key=lambda record: record["validated_at"])
        answer: dict[str, Any] = {
            "bucket": bucket, "key": key, "version_id": version_id, "home": owners[0] if owners else None,
            "owners": list(owners), "known_by": sorted(known), "etag": None, "size": None, "blocks": [],
            "unreachable": {member: said["error"] for member, said in records.items() if "error" in said},
        }  # fmt: skip
        if best is None:
            return answer
        held = await self._ask_all("blocks", question | {"content": best["content"]})
        keeping = {member: set(said.get("numbers", ())) for member, said in held.items()}
        content = bytes.fromhex(best["content"])
        count = block_count(best["size"], self._settings.cache.block_bytes)
        answer |= {"etag": best["etag"], "size": best["size"], "block_count": count}
        answer["blocks"] = [
            {
                "number": number,
                "owner": (ring.block_owners(bucket, name, content, number) or (None,))[0],
                "kept_by": sorted(member for member, numbers in keeping.items() if number in numbers),
            }
            for number in range(min(count, _BLOCKS_MAX))
        ]
        return answer

    def _member(self, name: str) -> Member:
        member = self.hub.view.find(name)
        if member is None:
            names = " ".join(each.name for each in self.hub.view.members)
            raise NotUnderstood(f"found node {name!r}, allowed: {names}")
        return member

    async def _ask(self, name: str, topic: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(msgspec.json.decode(await self.hub.ask(name, topic, msgspec.json.encode(body))))
        except (KosError, msgspec.MsgspecError) as error:
            return {"error": str(error)}

    async def _ask_all(self, topic: str, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
        names = [member.name for member in self.hub.view.members]
        answers = await asyncio.gather(*(self._ask(name, topic, body) for name in names))
        return dict(zip(names, answers, strict=True))
