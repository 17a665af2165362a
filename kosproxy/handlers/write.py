"""Everything that changes objects: carried out by the origin, and forgotten by the cache.

Owns: which keys a write changes, that the client hears of its end only after the cache has forgotten them, and finding
out whether a completion that the origin knows nothing of any more was carried out before. Does not own: how forgetting
works (koscache.carrier.writing), asking the origin (kosproxy.handlers.forward).

Invariant: the last bytes of the answer leave after the fence was passed for the second time. An answer may begin before:
a completion of many parts answers 200 at once, sends blanks for minutes so that nobody times out, and says at its end
whether it worked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from kos.errors import OriginError, S3Error
from kos.s3 import completion, xml
from kos.s3.operation import Op, Operation
from kos.s3.sigv4 import Identity
from kosproxy.exchange import Exchange
from kosproxy.handlers.forward import ask, check_origin, question_of, relay_head
from kosproxy.handlers.waiting import GAVE_UP, WAITED_FOR, Answer, Waiting
from kosproxy.inbound import Inbound
from kosproxy.outbound import Outbound, whole
from kosproxy.render import passed_on

_log: Final = logging.getLogger("kosproxy.write")
#: Of a completion, what a look at its object needs as well.
_LOOKS_WITH: Final = (
    "x-amz-expected-bucket-owner", "x-amz-request-payer", "x-amz-server-side-encryption-customer-algorithm",
    "x-amz-server-side-encryption-customer-key", "x-amz-server-side-encryption-customer-key-md5",
)  # fmt: skip
#: Of that look's answer, what the completion's would have had; and encryption's.
_TOLD: Final = frozenset({"x-amz-expiration", "x-amz-request-charged", "x-amz-version-id"})


def _end_known(failed: bool, attempts: int) -> bool:
    """Whether the origin is done with a write. Not if it, or a proxy before it, says that the write failed, or did not say of
    an earlier attempt what became of it: it may still carry that out, so the cache may not trust for ever what it reads until
    then."""
    return not failed and attempts == 1


async def write(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Carry out a write. Runs in a task of the worker's own: a client that goes away does not end it half-way.

    Raises S3Error, OriginError before the head has left; ConnectionError when the client is gone.
    """
    with contextlib.closing(Inbound(exchange, operation, identity)) as inbound:
        keys, versions, request = await _prepare(exchange, operation, identity, inbound)
        if operation.op in WAITED_FOR:
            await _wait_for(exchange, operation, keys, versions, request)
        else:
            await _relay(exchange, operation, keys, versions, request)


async def _relay(
    exchange: Exchange, operation: Operation, keys: list[str], versions: list[str], request: Outbound
) -> None:
    assert operation.bucket is not None
    held = b""
    gone: ConnectionError | None = None
    bucket_itself = operation.key is None and operation.op is not Op.DeleteObjects
    async with (
        exchange.parts.carrier.writing(
            operation.bucket, keys, versions=versions, bucket_itself=bucket_itself
        ) as writing,
        await ask(exchange, operation, request) as response,
    ):
        relay_head(exchange, response)
        if exchange.has_body(response.status):
            async for data in response.pieces():
                if held and gone is None:
                    try:
                        await exchange.write(held)
                    except ConnectionError as error:
                        # Nobody listens any more, but how it ends still decides when the fence is passed.
                        gone = error
                held = data
        writing.end_known = _end_known(response.status in GAVE_UP, response.attempts)
    if gone is not None:
        raise gone
    await exchange.write(held)
    await exchange.finish()


async def _wait_for(
    exchange: Exchange, operation: Operation, keys: list[str], versions: list[str], request: Outbound
) -> None:
    """A write that may take long. What it comes to is told when the fence was passed; blanks may go before."""
    assert operation.bucket is not None
    waiting = Waiting(exchange)

    async def answering() -> Answer:
        answer = await waiting.whole(await ask(exchange, operation, request))
        if operation.op is Op.CompleteMultipartUpload and completion.says_no_such_upload(answer.status, answer.body):
            return await _completed_before(exchange, operation, request) or answer
        return answer

    try:
        async with exchange.parts.carrier.writing(operation.bucket, keys, versions=versions) as writing:
            answer = await waiting.wait(answering, operation.op.name)
            writing.end_known = _end_known(answer.failed, answer.attempts)
    except (S3Error, OriginError) as failure:
        await waiting.fail(failure)
    else:
        await waiting.tell(answer)


async def _completed_before(exchange: Exchange, operation: Operation, request: Outbound) -> Answer | None:
    """The answer to a completion whose upload is gone because it was carried out; None when it was not, or who knows."""
    bucket, key, parts = operation.bucket, operation.key, exchange.parts
    assert bucket is not None and key is not None and isinstance(request.body, bytes)
    loop = asyncio.get_running_loop()
    expected = await loop.run_in_executor(parts.hashers, completion.multipart_etag, request.body)
    if expected is None:
        return None
    asked = dict(request.headers)
    headers = {name: asked[name] for name in _LOOKS_WITH if name in asked} | {"x-amz-checksum-mode": "ENABLED"}
    exchange.origin_requests += 1
    async with await parts.origin.request("HEAD", bucket, key, headers=headers, operation=Op.HeadObject.name) as found:
        found_headers = found.headers
        same = found.status == 200 and found_headers.get("etag", "").strip('"') == expected.strip('"')
    size = asked.get("x-amz-mp-object-size")
    if not same or (size is not None and size != found_headers.get("content-length")):
        return None
    _log.info("completion was carried out before", extra={"request_id": exchange.request_id, "bucket": bucket})
    kept = [
        (name, value)
        for name, value in passed_on(found_headers)
        if name.lower() in _TOLD or name.lower().startswith("x-amz-server-side-encryption")
    ]
    scheme = "https" if exchange.connection.socket is None else "http"  # no socket: TLS is in between
    location = f"{scheme}://{exchange.head.headers.get('host', '')}{exchange.head.raw_path}"
    document = completion.result(location, bucket, key, found_headers)
    return Answer(200, [*kept, ("Content-Type", "application/xml")], document)


async def _prepare(
    exchange: Exchange, operation: Operation, identity: Identity, inbound: Inbound
) -> tuple[list[str], list[str], Outbound]:
    """The keys that the write changes, those of which it may change versions, and the request that carries it out."""
    if operation.op is Op.DeleteObjects:
        check_origin(exchange, inbound)
        body = await inbound.read(xml.DELETE_REQUEST_MAX_BYTES)
        request = xml.parse_delete_request(body)
        versions = [item.key for item in request.items if item.version_id is not None]
        return (
            [item.key for item in request.items],
            versions,
            whole(exchange.head, operation, identity, inbound, body),
        )
    keys = list(operation.forgets)
    question = await question_of(exchange, operation, identity, inbound)
    return keys, keys if operation.changes_versions else [], question
