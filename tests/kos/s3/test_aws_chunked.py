"""aws-chunked: one wire sample per form, fed whole, byte by byte, with junk after it; and every way to be wrong."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from kos.errors import S3Error
from kos.s3 import aws_chunked
from kos.s3.aws_chunked import Decoder, Encoder, unsigned_trailer_length
from kos.s3.sigv4 import Identity, Payload, chunk_signature, trailer_signature

# The example of https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and sigv4-streaming-trailers.html:
# 65 KiB of "a" in chunks of 64 KiB, 1 KiB and 0.
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
AWS_DATE = "20130524T000000Z"
AWS_SCOPE = "20130524/us-east-1/s3/aws4_request"
AWS_BODY = b"a" * 66560
AWS_SEED = "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"
AWS_CHUNKS = (
    "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
    "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
    "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
)
AWS_TRAILER_SEED = "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e"
AWS_TRAILER_CHUNKS = (
    "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2",
    "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7",
    "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992",
)
AWS_TRAILER_SIGNATURE = "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435"

NAME = "x-amz-checksum-crc32c"
VALUE = "sOO8/Q=="
NAMES = frozenset({NAME})


def signing_key(secret: str) -> bytes:
    key = ("AWS4" + secret).encode()
    for part in AWS_SCOPE.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def identity(payload: Payload, seed: str) -> Identity:
    return Identity(
        access_key="AKIAIOSFODNN7EXAMPLE",
        payload=payload,
        payload_sha256=None,
        seed_signature=seed,
        scope=AWS_SCOPE,
        amz_date=AWS_DATE,
        signing_key=signing_key(AWS_SECRET),
        presigned=False,
    )


def aws_wire(signatures: tuple[str, str, str], tail: bytes) -> bytes:
    wire = b"10000;chunk-signature=%s\r\n" % signatures[0].encode() + AWS_BODY[:65536] + b"\r\n"
    wire += b"400;chunk-signature=%s\r\n" % signatures[1].encode() + AWS_BODY[65536:] + b"\r\n"
    return wire + b"0;chunk-signature=%s\r\n" % signatures[2].encode() + tail


class Signer:
    """A client that signs chunks as the documentation says, in any cut."""

    def __init__(self, payload: Payload) -> None:
        self.identity = identity(payload, "5" * 64)
        self.previous = self.identity.seed_signature

    def chunk(self, body: bytes) -> bytes:
        who = self.identity
        digest = hashlib.sha256(body).hexdigest()
        self.previous = chunk_signature(who.signing_key, who.amz_date, who.scope, self.previous, digest)
        return b"%x;chunk-signature=%s\r\n" % (len(body), self.previous.encode()) + body + (b"\r\n" if body else b"")

    def trailers(self, text: str) -> bytes:
        who = self.identity
        digest = hashlib.sha256(text.encode()).hexdigest()
        signature = trailer_signature(who.signing_key, who.amz_date, who.scope, self.previous, digest)
        return f"{text.replace(chr(10), chr(13) + chr(10))}x-amz-trailer-signature:{signature}\r\n\r\n".encode()


BODY = bytes(range(256)) * 3


def sample(payload: Payload) -> tuple[bytes, Identity | None]:
    """BODY on the wire in three chunks, the middle one of a single byte."""
    cut = (BODY[:300], BODY[300:301], BODY[301:])
    if payload is Payload.STREAMING_UNSIGNED_TRAILER:
        wire = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in cut)
        return wire + f"0\r\n{NAME}:{VALUE}\r\n\r\n".encode(), None
    signer = Signer(payload)
    wire = b"".join(signer.chunk(piece) for piece in (*cut, b""))
    wire += signer.trailers(f"{NAME}:{VALUE}\n") if payload is Payload.STREAMING_SIGNED_TRAILER else b"\r\n"
    return wire, signer.identity


def decoder(payload: Payload, who: Identity | None, length: int | None = len(BODY)) -> Decoder:
    return Decoder(payload, who, length, NAMES if payload is not Payload.STREAMING_SIGNED else frozenset())


def decode(unpacker: Decoder, wire: bytes, step: int) -> bytes:
    body = b"".join(piece for start in range(0, len(wire), step) for piece in unpacker.feed(wire[start : start + step]))
    unpacker.finish()
    return body


def code_of(unpacker: Decoder, wire: bytes, step: int = 1 << 20) -> str:
    with pytest.raises(S3Error) as caught:
        decode(unpacker, wire, step)
    return caught.value.code


FORMS = sorted(aws_chunked.FORMS, key=lambda form: form.value)


def test_the_published_example_of_signed_chunks() -> None:
    wire = aws_wire(AWS_CHUNKS, b"\r\n")
    assert len(wire) == 66824  # the Content-Length of the example
    unpacker = Decoder(Payload.STREAMING_SIGNED, identity(Payload.STREAMING_SIGNED, AWS_SEED), len(AWS_BODY))
    assert decode(unpacker, wire, 1000) == AWS_BODY


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\n\r\n"])
def test_the_published_example_of_signed_chunks_with_a_trailer(line_end: bytes) -> None:
    tail = f"{NAME}:{VALUE}".encode() + line_end
    tail += b"x-amz-trailer-signature:" + AWS_TRAILER_SIGNATURE.encode() + b"\r\n\r\n"
    who = identity(Payload.STREAMING_SIGNED_TRAILER, AWS_TRAILER_SEED)
    unpacker = Decoder(Payload.STREAMING_SIGNED_TRAILER, who, len(AWS_BODY), NAMES)
    assert decode(unpacker, aws_wire(AWS_TRAILER_CHUNKS, tail), 65536) == AWS_BODY
    assert unpacker.trailers == {NAME: VALUE}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 2, 7, 300, 1 << 20])
def test_a_body_comes_out_the_same_however_it_is_fed(form: Payload, step: int) -> None:
    wire, who = sample(form)
    unpacker = decoder(form, who)
    assert decode(unpacker, wire, step) == BODY
    assert unpacker.trailers == ({} if form is Payload.STREAMING_SIGNED else {NAME: VALUE})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("junk", [b"\r\n", b"x", b"0\r\n\r\n", b"\0" * 5000])
def test_bytes_after_the_end_are_refused(form: Payload, step: int, junk: bytes) -> None:
    wire, who = sample(form)
    assert code_of(decoder(form, who), wire + junk, step) in ("IncompleteBody", "MalformedTrailerError")


@pytest.mark.parametrize("form", FORMS)
def test_a_body_cut_short_anywhere_is_refused_and_gives_no_trailers(form: Payload) -> None:
    wire, who = sample(form)
    for stop in range(len(wire)):
        unpacker = decoder(form, who)
        assert code_of(unpacker, wire[:stop]) == "IncompleteBody", stop
        assert unpacker.trailers == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [0, len(BODY) - 1, len(BODY) + 1, 1 << 40])
def test_another_length_than_announced_is_an_incomplete_body(form: Payload, length: int) -> None:
    wire, who = sample(form)
    with pytest.raises(S3Error) as caught:
        decode(decoder(form, who, length), wire, 100)
    assert caught.value.code == "IncompleteBody"
    assert caught.value.extra["NumberBytesExpected"] == str(length)


def test_more_than_announced_is_refused_before_any_of_the_surplus_chunk_is_given_out() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3, frozenset())
    assert unpacker.feed(b"2\r\nab\r\n") == [b"ab"]
    with pytest.raises(S3Error, match="IncompleteBody"):
        unpacker.feed(b"2\r\n")


def test_an_empty_body() -> None:
    signer = Signer(Payload.STREAMING_SIGNED)
    assert decode(Decoder(Payload.STREAMING_SIGNED, signer.identity, 0), signer.chunk(b"") + b"\r\n", 1) == b""
    assert decode(Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 0), b"0\r\n\r\n", 1) == b""


@pytest.mark.parametrize("form", [Payload.STREAMING_SIGNED, Payload.STREAMING_SIGNED_TRAILER])
def test_a_changed_byte_of_any_chunk_is_noticed_at_that_chunk(form: Payload) -> None:
    wire, who = sample(form)
    body_at = wire.index(BODY[:300])
    garbled = bytearray(wire)
    garbled[body_at + 5] ^= 1
    unpacker = decoder(form, who)
    given = unpacker.feed(bytes(garbled[: body_at + 299]))
    assert sum(map(len, given)) == 299
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        unpacker.feed(bytes(garbled[body_at + 299 : body_at + 300]))
    with pytest.raises(S3Error):
        unpacker.finish()


@pytest.mark.parametrize("form", [Payload.STREAMING_SIGNED, Payload.STREAMING_SIGNED_TRAILER])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_garbled_chunk_signature_does_not_match(form: Payload, nth: int) -> None:
    wire, who = sample(form)
    parts = wire.split(b"chunk-signature=")
    flipped = b"0" if parts[nth + 1][:1] != b"0" else b"1"
    for replacement in (flipped + parts[nth + 1][1:], parts[nth + 1][1:], b"z" + parts[nth + 1][1:]):
        garbled = b"chunk-signature=".join([*parts[: nth + 1], replacement, *parts[nth + 2 :]])
        assert code_of(decoder(form, who), garbled) == "SignatureDoesNotMatch"


def test_chunks_in_another_order_do_not_match() -> None:
    signer = Signer(Payload.STREAMING_SIGNED)
    first, second, last = signer.chunk(b"one"), signer.chunk(b"two"), signer.chunk(b"")
    unpacker = Decoder(Payload.STREAMING_SIGNED, signer.identity, 6)
    assert code_of(unpacker, second + first + last + b"\r\n") == "SignatureDoesNotMatch"


def test_a_signed_body_may_not_leave_its_signatures_out() -> None:
    who = identity(Payload.STREAMING_SIGNED, AWS_SEED)
    assert code_of(Decoder(Payload.STREAMING_SIGNED, who, 3), b"3\r\nabc\r\n0\r\n\r\n") == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"+3\r\nabc",
        b"0x3\r\nabc",
        b"3 \r\nabc",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"00000000000000003\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * 300 + b"\r\nabc\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_broken_framing_is_an_incomplete_body(wire: bytes, step: int) -> None:
    assert code_of(Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None), wire, step) == "IncompleteBody"


def test_a_chunk_line_without_an_end_is_not_collected() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None)
    with pytest.raises(S3Error, match="IncompleteBody"):
        unpacker.feed(b"3;" + b"x" * (1 << 20))


def test_a_chunk_of_more_than_s3_takes_is_refused() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None)
    with pytest.raises(S3Error, match="EntityTooLarge"):
        unpacker.feed(b"ffffffffffffffff\r\n")


def test_a_chunk_extension_of_an_unsigned_body_means_nothing() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3)
    assert decode(unpacker, b"3;name=value\r\nabc\r\n0;last\r\n\r\n", 1) == b"abc"


@pytest.mark.parametrize(
    "trailers",
    [
        b"\r\n",  # announced, missing
        b"x-amz-checksum-sha1:qUqP5cyxm6YcTAhz05Hph5gvu9M=\r\n\r\n",  # another one
        b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-checksum-sha1:qUqP5cyxm6YcTAhz05Hph5gvu9M=\r\n\r\n",  # one more
        b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-checksum-crc32c:sOO8/Q==\r\n\r\n",  # twice
        b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:00\r\n\r\n",  # not announced here
        b"x-amz-checksum-crc32c sOO8/Q==\r\n\r\n",
        b"x-amz-checksum-crc32c:\r\n\r\n",
        b":sOO8/Q==\r\n\r\n",
        b"x-amz-checksum-crc32c :sOO8/Q==\r\n\r\n",
        b"x-amz-checksum-crc32c:sOO8\0/Q==\r\n\r\n",
        b"x-amz-checksum-crc32c:sOO8/Q==\r\r\n\r\n",
        b"x-amz-checksum-crc32c:" + b"x" * 5000 + b"\r\n\r\n",
        b"".join(b"x-amz-%d:1\r\n" % number for number in range(20)) + b"\r\n",
    ],
)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_malformed_trailers(trailers: bytes, step: int) -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3, NAMES)
    assert code_of(unpacker, b"3\r\nabc\r\n0\r\n" + trailers, step) == "MalformedTrailerError"
    assert unpacker.trailers == {}


def test_a_trailer_that_was_not_announced_is_malformed() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3)
    assert code_of(unpacker, f"3\r\nabc\r\n0\r\n{NAME}:{VALUE}\r\n\r\n".encode()) == "MalformedTrailerError"


def test_trailer_names_are_case_insensitive_and_values_trimmed() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3, NAMES)
    assert decode(unpacker, b"3\r\nabc\r\n0\r\nX-Amz-Checksum-CRC32C: sOO8/Q== \r\n\r\n", 1) == b"abc"
    assert unpacker.trailers == {NAME: VALUE}


def test_trailers_accepted_unverified() -> None:
    """A changed value, a changed signature, or none: a signed trailer never passes by its looks."""
    wire, who = sample(Payload.STREAMING_SIGNED_TRAILER)
    form = Payload.STREAMING_SIGNED_TRAILER
    at = wire.index(b"x-amz-trailer-signature:")
    assert code_of(decoder(form, who), wire.replace(VALUE.encode(), b"AAAA/Q==")) == "SignatureDoesNotMatch"
    assert code_of(decoder(form, who), wire[:at] + b"x-amz-trailer-signature:zz\r\n\r\n") == "SignatureDoesNotMatch"
    swapped = b"1" if wire[at + 24 : at + 25] != b"1" else b"2"
    assert code_of(decoder(form, who), wire[: at + 24] + swapped + wire[at + 25 :]) == "SignatureDoesNotMatch"
    assert code_of(decoder(form, who), wire[:at] + b"\r\n") == "MalformedTrailerError"
    after = wire[:-2] + b"x-amz-checksum-crc32c:AAAA/Q==\r\n\r\n"
    assert code_of(decoder(form, who), after) == "MalformedTrailerError"


def test_a_failed_decoder_stays_failed() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, 3)
    with pytest.raises(S3Error):
        unpacker.feed(b"zz\r\n")
    with pytest.raises(S3Error):
        unpacker.feed(b"3\r\nabc\r\n0\r\n\r\n")
    with pytest.raises(S3Error):
        unpacker.finish()


def test_a_feed_within_one_chunk_is_not_copied() -> None:
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None)
    unpacker.feed(b"%x\r\n" % (1 << 20))
    piece = bytes(65536)
    (given,) = unpacker.feed(piece)
    assert given is piece


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33, 1000])
@pytest.mark.parametrize("chunk_bytes", [1, 16, 1 << 20])
def test_what_the_encoder_packs_has_the_foretold_length_and_unpacks_again(size: int, chunk_bytes: int) -> None:
    body = bytes(index % 251 for index in range(size))
    packer = Encoder(size, NAME, chunk_bytes)
    wire = b"".join(bytes(piece) for start in range(0, size, 7) for piece in packer.encode(body[start : start + 7]))
    wire += packer.finish(VALUE)
    assert len(wire) == unsigned_trailer_length(size, NAME, len(VALUE), chunk_bytes)
    unpacker = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, size, NAMES)
    assert decode(unpacker, wire, 5) == body
    assert unpacker.trailers == {NAME: VALUE}


def test_the_encoder_takes_no_other_length_than_it_foretold() -> None:
    packer = Encoder(3, NAME)
    with pytest.raises(S3Error, match="IncompleteBody"):
        packer.encode(b"abcd")
    packer.encode(b"ab")
    with pytest.raises(S3Error, match="IncompleteBody"):
        packer.finish(VALUE)


def test_request_headers() -> None:
    assert aws_chunked.announced_trailers({"x-amz-trailer": "X-Amz-Checksum-CRC32C , a"}) == {NAME, "a"}
    assert aws_chunked.announced_trailers({}) == frozenset()
    assert aws_chunked.decoded_length({"x-amz-decoded-content-length": "66560"}) == 66560
    for text, code in (("-1", "InvalidArgument"), ("1" * 30, "InvalidArgument"), ("9" * 15, "EntityTooLarge")):
        with pytest.raises(S3Error, match=code):
            aws_chunked.decoded_length({"x-amz-decoded-content-length": text})
    with pytest.raises(S3Error, match="MissingContentLength"):
        aws_chunked.decoded_length({})
    assert aws_chunked.stored_content_encoding("aws-chunked") is None
    assert aws_chunked.stored_content_encoding("gzip, AWS-Chunked,br") == "gzip, br"
    assert aws_chunked.stored_content_encoding(None) is None


def test_a_thousand_short_chunks_are_enough() -> None:
    """A megabyte in chunks of one byte is a minute's work."""
    short, long = b"1\r\nx\r\n", b"200\r\n" + b"y" * 512 + b"\r\n"
    decoder = Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None)
    assert b"".join(decoder.feed(short * 1023 + long * 5000 + b"0\r\n\r\n")) == b"x" * 1023 + b"y" * 512 * 5000
    decoder.finish()
    with pytest.raises(S3Error) as caught:
        Decoder(Payload.STREAMING_UNSIGNED_TRAILER, None, None).feed(short * 1025)
    assert caught.value.code == "InvalidRequest"
