"""Which listings a write may change, as fence slots: those of the directories that its keys lie in.

S3 has no directories, but nearly all prefixes that are listed end at a "/" or just behind one. So a page of a listing is
guarded by two slots of the fence: that of its prefix's directory (the prefix cut behind its last "/"), which every write
below that directory passes, and that of its bucket, which only writes to the bucket itself pass (made, removed, its
settings). A write of the key a/b/c passes the directories "", "a/" and "a/b/".

    list a/b/x*: v = slots("", a/b/x); GET -> without a/b/xy ................... page(v): differs from the slot: not used
    put a/b/xy:                            pass ""  a/  a/b/; PUT ... 200; pass them; answer the client

Why no page is ever older than an answered write. Let a write of k be answered, and then a page of prefix p be used, with k
beginning with p. The page carries the values that its slots had before its origin request began, and they are the slots'
present ones. The directory of p is one of the directories of k (it begins p, hence k, and ends in "/", or is ""), so the
write passed that slot before it was answered, and values never come back: the page's value was read after that passing,
so its origin request began after the origin had carried the write out. The same holds for who joins a request that is on
its way: he joins only under the values that it began with.

Directories deeper than DEPTH_MAX count as the one at DEPTH_MAX that they are in, for prefixes as for keys, so a write
passes at most DEPTH_MAX + 1 of them, and a page below is dropped more often than it must be.

Owns: directories of prefixes and keys, and their slots' hashes. Does not own: the slots (koscache.fence), when they are
passed (koscache.carrier), pages.

Invariant: for every key and every prefix of it, directory(prefix) is in directories([key]).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xxhash import xxh3_64_intdigest

from koscache.content import object_name

DEPTH_MAX: Final = 32
#: A name space each: no directory has the hash of a bucket because of how it is spelled.
_DIRECTORY_SEED: Final = 1
_BUCKET_SEED: Final = 2


def directory(prefix: str) -> str:
    """The prefix up to and with its last "/", but not beyond its DEPTH_MAX-th; "" if there is none."""
    home = prefix[: prefix.rfind("/") + 1]
    if home.count("/") <= DEPTH_MAX:
        return home
    end = -1
    for _ in range(DEPTH_MAX):
        end = home.find("/", end + 1)
    return home[: end + 1]


def directories(keys: Iterable[str]) -> set[str]:
    """All directories whose listings may show one of the keys. Keys that lie side by side cost little more than one."""
    found: set[str] = set()
    for home in {directory(key) for key in keys}:
        while home not in found:
            found.add(home)
            home = home[: home.rfind("/", 0, -1) + 1]
    return found


def directory_slot_hash(bucket: str, home: str) -> int:
    """64 bits, of which the fence takes the low ones. home: of directory() or directories()."""
    return xxh3_64_intdigest(object_name(bucket, home), seed=_DIRECTORY_SEED)


def bucket_slot_hash(bucket: str) -> int:
    """64 bits, of which the fence takes the low ones: what all listings of a bucket depend on."""
    return xxh3_64_intdigest(object_name(bucket, ""), seed=_BUCKET_SEED)
