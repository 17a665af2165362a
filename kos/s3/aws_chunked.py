"""The aws-chunked body encoding: unpacking what clients send, packing what goes to an origin.

Owns: the framing of chunks and trailers, the chain of chunk signatures, the trailer's signature, the announced decoded
length. Does not own: the checksums that trailers carry (kos.s3.checksums), HTTP's own chunked coding (the server undoes
that first), or which of the forms a request has (kos.s3.sigv4 reads x-amz-content-sha256).

Invariant: once finish() has returned, every byte that feed() gave out was covered by what the form promises (signatures
for the signed forms, the announced length for all). Until then nothing is: a chunk's bytes are given out before
its signature can be known, because holding them back would mean holding a chunk of any size. So a caller may pass bytes
on as they come, but must not complete the object before finish(): it keeps back the end of the body, or aborts.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and sigv4-streaming-trailers.html. S3
answers every fault of the framing with IncompleteBody and every fault of the trailers' form with MalformedTrailerError.
S3 refuses chunks under 8 KiB before the last; kos takes them, since the origin never sees the client's chunks, but not
any number of very short ones: each costs some 10 µs, whether it holds a byte or a megabyte.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from enum import Enum, auto
from typing import Final

from kos.errors import S3Error
from kos.s3.head import Headers
from kos.s3.sigv4 import Identity, Payload, chunk_signature, trailer_signature

#: size in hex (16 digits hold 64 bits) + ";chunk-signature=" + 64 hex digits is 97; the rest is room for extensions.
CHUNK_LINE_MAX_BYTES: Final = 256
#: All trailers with their line ends: a name, a Base64 SHA-256 and the trailer signature take less than 200 bytes.
TRAILERS_MAX_BYTES: Final = 4096
TRAILERS_MAX: Final = 8
#: What S3 takes in one request: 5 GiB. No chunk and no body is larger.
BODY_MAX_BYTES: Final = 5 * 1024**3

#: So many chunks of a body may be shorter than this: 10 ms of work that is no use to anybody.
_SHORT_CHUNKS_MAX: Final = 1024
_SHORT_CHUNK_BYTES: Final = 512

_SIGNATURE_TRAILER: Final = "x-amz-trailer-signature"
_SIGNED: Final = frozenset({Payload.STREAMING_SIGNED, Payload.STREAMING_SIGNED_TRAILER})
_WITH_TRAILER: Final = frozenset({Payload.STREAMING_SIGNED_TRAILER, Payload.STREAMING_UNSIGNED_TRAILER})
#: The payload kinds whose bodies are aws-chunked.
FORMS: Final = _SIGNED | _WITH_TRAILER

_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;([^\r\n]*))?")
_CHUNK_SIGNATURE: Final = re.compile(rb"[ \t]*chunk-signature=([0-9a-f]{64})[ \t]*")
_TRAILER_NAME: Final = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
_TRAILER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", re.ASCII)


def announced_trailers(headers: Headers) -> frozenset[str]:
    """The lower-case names in x-amz-trailer."""
    return frozenset(name for field in headers.get("x-amz-trailer", "").split(",") if (name := field.strip().lower()))


def decoded_length(headers: Headers) -> int:
    """x-amz-decoded-content-length, in bytes. Raises MissingContentLength, EntityTooLarge, InvalidArgument."""
    text = headers.get("x-amz-decoded-content-length")
    if text is None:
        raise S3Error("MissingContentLength")
    if not re.fullmatch(r"[0-9]{1,20}", text, re.ASCII):
        raise S3Error(
            "InvalidArgument",
            "The x-amz-decoded-content-length header is not a number of bytes.",
            extra={"ArgumentName": "x-amz-decoded-content-length", "ArgumentValue": text},
        )
    if int(text) > BODY_MAX_BYTES:
        raise S3Error("EntityTooLarge", extra={"ProposedSize": text, "MaxSizeAllowed": str(BODY_MAX_BYTES)})
    return int(text)


def stored_content_encoding(value: str | None) -> str | None:
    """A Content-Encoding without "aws-chunked", which is of the transfer, not of the object; None when none is left."""
    if value is None or "aws-chunked" not in value.lower():
        return value
    codings = [coding for field in value.split(",") if (coding := field.strip()) and coding.lower() != "aws-chunked"]
    return ", ".join(codings) or None


class _State(Enum):
    CHUNK_LINE = auto()
    CHUNK_BODY = auto()
    CHUNK_END = auto()
    LAST_CHUNK_END = auto()
    TRAILERS = auto()
    END = auto()
    FAILED = auto()


class Decoder:
    """Unpacks one aws-chunked body. Bounded: keeps at most one chunk line or the trailers, never a body.

    payload: one of FORMS. identity: who signed the request; needed for the signed forms. decoded_length: bytes
    announced in x-amz-decoded-content-length; None only for callers that check the length themselves. trailer_names:
    announced in x-amz-trailer, lower case.

    The S3 errors of feed() and finish(): IncompleteBody (broken framing; fewer or more bytes than announced; bytes
    after the end), SignatureDoesNotMatch (a chunk or the trailers are not what was signed), MalformedTrailerError
    (trailers that are ill-formed, not announced, announced but missing, or lack their signature), EntityTooLarge,
    InvalidRequest (too many short chunks).
    After an error the decoder stays failed.
    """

    def __init__(
        self,
        payload: Payload,
        identity: Identity | None,
        decoded_length: int | None,
        trailer_names: frozenset[str] = frozenset(),
    ) -> None:
        assert payload in FORMS, payload
        assert identity is not None or payload not in _SIGNED, "a signed body needs the identity that signed it"
        if len(trailer_names) > TRAILERS_MAX:
            raise S3Error("MalformedTrailerError")
        #: Verified trailers, lower-case names; empty until finish() has returned.
        self.trailers: Headers = {}
        self._identity = identity if payload in _SIGNED else None
        self._with_trailer = payload in _WITH_TRAILER
        self._trailer_names = trailer_names
        self._expected = decoded_length
        self._state = _State.CHUNK_LINE
        self._line = bytearray()
        self._announced = 0  # bytes in all chunks begun so far
        self._short_chunks = 0
        self._left = 0  # bytes still to come of this chunk
        self._claimed = ""
        self._previous = identity.seed_signature if identity is not None else ""
        self._hash = hashlib.sha256()

    def feed(self, data: bytes) -> list[bytes | memoryview]:
        """Takes encoded bytes, split anywhere; returns the decoded bytes among them, in order, a piece for each chunk.

        Pieces are parts of data and not copied: they keep it in memory as long as they live.
        """
        try:
            return self._feed(data)
        except S3Error:
            self._state = _State.FAILED
            raise

    def finish(self) -> None:
        """The encoded body has ended: checks that it was whole, verifies the trailers and fills `trailers`."""
        state, self._state = self._state, _State.FAILED
        if state not in (_State.TRAILERS, _State.END):
            raise _broken_off()
        if self._expected is not None and self._announced != self._expected:
            raise self._wrong_length(self._announced)
        if state is _State.TRAILERS:
            self.trailers = self._verified_trailers()
        self._state = _State.END

    def _feed(self, data: bytes) -> list[bytes | memoryview]:
        decoded: list[bytes | memoryview] = []
        view = memoryview(data)
        position, end = 0, len(data)
        while position < end:
            state = self._state
            if state is _State.CHUNK_BODY:
                take = min(self._left, end - position)
                piece = data if take == end else view[position : position + take]
                decoded.append(piece)
                self._took(piece)
                position += take
            elif state is _State.CHUNK_LINE:
                line, position = self._take_line(data, position, CHUNK_LINE_MAX_BYTES)
                if line is not None:
                    self._begin_chunk(line)
            elif state in (_State.CHUNK_END, _State.LAST_CHUNK_END):
                line, position = self._take_line(data, position, len(b"\r\n"))
                if line is not None:
                    self._state = _State.CHUNK_LINE if state is _State.CHUNK_END else _State.END
            elif state is _State.TRAILERS:
                self._line += view[position : position + TRAILERS_MAX_BYTES + 1]
                if len(self._line) > TRAILERS_MAX_BYTES:
                    raise S3Error("MalformedTrailerError")
                position = end
            else:
                raise _broken_off()
        return decoded

    def _take_line(self, data: bytes, position: int, max_bytes: int) -> tuple[bytes | None, int]:
        """(the line without its CRLF, or None while it is not whole; the position after it).

        A line of CHUNK_END has room for its CRLF alone, so anything else there is broken framing.
        """
        stop = min(position + max_bytes - len(self._line), len(data))
        found = data.find(b"\n", position, stop)
        if found < 0:
            self._line += data[position:stop]
            if len(self._line) >= max_bytes:
                raise _broken_off()
            return None, stop
        self._line += data[position : found + 1]
        line = bytes(self._line)
        self._line.clear()
        if not line.endswith(b"\r\n"):
            raise _broken_off()
        return line[:-2], found + 1

    def _begin_chunk(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise _broken_off()
        size = int(match[1], 16)
        if self._identity is not None:
            signature = _CHUNK_SIGNATURE.fullmatch(match[2] or b"")
            if signature is None:
                raise S3Error("SignatureDoesNotMatch")
            self._claimed = signature[1].decode()
        if size < _SHORT_CHUNK_BYTES:
            self._short_chunks += 1
            if self._short_chunks > _SHORT_CHUNKS_MAX:
                raise S3Error("InvalidRequest", "Only the last chunk is allowed to have a size less than 8192 bytes")
        self._announced += size
        if self._expected is not None and self._announced > self._expected:
            raise self._wrong_length(self._announced)
        if self._announced > BODY_MAX_BYTES:
            raise S3Error("EntityTooLarge", extra={"MaxSizeAllowed": str(BODY_MAX_BYTES)})
        if size:
            self._left = size
            self._state = _State.CHUNK_BODY
            return
        self._verify_chunk()
        self._state = _State.TRAILERS if self._with_trailer else _State.LAST_CHUNK_END

    def _took(self, piece: bytes | memoryview) -> None:
        if self._identity is not None:
            self._hash.update(piece)
        self._left -= len(piece)
        if self._left == 0:
            self._verify_chunk()
            self._state = _State.CHUNK_END

    def _verify_chunk(self) -> None:
        """Compares the signature that the chunk claims with that of the bytes that came; the next one builds on it."""
        identity = self._identity
        if identity is None:
            return
        signature = chunk_signature(
            identity.signing_key, identity.amz_date, identity.scope, self._previous, self._hash.hexdigest()
        )
        if not hmac.compare_digest(signature, self._claimed):
            raise S3Error("SignatureDoesNotMatch")
        self._previous = signature
        self._hash = hashlib.sha256()

    def _verified_trailers(self) -> Headers:
        trailers = _parse_trailers(bytes(self._line))
        identity = self._identity
        if identity is not None:
            claimed = trailers.pop(_SIGNATURE_TRAILER, None)
            if claimed is None:
                raise S3Error("MalformedTrailerError")
            # Sorted like the headers of a canonical request; it matters only beyond the one checksum that S3 takes.
            text = "".join(f"{name}:{trailers[name]}\n" for name in sorted(trailers))
            signature = trailer_signature(
                identity.signing_key,
                identity.amz_date,
                identity.scope,
                self._previous,
                hashlib.sha256(text.encode()).hexdigest(),
            )
            if not hmac.compare_digest(signature, claimed):
                raise S3Error("SignatureDoesNotMatch")
        if trailers.keys() != self._trailer_names:
            raise S3Error("MalformedTrailerError")
        return trailers

    def _wrong_length(self, provided: int) -> S3Error:
        return S3Error(
            "IncompleteBody",
            extra={"NumberBytesExpected": str(self._expected), "NumberBytesProvided": str(provided)},
        )


def _broken_off() -> S3Error:
    return S3Error("IncompleteBody", "The request body terminated unexpectedly")


def _parse_trailers(section: bytes) -> Headers:
    """The trailers in what follows the last chunk's line: fields, then an empty line, then nothing.

    A field may end with a bare LF, as S3's documentation writes it, and then a lone CRLF may follow it.
    """
    if section != b"\r\n" and not section.endswith(b"\n\r\n"):
        raise _broken_off()
    trailers: Headers = {}
    after_bare_newline = False
    for line in section[:-2].split(b"\n")[:-1]:
        field = line.removesuffix(b"\r")
        if not field:
            if not after_bare_newline:
                raise _broken_off()
            after_bare_newline = False
            continue
        after_bare_newline = len(field) == len(line)
        name, colon, value = field.decode("latin-1").partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not colon or _TRAILER_NAME.fullmatch(name) is None or _TRAILER_VALUE.fullmatch(value) is None:
            raise S3Error("MalformedTrailerError")
        # The signature covers the fields before it: nothing may follow it.
        if name in trailers or _SIGNATURE_TRAILER in trailers or len(trailers) > TRAILERS_MAX:
            raise S3Error("MalformedTrailerError")
        trailers[name] = value
    return trailers


#: Bytes in each chunk sent to an origin: 1 MiB costs 11 bytes of framing, and no origin buffers more than it must.
ENCODER_CHUNK_BYTES: Final = 1024 * 1024


def unsigned_trailer_length(
    decoded_length: int, trailer_name: str, value_length: int, chunk_bytes: int = ENCODER_CHUNK_BYTES
) -> int:
    """The Content-Length of what Encoder makes of decoded_length bytes and a trailer value of value_length bytes."""
    full, rest = divmod(decoded_length, chunk_bytes)
    encoded = full * (len(f"{chunk_bytes:x}") + 4 + chunk_bytes)
    if rest:
        encoded += len(f"{rest:x}") + 4 + rest
    return encoded + len("0\r\n") + len(trailer_name) + len(":") + value_length + len("\r\n\r\n")


class Encoder:
    """Packs a body of known length as STREAMING-UNSIGNED-PAYLOAD-TRAILER with one trailer.

    Chunks are cut by position alone, never by how the body arrives, so the encoded length is known beforehand
    (unsigned_trailer_length) and nothing is buffered.
    """

    def __init__(self, decoded_length: int, trailer_name: str, chunk_bytes: int = ENCODER_CHUNK_BYTES) -> None:
        assert decoded_length >= 0 and chunk_bytes > 0
        self._trailer_name = trailer_name
        self._chunk_bytes = chunk_bytes
        self._unsent = decoded_length
        self._left = 0

    def encode(self, data: bytes | memoryview) -> list[bytes | memoryview]:
        """The encoded pieces for the next bytes of the body, in order. Raises IncompleteBody past decoded_length."""
        if len(data) > self._unsent:
            raise S3Error("IncompleteBody")
        pieces: list[bytes | memoryview] = []
        view = memoryview(data)
        position = 0
        while position < len(view):
            if self._left == 0:
                self._left = min(self._chunk_bytes, self._unsent)
                pieces.append(b"%x\r\n" % self._left)
            take = min(self._left, len(view) - position)
            pieces.append(data if take == len(view) else view[position : position + take])
            position += take
            self._left -= take
            self._unsent -= take
            if self._left == 0:
                pieces.append(b"\r\n")
        return pieces

    def finish(self, trailer_value: str) -> bytes:
        """The last chunk and the trailer. Raises IncompleteBody when the body was shorter than announced."""
        if self._unsent:
            raise S3Error("IncompleteBody")
        return f"0\r\n{self._trailer_name}:{trailer_value}\r\n\r\n".encode("ascii")
