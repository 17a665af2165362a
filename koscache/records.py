"""Records in the index: getting, putting, and which of two stays.

Answers of the origin can reach the daemon in another order than they were given:

    open A: fence 1, GET ......... answer (old) ........................ put(A)
    write:             bump to 2, PUT, bump to 3
    open B:                                    fence 3, GET, answer (new) .. put(B) before or after A

The one whose fence is the slot's present value wins; among equals, the later validated_at. So B stays in both orders.

Owns: that rule, and what an entry on disk keeps of its record. Does not own: transactions (store).

Invariant: a record is only given for the bucket and key that it names; the hash it is found under is not believed.
"""

from __future__ import annotations

from typing import Protocol

from koscache import index as ix
from koscache.content import Record, object_hash
from koscache.fence import Fence
from koscache.index import Environment


class _Clock(Protocol):
    def now(self) -> float: ...


class Records:
    """Inside transactions of the one writer."""

    def __init__(self, environment: Environment, fence: Fence, clock: _Clock) -> None:
        self._objects = environment.objects
        self._fence = fence
        self._clock = clock

    def get(self, txn: ix.Transaction, bucket: str, key: str) -> Record | None:
        hashed = object_hash(bucket, key)
        value = txn.get(hashed, db=self._objects)
        named = None if value is None else ix.decode_record(hashed, value)
        return named.record if named is not None and (named.bucket, named.key) == (bucket, key) else None

    def put(self, txn: ix.Transaction, bucket: str, key: str, record: Record) -> bool:
        """False: the one that is there is newer and stays."""
        present = self.get(txn, bucket, key)
        if present is not None and self._is_newer(present, record, self._fence.value_of(bucket, key)):
            return False
        hashed = object_hash(bucket, key)
        txn.put(hashed, ix.encode_record(hashed, bucket, key, record), db=self._objects)
        return True

    def drop(self, txn: ix.Transaction, bucket: str, key: str) -> bool:
        return txn.delete(object_hash(bucket, key), db=self._objects)

    def _is_newer(self, present: Record, record: Record, slot_value: int) -> bool:
        if (present.fence == slot_value) != (record.fence == slot_value):
            return present.fence == slot_value
        # Validated in the future: the clock was set back since. Then it says nothing.
        return record.validated_at < present.validated_at <= self._clock.now()


def payload(bucket: str, key: str, record: Record | None, most: int) -> bytes:
    """What an entry keeps of its object: enough to rebuild the record, as one that must be revalidated. A record that
    is longer than `most` bytes is left out; after a loss of the index the origin is asked for it."""
    if record is None:
        return b""
    hashed = object_hash(bucket, key)
    kept = hashed + ix.encode_record(hashed, bucket, key, record.revalidated(0.0, 0))
    return kept if len(kept) <= most else b""
