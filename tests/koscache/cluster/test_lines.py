"""Lines over real sockets on loopback: who is let in, in what order things are heard, and how a line ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from kos.clock import Clock
from kos.tasks import Tasks
from koscache import ipc
from koscache.cluster import lines as lines_module
from koscache.cluster import wire
from koscache.cluster.coherence import Greeting, ProtocolBroken
from koscache.cluster.lines import Lines
from koscache.cluster.view import Member
from koscache.fence import SLOTS
from tests.conditions import until
from tests.fakes.clock import FakeClock

SECRET = b"of the whole cluster"
BLOCK_BYTES = 8 << 20
PING_S = 1.0


class Talker:
    """A Talk that writes down what it hears. broken: messages that it takes as a breach; strangers: names it does not know."""

    def __init__(self, name: str, daemon: int, address: str) -> None:
        self.me = Member(name, 1, "127.0.0.1:1", address, 1)
        self.daemon = daemon
        self.events: list[tuple[Any, ...]] = []
        self.strangers: set[str] = set()
        self.greeting = Greeting(3, (7, 8), ((1, (5,)),))
        self.broken: type | None = None
        self.hellos: list[wire.Hello] = []
        self.on_hello: Callable[[wire.Hello], None] | None = None

    def greet(self, name: str) -> Greeting:
        self.events.append(("greet", name))
        return self.greeting

    def told(self, name: str, message: Any) -> None:
        self.events.append(("told", name, message))
        if self.broken is not None and isinstance(message, self.broken):
            raise ProtocolBroken("of all things")

    def lost(self, name: str, reason: str) -> None:
        self.events.append(("lost", name, reason))

    def refused(self, name: str, reason: str) -> None:
        self.events.append(("refused", name, reason))

    def known(self, name: str) -> bool:
        return name != self.me.name and name not in self.strangers

    def hello(self, hello: wire.Hello) -> None:
        self.events.append(("hello", hello.member.name))
        self.hellos.append(hello)
        if self.on_hello is not None:
            self.on_hello(hello)

    def listening(self, name: str) -> None:
        self.events.append(("listening", name))

    def heard(self, name: str, message: Any) -> None:
        self.events.append(("heard", name, message))
        if self.broken is not None and isinstance(message, self.broken):
            raise ProtocolBroken("of all things")

    def left(self, name: str, reason: str) -> None:
        self.events.append(("left", name, reason))

    def kinds(self) -> list[str]:
        return [event[0] for event in self.events]

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]

    def messages(self, kind: str) -> list[Any]:
        return [message for _, message in self.of(kind)]


class Daemon:
    """One end: its lines, with a listening socket of their own."""

    def __init__(self, name: str, clock: Clock, daemon: int, options: dict[str, Any]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.talk = Talker(name, daemon, self.address)
        self.tasks = Tasks(name)
        settings: dict[str, Any] = {
            "secret": SECRET, "block_bytes": BLOCK_BYTES, "ping_s": PING_S, "connect_timeout_s": 5.0, "local_host": None,
        } | options  # fmt: skip
        secret = settings.pop("secret")
        self.lines = Lines(self.talk, secret, clock=clock, tasks=self.tasks, **settings)

    @property
    def member(self) -> Member:
        return self.talk.me

    async def stop(self) -> None:
        await self.lines.close()
        await self.tasks.close()
        self.socket.close()


Make = Callable[..., Any]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """make("a", clock=..., **options of Lines): a Daemon that listens."""
    made: list[Daemon] = []

    async def daemon(name: str, clock: Clock | None = None, number: int = 0, **options: Any) -> Daemon:
        end = Daemon(name, clock or Clock(), number or 100 + len(made), options)
        made.append(end)
        await end.lines.start(end.socket)
        return end

    yield daemon
    for end in made:
        await end.stop()


async def stands(writer: Daemon, listener: Daemon) -> None:
    """Has the writer follow the listener, and waits until the line is there on both ends."""
    writer.lines.follow({listener.member.name: listener.member})
    await until(lambda: writer.member.name in listener.lines.ins and "listening" in listener.talk.kinds())


def begin(number: int, slots: int = 1) -> wire.Begin:
    return wire.Begin(number, tuple(range(slots)))


# --- a line that stands --------------------------------------------------------------------------------------------------


async def test_both_prove_themselves_then_the_writer_says_what_the_listener_must_know(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    assert w.talk.events == [("greet", "a")]
    assert a.talk.events == [("hello", "w"), ("listening", "w")]
    assert a.talk.hellos == [
        wire.Hello(w.member, w.talk.daemon, 3, BLOCK_BYTES, SLOTS, (7, 8), ((1, (5,)),)),
    ]


async def test_all_is_heard_in_the_order_in_which_it_was_said(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    for number in range(2000):
        assert w.lines.tell("a", begin(number))
        assert a.lines.reply("w", wire.Ack(number, False, 0))
    await until(lambda: len(a.talk.of("heard")) == 2000 and len(w.talk.of("told")) == 2000)
    assert [message.number for message in a.talk.messages("heard")] == list(range(2000))
    assert [message.number for message in w.talk.messages("told")] == list(range(2000))


async def test_what_is_said_at_once_comes_behind_the_hello(make: Make) -> None:
    """Both ends may say things within the call in which they learn of the line."""
    w, a = await make("w"), await make("a")
    a.talk.on_hello = lambda hello: a.lines.reply("w", wire.Welcome(9)) and None
    w.lines.follow({"a": a.member})
    await until(lambda: w.talk.of("greet"))
    w.lines.tell("a", begin(1))
    await until(lambda: a.talk.of("heard") and w.talk.of("told"))
    assert a.talk.kinds() == ["hello", "listening", "heard"]
    assert w.talk.messages("told") == [wire.Welcome(9)]


async def test_a_hello_may_be_long_once_both_are_proven(make: Make) -> None:
    w, a = await make("w"), await make("a")
    w.talk.greeting = Greeting(3, tuple(range(1 << 20, (1 << 20) - 65_536, -1)), ())
    await stands(w, a)
    assert a.talk.hellos[0].skipped == w.talk.greeting.skipped


async def test_lines_go_both_ways_and_are_two(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    await stands(a, w)
    assert w.lines.tell("a", begin(1))
    assert a.lines.tell("w", begin(2))
    await until(lambda: a.talk.of("heard") and w.talk.of("heard"))
    assert a.talk.messages("heard") == [begin(1)]
    assert w.talk.messages("heard") == [begin(2)]


async def test_there_is_nothing_to_be_said_where_there_is_no_line(make: Make) -> None:
    w, a = await make("w"), await make("a")
    assert not w.lines.tell("a", begin(1))
    assert not w.lines.reply("a", wire.Ack(1, False, 0))
    w.lines.follow({"a": a.member})
    assert not w.lines.tell("a", begin(1))  # it has not stood yet
    w.lines.cut("nobody", "")
    w.lines.restart("nobody")


async def test_a_line_comes_from_the_host_that_this_node_listens_on(make: Make) -> None:
    w, a = await make("w", local_host="127.0.0.2"), await make("a")
    await stands(w, a)
    connection = a.lines.ins["w"].connection
    assert connection is not None and connection._transport is not None
    assert connection._transport.get_extra_info("peername")[0] == "127.0.0.2"


# --- who is not let in ---------------------------------------------------------------------------------------------------


async def refused_by(writer: Daemon, listener: Daemon, caplog: pytest.LogCaptureFixture) -> str:
    """What the writer logs of it."""
    writer.lines.follow({listener.member.name: listener.member})

    def reasons() -> list[str]:
        return [vars(record)["reason"] for record in caplog.records if record.message == "no line to a member"]

    await until(reasons)
    assert listener.lines.ins == {}
    assert "hello" not in listener.talk.kinds()
    return str(reasons()[0])


async def test_another_secret(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, a = await make("w", secret=b"of another cluster"), await make("a")
    assert "cluster.secret" in await refused_by(w, a, caplog)
    assert w.talk.events == []  # it has said nothing of its writes, and nobody it could believe has refused it


async def test_another_secret_of_the_one_that_listens(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """He takes anybody: but the writer tells him nothing."""
    w = await make("w")
    async with impostor("a", b"a guess") as (member, heard):
        w.lines.follow({"a": member})
        await until(
            lambda: any(getattr(record, "reason", "").startswith("its proof is wrong") for record in caplog.records)
        )
        assert {type(message) for message in heard} == {wire.Knock}
    assert w.talk.events == []


async def test_somebody_else_than_was_looked_for(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The address belongs to another member by now, who knows the secret."""
    w, a = await make("w"), await make("a")
    w.lines.follow({"b": msgspec.structs.replace(a.member, name="b")})
    await until(lambda: any(getattr(record, "member", "") == "b" for record in caplog.records))
    assert a.talk.events == []
    assert w.talk.events == []


async def test_another_block_size(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, a = await make("w", block_bytes=4 << 20), await make("a")
    assert "cache.block_size is 4194304 there and 8388608 here" in await refused_by(w, a, caplog)
    await until(lambda: w.talk.of("lost"))
    assert w.talk.kinds()[:2] == ["greet", "lost"]


async def test_a_name_that_is_not_known(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The one that is told so takes the other for one that does not miss its lease."""
    w, a = await make("w"), await make("a")
    a.talk.strangers.add("w")
    assert "no member is called w here" in await refused_by(w, a, caplog)
    await until(lambda: w.talk.of("lost"))
    assert w.talk.kinds()[:3] == ["greet", "refused", "lost"]


async def test_its_own_name(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, a = await make("a", number=1), await make("a", number=2)
    assert "no member is called a here" in await refused_by(w, a, caplog)


async def test_one_that_the_talk_does_not_let_in(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(hello: wire.Hello) -> None:
        raise ProtocolBroken("no member any more")

    w, a = await make("w"), await make("a")
    a.talk.on_hello = refuse
    w.lines.follow({"a": a.member})
    await until(lambda: w.talk.of("lost"))
    assert a.lines.ins == {}
    assert "listening" not in a.talk.kinds()
    assert "left" not in a.talk.kinds()  # it never was there
    assert "no member any more" in w.talk.of("lost")[0][1]


# --- strangers, by hand --------------------------------------------------------------------------------------------------


class Stranger:
    """A connection of a test's own to a listener. heard: what it was told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unframer = ipc.Unframer(wire.ToWriter, wire.MESSAGE_BYTES_MAX)
        self.heard: list[Any] = []

    @classmethod
    async def connect(cls, end: Daemon) -> Stranger:
        host, port = end.address.split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def hear(self, kind: type) -> Any:
        """Reads until there is one of these, or the end: None."""
        while True:
            for message in self.heard:
                if isinstance(message, kind):
                    return message
            received = await self._receive()
            if not received:
                return None
            self.heard += self._unframer.feed(received)

    async def _receive(self) -> bytes:
        try:
            return await self._reader.read(65536)
        except ConnectionError:
            return b""

    async def ended(self) -> bool:
        while received := await self._receive():
            self.heard += self._unframer.feed(received)
        return True

    def say(self, *messages: ipc.Message) -> None:
        self._writer.write(b"".join(map(ipc.frame, messages)))

    def say_bytes(self, said: bytes) -> None:
        self._writer.write(said)

    async def knock(self, to: Daemon, name: str = "w", *, daemon: int = 7, secret: bytes = SECRET, **said: Any) -> None:
        challenge = await self.hear(wire.Challenge)
        nonces = challenge.nonce, os.urandom(wire.NONCE_BYTES)
        proof = wire.proof(secret, "knock", nonces, name, to.member.name, daemon)
        options: dict[str, Any] = {
            "protocol": wire.PROTOCOL, "name": name, "to": to.member.name, "daemon": daemon, "nonce": nonces[1], "proof": proof,
        } | said  # fmt: skip
        self.say(wire.Knock(**options))

    async def stand(self, to: Daemon, name: str = "w", daemon: int = 7) -> None:
        await self.knock(to, name, daemon=daemon)
        assert await self.hear(wire.Proven)
        self.say(hello_of(name, daemon))

    def close(self) -> None:
        self._writer.close()


def hello_of(name: str, daemon: int = 7) -> wire.Hello:
    return wire.Hello(Member(name, 1, "", "", 1), daemon, 0, BLOCK_BYTES, SLOTS, (), ())


@asynccontextmanager
async def impostor(name: str, secret: bytes) -> AsyncIterator[tuple[Member, list[Any]]]:
    """One that listens, and proves itself by that secret to anybody. heard: what it was told."""
    heard: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unframer = ipc.Unframer(wire.ToListener, wire.MESSAGE_BYTES_MAX)
        nonce = os.urandom(wire.NONCE_BYTES)
        writer.write(ipc.frame(wire.Challenge(nonce)))
        while received := await reader.read(65536):
            for message in unframer.feed(received):
                heard.append(message)
                if isinstance(message, wire.Knock):
                    proof = wire.proof(secret, "proven", (nonce, message.nonce), name, message.name, 1)
                    writer.write(ipc.frame(wire.Proven(name, 1, proof)))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Member(name, 1, "", f"127.0.0.1:{server.sockets[0].getsockname()[1]}", 1), heard
    finally:
        server.close()


@pytest.fixture
def watched() -> FakeClock:
    return FakeClock()


async def test_a_stranger_that_says_nothing_is_sent_away(make: Make, watched: FakeClock) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    assert await stranger.hear(wire.Challenge)
    await watched.advance(lines_module._HANDSHAKE_S)
    assert a.lines._unproven
    await watched.advance(2 * PING_S)
    assert await stranger.ended()
    await until(lambda: not a.lines._unproven)
    assert a.talk.events == []


async def test_so_is_one_that_has_proven_itself_and_says_no_hello(make: Make, watched: FakeClock) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    await stranger.knock(a)
    assert await stranger.hear(wire.Proven)
    await watched.advance(lines_module._HANDSHAKE_S + 2 * PING_S)
    assert await stranger.ended()
    assert a.talk.events == []


async def test_and_one_that_stops_within_a_frame(make: Make, watched: FakeClock) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    await stranger.hear(wire.Challenge)
    stranger.say_bytes(ipc.frame(begin(1))[:-1])
    await watched.advance(lines_module._HANDSHAKE_S + 2 * PING_S)
    assert await stranger.ended()


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 64,
        (wire.STRANGER_BYTES_MAX + 1).to_bytes(4, "little"),
        b"\x01\x00\x00\x00\xc1",
        ipc.frame(wire.Challenge(b"x" * 16)),
    ],
    ids=["http", "ones", "long", "no message", "not for a listener"],
)
async def test_garbage_ends_a_line_at_once(make: Make, watched: FakeClock, junk: bytes) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    stranger.say_bytes(junk)
    assert await stranger.ended()
    assert a.talk.events == []
    await until(lambda: not a.lines._unproven)


@pytest.mark.parametrize("message", [hello_of("w"), begin(1), wire.AskView(), wire.Ask(1, "status", b"")])
async def test_nothing_is_heard_before_a_proof(make: Make, message: ipc.Message) -> None:
    a = await make("a")
    stranger = await Stranger.connect(a)
    stranger.say(message)
    refused = await stranger.hear(wire.Refused)
    assert "before its time" in refused.reason
    assert await stranger.ended()
    assert a.talk.events == []


@pytest.mark.parametrize(
    "said",
    [
        {"secret": b"a guess"},
        {"proof": b""},
        {"nonce": b"another nonce 16"},
        {"to": "b"},
        {"name": "x"},
        {"daemon": 8},
    ],
    ids=lambda said: next(iter(said)),
)
async def test_a_proof_is_of_all_that_it_is_for(make: Make, said: dict[str, Any]) -> None:
    a = await make("a")
    stranger = await Stranger.connect(a)
    secret = said.pop("secret", SECRET)
    challenge = await stranger.hear(wire.Challenge)
    nonces = challenge.nonce, os.urandom(wire.NONCE_BYTES)
    proof = wire.proof(secret, "knock", nonces, "w", "a", 7)
    knock: dict[str, Any] = {"name": "w", "to": "a", "daemon": 7, "nonce": nonces[1], "proof": proof} | said
    stranger.say(wire.Knock(wire.PROTOCOL, **knock))
    assert "proof" in (await stranger.hear(wire.Refused)).reason
    assert await stranger.ended()
    assert a.talk.events == []


async def test_a_proof_that_was_made_for_another_cannot_be_passed_on(make: Make) -> None:
    a = await make("a")
    stranger = await Stranger.connect(a)
    challenge = await stranger.hear(wire.Challenge)
    nonces = challenge.nonce, os.urandom(wire.NONCE_BYTES)
    stranger.say(wire.Knock(wire.PROTOCOL, "w", "b", 7, nonces[1], wire.proof(SECRET, "knock", nonces, "w", "b", 7)))
    assert await stranger.hear(wire.Refused)
    assert await stranger.ended()
    assert a.talk.events == []


async def test_a_proof_cannot_be_played_back(make: Make) -> None:
    a = await make("a")
    first = await Stranger.connect(a)
    challenge = await first.hear(wire.Challenge)
    nonces = challenge.nonce, os.urandom(wire.NONCE_BYTES)
    knock = wire.Knock(wire.PROTOCOL, "w", "a", 7, nonces[1], wire.proof(SECRET, "knock", nonces, "w", "a", 7))
    first.say(knock)
    assert await first.hear(wire.Proven)
    second = await Stranger.connect(a)
    assert (await second.hear(wire.Challenge)).nonce != challenge.nonce
    second.say(knock)
    assert await second.hear(wire.Refused)


async def test_what_the_listener_proves_is_no_proof_of_a_writer(make: Make) -> None:
    """Else two lines could be played against each other."""
    nonces = b"a" * 16, b"w" * 16
    proven = wire.proof(SECRET, "proven", nonces, "a", "w", 7)
    assert wire.proves(proven, SECRET, "proven", nonces, "a", "w", 7)
    assert not wire.proves(proven, SECRET, "knock", nonces, "a", "w", 7)
    assert not wire.proves(proven, SECRET, "proven", nonces, "w", "a", 7)
    assert not wire.proves(proven, SECRET, "proven", (nonces[1], nonces[0]), "a", "w", 7)


async def test_another_protocol_is_named_as_what_it_is(make: Make) -> None:
    a = await make("a")
    stranger = await Stranger.connect(a)
    await stranger.knock(a, protocol=wire.PROTOCOL + 1)
    assert "protocol 2, here 1" in (await stranger.hear(wire.Refused)).reason
    assert await stranger.ended()


async def test_a_hello_is_for_who_has_knocked(make: Make) -> None:
    a = await make("a")
    for other in (hello_of("x"), hello_of("w", daemon=8)):
        stranger = await Stranger.connect(a)
        await stranger.knock(a)
        await stranger.hear(wire.Proven)
        stranger.say(other)
        assert "somebody else" in (await stranger.hear(wire.Refused)).reason
        assert await stranger.ended()
    assert a.talk.events == []


async def test_nobody_knocks_twice(make: Make) -> None:
    a = await make("a")
    stranger = await Stranger.connect(a)
    await stranger.knock(a)
    await stranger.hear(wire.Proven)
    await stranger.knock(a, "x")
    assert "before its time" in (await stranger.hear(wire.Refused)).reason
    assert await stranger.ended()


async def test_strangers_are_few_at_a_time_and_keep_no_member_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("koscache.cluster.lines._UNPROVEN_MAX", 3)
    a = await make("a")
    strangers = [await Stranger.connect(a) for _ in range(3)]
    for stranger in strangers:
        assert await stranger.hear(wire.Challenge)
    strangers += [await Stranger.connect(a) for _ in range(10)]
    for stranger in strangers[:10]:
        assert await stranger.ended()
    w = await make("w")
    await stands(w, a)
    assert len(a.lines._unproven) <= 3
    # As often as somebody likes to knock, it is said once a second.
    assert sum(record.message == "line refused" for record in caplog.records) < 5
    for stranger in strangers:
        stranger.close()


async def test_what_comes_after_a_refusal_is_not_heard(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Of one packet with thousands of messages the first is answered."""
    a = await make("a")
    stranger = await Stranger.connect(a)
    assert await stranger.hear(wire.Challenge)
    tasks = len(asyncio.all_tasks())
    stranger.say(*[wire.Ping()] * 2, *[wire.AskView()] * 5000)
    assert await stranger.hear(wire.Refused)
    assert len(asyncio.all_tasks()) <= tasks + 1
    await stranger.ended()
    assert sum(isinstance(message, wire.Refused) for message in stranger.heard) == 1
    assert sum(record.message == "line refused" for record in caplog.records) == 1


async def test_a_new_line_of_a_member_takes_the_place_of_its_old_one_without_a_word(make: Make) -> None:
    a = await make("a")
    first, second = await Stranger.connect(a), await Stranger.connect(a)
    await first.stand(a)
    await until(lambda: a.talk.of("listening"))
    await second.stand(a)
    await until(lambda: len(a.talk.of("listening")) == 2)
    assert await first.ended()
    assert a.talk.of("left") == []
    assert a.lines.reply("w", wire.Welcome(5))
    assert await second.hear(wire.Welcome) == wire.Welcome(5)
    second.close()
    await until(lambda: len(a.talk.of("left")) == 1)


async def test_what_breaks_the_protocol_ends_the_line_and_is_told_why(make: Make) -> None:
    a = await make("a")
    a.talk.broken = wire.End
    stranger = await Stranger.connect(a)
    await stranger.stand(a)
    stranger.say(begin(1), wire.End(2), begin(3))
    assert (await stranger.hear(wire.Refused)).reason == "of all things"
    assert await stranger.ended()
    await until(lambda: a.talk.of("left"))
    assert len(a.talk.of("left")) == 1


async def test_a_listener_that_breaks_the_protocol_loses_the_line(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    w.talk.broken = wire.Resigned
    a.lines.reply("w", wire.Resigned())
    a.lines.reply("w", wire.Ack(1, False, 0))
    await until(lambda: w.talk.of("lost"))
    assert w.talk.messages("told") == [wire.Resigned()]
    await until(lambda: len(w.talk.of("greet")) == 2)  # and it begins anew


# --- silence ---------------------------------------------------------------------------------------------------------


async def ping(clock: FakeClock, times: int = 1) -> None:
    """So many pings, and time for their answers."""
    for _ in range(times):
        await clock.advance(PING_S)
        for _ in range(50):
            await asyncio.sleep(0)


async def answered(clock: FakeClock, ends: tuple[Daemon, Daemon]) -> None:
    """One ping, until both have heard of it."""
    w, a = ends
    await clock.advance(PING_S)
    every: list[Any] = [*w.lines._outs.values(), *a.lines.ins.values()]
    await until(lambda: all(line.heard_at == clock.monotonic() for line in every))


async def test_lines_on_which_nothing_happens_live_on_by_pings(make: Make, watched: FakeClock) -> None:
    w, a = await make("w", clock=watched), await make("a", clock=watched)
    await stands(w, a)
    for _ in range(20):
        await answered(watched, (w, a))
    assert w.talk.kinds() == ["greet"]
    assert a.talk.kinds() == ["hello", "listening"]


async def test_a_listener_that_is_silent_is_given_up_after_three_pings(make: Make, watched: FakeClock) -> None:
    w = await make("w", clock=watched)
    async with impostor("a", SECRET) as (member, heard):
        w.lines.follow({"a": member})
        await until(lambda: w.talk.of("greet"))
        await ping(watched, 3)
        assert w.talk.of("lost") == []
        await until(lambda: sum(isinstance(message, wire.Ping) for message in heard) == 3)
        await ping(watched)
        await until(lambda: w.talk.of("lost"))
    assert w.talk.of("lost")[0] == ("a", "silent")


async def test_so_is_a_writer_that_is_silent(make: Make, watched: FakeClock) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    await stranger.stand(a)
    await until(lambda: a.talk.of("listening"))
    stranger.say(wire.Ping())
    assert await stranger.hear(wire.Pong)
    await ping(watched, 3)
    assert a.talk.of("left") == []
    await ping(watched)
    assert await stranger.ended()
    await until(lambda: a.talk.of("left"))
    assert a.talk.of("left") == [("w", "silent")]


async def test_anything_that_is_said_breaks_the_silence(make: Make, watched: FakeClock) -> None:
    a = await make("a", clock=watched)
    stranger = await Stranger.connect(a)
    await stranger.stand(a)
    await until(lambda: a.talk.of("listening"))
    for number in range(5):
        await ping(watched, 3)
        stranger.say(begin(number))
        await until(lambda: begin(number) in a.talk.messages("heard"))  # noqa: B023
    assert a.talk.of("left") == []
    stranger.close()


async def test_who_was_stopped_himself_hears_everybody_out_first(make: Make, watched: FakeClock) -> None:
    """A machine that was suspended wakes up: what the others said meanwhile has not been read yet."""
    w, a = await make("w", clock=watched), await make("a", clock=watched)
    await stands(w, a)
    watched.move(1000)
    await answered(watched, (w, a))
    await answered(watched, (w, a))
    assert w.talk.kinds() == ["greet"]
    assert a.talk.kinds() == ["hello", "listening"]


# --- lines that end and begin anew ------------------------------------------------------------------------------------------


async def test_a_line_that_breaks_is_told_of_once_on_either_end_and_begins_anew(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    a.lines.cut("w", "for a test")
    await until(lambda: len(a.talk.of("hello")) == 2)
    assert a.talk.of("left") == [("w", "for a test")]
    assert len(w.talk.of("lost")) == 1
    assert w.talk.kinds() == ["greet", "lost", "greet"]


async def test_restart_ends_only_the_line_of_ours(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    await stands(a, w)
    w.talk.greeting = Greeting(4, (), ())
    w.lines.restart("a")
    await until(lambda: len(a.talk.hellos) == 2)
    assert a.talk.hellos[1].version == 4
    assert w.talk.of("lost") == [("a", "to say Hello anew")]
    assert w.talk.of("left") == []
    assert a.talk.of("lost") == []


async def test_attempts_come_at_growing_pauses_and_at_the_first_one_again_after_a_line(
    make: Make, watched: FakeClock
) -> None:
    w, a = await make("w", clock=watched), await make("a", clock=watched)
    closed = socket.create_server(("127.0.0.1", 0))
    nobody = msgspec.structs.replace(a.member, cluster=f"127.0.0.1:{closed.getsockname()[1]}")
    closed.close()
    w.lines.follow({"a": nobody})

    def pauses() -> list[float]:
        return [slept for slept in watched.slept if slept != PING_S]

    expected = [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    for count in range(1, len(expected) + 1):
        await until(lambda: len(pauses()) >= count)  # noqa: B023
        await watched.advance(pauses()[-1])
    for pause, longest in zip(pauses(), expected, strict=False):
        assert longest / 2 <= pause <= longest
    w.lines.follow({"a": msgspec.structs.replace(a.member, incarnation=2)})
    await until(lambda: a.talk.of("hello"))
    before = len(pauses())
    a.lines.cut("w", "for a test")
    await until(lambda: len(pauses()) == before + 1)
    assert pauses()[-1] <= 0.05


async def test_who_is_let_in_and_turned_away_at_once_does_not_begin_at_the_first_pause(
    make: Make, watched: FakeClock
) -> None:
    """Each attempt says a whole Hello."""
    w, a = await make("w", clock=watched), await make("a", clock=watched)

    def refuse(hello: wire.Hello) -> None:
        raise ProtocolBroken("not now")

    a.talk.on_hello = refuse
    w.lines.follow({"a": a.member})

    def pauses() -> list[float]:
        return [slept for slept in watched.slept if slept != PING_S]

    for count in range(1, 6):
        await until(lambda: len(pauses()) >= count)  # noqa: B023
        assert len(a.talk.hellos) == count
        await watched.advance(pauses()[-1])
    assert pauses()[4] > 0.3
    await until(lambda: len(pauses()) == 6)
    a.talk.on_hello = None
    await watched.advance(1.0)
    await until(lambda: a.talk.of("listening"))


async def test_an_address_that_is_none_is_tried_again_like_any_other(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    w, a = await make("w"), await make("a")
    w.lines.follow({"a": msgspec.structs.replace(a.member, cluster="no port")})
    await until(lambda: any(record.message == "no line to a member" for record in caplog.records))
    await stands(w, a)


async def test_who_does_not_answer_the_call_is_called_again(make: Make) -> None:
    """He accepts and says nothing: after the time for proofs that is no line."""
    clock = FakeClock()
    w = await make("w", clock=clock, connect_timeout_s=0.01)
    mute = socket.create_server(("127.0.0.1", 0), backlog=1)
    full = [socket.create_connection(mute.getsockname()) for _ in range(2)]  # nobody accepts any more
    member = Member("a", 1, "", f"127.0.0.1:{mute.getsockname()[1]}", 1)
    w.lines.follow({"a": member})
    await until(lambda: [slept for slept in clock.slept if slept != PING_S])
    assert w.talk.events == []
    for each in (*full, mute):
        each.close()


async def test_a_member_that_has_moved_is_followed_and_one_that_is_gone_is_cut(make: Make) -> None:
    w, a, elsewhere = await make("w"), await make("a"), await make("a")
    await stands(w, a)
    await stands(a, w)
    w.lines.follow({"a": elsewhere.member})
    await until(lambda: elsewhere.talk.of("listening"))
    assert w.talk.of("lost") == [("a", "it has moved")]
    assert w.talk.of("left") == [("a", "it has moved")]
    w.lines.follow({})
    await until(lambda: elsewhere.talk.of("left"))
    assert w.talk.of("lost")[-1] == ("a", "no member any more")
    assert not w.lines.tell("a", begin(1))


async def test_another_incarnation_begins_with_a_new_line_and_another_weight_does_not(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    w.lines.follow({"a": msgspec.structs.replace(a.member, weight=9)})
    w.lines.follow({"a": msgspec.structs.replace(a.member, incarnation=2)})
    await until(lambda: len(a.talk.hellos) == 2)
    assert w.talk.kinds() == ["greet", "lost", "greet"]


async def test_a_line_is_lost_though_its_member_was_followed_again_meanwhile(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    for incarnation in range(2, 6):
        w.lines.follow({"a": msgspec.structs.replace(a.member, incarnation=incarnation)})
    await until(lambda: a.talk.of("hello")[1:] and w.lines.tell("a", begin(1)))
    await until(lambda: begin(1) in a.talk.messages("heard"))
    assert w.talk.kinds().count("greet") == w.talk.kinds().count("lost") + 1


# --- the end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said_on",
    ["its line", "our line"],
)
async def test_close_delivers_what_was_queued(make: Make, said_on: str) -> None:
    """More than the sockets hold, to one who reads it only then."""
    w, a = await make("w"), await make("a")
    await stands(w, a)
    for number in range(300):
        if said_on == "our line":
            assert w.lines.tell("a", begin(number, slots=10_000))
        else:
            assert a.lines.reply("w", wire.Said(number, bytes(30_000)))
    await (w if said_on == "our line" else a).lines.close()
    await until(lambda: a.talk.of("left") if said_on == "our line" else w.talk.of("lost"))
    assert len(a.talk.of("heard") if said_on == "our line" else w.talk.of("told")) == 300


async def test_after_close_nobody_is_let_in_and_nobody_followed(make: Make) -> None:
    w, a = await make("w"), await make("a")
    await stands(w, a)
    await a.lines.close()
    a.lines.follow({"w": w.member})
    await until(lambda: w.talk.of("lost"))
    with pytest.raises(OSError):
        await Stranger.connect(a)
    assert not a.lines.reply("w", wire.Welcome(1))
    assert "greet" not in a.talk.kinds()
