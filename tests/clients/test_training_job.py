"""A training job reads its data set once from the origin: what a cache beside the GPUs is for.

A thousand small files (s3torchconnector) and ten TAR shards (boto3, streamed) are read by several worker processes of
PyTorch's loader, shuffled, for two epochs. The origin here counts what it is asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest
import torch
from s3torchconnector import S3ClientConfig, S3MapDataset
from torch.utils.data import ConcatDataset, DataLoader

from tests.clients.conftest import Endpoint
from tests.clients.training import (
    Environment,
    Sample,
    Shards,
    as_it_is,
    digest,
    file_sample,
    fork_server,
    make_shard,
    samples_of,
)
from tests.conditions import eventually
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node, node
from tests.fakes.origin import FakeOrigin

FILES = 1004  # so that their listing has a second page
SHARDS = 10
SHARD_SAMPLES = 32
SAMPLE_BYTES = 256 * 1024
WORKERS = 4
BUCKET = "datasets"
#: Nothing in it ever changes, and nothing is added: the operator's word for a data set that is done.
RULES = [{"match": f"{BUCKET}/*", "freshness": "immutable", "listings": "immutable"}]
BLOCK_BYTES = 1 << 20  # of the node's configuration


@pytest.fixture(scope="module")
def counting_origin() -> Iterator[FakeOrigin]:
    with FakeOrigin().in_thread() as one:
        one.create_bucket(BUCKET)
        yield one


@pytest.fixture(scope="module")
def kos_node(tmp_path_factory: pytest.TempPathFactory, counting_origin: FakeOrigin) -> Iterator[Node]:
    """In place of the node that the other tests share: `endpoint` is this one's."""
    with node(tmp_path_factory.mktemp("training"), counting_origin.endpoint, {"rules": RULES}) as one:
        yield one


@pytest.fixture
def surroundings(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    if endpoint.ca_file is not None:
        values["SSL_CERT_FILE"] = str(endpoint.ca_file)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def store_data_set(origin: FakeOrigin, prefix: str) -> dict[str, str]:
    """Puts it behind the node's back; name to digest of every sample."""
    rng = random.Random(prefix)
    expected = {}
    for n in range(FILES):
        key, body = f"{prefix}/files/{n % 10}/{n:04} +é.jpg", rng.randbytes(rng.randrange(2_000, 20_000))
        origin.put(BUCKET, key, body)
        expected[key] = digest(body)
    for n in range(SHARDS):
        key = f"{prefix}/shards/{n:02}.tar"
        samples = {f"{m:03}.bin": rng.randbytes(SAMPLE_BYTES) for m in range(SHARD_SAMPLES)}
        origin.put(BUCKET, key, make_shard(samples))
        expected |= {f"{key}/{name}": digest(body) for name, body in samples.items()}
    return expected


def epoch(endpoint: Endpoint, prefix: str, surroundings: dict[str, str], seed: int) -> list[Sample]:
    """Lists the data set, starts workers, reads everything in an order of this epoch's own."""
    files = S3MapDataset.from_prefix(
        f"s3://{BUCKET}/{prefix}/files/",
        region="us-east-1",
        endpoint=endpoint.url,
        transform=file_sample,
        s3client_config=S3ClientConfig(force_path_style=True, throughput_target_gbps=1, max_attempts=1),
    )
    shards = Shards(
        BUCKET, f"{prefix}/shards/", endpoint_url=endpoint.url, verify=endpoint.verify, region_name="us-east-1"
    )
    assert (len(files), len(shards)) == (FILES, SHARDS)
    loader = DataLoader(
        ConcatDataset([files, shards]),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        num_workers=WORKERS,
        multiprocessing_context=fork_server(),
        worker_init_fn=Environment(surroundings),
        collate_fn=as_it_is,
        timeout=60,
    )
    return list(samples_of(loader))


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_two_epochs(
    endpoint: Endpoint, kos_node: Node, counting_origin: FakeOrigin, surroundings: dict[str, str]
) -> None:
    prefix = "https" if endpoint.secure else "http"
    expected = store_data_set(counting_origin, prefix)
    blocks = blocks_of(counting_origin, prefix)
    stored_before = stored_blocks(kos_node)
    counting_origin.forget()

    first = epoch(endpoint, prefix, surroundings, seed=1)
    assert len(first) == len(expected) and dict(first) == expected
    assert counting_origin.count(op="GetObject") == blocks, "each was asked for once, whichever worker wanted it"
    eventually(lambda: stored_blocks(kos_node) - stored_before == blocks, "all that was read is in the store")
    counting_origin.forget()

    second = epoch(endpoint, prefix, surroundings, seed=2)
    assert len(second) == len(expected) and dict(second) == expected
    assert [name for name, _ in second] != [name for name, _ in first], "shuffled anew"
    assert [(each.method, each.target) for each in counting_origin.requests] == []


def blocks_of(origin: FakeOrigin, prefix: str) -> int:
    """In how many blocks the node cuts what lies below the prefix."""
    objects = origin.store.buckets[BUCKET].objects.items()
    return sum(-(-len(versions[-1].body) // BLOCK_BYTES) for key, versions in objects if key.startswith(prefix + "/"))


def stored_blocks(node: Node) -> int:
    found = re.search(r"^kos_store_entries (\S+)", node.metrics(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))
