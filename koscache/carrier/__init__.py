"""What the workers use of the cache: find, open, read, forget. The bytes of an object pass through a worker only.

Owns: the public names of this package. Does not own: decisions of the node (koscache.daemon), the store's files
(koscache.store), origin access (kos.origin), S3 answers (kos.s3.object_response).

Invariant: every body is bytes of exactly one version, and a client that goes away never takes a fill with it.

The order of a read:

    peek = carrier.peek(bucket, key)                                   # no await, microseconds
    if peek.freshness is FRESH and (pieces := carrier.cached(peek.record, bucket, key, start, stop)) is not None:
        ... sendfile the pieces ...; carrier.give_back(pieces)         # the fast lane ends here
    opened = await carrier.open(bucket, key, want)                     # S3Error, OriginRefused
    body = carrier.body(opened, start, stop)
    try:
        async for piece in body: ...                                   # a piece is valid until the next one is asked for
    except Changed: ...                                                # before the first piece: open again; after: abort
    finally:
        await body.aclose(); opened.close()

The order of a write:

    async with carrier.writing(bucket, keys, versions=keys_whose_versions_it_may_change) as writing:
        ... the origin request, until its answer is here ...
        writing.end_known = ... whether the origin is done with it ...

A key is everywhere here the name of an object: a client's key for the current one, version_name() for a version.
"""

from koscache.carrier.body import Body
from koscache.carrier.carrier import Carrier, CarrierStats, Writing
from koscache.carrier.peers import Peers
from koscache.carrier.types import (
    BytesPiece,
    Changed,
    FilePiece,
    Opened,
    Peek,
    Phase,
    Piece,
    Reason,
    Sight,
    StreamPiece,
    Want,
)
from koscache.content import Freshness, Record, version_name
from koscache.touchmap import TouchMap

__all__ = [
    "Body",
    "BytesPiece",
    "Carrier",
    "CarrierStats",
    "Changed",
    "FilePiece",
    "Freshness",
    "Opened",
    "Peek",
    "Peers",
    "Phase",
    "Piece",
    "Reason",
    "Record",
    "Sight",
    "StreamPiece",
    "TouchMap",
    "Want",
    "Writing",
    "version_name",
]
