"""Where the parts of an object lie that was uploaded in parts: for reads by partNumber.

Owns: finding that out, once per version and part for the whole node, and keeping it. Does not own: what a client is
answered (kosproxy.handlers.part), the bytes (body).

What a part's bounds are never changes as long as the bytes are the same, so it is kept in the index under a name made of
the content id (content.part_name) and is trusted without asking again, whatever the rule says of the object: that the
object still has this content is what opening it says. It leaves the index with the blocks of that content.

    reader ─▶ index: there ─▶ bounds
           └▶ daemon: you lead ─▶ HEAD ?partNumber=n, If-Match ─▶ 206: bounds, kept ─▶ all who wait
                                                              ├▶ 416: there is no such part
                                                              └▶ else: the origin does not speak this: nobody knows

Invariant: bounds come from one answer of the origin that names the version, the size of the whole and the slice; where
anything is missing from it there are no bounds, and the request is the origin's to answer.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html (partNumber, x-amz-mp-parts-count).
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

from kos.errors import OriginBroken, OriginUnavailable, S3Error
from kos.origin.response import OriginResponse
from kos.s3.object_response import Part
from kos.tasks import TasksClosed
from koscache import ipc
from koscache.carrier.context import CHECKSUM_MODE, Context
from koscache.carrier.fetch import OnRequest, content_range, refusal, service_unavailable, unavailable
from koscache.carrier.types import Opened
from koscache.content import Record, part_name
from koscache.ipc import OpenOutcome, Refusal
from koscache.leases import NO_LEASE

_COUNT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
_CHECKSUM_PREFIX: Final = "x-amz-checksum-"
_COUNT_HEADER: Final = "x-amz-mp-parts-count"
_RANGE_HEADER: Final = "Content-Range"
#: Of a single-flight question that no write can make wrong; see ipc.AskOpen.
_NO_FENCE: Final = 0

#: What asking brought. record: the part's (see _record); None with STORED cannot be.
_Learned = tuple[OpenOutcome, Record | None, Refusal | None, str, float]


class Parts:
    def __init__(self, context: Context) -> None:
        self._context = context

    def known(self, bucket: str, record: Record, number: int) -> Part | None:
        """The part if the index has it. No await."""
        found = self._context.reader.record(bucket, part_name(record.content, number))
        return None if found is None or found.content != record.content else _part(found)

    async def find(self, opened: Opened, number: int, on_request: OnRequest) -> Part | None:
        """The part of the version that was opened; None when only the origin can answer a read of it.

        Raises S3Error InvalidPartNumber (416) when there is no such part, ServiceUnavailable or SlowDown when the origin
        cannot be asked. Cancelling it never cancels the question.
        """
        record = opened.record
        known = self.known(opened.bucket, record, number)
        if known is not None or not opened.stored or not record.etag or not self._context.link.caching:
            return known
        landed: asyncio.Future[_Learned] = asyncio.get_running_loop().create_future()
        try:
            self._context.tasks.spawn(self._fly(opened, number, on_request, landed), "part")
        except TasksClosed:
            raise S3Error("ServiceUnavailable", "Shutting down.", headers={"Retry-After": "1"}) from None
        outcome, found, refused, reason, retry_after_s = await asyncio.shield(landed)
        if outcome is OpenOutcome.STORED and found is not None:
            return _part(found)
        if outcome is OpenOutcome.REFUSED and refused is not None:
            raise S3Error("InvalidPartNumber", extra={"PartNumberRequested": str(number)})
        if outcome is OpenOutcome.UNAVAILABLE:
            raise service_unavailable(reason, retry_after_s)
        return None

    async def _fly(self, opened: Opened, number: int, on_request: OnRequest, landed: asyncio.Future[_Learned]) -> None:
        """One question for all of the node who want to know. It is answered in every case, also when this is cancelled."""
        link, name = self._context.link, part_name(opened.record.content, number)
        lease = NO_LEASE
        learned: _Learned = (OpenOutcome.LEADER_GAVE_UP, None, None, "", 0.0)
        try:
            said: Any = await link.answer(lambda ask: ipc.AskOpen(ask, opened.bucket, name, _NO_FENCE))
            if isinstance(said, ipc.OpenEnded):
                learned = (said.outcome, said.record, said.refusal, said.reason, said.retry_after_s)
                return
            lease = said.lease if isinstance(said, ipc.OpenLead) else NO_LEASE
            # The second look: another one may have learned it between the first look and the question.
            known = self._context.reader.record(opened.bucket, name)
            if known is not None and known.content == opened.record.content:
                learned = (OpenOutcome.STORED, known, None, "", 0.0)
            else:
                on_request()
                learned = await self._ask(opened, number)
        finally:
            if lease != NO_LEASE:
                outcome, record, refused, reason, retry_after_s = learned
                content = b"" if record is None else record.content
                link.ask(
                    lambda ask: ipc.OpenDone(
                        ask, lease, outcome, reason, record, content, 0, 0, None, refused, retry_after_s
                    ),
                    lambda _: None,
                )
            if not landed.done():
                landed.set_result(learned)

    async def _ask(self, opened: Opened, number: int) -> _Learned:
        context, record = self._context, opened.record
        headers = [CHECKSUM_MODE, ("If-Match", record.etag)]
        validated_at = context.clock.now()
        try:
            response = await context.ask("HEAD", opened.bucket, opened.key, headers, part=number)
        except OriginUnavailable as error:
            return OpenOutcome.UNAVAILABLE, None, None, error.reason, error.retry_after_s
        except OriginBroken as error:
            return OpenOutcome.UNAVAILABLE, None, None, error.reason, 1.0
        if response.status == 416:
            return OpenOutcome.REFUSED, None, await refusal(response), "", 0.0
        if response.status == 429 or response.status >= 500:
            said = unavailable(response)
            return OpenOutcome.UNAVAILABLE, None, None, said.reason, said.retry_after_s
        response.close()
        if response.status in (404, 412):
            # Most likely it is another object by now. The origin's answer to this read will say; who comes next asks anew.
            context.forget(opened.bucket, opened.key, record)
        found = _record(response, record, number, validated_at)
        outcome = OpenOutcome.NOT_STORED if found is None else OpenOutcome.STORED
        return outcome, found, None, "", 0.0


def _record(response: OriginResponse, record: Record, number: int, validated_at: float) -> Record | None:
    """The part as the index keeps it, from the origin's answer to its HEAD; None if that does not say all of it."""
    headers = response.headers
    span = content_range(response)
    if response.status != 206 or span is None or headers.get("ETag", "").strip() != record.etag:
        return None
    start, stop, size = span
    if size != record.size or not start < stop <= size or (number == 1) != (start == 0):
        return None
    kept = [(_RANGE_HEADER, f"{start}-{stop}")]
    count = headers.get(_COUNT_HEADER, "").strip()
    if count:
        if _COUNT.fullmatch(count) is None or int(count) < number:
            return None
        kept.append((_COUNT_HEADER, count))
    checksums = tuple(
        (str(name), value) for name, value in headers.items() if name.lower().startswith(_CHECKSUM_PREFIX)
    )
    if (start, stop) != (0, size) and _of_the_whole(checksums, record):
        checksums = ()
    return Record(
        etag=record.etag,
        size=size,
        last_modified="",
        headers=tuple(kept),
        checksums=checksums,
        checksums_known=True,
        content=record.content,
        validated_at=validated_at,
        fence=_NO_FENCE,
    )


def _of_the_whole(checksums: tuple[tuple[str, str], ...], record: Record) -> bool:
    """Whether they are the object's and not the part's: an origin that answers a part with them would have its readers
    find the part damaged. A value with "-N" is one over parts."""
    whole = {value for name, value in record.checksums if name.lower() != "x-amz-checksum-type"}
    values = [value for name, value in checksums if name.lower() != "x-amz-checksum-type"]
    return any(value in whole or "-" in value for value in values)


def _part(found: Record) -> Part:
    named = dict(found.headers)
    start, _, stop = named[_RANGE_HEADER].partition("-")
    count = named.get(_COUNT_HEADER)
    return Part(int(start), int(stop), None if count is None else int(count), found.checksums)
