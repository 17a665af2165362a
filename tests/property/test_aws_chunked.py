"""aws-chunked over generated bodies, cuts, feeds and damage."""

from __future__ import annotations

import hashlib
import hmac
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3.aws_chunked import FORMS, Decoder, Encoder, unsigned_trailer_length
from kos.s3.sigv4 import Identity, Payload, chunk_signature, trailer_signature

NAME, VALUE = "x-amz-checksum-crc32", "AAAAAA=="
WHO = Identity(
    access_key="key",
    payload=Payload.STREAMING_SIGNED,
    payload_sha256=None,
    seed_signature="0" * 64,
    scope="20130524/us-east-1/s3/aws4_request",
    amz_date="20130524T000000Z",
    signing_key=hmac.digest(b"a", b"b", "sha256"),
    presigned=False,
)
forms = st.sampled_from(sorted(FORMS, key=lambda form: form.value))
chunk_lists = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def pack(form: Payload, chunks: list[bytes]) -> bytes:
    signed = form is not Payload.STREAMING_UNSIGNED_TRAILER
    previous, wire = WHO.seed_signature, b""
    for chunk in [*chunks, b""]:
        wire += b"%x" % len(chunk)
        if signed:
            digest = hashlib.sha256(chunk).hexdigest()
            previous = chunk_signature(WHO.signing_key, WHO.amz_date, WHO.scope, previous, digest)
            wire += b";chunk-signature=" + previous.encode()
        wire += b"\r\n" + chunk + (b"\r\n" if chunk else b"")
    if form is not Payload.STREAMING_SIGNED:
        wire += f"{NAME}:{VALUE}\r\n".encode()
    if form is Payload.STREAMING_SIGNED_TRAILER:
        digest = hashlib.sha256(f"{NAME}:{VALUE}\n".encode()).hexdigest()
        signature = trailer_signature(WHO.signing_key, WHO.amz_date, WHO.scope, previous, digest)
        wire += f"x-amz-trailer-signature:{signature}\r\n".encode()
    return wire + b"\r\n"


def decoder(form: Payload, length: int | None) -> Decoder:
    return Decoder(form, WHO, length, frozenset() if form is Payload.STREAMING_SIGNED else frozenset({NAME}))


def outcome(unpacker: Decoder, feeds: list[bytes]) -> bytes | str:
    body = b""
    try:
        for feed in feeds:
            body += b"".join(unpacker.feed(feed))
        unpacker.finish()
    except S3Error as error:
        return error.code
    return body


def cut(wire: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(wire), *(place % (len(wire) + 1) for place in places)})
    return [wire[start:stop] for start, stop in pairwise(edges)]


places = st.lists(st.integers(0, 10_000), max_size=20)


@given(forms, chunk_lists, places)
def test_every_body_survives_every_cut(form: Payload, chunks: list[bytes], cuts: list[int]) -> None:
    body = b"".join(chunks)
    unpacker = decoder(form, len(body))
    assert outcome(unpacker, cut(pack(form, chunks), cuts)) == body
    assert unpacker.trailers == ({} if form is Payload.STREAMING_SIGNED else {NAME: VALUE})


@given(forms, chunk_lists, places, st.integers(0, 10_000), st.integers(1, 255))
def test_damage_is_seen_alike_in_every_cut_and_never_passes_a_signature(
    form: Payload, chunks: list[bytes], cuts: list[int], place: int, change: int
) -> None:
    body = b"".join(chunks)
    wire = bytearray(pack(form, chunks))
    wire[place % len(wire)] ^= change
    whole = outcome(decoder(form, len(body)), [bytes(wire)])
    assert outcome(decoder(form, len(body)), cut(bytes(wire), cuts)) == whole
    if form is not Payload.STREAMING_UNSIGNED_TRAILER and isinstance(whole, bytes):
        assert whole == body  # only what means nothing was changed: the case of a hex digit, of a trailer's name


@given(forms, st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 300)), places)
def test_rubbish_raises_nothing_but_s3_errors_and_alike_in_every_cut(
    form: Payload, wire: bytes, length: int | None, cuts: list[int]
) -> None:
    assert outcome(decoder(form, length), [wire]) == outcome(decoder(form, length), cut(wire, cuts))


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 64))
def test_what_is_packed_has_the_foretold_length_and_comes_back(pieces: list[bytes], chunk_bytes: int) -> None:
    body = b"".join(pieces)
    packer = Encoder(len(body), NAME, chunk_bytes)
    wire = b"".join(bytes(part) for piece in pieces for part in packer.encode(memoryview(piece)))
    wire += packer.finish(VALUE)
    assert len(wire) == unsigned_trailer_length(len(body), NAME, len(VALUE), chunk_bytes)
    assert outcome(decoder(Payload.STREAMING_UNSIGNED_TRAILER, len(body)), [wire]) == body
