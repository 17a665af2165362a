"""What operators want to know of a cluster and have done to it, answered by the daemon.

Owns: the topics, their bodies (JSON), gathering the answers of all members. Does not own: the admin port (kos.node.admin) and the
command line (koscli.cluster) in front of it, what draining does (draining), the decisions behind the rest.

    of one node     status, blocks, drain, rejoin; learn, from a node that drains
    of the cluster  cluster: status of every member; locate: who keeps an object; drain, rejoin with {"node": NAME}

Invariant: an answer comes within hub's time-out whatever the members do, and is no longer than a message may be; who does not
answer is said to be in trouble.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

import kos
from kos.config import Config
from kos.control.errors import ControlUnavailable, LastActive
from kos.errors import KosError
from koscache.cluster.draining import Draining, Rings
from koscache.cluster.ring import Ring
from koscache.cluster.view import MemberState
from koscache.content import Record, block_count, version_name
from koscache.disk import StoreFailed
from koscache.inventory import runs_of
from koscache.keeper import Keeper
from koscache.store import Stats

if TYPE_CHECKING:
    from koscache.cluster.hub import Hub

_log: Final = logging.getLogger("koscache.cluster")

#: Blocks of one object that are looked for, the first ones: 128 GiB in blocks of 8 MiB. To place them takes a second.
_BLOCKS_MAX: Final = 16_384
#: Runs of blocks in one answer, all nodes together; some 14 bytes each.
_RUNS_MAX: Final = 65_536
_RUNS_LEAST: Final = 16
_ANSWER_S: Final = 5.0
#: In a static cluster lines begin anew when a node drains or rejoins: who has none is asked again for so long.
_LINE_S: Final = 1.0
#: Of a message beside its body.
_FRAME_BYTES: Final = 1024


class Wrong(enum.StrEnum):
    """Why there is no answer."""

    QUESTION = "question"  # it is not one
    UNKNOWN = "unknown"  # it names nothing that there is
    REFUSED = "refused"  # it would do harm
    AWAY = "away"  # a member, or the control store, cannot be asked
    FAILED = "failed"


class _Said(KosError):
    """An answer that is none."""

    def __init__(self, wrong: Wrong, message: str) -> None:
        super().__init__(message)
        self.wrong = wrong


class _About(msgspec.Struct):
    """The cluster, or the node that is asked: nothing more to say."""


class _OfNode(msgspec.Struct):
    node: str = ""


class _OfObject(msgspec.Struct):
    bucket: str
    key: str
    version_id: str | None = None


class _OfBlocks(msgspec.Struct):
    """content: in hex, of what is looked for; "" for the record alone."""

    bucket: str
    name: str
    content: str = ""


class _Lesson(msgspec.Struct):
    """bucket, name and record of each object."""

    records: list[tuple[str, str, Record]]


_Answer = dict[str, Any]


class Operations:
    """hub is set before anything is asked."""

    def __init__(self, settings: Config, keeper: Keeper) -> None:
        self._settings = settings
        self._keeper = keeper
        self._rings = Rings()
        self._hub: Hub | None = None
        self._draining: Draining | None = None
        self._reads = 0
        self._hits = 0
        self._topics: dict[str, tuple[type[msgspec.Struct], Callable[[Any], Awaitable[_Answer]]]] = {
            "status": (_About, self._status),
            "blocks": (_OfBlocks, self._blocks),
            "drain": (_OfNode, self._drain),
            "rejoin": (_OfNode, self._rejoin),
            "learn": (_Lesson, self._learn),
            "cluster": (_About, self._cluster),
            "locate": (_OfObject, self._locate),
        }

    @property
    def hub(self) -> Hub:
        assert self._hub is not None, "set before anything is asked"
        return self._hub

    @hub.setter
    def hub(self, hub: Hub) -> None:
        self._hub = hub
        self._draining = Draining(self._settings, self._keeper, self._rings, hub.me.name, hub.ask, hub.clock, hub.tasks)
        hub.followers.append(self._draining.follow)

    def counted(self, reads: int, hits: int) -> None:
        """Workers have answered so many more reads of objects, so many of them from the store."""
        self._reads += reads
        self._hits += hits

    async def answer(self, topic: str, body: bytes) -> bytes:
        """JSON in, JSON out; what went wrong is {"error": …, "wrong": a Wrong} too, so that it can travel between daemons."""
        try:
            if topic not in self._topics:
                raise _Said(Wrong.QUESTION, f"found topic {topic!r}, allowed: {' '.join(self._topics)}")
            kind, handle = self._topics[topic]
            said = msgspec.json.encode(await handle(msgspec.json.decode(body or b"{}", type=kind)))
            most = self._settings.cache.ipc_message_bytes - _FRAME_BYTES
            if len(said) > most:
                raise _Said(Wrong.FAILED, f"an answer of {len(said)} bytes; cache.ipc_message allows {most}")
            return said
        except _Said as error:
            return _error(error.wrong, str(error))
        except msgspec.MsgspecError as error:
            return _error(Wrong.QUESTION, f"not a question: {error}")
        except ControlUnavailable as error:
            return _error(Wrong.AWAY, f"the control store is away: {error}")
        except KosError as error:
            return _error(Wrong.FAILED, str(error))
        except Exception:
            # A bug; without an answer whoever asked would wait until he gives up.
            _log.exception("a question of an operator failed", extra={"topic": topic})
            return _error(Wrong.FAILED, "failed unexpectedly: the log of the daemon has more")

    # --- of this node -----------------------------------------------------------------------------------------------------

    async def _status(self, asked: _About) -> _Answer:
        hub = self.hub
        stats = await self._keeper.stats() if self._keeper.is_open else None
        store = stats if isinstance(stats, Stats) else None
        assert self._draining is not None, "made with the hub"
        return {
            "name": hub.me.name,
            "kos_version": kos.__version__,
            "state": hub.state,
            "trusting": hub.trusting,
            "epoch": hub.epoch,
            "view_version": hub.view.version,
            "capacity_bytes": self._settings.cache.size_bytes,
            "used_bytes": None if store is None else store.used_bytes,
            "blocks": None if store is None else store.blocks,
            "reads": self._reads,
            "hits": self._hits,
            "in_trouble": hub.in_trouble(),
            "control_away": hub.control_away,
            "writes_waiting": hub.writes.waiting,
            "drain": self._draining.progress(),
        }

    async def _blocks(self, asked: _OfBlocks) -> _Answer:
        """What the record says; of a content, which blocks of it are here."""
        content = bytes.fromhex(asked.content) if asked.content else None
        found = await self._keeper.look(asked.bucket, asked.name, content)
        if isinstance(found, StoreFailed):
            raise found
        record, numbers = found
        numbers = [number for number in numbers if number < _BLOCKS_MAX]
        return {
            "record": None if record is None else {
                "etag": record.etag, "size": record.size, "content": record.content.hex(), "validated_at": record.validated_at,
            },
            "count": len(numbers),
            "runs": runs_of(numbers),
        }  # fmt: skip

    async def _learn(self, asked: _Lesson) -> _Answer:
        """What this node is home to from now on, as its home before knew it.

        It is kept as what must be confirmed: this node's fence says nothing about how another has come by it. So the first
        read makes a conditional request, and not one for the bytes.
        """
        records = [(bucket, name, record.revalidated(0.0, 0)) for bucket, name, record in asked.records]
        failure = await self._keeper.learn(records)
        if failure is not None:
            raise failure
        return {}

    async def _drain(self, asked: _OfNode) -> _Answer:
        return await self._set_state(asked, MemberState.DRAINING, "drain")

    async def _rejoin(self, asked: _OfNode) -> _Answer:
        return await self._set_state(asked, MemberState.ACTIVE, "rejoin")

    async def _set_state(self, asked: _OfNode, state: MemberState, topic: str) -> _Answer:
        """Of the node that is named; of this one if none is."""
        hub = self.hub
        name = asked.node or hub.me.name
        if name != hub.me.name:
            if hub.view.find(name) is None:
                names = " ".join(each.name for each in hub.view.members)
                raise _Said(Wrong.UNKNOWN, f"found node {name!r}, allowed: {names}")
            until = hub.clock.monotonic() + _LINE_S
            while True:
                answer = await self._ask(name, topic, {})
                if "error" not in answer:
                    return answer
                wrong = Wrong(answer.get("wrong", Wrong.AWAY))
                if wrong is not Wrong.AWAY or hub.clock.monotonic() >= until:
                    raise _Said(wrong, f"{name}: {answer['error']}")
                await hub.clock.sleep(_LINE_S / 10)
        others = [each for each in hub.view.others(name) if each.state is MemberState.ACTIVE]
        if state is MemberState.DRAINING and not others:
            raise _Said(Wrong.REFUSED, f"no other node is active, so nobody could take over the share of {name}")
        try:
            await hub.set_state(state)
        except LastActive as error:
            # Another one was drained at the same time.
            raise _Said(Wrong.REFUSED, str(error)) from error
        return {"node": name, "state": state}

    # --- of the cluster ---------------------------------------------------------------------------------------------------

    async def _cluster(self, asked: _About) -> _Answer:
        hub, view = self.hub, self.hub.view
        ring = await self._rings.of(view)
        answers = await self._ask_all((member.name for member in view.members), "status", {})
        members = []
        for member in view.members:
            said = answers[member.name]
            members.append(
                {
                    "name": member.name,
                    "state": member.state,
                    "incarnation": member.incarnation,
                    "peer": member.peer,
                    "cluster": member.cluster,
                    "weight": member.weight,
                    "share": ring.share(member.name),
                    **{key: said.get(key) for key in (
                        "kos_version", "trusting", "epoch", "view_version", "capacity_bytes", "used_bytes", "blocks",
                        "reads", "hits", "in_trouble", "control_away", "writes_waiting", "drain", "error",
                    )},
                }
            )  # fmt: skip
        return {
            "asked": hub.me.name,
            "membership": self._settings.cluster.membership,
            "view_version": view.version,
            "control_away": hub.control_away,
            "members": members,
        }

    async def _locate(self, asked: _OfObject) -> _Answer:
        """Home, owners, which blocks each node should keep, and which it has."""
        bucket, key, version_id = asked.bucket, asked.key, asked.version_id
        name = key if version_id is None else version_name(key, version_id)
        view, block_bytes = self.hub.view, self._settings.cache.block_bytes
        ring = await self._rings.of(view)
        owners = ring.owners(bucket, name)
        question = {"bucket": bucket, "name": name}
        first = await self._ask_all((member.name for member in view.members), "blocks", question)
        silent = {member: said["error"] for member, said in first.items() if "error" in said}
        known = {member: said["record"] for member, said in first.items() if said.get("record")}
        answer: _Answer = {
            "bucket": bucket, "key": key, "version_id": version_id, "owners": owners, "home": owners[0] if owners else None,
            "known_by": sorted(known), "etag": None, "size": None, "block_bytes": block_bytes, "block_count": None,
            "blocks_looked_at": 0, "nodes": [], "unreachable": silent,
        }  # fmt: skip
        best = next((known[owner] for owner in owners if owner in known), None)
        if best is None and known:
            best = max(known.values(), key=lambda record: record["validated_at"])
        if best is None:
            return answer
        # Who has not answered the first question is not waited for again.
        second = await self._ask_all(
            (name for name in first if name not in silent), "blocks", question | {"content": best["content"]}
        )
        silent |= {member: said["error"] for member, said in second.items() if "error" in said}
        count = block_count(best["size"], block_bytes)
        looked_at = min(count, _BLOCKS_MAX)
        placed = await asyncio.to_thread(_place, ring, bucket, name, bytes.fromhex(best["content"]), looked_at)
        runs_max = max(_RUNS_LEAST, _RUNS_MAX // (2 * len(view.members)))
        nodes = []
        for member in view.members:
            numbers, said = placed.get(member.name, []), second.get(member.name, {})
            nodes.append(
                {
                    "name": member.name,
                    "should_keep": runs_of(numbers)[:runs_max],
                    "should_keep_count": len(numbers),
                    "keeps": said["runs"][:runs_max] if "runs" in said else None,
                    "keeps_count": said.get("count"),
                }
            )
        return answer | {
            "etag": best["etag"], "size": best["size"], "block_count": count, "blocks_looked_at": looked_at, "nodes": nodes,
        }  # fmt: skip

    async def _ask(self, name: str, topic: str, body: _Answer) -> _Answer:
        try:
            # The hub's time is for others; this node's own disk may hang as well.
            async with asyncio.timeout(_ANSWER_S):
                return dict(msgspec.json.decode(await self.hub.ask(name, topic, msgspec.json.encode(body))))
        except TimeoutError:
            return {"error": f"no answer within {_ANSWER_S:g} s"}
        except (KosError, msgspec.MsgspecError) as error:
            return {"error": str(error)}

    async def _ask_all(self, names: Iterable[str], topic: str, body: _Answer) -> dict[str, _Answer]:
        asked = list(names)
        answers = await asyncio.gather(*(self._ask(name, topic, body) for name in asked))
        return dict(zip(asked, answers, strict=True))


def _place(ring: Ring, bucket: str, name: str, content: bytes, count: int) -> dict[str, list[int]]:
    """By node, the blocks of the first `count` that it should keep. Takes long: not for the loop."""
    placed: dict[str, list[int]] = {}
    for number in range(count if ring.members else 0):
        placed.setdefault(ring.block_owners(bucket, name, content, number, 1)[0], []).append(number)
    return placed


def _error(wrong: Wrong, message: str) -> bytes:
    return msgspec.json.encode({"error": message, "wrong": wrong})
