"""The request that opens an object, sent: what the origin has of it, as one value.

Owns: sending the First (and what must follow a 416), the record that its answer makes, and where in the object the body of
that answer lies. Does not own: who may ask (open), which request (first), what becomes of the body (blocks, body).

Invariant: validated_at is read before the request is sent, so a record never claims to be younger than it is. Every
answer's connection is given back here or handed on in the Answer's ticket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kos import metrics
from kos.errors import OriginBroken, OriginUnavailable
from kos.origin.response import OriginResponse
from koscache.carrier.context import Context
from koscache.carrier.fetch import content_range, refusal, unavailable
from koscache.carrier.first import First, Judged, Kind, Verdict, after_416, judge_answer
from koscache.carrier.peer_response import PeerResponse, checksum_of
from koscache.carrier.ticket import Ticket
from koscache.carrier.types import Phase
from koscache.content import Record, block_length, body_checksum, make_record, split_name
from koscache.ipc import OpenOutcome, Refusal

_VERSION_ID: Final = "x-amz-version-id"


@dataclass(slots=True)
class Answer:
    """What asking the origin brought.

    reason: a Reason's value, or why the origin is unavailable. renewed: it was a 304. ticket: the body, unread. block:
    the number of the block that the body begins with and has whole. body: that block's bytes, when it is small.
    requests: how many were made. asked_at: when the question was put, epoch seconds; None: by another worker, who knows when.
    phase: of an answer that came by way of another node; fills: whether what it brought is to
    be kept here.
    """

    outcome: OpenOutcome
    reason: str = ""
    record: Record | None = None
    refusal: Refusal | None = None
    retry_after_s: float = 0.0
    renewed: bool = False
    ticket: Ticket | None = None
    block: int | None = None
    body: bytes | None = None
    requests: int = 0
    asked_at: float | None = None
    phase: Phase | None = None
    fills: bool = True


async def ask_origin(
    context: Context, bucket: str, key: str, fence: int, known: Record | None, first: First, *, alone: bool,
    document: bool = False,
) -> Answer:  # fmt: skip
    """alone: nothing will be stored, so the body is left in the ticket whatever it is. document: a refusal is to come
    with its document, for who sent a GET; a HEAD that is refused brings none, so a GET is asked once more.

    Raises nothing but CancelledError: what the origin says or fails to say is in the Answer.
    """
    requests = 0
    asked_at = context.clock.now()
    asking: First | None = first
    while asking is not None:
        requests += 1
        validated_at = context.clock.now()
        try:
            response = await context.ask(asking.method, bucket, key, asking.headers())
        except OriginUnavailable as error:
            return _unavailable(error, requests)
        except OriginBroken as error:
            return Answer(OpenOutcome.UNAVAILABLE, error.reason, retry_after_s=1.0, requests=requests)
        judged = judge_answer(asking, response.status, response.headers, split_name(key)[1])
        if judged.verdict is Verdict.SAME and known is not None and _headers_may_differ(known, fence, response):
            response.close()
            asking = First("HEAD", Kind.HEAD)
            continue
        if judged.verdict is Verdict.REFUSED and asking.method == "HEAD" and document:
            response.close()
            document = False
            asking = First("GET", Kind.OWN_RANGE, "bytes=0-0")
            continue
        if judged.verdict is not Verdict.EMPTY_OR_OUTSIDE:
            try:
                answer = await _answer(bucket, key, fence, known, asking, judged, response, validated_at)
            except BaseException:
                response.close()
                raise
            answer.requests, answer.asked_at = requests, asked_at
            if known is not None and answer.record is not None and answer.record.content == known.content:
                answer.renewed = answer.ticket is None and answer.body is None
            if answer.outcome is OpenOutcome.STORED and not alone:
                await find_block(context, answer, border=asking.kind is Kind.BLOCK)
            return answer
        response.close()
        asking = after_416(asking)
    return Answer(
        OpenOutcome.UNAVAILABLE, "the origin's answers contradict each other", None, None, 1.0, requests=requests
    )


def _headers_may_differ(known: Record, fence: int, response: OriginResponse) -> bool:
    """Whether a 304 may hide other headers than the known ones: an ETag names the bytes, not the metadata.

    A copy of an object onto itself, its tags or its lock change what a GET shows and keep the ETag. Through kos that
    fences the key; around kos a copy shows in Last-Modified, and in the version's id where there are versions.
    """
    last_modified = response.headers.get("Last-Modified", "").strip()
    if known.fence != fence or (last_modified != "" and last_modified != known.last_modified):
        return True
    version_id = response.headers.get(_VERSION_ID)
    return version_id is not None and version_id not in (
        value for name, value in known.headers if name.lower() == _VERSION_ID
    )


def _unavailable(error: OriginUnavailable, requests: int = 0) -> Answer:
    return Answer(OpenOutcome.UNAVAILABLE, error.reason, retry_after_s=error.retry_after_s, requests=requests)


async def _answer(
    bucket: str, key: str, fence: int, known: Record | None, first: First, judged: Judged, response: OriginResponse,
    validated_at: float,
) -> Answer:  # fmt: skip
    verdict = judged.verdict
    if verdict is Verdict.REFUSED:
        return Answer(OpenOutcome.REFUSED, refusal=await refusal(response))
    if verdict is Verdict.UNAVAILABLE:
        return _unavailable(unavailable(response))
    if verdict is Verdict.SAME:
        assert known is not None, "a condition without a record"
        response.close()
        record = known.revalidated(validated_at, fence)
        return Answer(OpenOutcome.STORED, judged.reason, record, renewed=True)
    assert judged.meta is not None, "a version without metadata"
    record = make_record(bucket, key, judged.meta, validated_at=validated_at, fence=fence)
    answer = Answer(OpenOutcome.STORED, judged.reason, record)
    span = _span(first, response, record.size)
    if span is None or span[0] == span[1]:
        response.close()
    else:
        answer.ticket = Ticket(response, *span)
    if verdict is Verdict.NOT_STORED:
        answer.outcome = OpenOutcome.NOT_STORED
    return answer


def _span(first: First, response: OriginResponse, size: int) -> tuple[int, int] | None:
    """Which slice of the object the answer's body is; None when there is no usable one."""
    if first.method == "HEAD":
        return None
    if response.status == 200:
        return 0, size
    found = content_range(response)
    if found is None or not found[0] < found[1] <= size or response.content_length != found[1] - found[0]:
        return None
    return found[0], found[1]


async def find_block(context: Context, answer: Answer, *, border: bool) -> None:
    """Sees whether the body is (or begins with) a block, and reads it if it is a small one. border: it was asked for from a
    block's border on."""
    ticket, record = answer.ticket, answer.record
    if ticket is None or record is None:
        return
    block_bytes = context.cache.block_bytes
    number, offset = divmod(ticket.start, block_bytes)
    length = block_length(record.size, number, block_bytes)
    whole = ticket.start == 0 and ticket.stop == record.size and record.size <= block_bytes
    if offset or ticket.stop - ticket.start < length or not (border or whole):
        return
    answer.block = number
    if length <= context.cache.small_bytes and ticket.stop - ticket.start == length:
        answer.ticket = None
        response = ticket.take()
        assert response is not None, "nobody else has it"
        try:
            body = await response.read(length)
        except OriginBroken:
            body = b""  # the record holds; whoever wants the bytes asks for them
        finally:
            response.release()
        if isinstance(response, PeerResponse):
            body = _compared(context, record, number, response, body)
        else:
            metrics.BYTE_COUNTS.add(("origin",), len(body))
        if len(body) == length:
            answer.body = body
        else:
            answer.block = None


def _compared(context: Context, record: Record, number: int, response: PeerResponse, body: bytes) -> bytes:
    """A small block as another node sent it; nothing if it is not what that node has."""
    expected = checksum_of(response)
    if not body or expected is None or expected == body_checksum(body):
        return body
    metrics.PEER_BLOCKS_BAD.labels(response.member).inc()
    context.upstream.bad(record, number)
    return b""
