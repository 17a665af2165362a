"""Figure uploads: large and signed uploads through kos, beside the same to the origin directly.

Owns: MB/s, and CPU per MiB of node and client, for a multipart upload of 1 GiB by boto3, and for bodies of 256 MiB in
aws-chunked chunks of 64 KiB, each chunk signed or a CRC32 in the trailer; over loopback, where nothing but the work
counts, over the near link, and over https (kos alone: the origin of these figures speaks none).

Invariant: the client does on both sides what a client does, hashing and signing as it sends; and the origin has received
every byte.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from bench import links, node
from bench.client import TIMEOUT_S, Address, answer_of
from bench.figure import Settings, say
from bench.processes import cores
from bench.results import MIB, BenchFailed, Outcome
from bench.shaper import NEAR
from bench.signing import ACCESS_KEY, REGION, SECRET_KEY, Object, streaming_put
from bench.synthetic import BUCKET, PERIOD_BYTES, key_of, pattern
from bench.tls_get import listen_https

SUMMARY: Final = "multipart of 1 GiB and signed chunks, beside direct"
_PART_BYTES: Final = 16 * MIB
_PARTS_AT_A_TIME: Final = 4
_CHUNK_BYTES: Final = 64 * 1024
_CRC32: Final = "x-amz-checksum-crc32"


@dataclass(frozen=True, slots=True)
class _To:
    """Where to; ca_file: the certificate to trust, by TLS, None without."""

    at: Address
    ca_file: Path | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.ca_file is None else 'https'}://{self.at}"


_Send = Callable[[_To, str], None]


def run(settings: Settings) -> Outcome:
    """Measure; raises BenchFailed where an upload is refused or bytes are missing at the origin."""
    outcome = Outcome()
    at = cores()
    with links.far_origin(settings.under, at.others) as far:
        kinds = _kinds(settings)
        for name, link in (("loopback", None), ("near", NEAR)):
            more = {"listen": listen_https(settings.under)}
            with (
                links.through(link, far.at, settings.under) as near_end,
                node.running(near_end, settings.under, more=more) as kos,
            ):
                assert kos.secure is not None
                sides = {"kos": _To(kos.at), "direct": _To(near_end)}
                if link is None:
                    sides["https"] = _To(kos.secure, Path(more["listen"]["tls_cert_file"]))
                for kind, (size, send) in kinds.items():
                    for turn in range(settings.rounds):
                        say(f"uploads {name} {kind}: round {turn + 1} of {settings.rounds}")
                        for side, to in sides.items():
                            _measure(outcome, f"{side}_{name}_{kind}", size, send, to, kos, far, turn)
                    _compare(outcome, name, kind, https=link is None)
    return outcome


def _compare(outcome: Outcome, name: str, kind: str, *, https: bool) -> None:
    ours, direct = f"kos_{name}_{kind}", f"direct_{name}_{kind}"
    # Over a link the link is what is slow. On two cores that client, node and origin share, nothing is promised.
    promised = 0.9 if name == "near" else None
    outcome.compare(f"{name}_{kind}_over_direct", f"{ours}_mb_s", f"{direct}_mb_s", at_least=promised)
    outcome.compare(f"{name}_{kind}_node_over_client", f"{ours}_node_us_per_mib", f"{direct}_client_us_per_mib")
    if https:
        outcome.compare(f"{name}_{kind}_https_over_http", f"https_{name}_{kind}_mb_s", f"{ours}_mb_s")


def _measure(
    outcome: Outcome, name: str, size: int, send: _Send, to: _To, kos: node.Node, far: links.Far, turn: int
) -> None:
    received, node_cpu, own_cpu = far.counters()["bytes_received"], kos.cpu_seconds(), time.process_time()
    start = time.perf_counter()
    send(to, key_of(size, f"uploads-{name}-{turn}"))
    seconds = time.perf_counter() - start
    own_cpu = time.process_time() - own_cpu
    outcome.add(f"{name}_mb_s", size / seconds / 1e6, high_is_good=True)
    outcome.add(f"{name}_client_us_per_mib", own_cpu / (size / MIB) * 1e6)
    if not name.startswith("direct"):
        outcome.add(f"{name}_node_us_per_mib", (kos.cpu_seconds() - node_cpu) / (size / MIB) * 1e6)
    arrived = far.counters()["bytes_received"] - received
    if arrived < size:
        raise BenchFailed(f"{name}: only {arrived} of {size} bytes reached the origin")


def _kinds(settings: Settings) -> dict[str, tuple[int, _Send]]:
    large, chunked = (32 * MIB, 8 * MIB) if settings.quick else (1024 * MIB, 256 * MIB)
    return {
        "multipart": (large, _multipart(_file(settings.under, large))),
        "signed_chunks": (chunked, _chunks(chunked, signed=True)),
        "trailer": (chunked, _chunks(chunked, signed=False)),
    }


def _file(under: Path, size: int) -> Path:
    """A file to upload; small against the memory of the machine, so that reading it is copying."""
    path = under / "large"
    with path.open("wb") as f:
        for piece in _pieces(size, PERIOD_BYTES):
            f.write(piece)
    return path


def _pieces(size: int, piece_bytes: int) -> Iterator[memoryview]:
    view = memoryview(pattern())
    done = 0
    while done < size:
        at = done % PERIOD_BYTES
        count = min(piece_bytes, size - done, PERIOD_BYTES - at)
        yield view[at : at + count]
        done += count


def _multipart(path: Path) -> _Send:
    """boto3 with its defaults: a CRC32 of each part, and over http a SHA-256 as well."""
    transfer = TransferConfig(
        multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_A_TIME
    )
    clients: dict[_To, Any] = {}

    def send(to: _To, key: str) -> None:
        if to not in clients:
            clients[to] = boto3.client(
                "s3",
                endpoint_url=to.url,
                aws_access_key_id=ACCESS_KEY,
                aws_secret_access_key=SECRET_KEY,
                region_name=REGION,
                verify=None if to.ca_file is None else str(to.ca_file),
                config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
            )
        clients[to].upload_file(str(path), BUCKET, key, Config=transfer)

    return send


def _chunks(size: int, *, signed: bool) -> _Send:
    """One PUT in chunks as the AWS SDKs for Java and Go send it: each signed, or unsigned with a CRC32 at the end."""

    def send(to: _To, key: str) -> None:
        lines = _chunk_lines(size, signed)
        head, sign = streaming_put(to.at, Object(BUCKET, key), size, lines, None if signed else _CRC32)
        with contextlib.closing(_connect(to)) as sock:
            sock.sendall(head)
            crc = 0
            for piece in _pieces(size, _CHUNK_BYTES):
                if signed:
                    line = b"%x;chunk-signature=%b\r\n" % (len(piece), sign(hashlib.sha256(piece).hexdigest()))
                else:
                    line = b"%x\r\n" % len(piece)
                    crc = zlib.crc32(piece, crc)
                sock.sendall(b"".join((line, piece, b"\r\n")))
            if signed:
                sock.sendall(b"0;chunk-signature=%b\r\n\r\n" % sign(hashlib.sha256(b"").hexdigest()))
            else:
                value = base64.b64encode(crc.to_bytes(4, "big"))
                sock.sendall(b"0\r\n%b:%b\r\n\r\n" % (_CRC32.encode(), value))
            answer_of(sock)

    return send


def _chunk_lines(size: int, signed: bool) -> int:
    """Bytes of the framing: what the encoded length is longer than the body."""
    extra = len(";chunk-signature=") + 64 if signed else 0
    lines = sum(len(f"{len(piece):x}") + extra + 4 for piece in _pieces(size, _CHUNK_BYTES))
    return lines + (1 + extra + 4 if signed else len("0\r\n") + len(_CRC32) + 1 + 8 + 4)


def _connect(to: _To) -> socket.socket:
    plain = socket.create_connection((to.at.host, to.at.port), timeout=TIMEOUT_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if to.ca_file is None:
        return plain
    return ssl.create_default_context(cafile=str(to.ca_file)).wrap_socket(plain, server_hostname=to.at.host)
