"""Listings through a real node of two workers: what the origin is asked, and that every write through kos is seen at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.conditions import eventually
from tests.fakes.node import Node, client, node, phase
from tests.fakes.origin import FakeOrigin

RULES = [
    {"match": "always/*", "freshness": "always", "stale_if_error": "0s"},
    {"match": "brief/*", "freshness": "1ms", "stale_if_error": "1h"},
    {"match": "mixed/live/*", "freshness": "1ms", "stale_if_error": "0s"},
    {"match": "*", "freshness": "immutable", "listings": "1h", "stale_if_error": "1h"},
]
OVERRIDES: dict[str, Any] = {
    "origin": {"retries": 0, "breaker_open": "200ms", "read_timeout": "3s", "connect_timeout": "1s"},
    "rules": RULES,
}


@pytest.fixture(scope="module")
def listed_origin() -> Iterator[FakeOrigin]:
    with FakeOrigin().in_thread() as origin:
        yield origin


@pytest.fixture(scope="module")
def listing_node(tmp_path_factory: pytest.TempPathFactory, listed_origin: FakeOrigin) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("listings"), listed_origin.endpoint, OVERRIDES) as one:
        yield one


@pytest.fixture
def origin(listed_origin: FakeOrigin) -> Iterator[FakeOrigin]:
    listed_origin.heal()
    listed_origin.forget()
    yield listed_origin
    listed_origin.heal()


_numbers = itertools.count()


@pytest.fixture
def bucket(origin: FakeOrigin) -> str:
    """A bucket of the test's own."""
    name = f"bucket-{next(_numbers)}"
    origin.create_bucket(name)
    return name


def anew(url: str) -> Any:
    """A client with connections of its own: the kernel gives each to any worker."""
    return client(url)


class Workers:
    """Asks until every worker has answered: what one knows, all must."""

    def __init__(self, one: Node) -> None:
        self._kos = client(one.s3_url)

    def listing(self, **asked: Any) -> dict[str, Any]:
        """By a new connection, which the kernel gives to any worker."""
        self._kos.close()  # its connections; it opens others
        return dict(self._kos.list_objects_v2(**asked))

    def listings(self, times: int = 8, **asked: Any) -> list[dict[str, Any]]:
        """So many that no worker is left out but once in 2^(times-1)."""
        return [self.listing(**asked) for _ in range(times)]


@pytest.fixture
def kos(listing_node: Node) -> Any:
    return anew(listing_node.s3_url)


@pytest.fixture
def workers(listing_node: Node) -> Workers:
    return Workers(listing_node)


def keys(answer: dict[str, Any]) -> list[str]:
    return [entry["Key"] for entry in answer.get("Contents", [])]


def prefixes(answer: dict[str, Any]) -> list[str]:
    return [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]


def age(answer: dict[str, Any]) -> str | None:
    headers: dict[str, str] = answer["ResponseMetadata"]["HTTPHeaders"]
    return headers.get("age")


def asked(origin: FakeOrigin, bucket: str) -> int:
    return sum(request.bucket == bucket and request.op.startswith("ListObjects") for request in list(origin.requests))


def test_a_listing_is_asked_once_for_all_workers(origin: FakeOrigin, bucket: str, kos: Any, workers: Workers) -> None:
    for number in range(5):
        origin.put(bucket, f"a/{number}", b"x")
    first = kos.list_objects_v2(Bucket=bucket, Prefix="a/")
    assert phase(first) == "miss" and keys(first) == [f"a/{number}" for number in range(5)] and age(first) is None
    eventually(lambda: phase(workers.listing(Bucket=bucket, Prefix="a/")) == "hit")
    before = asked(origin, bucket)
    for again in workers.listings(Bucket=bucket, Prefix="a/"):
        assert phase(again) == "hit" and keys(again) == keys(first) and age(again) == "0"
        assert again["ResponseMetadata"]["RequestId"] != first["ResponseMetadata"]["RequestId"]
    assert asked(origin, bucket) == before <= 2


def test_the_same_worker_s_second_listing_is_a_hit_at_once(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    origin.put(bucket, "k", b"x")
    assert [phase(kos.list_objects_v2(Bucket=bucket)) for _ in range(3)] == ["miss", "hit", "hit"]
    assert asked(origin, bucket) == 1


def test_versions_and_paths_of_a_listing(origin: FakeOrigin, bucket: str, kos: Any, listing_node: Node) -> None:
    origin.put(bucket, "k", b"x")
    assert phase(kos.list_objects(Bucket=bucket)) == "miss"
    assert phase(kos.list_objects(Bucket=bucket)) == "hit"
    assert phase(kos.list_objects_v2(Bucket=bucket)) == "miss", "another question"

    def slash(request: Any, **_: Any) -> None:
        request.url = request.url.replace(f"/{bucket}?", f"/{bucket}/?")
        sent.append(request.url)

    sent: list[str] = []
    other = client(listing_node.s3_url)
    other.meta.events.register("before-sign.s3.ListObjectsV2", slash)
    eventually(lambda: phase(other.list_objects_v2(Bucket=bucket)) == "hit", "/bucket and /bucket/ are one")
    assert f"/{bucket}/?" in sent[0]


WRITES: dict[str, Callable[[Any, str, str], Any]] = {
    "put": lambda kos, bucket, key: kos.put_object(Bucket=bucket, Key=key, Body=b"new"),
    "copy": lambda kos, bucket, key: kos.copy_object(
        Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": "seed"}
    ),
    "complete": lambda kos, bucket, key: _multipart(kos, bucket, key),
}


def _multipart(kos: Any, bucket: str, key: str) -> None:
    upload = kos.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = kos.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
    parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
    kos.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts)


QUESTIONS: list[dict[str, Any]] = [
    {},
    {"Delimiter": "/"},
    {"Prefix": "d"},
    {"Prefix": "d/"},
    {"Prefix": "d/", "Delimiter": "/"},
    {"Prefix": "d/e/"},
    {"Prefix": "d/e/ne"},
    {"Prefix": "d/e/new"},
    {"StartAfter": "d/a"},
    {"Prefix": "d", "Delimiter": "e"},
    {"MaxKeys": 1},
]


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_through_kos_is_in_every_listing_at_once(
    origin: FakeOrigin, bucket: str, kos: Any, workers: Workers, write: str
) -> None:
    for key in ("d/a", "seed", "z"):
        origin.put(bucket, key, b"x")
    for question in QUESTIONS:
        workers.listings(3, Bucket=bucket, **question)
    WRITES[write](kos, bucket, "d/e/new")
    for question in QUESTIONS:
        truth = client(origin.endpoint).list_objects_v2(Bucket=bucket, **question)
        for answer in workers.listings(3, Bucket=bucket, **question):
            assert (keys(answer), prefixes(answer)) == (keys(truth), prefixes(truth)), question
            assert "d/e/new" in keys(answer) or prefixes(answer) or "MaxKeys" in question


def test_what_is_deleted_through_kos_is_in_no_listing(
    origin: FakeOrigin, bucket: str, kos: Any, workers: Workers
) -> None:
    for number in range(30):
        origin.put(bucket, f"d/e/{number:02d}", b"x")
    for prefix in ("", "d/", "d/e/0"):
        workers.listings(3, Bucket=bucket, Prefix=prefix)
    kos.delete_object(Bucket=bucket, Key="d/e/00")
    for prefix in ("", "d/", "d/e/0"):
        assert all("d/e/00" not in keys(each) for each in workers.listings(4, Bucket=bucket, Prefix=prefix))
    gone = [{"Key": f"d/e/{number:02d}"} for number in range(1, 20)]
    kos.delete_objects(Bucket=bucket, Delete={"Objects": gone})
    for answer in workers.listings(4, Bucket=bucket, Prefix="d/"):
        assert keys(answer) == [f"d/e/{number:02d}" for number in range(20, 30)]


def test_a_write_leaves_listings_of_other_directories_alone(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    origin.put(bucket, "a/k", b"x")
    kos.list_objects_v2(Bucket=bucket, Prefix="a/")
    kos.put_object(Bucket=bucket, Key="b/k", Body=b"x")
    assert phase(kos.list_objects_v2(Bucket=bucket, Prefix="a/")) == "hit"


def test_a_bucket_that_is_removed_or_made_through_kos_is_seen(
    origin: FakeOrigin, bucket: str, kos: Any, workers: Workers
) -> None:
    assert [keys(each) for each in workers.listings(4, Bucket=bucket, Prefix="a/b/")] == [[]] * 4
    kos.delete_bucket(Bucket=bucket)
    for _ in range(6):
        with pytest.raises(ClientError, match="NoSuchBucket"):
            workers.listing(Bucket=bucket, Prefix="a/b/")
    kos.create_bucket(Bucket=bucket)
    assert all(keys(each) == [] for each in workers.listings(4, Bucket=bucket, Prefix="a/b/"))


def test_what_is_written_around_kos_is_seen_when_the_rule_says(origin: FakeOrigin, kos: Any) -> None:
    for name in ("always", "brief", "mixed"):
        origin.create_bucket(name)
        kos.list_objects_v2(Bucket=name)
        kos.list_objects_v2(Bucket=name, Prefix="fixed/")
        origin.put(name, "fixed/new", b"x")
    assert keys(kos.list_objects_v2(Bucket="always")) == ["fixed/new"]
    eventually(lambda: keys(kos.list_objects_v2(Bucket="brief")) == ["fixed/new"])
    eventually(lambda: keys(kos.list_objects_v2(Bucket="mixed")) == ["fixed/new"], "the strictest rule below holds")
    assert keys(kos.list_objects_v2(Bucket="mixed", Prefix="fixed/")) == [], "trusted for an hour"
    assert all(phase(kos.list_objects_v2(Bucket="always")) == "miss" for _ in range(3))


def test_stale_while_the_origin_is_down_but_never_what_a_write_may_have_changed(
    origin: FakeOrigin, bucket: str, kos: Any
) -> None:
    origin.put("brief", "s/k", b"x")
    kos.list_objects_v2(Bucket="brief", Prefix="s/")
    kos.list_objects_v2(Bucket="brief", Prefix="t/")
    kos.list_objects_v2(Bucket="always", Prefix="s/")
    eventually(lambda: phase(kos.list_objects_v2(Bucket="brief", Prefix="s/")) == "miss")
    fault = origin.fault(times=None, status=503)
    stale = kos.list_objects_v2(Bucket="brief", Prefix="s/")
    assert phase(stale) == "stale" and keys(stale) == ["s/k"] and age(stale) is not None
    with pytest.raises(ClientError, match=r"503|Slow|Unavailable|InternalError"):
        kos.list_objects_v2(Bucket="always", Prefix="s/")
    with pytest.raises(ClientError):
        kos.put_object(Bucket="brief", Key="s/l", Body=b"x")
    with pytest.raises(ClientError):
        kos.list_objects_v2(Bucket="brief", Prefix="s/")
    assert phase(kos.list_objects_v2(Bucket="brief", Prefix="t/")) == "stale"
    fault.end()
    origin.heal()


def test_errors_are_not_kept(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    for _ in range(2):
        with pytest.raises(ClientError, match="NoSuchBucket"):
            kos.list_objects_v2(Bucket="nowhere")
    origin.create_bucket("nowhere")
    assert keys(kos.list_objects_v2(Bucket="nowhere")) == []
    del origin.store.buckets["nowhere"]


@pytest.mark.parametrize(
    ("raw", "status", "kept"),
    [
        ({"cache-control": "no-store"}, 200, False),
        ({"x-amz-bucket-region": "eu-west-1", "x-custom": "1"}, 200, True),
    ],
)
def test_headers_of_a_listing(
    origin: FakeOrigin, bucket: str, kos: Any, raw: dict[str, str], status: int, kept: bool
) -> None:
    origin.fault(times=None, op="ListObjectsV2", bucket=bucket, headers=raw)
    answers = [kos.list_objects_v2(Bucket=bucket) for _ in range(2)]
    for answer in answers:
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == status
        assert raw.items() <= answer["ResponseMetadata"]["HTTPHeaders"].items()
    assert phase(answers[1]) == ("hit" if kept else "miss")


def test_what_an_origin_says_to_one_is_not_said_to_others(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    told: dict[str, str | None] = {
        "access-control-allow-origin": "https://one.example",
        "age": "77",
        "set-cookie": "who=one",
        "x-amz-request-charged": "requester",
        "x-kos-cache": "hit",
    }
    origin.fault(op="ListObjectsV2", bucket=bucket, headers=told)
    miss, hit = (kos.list_objects_v2(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"] for _ in range(2))
    assert (miss["x-kos-cache"], hit["x-kos-cache"]) == ("miss;reason=cold", "hit")
    assert hit["age"] == "0" and told.keys() & miss.keys() == {"x-kos-cache"} < told.keys() & hit.keys()
    assert told.keys() & hit.keys() == {"x-kos-cache", "age"}


def test_an_answer_that_is_no_listing_is_passed_on_and_not_kept(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    page = b"<html>please log in</html>"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(page)
    origin.fault(raw=head + page, op="ListObjectsV2", bucket=bucket)
    with contextlib.suppress(Exception):  # what boto3 makes of it is its own business
        kos.list_objects_v2(Bucket=bucket)
    assert phase(kos.list_objects_v2(Bucket=bucket)) == "miss"


def test_a_listing_that_breaks_off_is_asked_again(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    origin.put(bucket, "k", b"x")
    origin.fault(body_cut=20, op="ListObjectsV2", bucket=bucket)
    assert keys(kos.list_objects_v2(Bucket=bucket)) == ["k"]
    assert asked(origin, bucket) == 2


def test_those_who_ask_at_a_time_share_one_request_and_one_who_leaves_takes_nothing(
    origin: FakeOrigin, bucket: str, listing_node: Node
) -> None:
    origin.put(bucket, "k", b"x")
    hold = origin.hold(op="ListObjectsV2", bucket=bucket, times=None)
    clients = [anew(listing_node.s3_url) for _ in range(12)]
    impatient = client(listing_node.s3_url, read_timeout=0.3)
    with pytest.raises(Exception, match=r"(?i)timeout|timed out"):
        impatient.list_objects_v2(Bucket=bucket)
    with ThreadPoolExecutor(12) as threads:
        waiting = [threads.submit(each.list_objects_v2, Bucket=bucket) for each in clients]
        hold.wait_reached()
        hold.release()
        assert all(keys(each.result()) == ["k"] for each in waiting)
    assert asked(origin, bucket) <= 2, "one for each worker at most"


def test_a_write_while_a_listing_is_on_its_way_is_seen_by_who_asks_after_it(
    origin: FakeOrigin, bucket: str, listing_node: Node, kos: Any, workers: Workers
) -> None:
    hold = origin.hold(op="ListObjectsV2", bucket=bucket)
    with ThreadPoolExecutor(1) as threads:
        early = threads.submit(anew(listing_node.s3_url).list_objects_v2, Bucket=bucket)
        hold.wait_reached()  # its answer is made, and without the key
        kos.put_object(Bucket=bucket, Key="k", Body=b"x")
        assert all(keys(each) == ["k"] for each in workers.listings(4, Bucket=bucket))
        hold.release()
        assert keys(early.result()) == []
    assert all(keys(each) == ["k"] for each in workers.listings(6, Bucket=bucket))


def test_what_is_asked_in_an_unusual_way_is_passed_through(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    for _ in range(2):
        answer = kos.list_objects_v2(Bucket=bucket, ExpectedBucketOwner="123456789012")
        assert answer["ResponseMetadata"]["HTTPHeaders"]["x-kos-cache"] == "bypass;reason=expected_bucket_owner"
    assert origin.requests[-1].headers["x-amz-expected-bucket-owner"] == "123456789012"
    assert asked(origin, bucket) == 2


def test_what_more_is_asked_of_each_object_makes_another_question(
    origin: FakeOrigin, bucket: str, kos: Any, listing_node: Node
) -> None:
    plain = [phase(kos.list_objects_v2(Bucket=bucket)) for _ in range(2)]
    more = [phase(kos.list_objects_v2(Bucket=bucket, OptionalObjectAttributes=["RestoreStatus"])) for _ in range(2)]
    assert plain == more == ["miss", "hit"]
    name = "x-amz-optional-object-attributes"
    assert [each.headers.get(name) for each in origin.requests] == [None, "RestoreStatus"]


def test_kos_refuses_what_s3_refuses_without_asking(origin: FakeOrigin, bucket: str, kos: Any) -> None:
    with pytest.raises(ClientError) as refused:
        kos.list_objects_v2(Bucket=bucket, MaxKeys=-1)
    error = refused.value.response["Error"]
    assert (error["Code"], error["ArgumentName"], error["ArgumentValue"]) == ("InvalidArgument", "maxKeys", "-1")
    assert asked(origin, bucket) == 0


def _spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("damage", ["database", "log", "directory", "pickle"])
def test_damage_to_the_pages_while_the_node_runs_changes_no_answer(
    origin: FakeOrigin, bucket: str, kos: Any, workers: Workers, listing_node: Node, damage: str
) -> None:
    for number in range(20):
        origin.put(bucket, f"{number % 5}/{number}", b"x")
    for number in range(5):
        workers.listings(3, Bucket=bucket, Prefix=f"{number}/")
    directory = Path(listing_node.config["cache"]["dir"]) / "listings"
    pages = directory / os.readlink(directory / "CURRENT")
    if damage == "database":
        _spoil(pages / "cache.db")
    elif damage == "log":
        _spoil(pages / "cache.db-wal")
    elif damage == "directory":
        for file in pages.iterdir():
            file.unlink()
        (directory / "CURRENT").unlink()
    else:
        connection = sqlite3.connect(pages / "cache.db")
        with connection:
            connection.execute("UPDATE Cache SET mode = 4")
        connection.close()
    for number in range(5):
        for answer in workers.listings(4, Bucket=bucket, Prefix=f"{number}/"):
            assert keys(answer) == sorted(f"{number}/{each}" for each in range(number, 20, 5))
    kos.put_object(Bucket=bucket, Key="0/new", Body=b"x")
    assert all("0/new" in keys(each) for each in workers.listings(6, Bucket=bucket, Prefix="0/"))
    eventually(
        lambda: all(phase(each) == "hit" for each in workers.listings(4, Bucket=bucket, Prefix="1/")), "kept again"
    )
    assert len(listing_node.worker_pids()) == 2


def test_pages_outlive_a_worker_and_a_daemon(
    origin: FakeOrigin, bucket: str, kos: Any, workers: Workers, listing_node: Node
) -> None:
    origin.put(bucket, "k", b"x")
    eventually(lambda: all(phase(each) == "hit" for each in workers.listings(4, Bucket=bucket)))
    before = asked(origin, bucket)
    for pid in (listing_node.daemon_pid(), *listing_node.worker_pids()):
        os.kill(pid, 9)

    def answers() -> bool:
        with contextlib.suppress(BotoCoreError, ClientError):
            return all(phase(each) == "hit" for each in workers.listings(4, Bucket=bucket))
        return False

    eventually(answers)
    assert asked(origin, bucket) == before


def test_no_pages_where_there_is_no_cache(tmp_path: Path, own_origin: FakeOrigin) -> None:
    own_origin.put("b", "k", b"x")
    with node(tmp_path, own_origin.endpoint, {"cache": {"enabled": "false"}, "workers": 1}) as one:
        kos = client(one.s3_url)
        answers = [kos.list_objects_v2(Bucket="b") for _ in range(2)]
        assert [phase(each) for each in answers] == ["bypass", "bypass"]
        assert all(keys(each) == ["k"] for each in answers)
        assert not (Path(one.config["cache"]["dir"]) / "listings").exists()
