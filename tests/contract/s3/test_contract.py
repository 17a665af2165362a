"""Whatever the origin can do, kos can do: every case against the origin itself and through a real node.

A difference is a failure, unless it stands in differences.py with its reason, and what stands there must be seen. Reads
through kos are made until the cache answers, so that cached answers are compared as well. The origin verifies no
signatures and few checksums; what kos decides by itself has tests of its own.
"""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.contract.s3 import cases
from tests.contract.s3.differences import DIFFERENCES, RULES, unexplained
from tests.contract.s3.registry import CASES
from tests.contract.s3.scene import Scene, differences
from tests.fakes.node import Node, client, moto_origin, node

_numbers = itertools.count()
#: Of so many cases one is tried over https as well.
SAMPLE = 24

assert cases.__name__


#: Moto answers some of the questions with 500. So many of them in a row are not what a real origin's failure looks like.
OVERRIDES: dict[str, Any] = {"origin": {"retries": 1, "breaker_failures": 10_000}}


class Clients(NamedTuple):
    """Of one endpoint: signing by version 4, and making links by version 2. trust: whose certificates are taken."""

    new: Any
    old: Any
    trust: ssl.SSLContext | None = None


class Both(NamedTuple):
    """Clients of the same store: of the origin itself, and of the node before it over http and https."""

    direct: Clients
    through: Clients
    through_tls: Clients


def clients(url: str, ca_file: Path | None = None) -> Clients:
    verify = None if ca_file is None else str(ca_file)
    return Clients(
        client(url, verify=verify, signature_version="s3v4"),
        client(url, verify=verify, signature_version="s3"),
        None if ca_file is None else ssl.create_default_context(cafile=verify),
    )


@pytest.fixture(scope="module")
def origin_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_origin(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="module")
def contract_node(tmp_path_factory: pytest.TempPathFactory, origin_url: str) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), origin_url, OVERRIDES) as one:
        yield one


@pytest.fixture(scope="module")
def both(origin_url: str, contract_node: Node) -> Both:
    through_tls = clients(contract_node.s3_tls_url, contract_node.ca_file)
    return Both(clients(origin_url), clients(contract_node.s3_url), through_tls)


def scenes(both: Both, *, tls: bool = False) -> tuple[Scene, Scene]:
    """Two buckets of the same kind, whose names are of one length: documents of the two are as well."""
    number = next(_numbers)
    names = f"direct-{number:04}", f"kosway-{number:04}"
    for name in names:
        both.direct.new.create_bucket(Bucket=name)
    through = both.through_tls if tls else both.through
    return Scene(*both.direct, names[0], repeats=False), Scene(*through, names[1], repeats=True)


def compare(name: str, direct: Scene, through: Scene) -> None:
    with ThreadPoolExecutor(2) as threads:
        # Of both sides at once: that the origin has one more to serve changes no answer.
        list(threads.map(CASES[name], (direct, through)))
    assert direct.seen, "a case that asks nothing compares nothing"
    found, used = unexplained(differences(direct.seen, through.seen), through.seen)
    known = DIFFERENCES.get(name)
    assert found == ({} if known is None else known.paths)
    assert {rule for rule in RULES if rule.case == name} <= used


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_the_origin(both: Both, name: str) -> None:
    compare(name, *scenes(both))


@pytest.mark.parametrize("name", list(CASES)[::SAMPLE])
def test_the_same_over_https(both: Both, name: str) -> None:
    """Clients write otherwise there: bodies in chunks, with their checksums behind them."""
    compare(name, *scenes(both, tls=True))


def test_every_difference_is_of_a_case() -> None:
    assert DIFFERENCES.keys() | {rule.case for rule in RULES} <= CASES.keys()
    assert all(known.paths and known.reason for known in DIFFERENCES.values())


def test_cached_answers_are_among_those_compared(both: Both) -> None:
    _, through = scenes(both)
    through.put()
    through.get()
    assert through.phases[1] == "miss" and through.phases[-1] == "hit"
    through.head()
    assert through.phases[-1] == "hit"


def test_a_difference_is_seen(both: Both) -> None:
    """In the status, a header, a document, a body; but not in what is called differently at each place."""
    direct, through = scenes(both)
    for scene, body in ((direct, b"one"), (through, b"two")):
        scene.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
        scene.put(body=body, ContentType=f"text/{body.decode()}")
        scene.get()
        scene.keys()
    found = differences(direct.seen, through.seen)
    assert found["3 get_object.Body"] == ("b'one'", "b'two'")
    assert found["3 get_object.header content-type"] == ("'text/one'", "'text/two'")
    assert "4 list_objects_v2.Contents.0.ETag" in found and "4 list_objects_v2.Contents.0.Key" not in found
    assert direct.seen["3 get_object.VersionId"] == through.seen["3 get_object.VersionId"] == "'id-1'"
