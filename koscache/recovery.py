"""Recovery: from a directory in any state to an index and segments that agree, or to an empty store.

    index trusted  (same boot, or closed cleanly; it opens)
        segments that it knows and that are as they were left     kept, nothing is read
        segments that were being filled                           walked; entries unverified; filled further
        missing, of another size, written to since                suspect: its entries go, what can be read comes back
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
from koscache.content import StoreConfig
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

#: an index whose daemon died this often without living for STARTS_FORGOTTEN_S is not opened again
STARTS_MAX: Final = 5
STARTS_FORGOTTEN_S: Final = 60.0
_SEGMENTS_PER_TRANSACTION: Final = 32


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
        findings: dict[int, _Finding] = {}
        try:
            for segment, row in known.items():
                finding = self._inspect(segment, row, files.get(segment), trust)
                if finding is not None:
                    findings[segment] = finding
            with environment.write() as txn:
                self._apply(environment, txn, known, findings)
            filling = self._resume(known, findings)
        except BaseException:
            for finding in findings.values():
                _close(self._disk, finding.fd)
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

    def _inspect(self, segment: int, row: SegmentRow, file: tuple[int, int] | None, trust: Trust) -> _Finding | None:
        """None: the segment is as it was left, and sealed."""
        untouched = file == (row.size, row.mtime_ns)
        if row.state is SegmentState.SEALED and untouched:
            return None
        walk, fd = self._read(segment) if file is not None else (None, -1)
        if row.state is SegmentState.OPEN and walk is not None and walk.clean and walk.position >= row.position:
            # A segment that was being filled: the index knows nothing that the walk does not. After a clean close
            # nobody has written to it since, else its blocks are checked before they are used.
            return _Finding(walk, fd, suspect=False, unverified=not (untouched and trust is Trust.CLEAN))
        if walk is not None and self._policy is RecoveryPolicy.STRICT:
            _close(self._disk, fd)
            walk = None
        return _Finding(walk, fd if walk is not None else -1, suspect=True, unverified=True)

    def _read(self, segment: int) -> tuple[Walk | None, int]:
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

    def _apply(
        self,
        environment: Environment,
        txn: ix.Transaction,
        known: dict[int, SegmentRow],
        findings: dict[int, _Finding],
    ) -> None:
        """Brings index rows and entries in line with what was found."""
        suspects = {segment for segment, finding in findings.items() if finding.suspect}
        if suspects:
            self._dropped += environment.purge(txn, suspects)
        for segment, finding in findings.items():
            if finding.walk is None:
                self._disk.unlink(segment_path(self._dir, segment))
                self._segments_dropped += 1
                txn.delete(ix.segment_key(segment), db=environment.segments)
                del known[segment]
                continue
            if finding.unverified:
                put = environment.put_unverified(txn, segment, finding.walk.blocks)
                self._dropped -= put if finding.suspect else 0
            known[segment] = self._row(finding)
            txn.put(ix.segment_key(segment), ix.encode_segment(known[segment]), db=environment.segments)
        self._dropped = max(self._dropped, 0)

    def _row(self, finding: _Finding) -> SegmentRow:
        """Sealed: by its footer; or frozen as it is, because what lies behind something garbled may be in use."""
        assert finding.walk is not None
        walk = finding.walk
        sealed = walk.sealed or not walk.clean or finding.suspect
        state = SegmentState.SEALED if sealed else SegmentState.OPEN
        return SegmentRow(state, walk.size, self._disk.mtime_ns(finding.fd), walk.position)

    def _resume(self, known: dict[int, SegmentRow], findings: dict[int, _Finding]) -> list[SegmentFile]:
        """The segments that can be filled further, with their descriptors; those of the others are closed."""
        filling: list[SegmentFile] = []
        for segment, finding in findings.items():
            if finding.walk is None or known[segment].state is SegmentState.SEALED:
                _close(self._disk, finding.fd)
                continue
            path = segment_path(self._dir, segment)
            filling.append(SegmentFile.resume(self._disk, path, finding.fd, finding.walk))
        return filling

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
        """Newest first and never overwriting: of two copies the newer stays, and if the map gets full, the oldest
        go."""
        rows: dict[int, SegmentRow] = {}
        full = False
        for begin in range(0, len(newest_first), _SEGMENTS_PER_TRANSACTION):
            batch = newest_first[begin : begin + _SEGMENTS_PER_TRANSACTION]
            added: dict[int, SegmentRow] = {}
            if not full:
                try:
                    with environment.write() as txn:
                        for segment in batch:
                            row = self._rebuild_segment(environment, txn, segment, filling, same_boot=same_boot)
                            if row is not None:
                                added[segment] = row
                except IndexFull:
                    full = True
                    for each in [each for each in filling if each.id in batch]:
                        filling.remove(each)
                        each.close()
                    added = {}
            for segment in batch:
                if segment not in added:
                    self._disk.unlink(segment_path(self._dir, segment))
                    self._segments_dropped += 1
            rows |= added
        return dict(sorted(rows.items()))

    def _rebuild_segment(
        self,
        environment: Environment,
        txn: ix.Transaction,
        segment: int,
        filling: list[SegmentFile],
        *,
        same_boot: bool,
    ) -> SegmentRow | None:
        walk, fd = self._read(segment)
        if walk is None:
            return None
        try:
            if not walk.sealed and not walk.clean and self._policy is RecoveryPolicy.STRICT:
                return None
            _put_rebuilt(environment, txn, segment, walk.blocks)
            if walk.sealed or not (walk.clean and same_boot):
                # After a power failure the file may hold, behind the walk's end, what was never known: not filled on.
                row = SegmentRow(SegmentState.SEALED, walk.size, self._disk.mtime_ns(fd), walk.position)
            else:
                row = SegmentRow(SegmentState.OPEN, walk.size, 0, walk.position)
                filling.append(SegmentFile.resume(self._disk, segment_path(self._dir, segment), fd, walk))
                fd = -1
            txn.put(ix.segment_key(segment), ix.encode_segment(row), db=environment.segments)
            return row
        finally:
            _close(self._disk, fd)

    def _files(self) -> dict[int, tuple[int, int]]:
        """Segment files there are: id -> (size, mtime in ns)."""
        directory = os.path.join(self._dir, SEGMENTS_DIR)
        ids = sorted(segment for segment in map(parse_segment_name, self._disk.list(directory)) if segment is not None)
        return {segment: self._disk.stat(segment_path(self._dir, segment)) for segment in ids}


class _Finding(NamedTuple):
    """walk: None when nothing can be read. suspect: its index entries go first. unverified: its entries are put
    anew."""

    walk: Walk | None
    fd: int
    suspect: bool
    unverified: bool


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


def _put_rebuilt(environment: Environment, txn: ix.Transaction, segment: int, regions: list[Region]) -> None:
    """Puts entries and their records where the new index has none."""
    blocks = [ix.unverified(segment, region) for region in regions]
    with txn.cursor(environment.blocks) as cursor:
        cursor.putmulti(blocks, overwrite=False)
    records = [
        (region.payload[: ix.OBJECT_HASH_BYTES], region.payload[ix.OBJECT_HASH_BYTES :])
        for region in regions
        if len(region.payload) > ix.OBJECT_HASH_BYTES
    ]
    with txn.cursor(environment.objects) as cursor:
        cursor.putmulti(records, overwrite=False)


def mark(disk: Disk, cache_dir: str, pointer: Pointer, **changes: object) -> Pointer:
    """Writes CURRENT with some fields changed. Raises StoreFailed."""
    changed = msgspec.structs.replace(pointer, **changes)
    try:
        ix.write_pointer(disk, cache_dir, changed)
    except OSError as error:
        raise StoreFailed(f"writing CURRENT: {error}") from error
    return changed
