"""All cases, by area. Importing this package registers them."""

from tests.contract.s3.cases import (
    buckets,
    conditions,
    copies,
    deletes,
    keys,
    listings,
    multipart,
    objects,
    presigned,
    tags_and_locks,
    versions,
)

__all__ = [
    "buckets",
    "conditions",
    "copies",
    "deletes",
    "keys",
    "listings",
    "multipart",
    "objects",
    "presigned",
    "tags_and_locks",
    "versions",
]
