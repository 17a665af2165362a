"""A process that fills a block store until it is killed: argv is the directory and the number of the first object.

Prints the number of each object once it is committed. Reads some again (touches), so that evictions have to move entries.
"""

from __future__ import annotations

import os
import sys

from kos.clock import Clock
from koscache.content import Commit, Refused, body_checksum
from koscache.fence import read_boot_id
from koscache.store import Store
from tests.fakes.block_store import KIB, Settings, Thing, open_store, small

SIZES = (300, 1900, 9000, 16 * KIB, 50 * KIB)


def put(store: Store, thing: Thing) -> None:
    if thing.size <= 2 * KIB:
        store.put_small([small(store, thing)])
        return
    record = thing.record(store)
    store.put_record(thing.bucket, thing.key, record)
    for number in thing.numbers():
        body = thing.block(number)
        extent = store.reserve(thing.content, number, len(body))
        if isinstance(extent, Refused):
            return
        fd = os.open(extent.path, os.O_RDWR)
        for at in range(0, len(body), 4096):
            os.pwrite(fd, body[at : at + 4096], extent.offset + at)
        os.close(fd)
        commit = Commit(extent, thing.content, number, len(body), body_checksum(body), thing.bucket, thing.key, record)
        if number % 7 == 6:
            store.abandon(extent)
        else:
            store.commit([commit])


def main(directory: str, number: int) -> None:
    store = open_store(Settings(directory), Clock(), boot_id=read_boot_id())
    while True:
        put(store, Thing(f"k{number}", SIZES[number % len(SIZES)]))
        back = number - 30 - number % 17
        store.touched([(Thing(f"k{back}", SIZES[back % len(SIZES)]).content, 0)])
        for gone in store.evict():
            store.released(gone)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        number += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
