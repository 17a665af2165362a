"""Two workers list and write in every order of events: nobody who asks after a write was answered is shown a state before it.

Each listing and each write is cut into its steps (asked, carried out by the origin, answered), which hypothesis orders. The
fence is the real one, the pages are in memory, both workers share them as they do on disk.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kos.config import Rule
from kos.rules import Rules
from kos.s3.listing import Question
from kos.tasks import Tasks
from koscache.fence import Fence
from kosproxy.listings import Found, Listings
from kosproxy.pages import Page
from tests.fakes.clock import FakeClock, settle

#: Few, so that they meet; what a directory is has tests of its own (tests/koscache/test_directories.py).
KEYS = ["a", "d/a", "d//e"]
PREFIXES = ["", "d", "d/", "d//"]


@functools.cache
def shared_fence() -> Fence:
    """One for all histories: values never come back, so that none is another's."""
    directory = tempfile.TemporaryDirectory()
    with directory:
        return Fence.open(directory.name, "boot")


class MemoryPages:
    """What kosproxy.pages.Pages is, without a disk."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Page] = {}

    async def get(self, key: bytes) -> Page | None:
        await asyncio.sleep(0)
        return self.kept.get(key)

    async def put(self, key: bytes, page: Page, keep_s: float | None) -> None:
        await asyncio.sleep(0)
        self.kept[key] = page


class Response:
    """One answer of the origin's, whole."""

    status = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    content_length = None

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def pieces(self) -> AsyncIterator[bytes]:
        yield self._body

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@dataclass(eq=False)
class Asked:
    """A request at the origin: carried out when the machine says so, answered when it says so."""

    prefix: str
    body: bytes = b""
    answered: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Listing:
    """One client's listing. least: for each key, the number of the write that it must show, or a later one."""

    prefix: str
    least: dict[str, int]
    task: asyncio.Task[Any]


@dataclass(eq=False)
class Write:
    key: str
    removes: bool
    slots: set[int]
    number: int = 0


class History(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.fence = shared_fence()
        self.clock = FakeClock()
        self.tasks = Tasks("test")
        #: the last write of each key that the origin has carried out: its number, and whether the key is there
        self.state: dict[str, tuple[int, bool]] = {}
        #: the number of the last write of each key that was answered
        self.answered: dict[str, int] = {}
        self.asked: list[Asked] = []
        self.served: list[Asked] = []
        self.listings: list[Listing] = []
        self.begun: list[Write] = []
        self.carried_out: list[Write] = []
        self.count = 0
        pages: Any = MemoryPages()
        rules = Rules([Rule(match="*", listings=float("inf"))])
        origin: Any = self
        self.workers = [Listings(pages, self.fence, origin, rules, self.clock, self.tasks) for _ in range(2)]

    async def request(self, method: str, bucket: str, key: None, **more: Any) -> Response:
        """What the workers take for the origin."""
        asked = Asked(dict(more["query"]).get("prefix", ""))
        self.asked.append(asked)
        await asked.answered.wait()
        return Response(asked.body)

    def run(self) -> None:
        self.loop.run_until_complete(settle())
        for listing in [each for each in self.listings if each.task.done()]:
            self.listings.remove(listing)
            found = listing.task.result()
            assert isinstance(found, Found)
            shown = dict(line.split(b"=") for line in found.page.body.split(b"|")[1:-1])
            for each, least in listing.least.items():
                if each.startswith(listing.prefix):
                    assert int(shown.get(each.encode(), b"0")) >= least, (listing.prefix, each, found.phase)

    @rule(worker=st.integers(0, 1), prefix=st.sampled_from(PREFIXES))
    def client_lists(self, worker: int, prefix: str) -> None:
        question = Question("b", 2, prefix=prefix or None)
        find = self.workers[worker].find(question, "ListObjectsV2")
        self.listings.append(Listing(prefix, dict(self.answered), self.loop.create_task(find)))
        self.run()

    @rule(worker=st.integers(0, 1), prefix=st.sampled_from(PREFIXES))
    def client_lists_undisturbed(self, worker: int, prefix: str) -> None:
        self.client_lists(worker, prefix)
        while self.asked:
            self._serve(self.asked[0])
        while self.served:
            self._deliver(self.served[0])

    @rule(key=st.sampled_from(KEYS), removes=st.booleans())
    def client_writes_undisturbed(self, key: str, removes: bool) -> None:
        self.write_begins(key, removes)
        self._carry_out(self.begun[-1])
        self._answer(self.carried_out[-1])

    @precondition(lambda self: self.asked)
    @rule(drawn=st.data())
    def origin_lists(self, drawn: st.DataObject) -> None:
        self._serve(drawn.draw(st.sampled_from(self.asked)))

    def _serve(self, asked: Asked) -> None:
        self.asked.remove(asked)
        # Removed keys are shown too, with the number of their removal: what matters is which write the answer knows.
        lines = [
            b"%b=%d" % (key.encode(), number) for key, (number, _) in self.state.items() if key.startswith(asked.prefix)
        ]
        asked.body = b"|".join([b"<ListBucketResult>", *lines, b"</ListBucketResult>"])
        self.served.append(asked)

    @precondition(lambda self: self.served)
    @rule(drawn=st.data())
    def listing_arrives(self, drawn: st.DataObject) -> None:
        self._deliver(drawn.draw(st.sampled_from(self.served)))

    def _deliver(self, asked: Asked) -> None:
        self.served.remove(asked)
        asked.answered.set()
        self.run()

    @rule(key=st.sampled_from(KEYS), removes=st.booleans())
    def write_begins(self, key: str, removes: bool) -> None:
        write = Write(key, removes, self.fence.directory_slots("b", [key]))
        self.fence.bump_all(write.slots)
        self.begun.append(write)

    @precondition(lambda self: self.begun)
    @rule(drawn=st.data())
    def origin_writes(self, drawn: st.DataObject) -> None:
        self._carry_out(drawn.draw(st.sampled_from(self.begun)))

    def _carry_out(self, write: Write) -> None:
        self.begun.remove(write)
        self.count += 1
        write.number = self.count
        self.state[write.key] = (self.count, not write.removes)
        self.carried_out.append(write)

    @precondition(lambda self: self.carried_out)
    @rule(drawn=st.data())
    def write_is_answered(self, drawn: st.DataObject) -> None:
        self._answer(drawn.draw(st.sampled_from(self.carried_out)))

    def _answer(self, write: Write) -> None:
        self.carried_out.remove(write)
        self.fence.bump_all(write.slots)
        self.answered[write.key] = max(self.answered.get(write.key, 0), write.number)

    @invariant()
    def flights_are_counted(self) -> None:
        for worker in self.workers:
            assert worker.flights == len({id(flight) for flight in worker._flights.values()})

    def teardown(self) -> None:
        while self.asked or self.served:
            for asked in self.asked + self.served:
                asked.body = asked.body or b"<ListBucketResult></ListBucketResult>"
                asked.answered.set()
            self.asked.clear()
            self.served.clear()
            self.loop.run_until_complete(settle())
        assert all(listing.task.done() for listing in self.listings)
        assert all(worker.flights == 0 and worker._flying_bytes == 0 for worker in self.workers)
        self.loop.run_until_complete(self.tasks.close())
        self.loop.close()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
