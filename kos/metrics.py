"""Every metric of kos, in one table, and the counts that are cheap enough for the hot path.

Owns: names, labels and meaning of metrics; how the processes of a node keep theirs apart. Does not own: the page
(kos.node.admin) or when something is counted.

How it works over processes: the supervisor gives its children PROMETHEUS_MULTIPROC_DIR, where each keeps its numbers in
files of its own, and KOS_PROCESS, a name that stays when a child is replaced. Files are named by it, so a new worker-0
goes on counting where the last one stopped, and a child that crashes all night does not leave a thousand files behind.
Without the variables (tests, tools) everything is in memory.

Invariant: label values come from fixed sets (operations, phases, reasons), never from keys, buckets or addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values

from kos.clock import Clock

MULTIPROC_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
PROCESS: Final = "KOS_PROCESS"

if os.environ.get(MULTIPROC_DIR) and os.environ.get(PROCESS):
    # Must come before the first metric below is made: each takes its storage from here.
    values.ValueClass = values.MultiProcessValue(lambda: os.environ[PROCESS])  # type: ignore[no-untyped-call]

REQUESTS: Final = Counter(
    "kos_requests_total",
    "S3 requests answered. lane: fast, slow. phase: hit, peer, miss, revalidated, stale, bypass, none",
    ["operation", "status", "lane", "phase"],
)
BYTES: Final = Counter(
    "kos_bytes_total",
    "Bytes of object bodies. source: hit (from this node's store), fill (to clients while filling), "
    "origin (received from the origin), client (received from clients), peer (received from other nodes), "
    "peer_out (sent to other nodes)",
    ["source"],
)
ORIGIN_REQUESTS: Final = Counter(
    "kos_origin_requests_total", "Requests that the origin answered", ["operation", "status"]
)
ORIGIN_SECONDS: Final = Histogram(
    "kos_origin_seconds",
    "Time from sending a request to the first byte of the origin's answer",
    ["operation"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
ORIGIN_ERRORS: Final = Counter("kos_origin_errors_total", "Requests that the origin did not answer", ["reason"])
PEER_REQUESTS: Final = Counter(
    "kos_peer_requests_total",
    "Questions to other nodes. path: object, block, checksum, ahead, take. result: answered, declined (it said why not), "
    "failed (no answer), broken (besides answered: its body broke off), lost (another node was faster, or nobody waits), "
    "busy (too many connections to it)",
    ["path", "result"],
)
PEER_HEDGES: Final = Counter(
    "kos_peer_hedges_total", "Questions that were asked of a second node because the first was slow", ["path"]
)
PEER_HEAD_SECONDS: Final = Histogram(
    "kos_peer_head_seconds",
    "Time from the question to the head of another node's answer",
    ["path"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
PEER_BLOCKS_BAD: Final = Counter(
    "kos_peer_blocks_bad_total", "Blocks of other nodes that were not what their checksum says", ["member"]
)
PEER_ANSWERS: Final = Counter(
    "kos_peer_answers_total",
    "Questions of other nodes that were answered. path: object, block, checksum, ahead, take, none. lane: fast, slow",
    ["path", "status", "lane"],
)
# The daemon alone knows these of the cluster.
CLUSTER_MEMBERS: Final = Gauge(
    "kos_cluster_members", "Members of the cluster, as this node knows them", multiprocess_mode="livemostrecent"
)
CLUSTER_TROUBLED: Final = Gauge(
    "kos_cluster_troubled", "Members that this node has no line to or from", multiprocess_mode="livemostrecent"
)
CLUSTER_TRUSTED: Final = Gauge(
    "kos_cluster_trusted",
    "1 while records may be used without asking the origin, 0 while each must be confirmed",
    multiprocess_mode="livemostrecent",
)
CLUSTER_CONTROL_AWAY: Final = Gauge(
    "kos_cluster_control_away",
    "1 while the control store does not answer this node; then no member can be expelled, and none may be restarted",
    multiprocess_mode="livemostrecent",
)
CLUSTER_WRITES_WAITING: Final = Gauge(
    "kos_cluster_writes_waiting", "Writes that not all nodes have heard of yet", multiprocess_mode="livemostrecent"
)
CLUSTER_WRITE_SECONDS: Final = Histogram(
    "kos_cluster_write_seconds",
    "Time from the end of a write until all nodes have heard of it",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
CLUSTER_WRITES_REFUSED: Final = Counter(
    "kos_cluster_writes_refused_total", "Writes that not all nodes had heard of in time: answered 503"
)
CLUSTER_EXPELLED: Final = Counter("kos_cluster_expelled_total", "Members that this node has expelled")
CLUSTER_EPOCHS: Final = Counter(
    "kos_cluster_epochs_total", "Times that this node had every record confirmed, as it may have missed something"
)
FILLS_IN_FLIGHT: Final = Gauge(
    "kos_fills_in_flight", "Blocks being filled by this process", multiprocess_mode="livesum"
)
FILL_FOLLOWERS: Final = Gauge(
    "kos_fill_followers", "Readers that follow somebody else's fill", multiprocess_mode="livesum"
)
STORE_BYTES: Final = Gauge(
    "kos_store_bytes", "Bytes that the block store takes, index included", multiprocess_mode="livemax"
)
STORE_ENTRIES: Final = Gauge("kos_store_entries", "Blocks in the store", multiprocess_mode="livemax")
EVICTIONS: Final = Counter("kos_evictions_total", "Blocks that left the store", ["reason"])
BREAKER_STATE: Final = Gauge(
    "kos_breaker_state",
    "Of the origin: 0 closed, 1 half-open, 2 open; the worst of all workers",
    multiprocess_mode="livemax",
)
# The daemon alone knows: processes that never set it count for nothing. While there is no daemon there is no value either.
CACHING: Final = Gauge(
    "kos_caching", "1 while new blocks are stored, 0 while caching is off", multiprocess_mode="livemostrecent"
)
LISTING_PAGE_ERRORS: Final = Counter(
    "kos_listing_page_errors_total",
    "Pages of listings that could not be kept or found. kind: locked, full, damaged, disk, slow, row, busy, "
    "disk_nearly_full, path",
    ["kind"],
)
TASK_FAILURES: Final = Counter("kos_task_failures_total", "Tasks that ended by an unexpected exception", ["owner"])
TLS_HANDSHAKES: Final = Counter(
    "kos_tls_handshakes_total",
    "TLS handshakes of clients. result: done, failed, not_tls (plain http), timeout, lost (the client left), "
    "turned_away (at the limit of connections)",
    ["result"],
)
# With a label, for a metric without one would be there, and 0, in processes that never set it.
TLS_NOT_AFTER: Final = Gauge(
    "kos_tls_not_after_seconds",
    "End of the certificate's validity, seconds since the epoch; the earliest of all workers",
    ["port"],
    multiprocess_mode="livemin",
)
TLS_RELOAD_FAILURES: Final = Counter(
    "kos_tls_reload_failures_total", "Certificate files that had changed and were not taken: each complaint once"
)
ACCESS_LOG_DROPPED: Final = Counter(
    "kos_access_log_dropped_total", "Access log lines dropped because the queue was full"
)

#: what the supervisor itself counts: it has no files among the children's, its page adds these
NODE_REGISTRY: Final = CollectorRegistry()
WORKERS_RESTARTS: Final = Counter(
    "kos_workers_restarts_total", "Child processes started again after an exit", ["process"], registry=NODE_REGISTRY
)
NODE_READY: Final = Gauge("kos_node_ready", "1 while requests to this node will succeed", registry=NODE_REGISTRY)


class FastCounts:
    """Counts in a plain dict, carried over once a second: no look-up of labels and no lock for each count.

    `counts.add(("GetObject", "200", "fast", "hit"))` with the label values in the metric's order.
    """

    __slots__ = ("_counter", "_counts", "flushed")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        #: called with what is carried over, for who wants to know it too
        self.flushed: Callable[[Mapping[tuple[str, ...], float]], None] | None = None
        self._counts: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], amount: float = 1) -> None:
        counts = self._counts
        counts[labels] = counts.get(labels, 0) + amount

    def flush(self) -> None:
        """Carry over what was counted since the last time."""
        counts, self._counts = self._counts, {}
        for labels, amount in counts.items():
            self._counter.labels(*labels).inc(amount)
        if counts and self.flushed is not None:
            self.flushed(counts)


#: for everybody who counts per request; a process that uses them runs flush_forever
REQUEST_COUNTS: Final = FastCounts(REQUESTS)
BYTE_COUNTS: Final = FastCounts(BYTES)
PEER_REQUEST_COUNTS: Final = FastCounts(PEER_REQUESTS)
PEER_ANSWER_COUNTS: Final = FastCounts(PEER_ANSWERS)
_FAST_COUNTS: Final = (REQUEST_COUNTS, BYTE_COUNTS, PEER_REQUEST_COUNTS, PEER_ANSWER_COUNTS)


async def flush_forever(clock: Clock, every_s: float = 1.0, counts: Iterable[FastCounts] = _FAST_COUNTS) -> None:
    """Carry over fast counts until cancelled, and once more then: a process that drains loses no count."""
    counts = tuple(counts)
    try:
        while True:
            await clock.sleep(every_s)
            for each in counts:
                each.flush()
    finally:
        for each in counts:
            each.flush()
