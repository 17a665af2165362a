"""GetObject and HeadObject of one part of an object, by partNumber: SDKs read large objects so, part by part.

Owns: which partNumber counts, the order of refusals, and when the origin answers instead. Does not own: where parts lie
(koscache.carrier.parts), the answer's head (kos.s3.object_response), opening and sending (kosproxy.handlers.get).

An object that was stored in one piece is its own first part. Of one that was uploaded in parts the origin says once where
they lie; it is asked for the slice like for any other, so blocks are shared with plain reads. An origin that does not say
it (it ignores partNumber, or names the part's ETag instead of the object's) answers each such read itself.

Invariant: a slice that kos sends is a part because the origin said so of this very version, or because it is everything.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html (partNumber)
"""

from __future__ import annotations

import re
from typing import Final

from kos.errors import S3Error
from kos.s3.object_response import Part
from kos.s3.operation import Operation
from kos.s3.ranges import RangeSpec
from kos.s3.sigv4 import Identity
from koscache.carrier import Changed, Opened, Phase, Reason, Want
from kosproxy.exchange import Exchange
from kosproxy.handlers.forward import forward
from kosproxy.handlers.get import OPENS_MAX, answer_of, changes_too_fast, name_of, opening, send, want_of

PART_NUMBER_MAX: Final = 10_000
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


def part_number(params_value: str) -> int:
    """The number of a partNumber parameter; raises S3Error InvalidArgument, as S3 does."""
    if _NUMBER.fullmatch(params_value) is not None and 1 <= int(params_value) <= PART_NUMBER_MAX:
        return int(params_value)
    raise S3Error(
        "InvalidArgument",
        f"Part number must be an integer between 1 and {PART_NUMBER_MAX}, inclusive",
        extra={"ArgumentName": "partNumber", "ArgumentValue": params_value},
    )


async def read_part(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Answer a read of a part. Raises S3Error, OriginError before the head has left; ConnectionError afterwards."""
    number = part_number(operation.params["partNumber"])
    if "range" in exchange.head.headers:
        raise S3Error("InvalidRequest", "Cannot specify both Range header and partNumber query parameter")
    for _ in range(OPENS_MAX):
        try:
            async with opening(exchange, operation, _want(exchange, operation, number)) as opened:
                # Conditions are about the object, and come before the question whether it has such a part.
                if answer_of(exchange, operation, opened).status == 304:
                    await send(exchange, operation, opened)
                    return
                part = await _find(exchange, opened, number)
                if part is not None:
                    await send(exchange, operation, opened, part)
                    return
            await forward(exchange, operation._replace(bypass_reason="part_number"), identity)
            return
        except Changed:
            if exchange.begun:
                raise
    raise changes_too_fast()


def _want(exchange: Exchange, operation: Operation, number: int) -> Want:
    """What to open with: the part's slice if it is known, else what is likely to be needed.

    The first part, of whatever object, begins at its first byte: a plain read that brings the first block is right. Of
    any other part nobody knows where it begins; what the object is will do.
    """
    want = want_of(exchange.head)
    carrier = exchange.parts.carrier
    assert operation.bucket is not None
    record = carrier.peek(operation.bucket, name_of(operation)).record
    try:
        part = None if record is None else carrier.known_part(operation.bucket, record, number)
    except S3Error:
        # Of what is known now; opening tells whether it still is.
        return Want(head_only=True, conditional=want.conditional, document=not want.head_only)
    if part is None or part.parts_count is None:
        unknown = want.head_only or number > 1
        # Those of an object of one piece are its part's; others' come with the bounds.
        checksum_mode = want.checksum_mode and (part is not None or not unknown)
        return Want(unknown, None, checksum_mode, want.conditional, not want.head_only)
    return Want(want.head_only, RangeSpec(part.start, part.stop - 1), False, want.conditional)


async def _find(exchange: Exchange, opened: Opened, number: int) -> Part | None:
    """The part of what was opened; None: the origin has to answer."""

    def asked() -> None:
        exchange.origin_requests += 1
        if exchange.phase in (Phase.HIT, Phase.REVALIDATED):
            exchange.phase, exchange.reason = Phase.MISS, Reason.PART

    return await exchange.parts.carrier.find_part(opened, number, asked)
