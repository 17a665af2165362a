"""s3torchconnector: PyTorch datasets and checkpoints over the AWS Common Runtime in Rust.

It takes no authority to trust as an argument, and does not look at AWS_CA_BUNDLE: its TLS reads SSL_CERT_FILE, anew for
each client, so an environment variable is enough.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from s3torchconnector import (
    S3Checkpoint,
    S3ClientConfig,
    S3IterableDataset,
    S3MapDataset,
    S3Reader,
    S3ReaderConstructor,
)
from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
from s3torchconnectorclient import S3Exception

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import ODD_KEY, digests, objects, sha256, stored, was_multipart
from tests.clients.training import Environment, as_it_is, file_sample, fork_server, samples_of
from tests.conditions import eventually
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node, client, phase

PART_BYTES = 5 << 20
READERS = {
    "sequential": S3ReaderConstructor.sequential(),
    "range_based": S3ReaderConstructor.range_based(),
    "short_ranges": S3ReaderConstructor.range_based(buffer_size=300_000),
    "unbuffered": S3ReaderConstructor.range_based(buffer_size=0),
}


@pytest.fixture(autouse=True)
def surroundings(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the client takes from its environment; S3StorageWriter takes its endpoint only from there."""
    values = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint.url,
    }
    if endpoint.ca_file is not None:
        values["SSL_CERT_FILE"] = str(endpoint.ca_file)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def connection(endpoint: Endpoint) -> dict[str, Any]:
    """The arguments that most of its classes take."""
    config = S3ClientConfig(force_path_style=True, part_size=PART_BYTES, throughput_target_gbps=1, max_attempts=2)
    return {"region": "us-east-1", "endpoint": endpoint.url, "s3client_config": config}


@pytest.fixture(scope="module")
def library(kos_node: Node) -> str:
    """A bucket with objects() below set/, and what is not in the set."""
    s3 = client(kos_node.s3_url)
    s3.create_bucket(Bucket="library")
    for key, body in objects().items():
        s3.put_object(Bucket="library", Key=f"set/{key}", Body=body)
    s3.put_object(Bucket="library", Key="settled", Body=b"not in the set")
    return "library"


def whole(reader: S3Reader) -> tuple[str, str]:
    return reader.key, sha256(reader.read())


@pytest.mark.parametrize("reader", ["sequential", "range_based"])
def test_a_map_dataset(connection: Any, library: str, reader: str) -> None:
    bodies = objects()
    settings = {"transform": whole, "reader_constructor": READERS[reader], **connection}
    for _ in range(2):
        found = S3MapDataset.from_prefix(f"s3://{library}/set/", **settings)
        assert dict(found[n] for n in range(len(found))) == digests(bodies, "set/")
    # Named instead of listed: where a size matters it is asked for with HEAD.
    keys = ["empty", ODD_KEY]
    found = S3MapDataset.from_objects([f"s3://{library}/set/{key}" for key in keys], **settings)
    assert [found[n] for n in range(len(found))] == [(f"set/{key}", sha256(bodies[key])) for key in keys]


def test_an_iterable_dataset(connection: Any, surroundings: dict[str, str], library: str) -> None:
    expected = digests(objects(), "set/")
    found = S3IterableDataset.from_prefix(f"s3://{library}/set/", **connection)
    assert dict(whole(reader) for reader in found) == expected
    # Each worker lists, and reads every second key.
    found = S3IterableDataset.from_prefix(
        f"s3://{library}/set/", transform=file_sample, enable_sharding=True, **connection
    )
    loader = torch.utils.data.DataLoader(
        found,
        num_workers=2,
        multiprocessing_context=fork_server(),
        worker_init_fn=Environment(surroundings),
        collate_fn=as_it_is,
        timeout=60,
    )
    assert sorted(samples_of(loader)) == sorted(expected.items())


@pytest.mark.parametrize("reader", ["sequential", "short_ranges", "unbuffered"])
def test_seeking(connection: Any, library: str, reader: str) -> None:
    body = objects()[ODD_KEY]
    rng = random.Random(9)
    (found,) = S3IterableDataset.from_objects(
        f"s3://{library}/set/{ODD_KEY}", reader_constructor=READERS[reader], **connection
    )
    for _ in range(12):
        start = rng.randrange(len(body))
        length = rng.choice([1, 100, 70_000, 1 << 20])
        assert found.seek(start) == start
        assert found.read(length) == body[start : start + length]
    assert found.seek(-5, io.SEEK_END) == len(body) - 5
    assert found.read() == body[-5:]
    assert found.read(1) == b""


def test_a_checkpoint_of_several_parts(connection: Any, s3: Any, origin: Any, bucket: str) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        "weight": torch.rand(1200, 2000, generator=generator),
        "bias": torch.rand(2000, generator=generator).to(torch.bfloat16),
        "none": torch.empty(0),
        "step": 17,
    }
    expected = io.BytesIO()
    torch.save(state, expected)
    checkpoints = S3Checkpoint(**connection)
    for key in ("ck/model +é.pt", "ck/again.pt"):
        with checkpoints.writer(f"s3://{bucket}/{key}") as writer:
            torch.save(state, writer)
        assert was_multipart(origin, bucket, key)
        for _ in range(2):
            with checkpoints.reader(f"s3://{bucket}/{key}") as reader:
                loaded = torch.load(reader, map_location="cpu", weights_only=True)
            assert loaded.keys() == state.keys() and loaded["step"] == 17
            assert all(torch.equal(loaded[name], state[name]) for name in ("weight", "bias", "none"))
    # An archive of the name that a stream has: the same bytes whichever the file.
    held = stored(origin, bucket)
    assert held == dict.fromkeys(("ck/model +é.pt", "ck/again.pt"), sha256(expected.getvalue()))
    eventually(
        lambda: phase(s3.get_object(Bucket=bucket, Key="ck/again.pt", Range="bytes=0-9")) == "hit", "it is cached"
    )


def test_writers_small_empty_and_given_up(connection: Any, origin: Any, bucket: str) -> None:
    checkpoints = S3Checkpoint(**connection)
    bodies = objects()
    for key, body in bodies.items():
        with checkpoints.writer(f"s3://{bucket}/{key}") as writer:
            for start in range(0, len(body), 1 << 20):
                writer.write(body[start : start + (1 << 20)])
    assert stored(origin, bucket) == digests(bodies)
    for key in bodies:
        with checkpoints.reader(f"s3://{bucket}/{key}") as reader:
            assert whole(reader) == (key, sha256(bodies[key]))
    # Overwritten, and seen at once.
    with checkpoints.writer(f"s3://{bucket}/small.bin") as writer:
        writer.write(b"new")
    with checkpoints.reader(f"s3://{bucket}/small.bin") as reader:
        assert reader.read() == b"new"
    # A training step that fails while it saves leaves what was there.
    with pytest.raises(RuntimeError, match="out of memory"), checkpoints.writer(f"s3://{bucket}/small.bin") as writer:
        writer.write(b"torn")
        raise RuntimeError("out of memory")
    with checkpoints.reader(f"s3://{bucket}/small.bin") as reader:
        assert reader.read() == b"new"
    with pytest.raises(S3Exception), checkpoints.reader(f"s3://{bucket}/absent") as reader:
        reader.read()


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """torch.distributed of one process: what saves a sharded model asks it who is there."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("reader", ["sequential", "dcp_optimized"])
def test_a_distributed_checkpoint(connection: Any, origin: Any, bucket: str, reader: str) -> None:
    """It writes under a name of its own, then copies and deletes: what the copy replaced must not be read again."""
    about = {"region": "us-east-1", "s3client_config": connection["s3client_config"]}
    path = f"s3://{bucket}/run +1/step/"
    constructor = S3ReaderConstructor.dcp_optimized() if reader == "dcp_optimized" else READERS[reader]
    with one_process_group():
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            state = {f"layer{n}": torch.rand(300, 1000, generator=generator) for n in range(4)}
            dcp.save(state, storage_writer=S3StorageWriter(path=path, overwrite=True, **about))
            loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            dcp.load(loaded, storage_reader=S3StorageReader(path=path, reader_constructor=constructor, **about))
            assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert {key.rpartition("/")[2] for key in stored(origin, bucket)} == {".metadata", "__0_0.distcp"}
