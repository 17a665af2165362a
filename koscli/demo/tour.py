"""The tour: what kos does, shown step by step with boto3 and real bytes.

Owns: the steps and what each must show. Does not own: the processes (stage) or printing (command).

Invariant: a step holds only if the bytes that came back were compared with those that were sent.
"""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from koscli.demo.stage import Stage

THREADS = 8
_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the table: what was done, whether it held, how long it took (seconds) and what was seen."""

    name: str
    held: bool
    seconds: float
    detail: str


class Tour:
    """The steps, in the order in which they build on each other."""

    def __init__(self, stage: Stage, *, small_count: int, large_bytes: int) -> None:
        self._stage = stage
        rng = random.Random(_SEED)
        self._small = {
            f"datasets/small/{n:05d}.bin": rng.randbytes(rng.randrange(2_000, 40_000)) for n in range(small_count)
        }
        # randbytes takes less than 256 MiB at a time
        self._large = b"".join(rng.randbytes(min(16 << 20, large_bytes - at)) for at in range(0, large_bytes, 16 << 20))
        self._large_sha256 = hashlib.sha256(self._large).hexdigest()
        self._rng = rng
        self._s3 = self._client(stage.s3_url)

    def _client(self, url: str, **options: Any) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=self._stage.access_key,
            aws_secret_access_key=self._stage.secret_key,
            **options,
            config=Config(max_pool_connections=32, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )

    def steps(self) -> Iterator[Step]:
        """Take the tour; a step that raises is a step that did not hold, and the tour goes on."""
        s3, bucket = self._s3, self._stage.bucket
        s3.create_bucket(Bucket=bucket)
        small_mib = sum(map(len, self._small.values())) / 2**20
        yield self._step(f"upload {len(self._small)} small files ({small_mib:.1f} MiB)", self._upload_small)
        yield self._step(f"upload one of {len(self._large) >> 20} MiB (multipart)", self._upload_large)
        yield self._step("first read of the small files", self._read_small)
        yield self._step("second read of the small files", lambda: self._read_small(expect_hits=True))
        yield self._step("first read of the large one", self._read_large)
        yield self._step("second read of the large one", lambda: self._read_large(expect_hits=True))
        yield self._step("range reads in the large one", self._read_ranges)
        yield self._step("an overwrite is seen at once", self._overwrite)
        yield self._step("written and read over https", self._over_tls)
        yield self._step("origin stopped, cached reads go on", self._origin_stopped)

    def _step(self, name: str, action: Callable[[], tuple[bool, str]]) -> Step:
        began = time.perf_counter()
        try:
            held, detail = action()
        except Exception as failure:  # whatever it is, it is this step's outcome and is shown
            held, detail = False, f"{type(failure).__name__}: {failure}"
        return Step(name, held, time.perf_counter() - began, detail)

    def _upload_small(self) -> tuple[bool, str]:
        def put(item: tuple[str, bytes]) -> bool:
            answer = self._s3.put_object(Bucket=self._stage.bucket, Key=item[0], Body=item[1])
            return bool(answer["ETag"].strip('"') == hashlib.md5(item[1], usedforsecurity=False).hexdigest())

        with ThreadPoolExecutor(THREADS) as pool:
            right = sum(pool.map(put, self._small.items()))
        return right == len(self._small), f"{right} ETags right"

    def _upload_large(self) -> tuple[bool, str]:
        transfer = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
        began = time.perf_counter()
        self._s3.upload_fileobj(io.BytesIO(self._large), self._stage.bucket, "datasets/large.bin", Config=transfer)
        head = self._s3.head_object(Bucket=self._stage.bucket, Key="datasets/large.bin")
        rate = len(self._large) / 2**20 / (time.perf_counter() - began)
        return head["ContentLength"] == len(self._large), f"{rate:.0f} MiB/s"

    def _read_small(self, *, expect_hits: bool = False) -> tuple[bool, str]:
        def get(item: tuple[str, bytes]) -> tuple[bool, str]:
            body, phase = self._get(item[0])
            return body == item[1], phase

        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(get, self._small.items()))
        phases = Counter(phase for _, phase in answers)
        right = all(same for same, _ in answers)
        hits = phases["hit"] / len(answers)
        return right and (
            hits == 1.0 or not expect_hits
        ), f"hit ratio {hits:.0%}, bytes {'right' if right else 'WRONG'}"

    def _read_large(self, *, expect_hits: bool = False) -> tuple[bool, str]:
        began = time.perf_counter()
        answer = self._s3.get_object(Bucket=self._stage.bucket, Key="datasets/large.bin")
        digest = hashlib.sha256()
        for chunk in answer["Body"].iter_chunks(1 << 20):
            digest.update(chunk)
        rate = len(self._large) / 2**20 / (time.perf_counter() - began)
        right = digest.hexdigest() == self._large_sha256
        phase = phase_of(answer)
        return right and (phase == "hit" or not expect_hits), f"{phase}, {rate:.0f} MiB/s, sha256 {word(right)}"

    def _read_ranges(self) -> tuple[bool, str]:
        size, count, right = len(self._large), 50, 0
        for _ in range(count):
            start = self._rng.randrange(size)
            stop = min(size, start + self._rng.randrange(1, 1 << 20))
            body, _ = self._get("datasets/large.bin", Range=f"bytes={start}-{stop - 1}")
            right += body == self._large[start:stop]
        return right == count, f"{right} of {count} right"

    def _overwrite(self) -> tuple[bool, str]:
        key, rounds, seen = "state/latest.bin", 20, 0
        for n in range(rounds):
            body = self._rng.randbytes(10_000 + n)
            self._s3.put_object(Bucket=self._stage.bucket, Key=key, Body=body)
            seen += self._get(key)[0] == body
            seen += self._get(key)[0] == body
        return seen == 2 * rounds, f"{seen} of {2 * rounds} reads saw the newest bytes"

    def _over_tls(self) -> tuple[bool, str]:
        secure = self._client(self._stage.s3_tls_url, verify=str(self._stage.ca_file))
        key, body = "state/secure.bin", self._rng.randbytes(1_000_000)
        secure.put_object(Bucket=self._stage.bucket, Key=key, Body=body)
        there = secure.get_object(Bucket=self._stage.bucket, Key=key)["Body"].read() == body
        here = self._get(key)[0] == body
        return there and here, f"bytes {word(there)} over https, {word(here)} over http"

    def _origin_stopped(self) -> tuple[bool, str]:
        with self._stage.origin_stopped():
            small_held, small = self._read_small(expect_hits=True)
            large_held, _ = self._read_large(expect_hits=True)
            began = time.perf_counter()
            try:
                self._get("datasets/never-read.bin")
            except ClientError as refusal:
                status = refusal.response["ResponseMetadata"]["HTTPStatusCode"]
            else:
                status = 200
            waited = time.perf_counter() - began
        detail = f"{small}; an unknown key is answered {status} in {waited:.1f} s"
        return small_held and large_held and status == 503, detail

    def _get(self, key: str, **arguments: str) -> tuple[bytes, str]:
        answer = self._s3.get_object(Bucket=self._stage.bucket, Key=key, **arguments)
        return answer["Body"].read(), phase_of(answer)


def phase_of(answer: dict[str, Any]) -> str:
    """hit, miss, revalidated, stale or bypass, as x-kos-cache of a boto3 answer says."""
    return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-kos-cache", "none")).partition(";")[0]


def word(right: bool) -> str:
    """For the table."""
    return "right" if right else "WRONG"
