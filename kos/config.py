"""The configuration tree: every option, its default and its limits.

Owns: which options there are, what they mean together (cross-checks), and `load`.
Does not own: YAML and line numbers (kos.config_file), the syntax of single values (kos.config_values), the reasons
behind the defaults (configs/kos.yaml, which a test holds equal to this module).

Invariant: a Config from `load` has passed every check; nothing below it looks at the file or the environment again.

Names: `_bytes` and `_s` are left off in the file, where the value carries its unit: `cache.size: 100GiB`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from kos import config_file
from kos.config_file import Complaint
from kos.config_values import (
    ACCESS_KEY,
    ADDRESS,
    ADDRESS_OR_NONE,
    ALWAYS,
    AUTO,
    BOOLEAN,
    CONTROL_URL,
    DOMAIN,
    ENDPOINT,
    FRESHNESS,
    FRESHNESS_OR_AUTO,
    GIB,
    GLOB,
    HOST,
    IMMUTABLE,
    KIB,
    LOG_TARGET,
    MIB,
    NAME,
    PATH,
    TEXT,
    TIB,
    Key,
    Outside,
    Secret,
    choice,
    count,
    count_or_auto,
    duration,
    show_duration,
    show_freshness,
    show_size,
    size,
    size_or_auto,
    split_address,
)
from kos.errors import ConfigError

__all__ = [
    "ALWAYS",
    "IMMUTABLE",
    "Cache",
    "Cluster",
    "Config",
    "Control",
    "Credential",
    "Limits",
    "Listen",
    "Log",
    "Member",
    "Origin",
    "Rule",
    "Supervisor",
    "load",
    "own_name",
    "split_address",
]


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """Where this node listens: HOST:PORT each; port 0 takes a free one. domain: for virtual-hosted buckets.
    sigv2_query: whether links signed by version 2 are taken.

    s3 is http, s3_tls https; either may be None. The certificate's files are read by kos.tls, not here: they change
    while the node runs.
    """

    s3: Annotated[str | None, Key(ADDRESS_OR_NONE)] = "127.0.0.1:9000"
    s3_tls: Annotated[str | None, Key(ADDRESS_OR_NONE)] = None
    tls_cert_file: Annotated[str | None, Key(PATH)] = None
    tls_key_file: Annotated[str | None, Key(PATH)] = None
    tls_min_version: Annotated[Literal["1.2", "1.3"], Key(choice("1.2", "1.3"))] = "1.2"
    admin: Annotated[str, Key(ADDRESS)] = "127.0.0.1:9001"
    peer: Annotated[str, Key(ADDRESS)] = "127.0.0.1:9002"
    cluster: Annotated[str, Key(ADDRESS)] = "127.0.0.1:9003"
    domain: Annotated[str | None, Key(DOMAIN)] = None
    sigv2_query: Annotated[bool, Key(BOOLEAN)] = True


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The object store behind, and how patiently it is asked. Connections are per worker."""

    endpoint: Annotated[str, Key(ENDPOINT)]
    region: Annotated[str, Key(NAME)] = "us-east-1"
    addressing: Annotated[Literal["path", "virtual"], Key(choice("path", "virtual"))] = "path"
    access_key: Annotated[str | None, Key(ACCESS_KEY)] = None
    secret_key: Annotated[str | None, Secret("secret_key")] = None
    session_token: Annotated[str | None, Secret("session_token")] = None
    profile: Annotated[str | None, Key(TEXT)] = None
    connections: Annotated[int, Key(count(1, 4096))] = 64
    connect_timeout_s: Annotated[float, Key(duration(0.01, 300), "connect_timeout")] = 5.0
    read_timeout_s: Annotated[float, Key(duration(0.01, 3600), "read_timeout")] = 30.0
    request_timeout_s: Annotated[float, Key(duration(0.1, 86400), "request_timeout")] = 3600.0
    retries: Annotated[int, Key(count(0, 20))] = 3
    retry_base_s: Annotated[float, Key(duration(0.001, 60), "retry_base")] = 0.1
    retry_max_s: Annotated[float, Key(duration(0.001, 300), "retry_max")] = 5.0
    breaker_failures: Annotated[int, Key(count(1, 10000))] = 8
    breaker_open_s: Annotated[float, Key(duration(0.01, 3600), "breaker_open")] = 5.0
    trailing_checksums: Annotated[bool, Key(BOOLEAN)] = True
    verify_tls: Annotated[bool, Key(BOOLEAN)] = True
    ca_file: Annotated[str | None, Key(PATH)] = None

    def __repr__(self) -> str:
        return f"Origin(endpoint={self.endpoint!r}, region={self.region!r}, access_key={self.access_key!r})"


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The block store of this node and the fills into it. Limits count per node unless said otherwise."""

    dir: Annotated[str, Key(PATH)]
    size_bytes: Annotated[int, Key(size(16 * MIB), "size")]
    enabled: Annotated[bool, Key(BOOLEAN)] = True
    block_bytes: Annotated[int, Key(size(4 * KIB, 256 * MIB), "block_size")] = 8 * MIB
    segment_bytes: Annotated[int, Key(size(64 * KIB, 4 * GIB), "segment_size")] = 256 * MIB
    index_bytes: Annotated[int, Key(size_or_auto(1 * MIB, 1 * TIB), "index_size")] = 0
    min_free_bytes: Annotated[int, Key(size(0), "min_free")] = 1 * GIB
    small_bytes: Annotated[int, Key(size(0, 1 * MIB), "small_size")] = 64 * KIB
    fill_ahead_bytes: Annotated[int, Key(size(0, 16 * GIB), "fill_ahead")] = 128 * MIB
    fills_max_bytes: Annotated[int, Key(size(4 * KIB), "fills_max")] = 1 * GIB
    random_read_bytes: Annotated[int, Key(size(0, 256 * MIB), "random_read")] = 1 * MIB
    fill_buffer_bytes: Annotated[int, Key(size(4 * KIB, 16 * MIB), "fill_buffer")] = 1 * MIB
    write_threads: Annotated[int, Key(count(1, 64))] = 2
    listings_bytes: Annotated[int, Key(size(0, 64 * GIB), "listings_size")] = 256 * MIB
    scrub_bytes_per_s: Annotated[int, Key(size(0, 16 * GIB), "scrub_rate")] = 8 * MIB
    lease_timeout_s: Annotated[float, Key(duration(0.1, 3600), "lease_timeout")] = 60.0
    ipc_message_bytes: Annotated[int, Key(size(64 * KIB, 64 * MIB), "ipc_message")] = 4 * MIB
    ipc_queue_bytes: Annotated[int, Key(size(64 * KIB, 1 * GIB), "ipc_queue")] = 32 * MIB
    ipc_timeout_s: Annotated[float, Key(duration(0.01, 300), "ipc_timeout")] = 5.0

    def __post_init__(self) -> None:
        if not self.index_bytes:
            # 1/32 of the store: at 10 KiB an object that is 320 bytes of index for each, at 8 MiB a block 256 KiB.
            worked_out = min(max(self.size_bytes // 32, 8 * MIB), 64 * GIB)
            msgspec.structs.force_setattr(self, "index_bytes", worked_out)


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """One key pair that clients sign with."""

    access_key: Annotated[str, Key(ACCESS_KEY)]
    secret_key: Annotated[str, Secret("secret_key")]

    def __repr__(self) -> str:
        return f"Credential(access_key={self.access_key!r})"


#: How long a page of a listing may be trusted, at most, where no rule says so.
_LISTINGS_S: Final = 30.0


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """How long a record of a matching object may be trusted: freshness in seconds, IMMUTABLE or ALWAYS.

    stale_if_error_s: how long after that it may still be served while the origin is down. listings: the same as freshness,
    for listings that may show a matching object; worked out if AUTO. local_copy: when blocks that another node of the
    cluster keeps are kept here as well.
    """

    match: Annotated[str, Key(GLOB)]
    freshness: Annotated[float, Key(FRESHNESS)] = 30.0
    stale_if_error_s: Annotated[float, Key(duration(0, 365 * 86400), "stale_if_error")] = 3600.0
    listings: Annotated[float, Key(FRESHNESS_OR_AUTO)] = AUTO
    local_copy: Annotated[Literal["never", "hot", "always"], Key(choice("never", "hot", "always"))] = "hot"

    def __post_init__(self) -> None:
        if self.listings == AUTO:
            # That objects never change does not say that none is ever added.
            msgspec.structs.force_setattr(self, "listings", min(self.freshness, _LISTINGS_S))

    @property
    def text(self) -> str:
        """The rule as an operator writes it, for explain and logs."""
        return f'match: "{self.match}", freshness: {show_freshness(self.freshness)}'


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """Where the durable state of the region lives, and how patiently it is asked."""

    url: Annotated[str, Key(CONTROL_URL)] = "sqlite:////var/lib/kos/control.db"
    password: Annotated[str | None, Secret("password")] = None
    timeout_s: Annotated[float, Key(duration(0.1, 60), "timeout")] = 3.0

    def __repr__(self) -> str:
        return f"Control(url={self.url!r})"


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """This node among others. membership off: it is alone, and nothing below counts.

    name: None stands for the host's name. advertise: the host at which others reach listen.peer and listen.cluster; None:
    the one that is listened on. weight: this node's share of keys is weight over all weights; 0: GiB of cache.size.
    Connections are per worker and peer. hedges: of a hundred requests to peers so many may be doubled.
    """

    membership: Annotated[Literal["off", "static", "control"], Key(choice("off", "static", "control"))] = "off"
    name: Annotated[str | None, Outside("name", NAME)] = None
    advertise: Annotated[str | None, Outside("advertise", HOST)] = None
    weight: Annotated[int, Key(count_or_auto(1, 1000000))] = 0
    secret: Annotated[str | None, Secret("secret")] = None
    lease_s: Annotated[float, Key(duration(0.2, 60), "lease")] = 2.0
    member_lease_s: Annotated[float, Key(duration(1, 600), "member_lease")] = 15.0
    heartbeat_s: Annotated[float, Key(duration(0.1, 60), "heartbeat")] = 3.0
    write_wait_s: Annotated[float, Key(duration(0.1, 600), "write_wait")] = 40.0
    connections: Annotated[int, Key(count(1, 1024))] = 32
    connect_timeout_s: Annotated[float, Key(duration(0.01, 60), "connect_timeout")] = 1.0
    read_timeout_s: Annotated[float, Key(duration(0.05, 600), "read_timeout")] = 10.0
    hedge_least_s: Annotated[float, Key(duration(0.001, 60), "hedge_least")] = 0.02
    hedge_most_s: Annotated[float, Key(duration(0.001, 60), "hedge_most")] = 1.0
    hedges: Annotated[int, Key(count(0, 100))] = 5
    drain_s: Annotated[float, Key(duration(0, 86400), "drain")] = 600.0

    @property
    def enabled(self) -> bool:
        return self.membership != "off"

    def __repr__(self) -> str:
        return f"Cluster(membership={self.membership!r}, name={self.name!r})"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a static cluster, as all of them write it down. weight as in Cluster, equal for all by default."""

    name: Annotated[str, Key(NAME)]
    peer: Annotated[str, Key(ADDRESS)]
    cluster: Annotated[str, Key(ADDRESS)]
    weight: Annotated[int, Key(count(1, 1000000))] = 100


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may cost. Per worker; times are idle times unless said otherwise."""

    connections: Annotated[int, Key(count(1, 1000000))] = 4096
    backlog: Annotated[int, Key(count(1, 65535))] = 1024
    header_bytes: Annotated[int, Key(size(8 * KIB, 1 * MIB), "header_size")] = 64 * KIB
    header_timeout_s: Annotated[float, Key(duration(0.1, 3600), "header_timeout")] = 30.0
    keepalive_s: Annotated[float, Key(duration(0.1, 86400), "keepalive")] = 75.0
    body_timeout_s: Annotated[float, Key(duration(0.1, 3600), "body_timeout")] = 60.0
    send_timeout_s: Annotated[float, Key(duration(0.1, 3600), "send_timeout")] = 60.0
    drain_s: Annotated[float, Key(duration(0, 3600), "drain")] = 10.0
    preflights: Annotated[int, Key(count(1, 4096))] = 8
    relay_buffer_bytes: Annotated[int, Key(size(4 * KIB, 64 * MIB), "relay_buffer")] = 256 * KIB
    held_bodies_bytes: Annotated[int, Key(size(8 * MIB, 64 * GIB), "held_bodies")] = 64 * MIB
    completion_wait_s: Annotated[float, Key(duration(0.1, 3600), "completion_wait")] = 10.0


class Supervisor(msgspec.Struct, frozen=True, kw_only=True):
    """How child processes are started, restarted and stopped; and the admin port."""

    start_timeout_s: Annotated[float, Key(duration(0.1, 3600), "start_timeout")] = 120.0
    start_attempts: Annotated[int, Key(count(1, 100))] = 3
    restart_base_s: Annotated[float, Key(duration(0.001, 60), "restart_base")] = 0.2
    restart_max_s: Annotated[float, Key(duration(0.001, 3600), "restart_max")] = 30.0
    stable_s: Annotated[float, Key(duration(0.1, 86400), "stable")] = 60.0
    stop_timeout_s: Annotated[float, Key(duration(0, 3600), "stop_timeout")] = 10.0
    admin_connections: Annotated[int, Key(count(1, 4096))] = 64
    admin_timeout_s: Annotated[float, Key(duration(0.1, 3600), "admin_timeout")] = 10.0


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """The log on stderr and the access log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Key(choice("debug", "info", "warning", "error"))] = (
        "info"
    )
    access: Annotated[str, Key(LOG_TARGET)] = "off"
    access_flush_s: Annotated[float, Key(duration(0.01, 60), "access_flush")] = 0.2
    access_batch_bytes: Annotated[int, Key(size(4 * KIB, 16 * MIB), "access_batch")] = 64 * KIB
    access_queue_bytes: Annotated[int, Key(size(64 * KIB, 1 * GIB), "access_queue")] = 4 * MIB


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole node."""

    region: Annotated[str, Key(NAME)]
    origin: Origin
    cache: Cache
    credentials: tuple[Credential, ...]
    listen: Listen = Listen()
    workers: Annotated[int, Key(count(1, 256))] = 2
    rules: tuple[Rule, ...] = ()
    control: Control = Control()
    cluster: Cluster = Cluster()
    members: tuple[Member, ...] = ()
    limits: Limits = Limits()
    supervisor: Supervisor = Supervisor()
    log: Log = Log()


def own_name(settings: Config) -> str:
    """This node's name in a cluster. Raises ConfigError where it is the host's, and that is none for a member."""
    name = settings.cluster.name or socket.gethostname()
    try:
        return str(NAME.parse(name))
    except ValueError:
        raise ConfigError(f"cluster.name: found the host's name {name!r}, allowed: {NAME.allowed}") from None


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration file.

    environ: where `*_env` secrets come from (default: the environment). Raises ConfigError, each line of which names
    file, line, key, what was found and what is allowed.
    """
    return config_file.load(Path(path), Config, check, environ)


def check(config: Config) -> Iterator[Complaint]:
    """What single values cannot show: options that contradict one another."""
    yield from _check_cache(config.cache)
    yield from _check_origin(config.origin)
    yield from _check_listen(config.listen)
    yield from _check_cluster(config)
    if not config.credentials:
        yield Complaint(("credentials",), "an empty list", "at least one {access_key, secret_key}")
    seen: set[str] = set()
    for index, credential in enumerate(config.credentials):
        if credential.access_key in seen:
            allowed = "each access_key once"
            yield Complaint(("credentials", index, "access_key"), f"{credential.access_key!r} again", allowed)
        seen.add(credential.access_key)
    if config.supervisor.restart_base_s > config.supervisor.restart_max_s:
        yield Complaint(("supervisor", "restart_base"), "more than restart_max", "at most supervisor.restart_max")


#: Eight pages of 1000 keys of ordinary length: less would hold none of the greatest ones.
_LISTINGS_LEAST_BYTES: Final = 4 * MIB


def _check_cache(cache: Cache) -> Iterator[Complaint]:
    block = cache.block_bytes
    if block & (block - 1):
        # A power of two from 4 KiB on is a multiple of the page, so extents stay aligned for splice and sendfile.
        yield Complaint(("cache", "block_size"), show_size(block), "4KiB times a power of two, e.g. 8MiB")
    if block > cache.segment_bytes:
        found = f"{show_size(block)} in segments of {show_size(cache.segment_bytes)}"
        yield Complaint(("cache", "block_size"), found, "at most cache.segment_size")
    least = 4 * cache.segment_bytes + cache.index_bytes
    if cache.size_bytes < least:
        allowed = f"at least 4 segments and the index: {show_size(least)}"
        yield Complaint(("cache", "size"), show_size(cache.size_bytes), allowed)
    if cache.small_bytes > cache.block_bytes:
        yield Complaint(("cache", "small_size"), show_size(cache.small_bytes), "at most cache.block_size")
    if cache.fills_max_bytes < cache.block_bytes:
        yield Complaint(("cache", "fills_max"), show_size(cache.fills_max_bytes), "at least cache.block_size")
    if cache.ipc_message_bytes < cache.small_bytes + 64 * KIB:
        # One commit carries a small body and its record (S3 allows 8 KB of headers; 64 KiB leaves room for the rest).
        found = show_size(cache.ipc_message_bytes)
        yield Complaint(("cache", "ipc_message"), found, "at least cache.small_size and 64KiB")
    if 0 < cache.listings_bytes < _LISTINGS_LEAST_BYTES:
        found, allowed = show_size(cache.listings_bytes), f"0 for none, or at least {show_size(_LISTINGS_LEAST_BYTES)}"
        yield Complaint(("cache", "listings_size"), found, allowed)
    if cache.ipc_queue_bytes < cache.ipc_message_bytes:
        yield Complaint(("cache", "ipc_queue"), show_size(cache.ipc_queue_bytes), "at least cache.ipc_message")


def _check_origin(origin: Origin) -> Iterator[Complaint]:
    if (origin.access_key is None) != (origin.secret_key is None):
        present, absent = ("access_key", "secret_key") if origin.secret_key is None else ("secret_key", "access_key")
        found = f"{present} without {absent}"
        yield Complaint(("origin", present), found, "both, or neither for the AWS default chain")
    if origin.session_token is not None and origin.access_key is None:
        yield Complaint(("origin", "session_token"), "no access_key", "a session token only beside access_key")
    if origin.profile is not None and origin.access_key is not None:
        yield Complaint(("origin", "profile"), "access_key as well", "profile or access_key, not both")
    if origin.retry_base_s > origin.retry_max_s:
        yield Complaint(("origin", "retry_base"), "more than retry_max", "at most origin.retry_max")


def _check_listen(listen: Listen) -> Iterator[Complaint]:
    if listen.s3 is None and listen.s3_tls is None:
        yield Complaint(("listen", "s3"), "none, and no s3_tls", "an address for s3, for s3_tls, or for both")
    for name, file in (("tls_cert_file", listen.tls_cert_file), ("tls_key_file", listen.tls_key_file)):
        if listen.s3_tls is not None and file is None:
            yield Complaint(("listen", name), "nothing, but s3_tls", "the path of a PEM file, for https")
        elif listen.s3_tls is None and file is not None:
            yield Complaint(("listen", name), "no s3_tls", "only beside s3_tls, the address for https")
    taken: dict[tuple[str, int], str] = {}
    all_addresses = (
        ("s3", listen.s3),
        ("s3_tls", listen.s3_tls),
        ("admin", listen.admin),
        ("peer", listen.peer),
        ("cluster", listen.cluster),
    )
    for name, address in all_addresses:
        if address is None:
            continue
        host, port = split_address(address)
        clash = next((other for (h, p), other in taken.items() if p == port and _overlap(h, host)), None)
        if port and clash:
            yield Complaint(("listen", name), f"{address} as in listen.{clash}", "an address of its own")
        taken[host, port] = name


#: Below it a secret can be guessed from one captured signature.
_SECRET_LEAST: Final = 16


def _check_cluster(config: Config) -> Iterator[Complaint]:
    cluster, members = config.cluster, config.members
    if members and cluster.membership != "static":
        yield Complaint(
            ("members",), f"a list, and cluster.membership {cluster.membership}", "a list only beside static"
        )
    if not cluster.enabled:
        return
    if cluster.secret is None or len(cluster.secret) < _SECRET_LEAST:
        found = "nothing" if cluster.secret is None else f"{len(cluster.secret)} characters"
        yield Complaint(("cluster", "secret"), found, f"at least {_SECRET_LEAST} characters, the same on every node")
    if not config.cache.enabled:
        yield Complaint(
            ("cache", "enabled"), "false, in a cluster", "true: a node without a store has nothing to share"
        )
    if cluster.heartbeat_s * 3 > cluster.member_lease_s:
        found = f"{show_duration(cluster.heartbeat_s)} with member_lease {show_duration(cluster.member_lease_s)}"
        yield Complaint(("cluster", "heartbeat"), found, "at most a third of member_lease, so that two may be lost")
    # A lease counts for a tenth longer to those who granted it; the long one is twice member_lease.
    static = cluster.membership == "static"
    least_s = 1.1 * (cluster.lease_s if static else 2 * cluster.member_lease_s)
    if cluster.write_wait_s <= least_s:
        option = (
            f"lease {show_duration(cluster.lease_s)}"
            if static
            else f"member_lease {show_duration(cluster.member_lease_s)}"
        )
        found = f"{show_duration(cluster.write_wait_s)} with {option}"
        allowed = (
            f"more than {show_duration(least_s)}, or writes fail while a node is waited for that cannot be reached"
        )
        yield Complaint(("cluster", "write_wait"), found, allowed)
    if cluster.hedge_least_s > cluster.hedge_most_s:
        yield Complaint(("cluster", "hedge_least"), "more than hedge_most", "at most cluster.hedge_most")
    names = [member.name for member in members]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Complaint(("members", index, "name"), f"{name!r} again", "each name once")
    if cluster.membership == "static" and cluster.name is not None and cluster.name not in names:
        yield Complaint(("members",), f"no member {cluster.name!r}", "this node's own cluster.name among them")
    for name, address in (("peer", config.listen.peer), ("cluster", config.listen.cluster)):
        if split_address(address)[1] == 0:
            yield Complaint(("listen", name), address, "in a cluster a port of its own, for the others are told it")
    host, _ = split_address(config.listen.peer)
    if host in ("0.0.0.0", "::") and cluster.membership == "control" and cluster.advertise is None:
        yield Complaint(
            ("cluster", "advertise"),
            f"nothing, and listen.peer {config.listen.peer}",
            "the host at which other nodes reach this one",
        )


def _overlap(one: str, other: str) -> bool:
    return one == other or bool({one, other} & {"0.0.0.0", "::"})
