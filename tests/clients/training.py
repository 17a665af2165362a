"""What runs in the worker processes of a training job: datasets over S3, their samples as digests.

It imports no more than a job would, since every worker imports it.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import multiprocessing.context
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import boto3
from botocore.config import Config
from s3torchconnector import S3Reader
from torch.utils.data import Dataset

#: Name and SHA-256.
Sample = tuple[str, str]
READ_BYTES = 256 * 1024


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Workers fork from a process that has PyTorch loaded and nothing else running: loaded once, not once a worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Environment:
    """A worker_init_fn: workers of a fork server know the environment of the time when it was started, not the test's."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)

    def __call__(self, worker: int) -> None:
        os.environ.update(self.values)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def file_sample(reader: S3Reader) -> list[Sample]:
    """One small file is one sample."""
    return [(reader.key, digest(reader.read()))]


def as_it_is(samples: list[Any]) -> list[Any]:
    """A collate_fn: no tensors to be made of digests."""
    return samples


class Shards(Dataset[list[Sample]]):
    """TAR files read as they stream in, never held whole, by boto3: the way of WebDataset."""

    def __init__(self, bucket: str, prefix: str, **client: Any) -> None:
        self._bucket, self._settings = bucket, client
        self._client: Any = None
        pages = self._s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        self._keys = [each["Key"] for page in pages for each in page.get("Contents", ())]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> list[Sample]:
        key = self._keys[index]
        body = self._s3().get_object(Bucket=self._bucket, Key=key)["Body"]
        with tarfile.open(fileobj=body, mode="r|", bufsize=READ_BYTES) as shard:
            return [(f"{key}/{member.name}", digest(_content(shard, member))) for member in shard]

    def _s3(self) -> Any:
        if self._client is None:
            config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
            self._client = boto3.client("s3", config=config, **self._settings)
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}  # clients belong to the process that made them


def make_shard(samples: Mapping[str, bytes]) -> bytes:
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for name, body in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return shard.getvalue()


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None, member.name
    return file.read()


def samples_of(loader: Any) -> Iterator[Sample]:
    """One epoch."""
    for batch in loader:
        for samples in batch:
            yield from samples
