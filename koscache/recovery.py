"""Recovery: from a directory in any state to an index and segments that agree, or to an empty store.

    index trusted  (same boot, or closed cleanly; it opens)
        segments that it knows and that are as they were left     kept, nothing is read
        segments that were being filled                           walked; entries unverified; filled further
        missing, of another size, written to since                suspect: what is inside the file is unverified, the rest goes
        files that it does not know                               unlinked
    index rebuilt  (all else)
        every segment: footer, else walk; entries unverified, records to be revalidated

Unverified: the checksum is checked before the first use (Store.verify, or the scrub). After a power failure a footer
can have reached the disk before a body that was written earlier; so can a kernel bug or a hand that edits files.

Owns: the judgement and the rebuilding. Does not own: formats (layout, index), normal operation (store).

Invariant: whatever is found, an entry comes back only under the content id and checksum that its own header holds. The
worst that bad files can do is make entries disappear.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from enum import Enum
from typing import Final, NamedTuple, Protocol

import lmdb
import msgspec

from koscache import index as ix
from koscache.content import Location, StoreConfig
from koscache.disk import Disk, StoreFailed, disk_errors
from koscache.index import Environment, IndexBroken, IndexFull, Pointer, SegmentRow, SegmentState
from koscache.layout import Region
from koscache.segments import (
    SEGMENTS_DIR,
    SegmentFile,
    Walk,
    parse_segment_name,
    read_segment,
    segment_path,
)

#: An index whose daemon died this often, each time before it lived STARTS_FORGOTTEN_S or did STARTS_FORGOTTEN_COUNT
#: transactions, is not opened again.
STARTS_MAX: Final = 5
STARTS_FORGOTTEN_S: Final = 60.0
STARTS_FORGOTTEN_COUNT: Final = 1000
#: keys and values put in one transaction; LMDB allows 512 MiB of dirty pages. Less if the map is small, so that it does
#: not get full in one step.
_TRANSACTION_BYTES: Final = 24 << 20
_BLOCK_BYTES: Final = 64  # key, value and what LMDB adds


class RecoveryPolicy(Enum):
    """What to do with a segment that is not as it was left."""

    LENIENT = "lenient"  # keep every entry whose header holds; its body is checked before use
    STRICT = "strict"  # drop the segment


class Trust(Enum):
    """Whether the index that CURRENT names is used, and why."""

    SAME_BOOT = "same boot: the page cache is whole"
    CLEAN = "closed cleanly"
    NO_INDEX = "no index yet"
    NO_POINTER = "CURRENT is missing or garbled"
    OTHER_FORMAT = "made by another version"
    OTHER_BLOCK_SIZE = "block_size was changed: everything is dropped"
    OTHER_BOOT = "the machine stopped without a clean close"
    SEEN_BROKEN = "the index was seen broken"
    KILLS = "the index was opened too often by daemons that died"
    TOO_LARGE = "the index is larger than index_size"
    WILL_NOT_OPEN = "the index does not open"

    @property
    def holds(self) -> bool:
        return self in (Trust.SAME_BOOT, Trust.CLEAN)


class RecoveryReport(msgspec.Struct, frozen=True):
    """What open() found. index: "trusted", "rebuilt" or "new", and reason why. kept: blocks; dropped: blocks that the
    index had or a header named and that are gone. segments, segments_dropped: files. seconds: the whole of it."""

    index: str
    reason: str
    kept: int
    dropped: int
    segments: int
    segments_dropped: int
    seconds: float


class Recovered(NamedTuple):
    """segments: id -> row, oldest first, those in `filling` included."""

    environment: Environment
    pointer: Pointer
    segments: dict[int, SegmentRow]
    filling: list[SegmentFile]
    next_segment: int
    trust: Trust
    dropped: int
    segments_dropped: int


class _Clock(Protocol):
    def now(self) -> float: ...


def judge_index(pointer: Pointer | None, numbers: list[int], boot_id: str, block_bytes: int) -> Trust:
    """Pure: may the index be used? numbers: of the index directories that exist."""
    if pointer is None:
        return Trust.NO_POINTER if numbers else Trust.NO_INDEX
    if pointer.format != ix.FORMAT:
        return Trust.OTHER_FORMAT
    if pointer.block_bytes != block_bytes:
        return Trust.OTHER_BLOCK_SIZE
    if pointer.index not in numbers:
        return Trust.WILL_NOT_OPEN
    if not pointer.trusted:
        return Trust.SEEN_BROKEN
    if pointer.starts >= STARTS_MAX:
        return Trust.KILLS
    if pointer.clean:
        return Trust.CLEAN
    return Trust.SAME_BOOT if pointer.boot_id == boot_id else Trust.OTHER_BOOT


class Recovery:
    """One run over one directory. Raises StoreFailed when the disk does not let it."""

    def __init__(self, config: StoreConfig, disk: Disk, clock: _Clock, boot_id: str, policy: RecoveryPolicy) -> None:
        self._config = config
        self._dir = config.dir
        self._disk = disk
        self._clock = clock
        self._boot_id = boot_id
        self._policy = policy
        self._dropped = 0
        self._segments_dropped = 0

    def run(self) -> Recovered:
        with disk_errors("recovering the store"):
            self._disk.make_dir(os.path.join(self._dir, SEGMENTS_DIR))
            names = self._disk.list(self._dir)
            pointer = ix.read_pointer(self._disk, self._dir)
            numbers = ix.index_numbers(names)
            trust = judge_index(pointer, numbers, self._boot_id, self._config.block_bytes)
            if trust.holds and pointer is not None:
                try:
                    return self._use(pointer, trust)
                except (IndexBroken, IndexFull):
                    trust = Trust.WILL_NOT_OPEN
                except _TooLarge:
                    trust = Trust.TOO_LARGE
            return self._rebuild(pointer, numbers, trust)

    # ---- the index is trusted

    def _use(self, pointer: Pointer, trust: Trust) -> Recovered:
        current = msgspec.structs.replace(
            pointer,
            boot_id=self._boot_id,
            clean=False,
            starts=0 if pointer.clean else pointer.starts + 1,
            map_bytes=self._config.index_bytes,
        )
        # Before the index is touched: should it kill us, the count of starts has to know.
        ix.write_pointer(self._disk, self._dir, current)
        environment = _attach(ix.index_path(self._dir, current.index), self._config.index_bytes)
        try:
            return self._reconcile(environment, current, trust)
        except BaseException:
            environment.detach()
            raise

    def _reconcile(self, environment: Environment, pointer: Pointer, trust: Trust) -> Recovered:
        known, next_segment = _read_rows(environment)
        files = self._files()
        for segment in [each for each in files if each not in known]:
            self._disk.unlink(segment_path(self._dir, segment))  # died between making or evicting and the index
            del files[segment]
        suspects: dict[int, int] = {}  # segment -> bytes that it has
        filling: list[SegmentFile] = []
        try:
            for segment, row in known.items():
                untouched = files.get(segment) == (row.size, row.mtime_ns)
                if row.state is SegmentState.SEALED and untouched:
                    continue
                checked = untouched and trust is Trust.CLEAN
                if not self._take_up(environment, segment, row, filling, is_there=segment in files, checked=checked):
                    suspects[segment] = files[segment][0] if segment in files else 0
            if suspects:
                self._suspect(environment, known, suspects)
        except BaseException:
            for each in filling:
                each.close()
            raise
        newest = max(files, default=-1) + 1
        return Recovered(
            environment,
            pointer,
            known,
            filling,
            max(next_segment, newest),
            trust,
            self._dropped,
            self._segments_dropped,
        )

    def _take_up(
        self,
        environment: Environment,
        segment: int,
        row: SegmentRow,
        filling: list[SegmentFile],
        *,
        is_there: bool,
        checked: bool,
    ) -> bool:
        """Goes on filling a segment, if it is whole: then the index knows nothing of it that the walk does not. False:
        it is not whole, or was sealed.

        checked: closed cleanly, and nobody has written to it since. Else its blocks are checked before they are used.
        """
        if row.state is not SegmentState.OPEN or not is_there:
            return False
        walk, fd = self._read(segment)
        if walk is None or not walk.clean or walk.position < row.position or walk.size != row.size:
            _close(self._disk, fd)
            return False
        each = SegmentFile.resume(self._disk, segment_path(self._dir, segment), fd, walk)
        filling.append(each)
        if not checked:
            for begin in range(0, len(walk.blocks), ix.CHANGES_MAX):
                with environment.write() as txn:
                    environment.put_unverified(txn, segment, walk.blocks[begin : begin + ix.CHANGES_MAX])
        return True

    def _suspect(self, environment: Environment, known: dict[int, SegmentRow], suspects: dict[int, int]) -> None:
        """Segments that are not as they were left. The index still knows where each block was and its checksum: what
        lies inside the file is checked before its next use (or dropped, if strict); nobody writes to the file again,
        because what lies behind a garbled header may be in use."""
        strict = self._policy is RecoveryPolicy.STRICT

        def judge(location: Location) -> Location | None:
            size = suspects.get(location.segment)
            if size is None:
                return location
            if strict or location.offset + location.length > size:
                return None
            return location._replace(verified=False)

        self._dropped += environment.revise(judge)[0]
        for segment, size in suspects.items():
            path = segment_path(self._dir, segment)
            if strict or size == 0:
                self._disk.unlink(path)
                self._segments_dropped += 1
                del known[segment]
            else:
                mtime_ns = self._disk.stat(path)[1]
                known[segment] = SegmentRow(SegmentState.SEALED, size, mtime_ns, known[segment].position)
        with environment.write() as txn:
            for segment in suspects:
                key = ix.segment_key(segment)
                if segment in known:
                    txn.put(key, ix.encode_segment(known[segment]), db=environment.segments)
                else:
                    txn.delete(key, db=environment.segments)

    def _read(self, segment: int) -> tuple[Walk | None, int]:
        """(None, -1): not a segment of this store."""
        path = segment_path(self._dir, segment)
        fd = self._disk.open(path, os.O_RDWR)
        try:
            walk = read_segment(self._disk, fd, segment, self._config.block_bytes)
        except BaseException:
            _close(self._disk, fd)
            raise
        if walk is None:
            _close(self._disk, fd)
            return None, -1
        return walk, fd

    # ---- the index is built anew

    def _rebuild(self, pointer: Pointer | None, numbers: list[int], trust: Trust) -> Recovered:
        files = self._files()
        before = [*numbers, *(segment >> 32 for segment in files), 0 if pointer is None else pointer.index]
        # Index and segment ids go up with time even if everything that remembers the last one was deleted while
        # workers still hold descriptors.
        generation = max(max(before) + 1, int(self._clock.now()) & 0x7FFFFFFF)
        for number in numbers:
            shutil.rmtree(ix.index_path(self._dir, number), ignore_errors=True)
        current = Pointer(
            format=ix.FORMAT,
            index=generation,
            boot_id=self._boot_id,
            clean=False,
            trusted=False,  # until it is whole
            starts=0,
            block_bytes=self._config.block_bytes,
            map_bytes=self._config.index_bytes,
        )
        ix.write_pointer(self._disk, self._dir, current)
        path = ix.index_path(self._dir, generation)
        self._disk.make_dir(path)
        environment = _attach(path, self._config.index_bytes)
        filling: list[SegmentFile] = []
        try:
            with environment.write() as txn:
                txn.put(ix.NEXT_SEGMENT, ix.segment_key(generation << 32), db=environment.meta)
            same_boot = pointer is not None and pointer.boot_id == self._boot_id
            rows = self._fill_index(environment, sorted(files, reverse=True), filling, same_boot=same_boot)
            current = msgspec.structs.replace(current, trusted=True)
            ix.write_pointer(self._disk, self._dir, current)
        except BaseException:
            for each in filling:
                each.close()
            environment.detach()
            raise
        return Recovered(
            environment, current, rows, filling, generation << 32, trust, self._dropped, self._segments_dropped
        )

    def _fill_index(
        self, environment: Environment, newest_first: list[int], filling: list[SegmentFile], *, same_boot: bool
    ) -> dict[int, SegmentRow]:
        """Newest first and never overwriting: of two copies the newer stays, and if the map gets full, the oldest go."""
        rows: dict[int, SegmentRow] = {}
        pending = _Pending(environment)
        full = False
        for segment in newest_first:
            walk, fd = (None, -1) if full else self._read(segment)
            if walk is None or (not walk.clean and self._policy is RecoveryPolicy.STRICT):
                _close(self._disk, fd)
                self._disk.unlink(segment_path(self._dir, segment))
                self._segments_dropped += 1
                continue
            if walk.sealed or not (walk.clean and same_boot):
                # After a power failure the file may hold, behind the walk's end, what was never known: not filled on.
                rows[segment] = SegmentRow(SegmentState.SEALED, walk.size, self._disk.mtime_ns(fd), walk.position)
                _close(self._disk, fd)
            else:
                rows[segment] = SegmentRow(SegmentState.OPEN, walk.size, 0, walk.position)
                filling.append(SegmentFile.resume(self._disk, segment_path(self._dir, segment), fd, walk))
            try:
                pending.add(segment, rows[segment], walk.blocks)
            except IndexFull:
                full = True
        try:
            pending.flush()
        except IndexFull:
            full = True
        if full:
            self._drop_unindexed(environment, rows, filling, pending.done)
        return dict(sorted(rows.items()))

    def _drop_unindexed(
        self, environment: Environment, rows: dict[int, SegmentRow], filling: list[SegmentFile], done: set[int]
    ) -> None:
        """The index holds no more: segments that did not get into it whole go. Entries of theirs that did find no
        segment, which is a miss, and are overwritten or swept in time."""
        for segment in [each for each in rows if each not in done]:
            del rows[segment]
            for each in [each for each in filling if each.id == segment]:
                filling.remove(each)
                each.close()
            self._disk.unlink(segment_path(self._dir, segment))
            self._segments_dropped += 1

    def _files(self) -> dict[int, tuple[int, int]]:
        """Segment files there are: id -> (size, mtime in ns)."""
        directory = os.path.join(self._dir, SEGMENTS_DIR)
        ids = sorted(segment for segment in map(parse_segment_name, self._disk.list(directory)) if segment is not None)
        return {segment: self._disk.stat(segment_path(self._dir, segment)) for segment in ids}


class _Pending:
    """Entries on their way into a new index, many to a transaction but not too many."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._rows: list[tuple[bytes, bytes]] = []
        self._blocks: list[tuple[bytes, bytes]] = []
        self._records: list[tuple[bytes, bytes]] = []
        self._segments: list[int] = []
        self._bytes = 0
        self._bytes_max = min(_TRANSACTION_BYTES, environment.map_bytes // 16)
        self.done: set[int] = set()

    def add(self, segment: int, row: SegmentRow, regions: list[Region]) -> None:
        """Raises IndexFull."""
        for region in regions:
            self._blocks.append(ix.unverified(segment, region))
            if len(region.payload) > ix.OBJECT_HASH_BYTES:
                hashed, value = region.payload[: ix.OBJECT_HASH_BYTES], region.payload[ix.OBJECT_HASH_BYTES :]
                self._records.append((hashed, value))
                self._bytes += len(value)
            self._bytes += _BLOCK_BYTES
            if self._bytes >= self._bytes_max:
                self.flush()
        self._rows.append((ix.segment_key(segment), ix.encode_segment(row)))
        self._segments.append(segment)

    def flush(self) -> None:
        """Raises IndexFull: also when all went in, but no more should."""
        environment = self._environment
        blocks, records, rows, segments = self._blocks, self._records, self._rows, self._segments
        self._blocks, self._records, self._rows, self._segments = [], [], [], []
        self._bytes = 0
        with environment.write() as txn:
            with txn.cursor(environment.blocks) as cursor:
                cursor.putmulti(blocks, overwrite=False)
            with txn.cursor(environment.objects) as cursor:
                cursor.putmulti(records, overwrite=False)
            with txn.cursor(environment.segments) as cursor:
                cursor.putmulti(rows)
        self.done.update(segments)
        if environment.is_filling_up():
            raise IndexFull("index full: no more segments")


class _TooLarge(Exception):
    pass


def _close(disk: Disk, fd: int) -> None:
    if fd >= 0:
        disk.close(fd)


def _attach(path: str, map_bytes: int) -> Environment:
    """Raises IndexBroken for whatever does not open."""
    with contextlib.ExitStack() as stack:
        try:
            environment = Environment.attach(path, map_bytes, writable=True)
        except (lmdb.Error, OSError) as error:
            raise IndexBroken(f"index does not open: {error}") from error
        stack.callback(environment.detach)
        if environment.file_bytes() > map_bytes + (64 << 10):
            raise _TooLarge
        info = environment.env.info()
        pages_end = (info["last_pgno"] + 1) * environment.env.stat()["psize"]
        if os.stat(os.path.join(path, "data.mdb")).st_size < pages_end:
            # Reading behind the end of a mapped file is SIGBUS, in every worker.
            raise IndexBroken("index is cut short")
        stack.pop_all()
    return environment


def _read_rows(environment: Environment) -> tuple[dict[int, SegmentRow], int]:
    """Every segment the index knows, oldest first, and the next id. Raises IndexBroken."""
    rows: dict[int, SegmentRow] = {}
    with environment.read() as txn:
        for key, value in txn.cursor(environment.segments):
            row = ix.decode_segment(value)
            if row is None or len(key) != 8:
                raise IndexBroken("index holds a row that cannot be read")
            rows[ix.parse_segment_key(key)] = row
        raw = txn.get(ix.NEXT_SEGMENT, db=environment.meta)
    if raw is None:
        raise IndexBroken("index does not know the next segment")
    return rows, ix.parse_segment_key(raw)


def mark(disk: Disk, cache_dir: str, pointer: Pointer, **changes: object) -> Pointer:
    """Writes CURRENT with some fields changed. Raises StoreFailed."""
    changed = msgspec.structs.replace(pointer, **changes)
    try:
        ix.write_pointer(disk, cache_dir, changed)
    except OSError as error:
        raise StoreFailed(f"writing CURRENT: {error}") from error
    return changed
