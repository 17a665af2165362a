"""One moto origin and one node for all client tests; a bucket for each test, made through kos.

A test that takes `endpoint` (or what is made of it) runs twice: over http and over https.
"""

from __future__ import annotations

import itertools
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node, client, moto_origin, node

#: The node answers BUCKET.DOMAIN too; its certificate covers that, but a resolver may not know the name.
DOMAIN = "s3.localhost"

_numbers = itertools.count()


@dataclass(frozen=True)
class Endpoint:
    """One of the node's two addresses. ca_file: the authority that a client must be told to trust; None over http."""

    url: str
    ca_file: Path | None

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return self.url.partition("://")[2]

    @property
    def secure(self) -> bool:
        return self.ca_file is not None

    @property
    def verify(self) -> str | None:
        """What boto3, and what is built on it, takes."""
        return None if self.ca_file is None else str(self.ca_file)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What urllib takes."""
        return None if self.ca_file is None else ssl.create_default_context(cafile=str(self.ca_file))

    def boto3(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY, **settings: Any) -> Any:
        return client(self.url, access_key, secret_key, verify=self.verify, **settings)


@pytest.fixture(scope="session")
def origin_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_origin(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def kos_node(tmp_path_factory: pytest.TempPathFactory, origin_url: str) -> Iterator[Node]:
    with node(tmp_path_factory.mktemp("node"), origin_url, {"listen": {"domain": DOMAIN}}) as one:
        yield one


@pytest.fixture(params=["http", "https"])
def endpoint(request: pytest.FixtureRequest, kos_node: Node) -> Endpoint:
    if request.param == "http":
        return Endpoint(kos_node.s3_url, None)
    return Endpoint(kos_node.s3_tls_url, kos_node.ca_file)


@pytest.fixture
def s3(kos_node: Node) -> Any:
    """boto3 over http."""
    return client(kos_node.s3_url)


@pytest.fixture
def origin(origin_url: str) -> Any:
    """The same store without kos: what it holds is what a client of the origin would see."""
    return client(origin_url)


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"bucket-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def bare_env(tmp_path: Path) -> dict[str, str]:
    """Environment of a client process: these credentials and nothing of this machine's."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def client_env(bare_env: dict[str, str], endpoint: Endpoint) -> dict[str, str]:
    """The same, trusting the node's certificate. Both names of it: the AWS SDKs read one, Go's own TLS the other."""
    trust = {} if endpoint.ca_file is None else dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE"), str(endpoint.ca_file))
    return bare_env | trust
