"""What was written through one node is read through every other at once: objects, deletions, uploads, copies, listings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.cluster import cluster
from tests.fakes.origin import FakeOrigin
from tests.history.ledger import Ledger
from tests.history.test_history import seed
from tests.history.workload import Workload

#: Nothing but being told of a write ever makes a record of these out of date.
FRESHNESS_S = {"immutable": float("inf")}
SETTINGS: dict[str, Any] = {
    "workers": 2,
    "cache": {"size": "128MiB", "block_size": "64KiB", "segment_size": "4MiB", "small_size": "16KiB"},
    "rules": [{"match": "*", "freshness": "immutable"}],
}
WEIGHTS = {"get": 6, "range": 3, "put": 9, "delete": 3, "multipart": 3, "copy": 3, "delete_many": 2, "listing": 3}


async def everywhere(tmp_path: Path, network: str, operations: int, *, delay_s: float = 0.0) -> Workload:
    origin = FakeOrigin()
    with origin.in_thread(), cluster(tmp_path, 5, network=network, settings=SETTINGS, origin=origin) as them:
        if delay_s:
            # Unlike for each pair, so that messages overtake each other.
            for n, node in enumerate(them):
                them.network.slow(node.name, delay_s=delay_s * n)
        ledger = Ledger(FRESHNESS_S)
        ledger.watch(origin.store)
        urls = [node.s3_url for node in them]
        work = Workload(urls, origin, ledger, seed(), keys_per_bucket=8, weights=WEIGHTS, read_everywhere=True)
        work.fill()
        await work.run(operations, clients=8)
        assert not work.violations, "\n".join(work.violations[:5]) + f"\n{work.outcomes}"
        refused = {what: count for what, count in work.outcomes.items() if " 50" in what}
        assert not refused, f"{refused} {work.refusals}"
        return work


async def test_a_write_through_one_is_read_through_all(tmp_path: Path) -> None:
    work = await everywhere(tmp_path, "direct", 700)
    assert sum(count for what, count in work.outcomes.items() if what.startswith("read 200")) > 1000, work.outcomes


@pytest.mark.slow
async def test_a_write_through_one_is_read_through_all_over_slow_links(tmp_path: Path) -> None:
    await everywhere(tmp_path, "relays", 300, delay_s=0.004)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_write_through_one_is_read_through_all_many_times(tmp_path: Path) -> None:
    await everywhere(tmp_path, "direct", 30_000)


def test_every_way_to_change_an_object_is_seen_by_boto3(tmp_path: Path) -> None:
    """The plainest form: one client a node, one change after the other, no randomness but of who does what."""
    rng = random.Random(3)
    with cluster(tmp_path, 3, network="direct", settings=SETTINGS) as them:
        them.origin.create_bucket("b")

        def shown() -> list[dict[str, str]]:
            pages = [node.s3.list_objects_v2(Bucket="b") for node in them]
            return [{each["Key"]: each["ETag"] for each in page.get("Contents", [])} for page in pages]

        def seen(key: str, body: bytes | None) -> None:
            for node in them:
                if body is None:
                    with pytest.raises(node.s3.exceptions.NoSuchKey):
                        node.s3.get_object(Bucket="b", Key=key)
                else:
                    assert node.s3.get_object(Bucket="b", Key=key)["Body"].read() == body, (node.name, key)
            assert all((key in page) is (body is not None) for page in shown()), key

        for turn in range(6):
            one, two, three = rng.sample(list(them), 3)
            first, second = rng.randbytes(100_000 + turn), rng.randbytes(70_000)
            seen("k", None)
            one.s3.put_object(Bucket="b", Key="k", Body=first)
            seen("k", first)
            two.s3.put_object(Bucket="b", Key="k", Body=second)
            seen("k", second)
            three.s3.copy_object(Bucket="b", Key="copy", CopySource="b/k")
            seen("copy", second)
            made = one.s3.create_multipart_upload(Bucket="b", Key="k")["UploadId"]
            etag = two.s3.upload_part(Bucket="b", Key="k", UploadId=made, PartNumber=1, Body=first)["ETag"]
            parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
            three.s3.complete_multipart_upload(Bucket="b", Key="k", UploadId=made, MultipartUpload=parts)
            seen("k", first)
            one.s3.delete_object(Bucket="b", Key="copy")
            seen("copy", None)
            two.s3.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "k"}, {"Key": "copy"}]})
