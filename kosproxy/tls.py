"""TLS between a worker and its clients: what a connection sends is encrypted here, what arrives is decrypted.

Owns: the handshake, its failures and their number, the two directions of an open connection, its orderly end. Does not
own: what is said over it (kosproxy.server), the certificate (kosproxy.certificate), how long a handshake may take
(kosproxy.server's clocks).

Why not the loop's own TLS (create_server(ssl=...)): there a connection is unknown to the edge until its handshake is
done, so that neither the number nor the end of half-open ones can be held to the limits; each holds a buffer of 256 KiB;
and what the kernel has not taken yet hides one level below the transport that a sender is paused by, so that a client
that takes bytes slowly looks like one that takes none. Here the transport that a Connection sees has no buffer of its
own: a byte is at the client's kernel's, or in the plain transport below, where it is counted.

Invariant: bytes leave in the order of their write() calls, and all that were written before close() leave before its
close_notify.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final

from kos import metrics
from kosproxy.server import Connection, Edge

#: Read from the socket at once, and encrypted at once: four records. OpenSSL's buffers keep the size that they once had,
#: so this, and not the largest body, is what an idle connection may hold: some 90 KiB for each direction.
PIECE_BYTES: Final = 64 * 1024
#: One record more: decrypting may end in the middle of what was read before.
_OPENED_BYTES: Final = PIECE_BYTES + 16 * 1024
#: Bytes that a client may send without a byte of HTTP in them: a record of 16 KiB that is not all there yet, and some
#: changes of keys, each of which costs the node 40 µs for 27 bytes.
_BARREN_BYTES: Final = 32 * 1024
#: What TLS may answer by itself, 27 bytes to each change of keys, while the client takes nothing. The clock of such a
#: client does not end it: what waits for the client has changed at every look.
_OWN_BYTES: Final = 16 * 1024

_log: Final = logging.getLogger("kosproxy.tls")


class TlsEdge:
    """Makes the connections of a listening socket that speaks TLS; a protocol factory for create_server.

    context: the certificate to use for a handshake that begins now. not_tls: the whole response to plain HTTP.
    """

    def __init__(self, edge: Edge, context: Callable[[], ssl.SSLContext], not_tls: bytes) -> None:
        self.edge = edge
        self.context = context
        self.not_tls = not_tls
        self.loop = asyncio.get_running_loop()
        # Used from the arrival of bytes to their delivery, within which nothing else runs: one of each does for all.
        self.received = memoryview(bytearray(PIECE_BYTES))
        self.opened = memoryview(bytearray(_OPENED_BYTES))

    def __call__(self) -> Secured:
        return Secured(self)


class Secured(asyncio.Transport, asyncio.BufferedProtocol):
    """One client: the protocol of a plain transport, and the transport of a Connection."""

    __slots__ = (
        "_barren_bytes",
        "_closing",
        "_ended",
        "_incoming",
        "_listener",
        "_outgoing",
        "_own_bytes",
        "_paused",
        "_protocol",
        "_reading",
        "_shaking",
        "_since",
        "_ssl",
        "_wire",
    )

    def __init__(self, listener: TlsEdge) -> None:
        super().__init__()
        self._listener = listener
        self._wire: asyncio.Transport | None = None
        self._protocol: Connection | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl: ssl.SSLObject | None = None
        self._shaking = False
        self._since = 0.0
        self._barren_bytes = 0
        self._own_bytes = 0
        self._closing = False
        self._ended = False
        self._paused = False
        self._reading = True

    # -- the plain transport's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        edge = self._listener.edge
        self._wire = transport  # type: ignore[assignment]  # uvloop's is not derived from asyncio.Transport
        if edge.full or edge.draining:
            # There is no saying why without a handshake, which is what a node at its limit has no time for.
            _count("turned_away")
            self.abort()
            return
        transport.set_write_buffer_limits(high=0)  # type: ignore[attr-defined]
        self._since = self._listener.loop.time()
        self._shaking = True
        edge.handshakes.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._listener.received

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        self._incoming.write(self._listener.received[:nbytes])
        if self._shaking:
            self._shake()
        else:
            self._barren_bytes += nbytes
            self._read()

    def eof_received(self) -> None:
        if self._protocol is not None and not self._closing:
            self._protocol.eof_received()
        self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        protocol, self._protocol = self._protocol, None
        self._closing = True
        self._ssl = None
        if self._shaking:
            self._end_shaking("lost")
        if protocol is not None:
            protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._paused = True
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._paused = False
        self._own_bytes = 0
        # What was closed has now sent its last, and is lost next. To abort it from here makes asyncio lose it twice.
        if self._protocol is not None and not self._closing:
            self._protocol.resume_writing()

    # -- the handshake

    def check_clock(self, now: float, timeout_s: float) -> None:
        """Called once in a while as long as the handshake lasts: end one that takes too long."""
        if now - self._since > timeout_s:
            self._end_shaking("timeout")
            self.abort()

    def _shake(self) -> None:
        if self._ssl is None:
            self._ssl = self._listener.context().wrap_bio(self._incoming, self._outgoing, server_side=True)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (ssl.SSLError, OSError) as failure:
            self._refuse(failure)
            return
        self._flush()
        self._end_shaking("done")
        self._protocol = protocol = self._listener.edge()
        protocol.connection_made(self)
        if self._paused:
            protocol.pause_writing()
        self._read()

    def _refuse(self, failure: OSError) -> None:
        """No handshake came about. Scanners and health checks do this all day: it is counted, and no error of ours."""
        assert self._wire is not None
        reason = getattr(failure, "reason", None) or str(failure)
        _log.debug("TLS handshake failed", extra={"reason": reason, "client": self.get_extra_info("peername")})
        if reason in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
            self._end_shaking("not_tls")
            self._outgoing.read()
            self._wire.write(self._listener.not_tls)
        else:
            self._end_shaking("failed")
            # What is wrong, in TLS's own words.
            self._flush()
        self._closing = True
        self._wire.close()

    def _end_shaking(self, result: str) -> None:
        self._shaking = False
        self._listener.edge.handshakes.discard(self)
        _count(result)

    # -- arriving bytes

    def _read(self) -> None:
        """Decrypt what is there and hand it on."""
        opened, incoming, tls = self._listener.opened, self._incoming, self._ssl
        filled, ended = 0, False
        while tls is not None and self._reading and not self._closing:
            if not incoming.pending and not tls.pending():
                break  # asking for what is not there costs an exception
            try:
                count = tls.read(len(opened) - filled, opened[filled:])
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLError, OSError) as failure:
                self._break_off(failure)
                return
            if not count:
                ended = True
                break
            filled += count  # type: ignore[operator]  # a count, for it reads into a buffer
            self._barren_bytes = 0
            if filled == len(opened):
                self._deliver(bytes(opened))
                filled = 0
        if filled:
            self._deliver(bytes(opened[:filled]))
        if self._outgoing.pending and not self._closing:
            # The answer to a change of keys.
            if self._paused:
                self._own_bytes += self._outgoing.pending
            self._flush()
        barren = self._reading and self._barren_bytes > _BARREN_BYTES
        if (barren or self._own_bytes > _OWN_BYTES) and not self._closing:
            self._break_off(ssl.SSLError("changes of keys without end"))
            return
        if ended and not self._closing:
            # The client's close_notify: as the end of a plain connection, it ends both directions.
            if self._protocol is not None:
                self._protocol.eof_received()
            self.close()

    def _deliver(self, data: bytes) -> None:
        if self._protocol is not None:
            self._protocol.data_received(data)

    def _break_off(self, failure: OSError) -> None:
        _log.debug("TLS connection broke off", extra={"reason": str(failure)})
        self._closing = True
        if self._wire is not None:
            self._flush()
            self._wire.abort()

    # -- the connection's transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send; what the kernel does not take waits in the plain transport, and pauses the protocol."""
        tls, wire = self._ssl, self._wire
        if self._closing or self._ended or tls is None or wire is None:
            return
        try:
            if len(data) <= PIECE_BYTES and tls.write(data) == len(data):
                wire.write(self._outgoing.read())
                return
            # The buffer may be used again when this returns: there is nothing left in it that was not encrypted.
            left = memoryview(data)
            while left:
                left = left[tls.write(left[:PIECE_BYTES]) :]
                wire.write(self._outgoing.read())
        except (ssl.SSLError, OSError) as failure:
            self._break_off(failure)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Send what was written and a close_notify, then close. The client's own close_notify is not waited for (RFC 8446
        section 6.1 does not ask for it): the end of an answer is known from its length."""
        if self._closing:
            return
        self._closing = True
        if self._wire is None:
            return
        if not self._shaking:
            self._notify()
        self._wire.close()

    def _notify(self) -> None:
        """Send a close_notify, once. OpenSSL then asks for the client's, whose absence is no failure."""
        if self._ssl is not None and not self._ended:
            self._ended = True
            with contextlib.suppress(ssl.SSLError, OSError):
                self._ssl.unwrap()
            self._flush()

    def abort(self) -> None:
        self._closing = True
        if self._wire is not None:
            self._wire.abort()

    def is_closing(self) -> bool:
        return self._closing or self._wire is None or self._wire.is_closing()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and self._wire is not None:
            self._wire.write(data)

    def pause_reading(self) -> None:
        self._reading = False
        if self._wire is not None and not self._closing:
            self._wire.pause_reading()

    def resume_reading(self) -> None:
        if self._reading or self._wire is None or self._closing:
            return
        self._reading = True
        self._wire.resume_reading()
        # Not at once: a protocol that resumes is in the middle of something.
        self._listener.loop.call_soon(self._read)

    def is_reading(self) -> bool:
        return self._reading and not self.is_closing()

    def get_write_buffer_size(self) -> int:
        return 0 if self._wire is None else self._wire.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._wire is not None:
            self._wire.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Nothing more will be written; what arrives is still read (TLS 1.3 means it so, and 1.2 is used so)."""
        if not self._closing and not self._shaking:
            self._notify()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._ssl
        if name == "sslcontext":
            return default if self._ssl is None else self._ssl.context
        return default if self._wire is None else self._wire.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, Connection)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol


def _count(result: str) -> None:
    metrics.TLS_HANDSHAKES.labels(result).inc()
