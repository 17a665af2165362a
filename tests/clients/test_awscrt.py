"""The AWS Common Runtime, the C library below boto3's fast transfers, mountpoint and the connector for PyTorch.

It splits by itself: parts up with a checksum in each trailer, and down either by part number or by ranges, in parallel.
"""

from __future__ import annotations

import base64
import io
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3.crt
import pytest
from awscrt.auth import AwsCredentialsProvider
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientTlsContext, TlsContextOptions
from awscrt.s3 import (
    S3ChecksumAlgorithm,
    S3ChecksumConfig,
    S3ChecksumLocation,
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    S3ResponseError,
    create_default_s3_signing_config,
)
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.exceptions import ClientError
from s3transfer.crt import CRTTransferManager, create_s3_crt_client

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import (
    LARGE_BYTES,
    ODD_KEY,
    PART_BYTES,
    digests,
    objects,
    random_bytes,
    sha256,
    stored,
    was_multipart,
)
from tests.fakes.node import ACCESS_KEY, SECRET_KEY

LARGE = random_bytes(LARGE_BYTES, 6)
TIMEOUT_S = 60


@dataclass
class Answer:
    """What came back for one request, put together from pieces that come in order or not."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    validated: bool = False


class Crt:
    """S3Client as its documentation has it used: a request of HTTP, which it splits, signs and repeats."""

    def __init__(self, endpoint: Endpoint, secret_key: str = SECRET_KEY) -> None:
        self._host = endpoint.host
        provider = AwsCredentialsProvider.new_static(ACCESS_KEY, secret_key)
        trust = None
        if endpoint.verify is not None:
            options = TlsContextOptions()
            options.override_default_trust_store_from_path(ca_filepath=endpoint.verify)
            trust = ClientTlsContext(options).new_connection_options()
        self._client = S3Client(
            region="us-east-1",
            signing_config=create_default_s3_signing_config(region="us-east-1", credential_provider=provider),
            tls_mode=S3RequestTlsMode.ENABLED if endpoint.secure else S3RequestTlsMode.DISABLED,
            tls_connection_options=trust,
            part_size=PART_BYTES,
        )

    def close(self) -> None:
        gone = self._client.shutdown_event
        del self._client
        assert gone.wait(TIMEOUT_S)

    def request(
        self,
        kind: S3RequestType,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        **settings: Any,
    ) -> Answer:
        """Raises S3ResponseError."""
        answer = Answer()
        lock = threading.Lock()

        def on_headers(status_code: int, headers: list[tuple[str, str]], **_: Any) -> None:
            answer.status = status_code
            answer.headers = {name.lower(): value for name, value in headers}

        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            with lock:
                start = offset - first
                if len(answer.body) < start + len(chunk):
                    answer.body.extend(bytes(start + len(chunk) - len(answer.body)))
                answer.body[start : start + len(chunk)] = chunk

        def on_done(did_validate_checksum: bool = False, **_: Any) -> None:
            answer.validated = did_validate_checksum

        sent = HttpHeaders([("Host", self._host), *(headers or {}).items()])
        if body is not None:
            sent.add("Content-Length", str(len(body)))
        # Offsets are those of the object, not of the range that was asked for.
        asked = (headers or {}).get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        first = int(asked)
        done: Future[None] = self._client.make_request(
            type=kind,
            request=HttpRequest(method, path, sent, io.BytesIO(body) if body is not None else None),
            on_headers=on_headers,
            on_body=on_body,
            on_done=on_done,
            **settings,
        ).finished_future
        done.result(TIMEOUT_S)
        return answer

    def put(self, path: str, body: bytes, checksum: S3ChecksumConfig | None = None) -> Answer:
        headers = {}
        if checksum is not None and checksum.algorithm is not None:
            # moto keeps only a checksum that this header names; S3 needs no such hint.
            headers["x-amz-sdk-checksum-algorithm"] = checksum.algorithm.name
        return self.request(S3RequestType.PUT_OBJECT, "PUT", path, headers, body, checksum_config=checksum)

    def get(self, path: str, headers: dict[str, str] | None = None, **settings: Any) -> Answer:
        return self.request(S3RequestType.GET_OBJECT, "GET", path, headers, **settings)


Connect = Callable[..., Crt]


@pytest.fixture
def connect(endpoint: Endpoint) -> Iterator[Connect]:
    made: list[Crt] = []

    def connect(secret_key: str = SECRET_KEY) -> Crt:
        made.append(Crt(endpoint, secret_key))
        return made[-1]

    yield connect
    for each in made:
        each.close()


@pytest.fixture
def crt(connect: Connect) -> Crt:
    return connect()


def path_of(bucket: str, key: str) -> str:
    return f"/{bucket}/{quote(key)}"


#: In the header one algorithm stands for all: there they differ in nothing but their name.
CHECKSUMS = [
    None,
    S3ChecksumConfig(algorithm=S3ChecksumAlgorithm.CRC32C, location=S3ChecksumLocation.HEADER),
    *(
        S3ChecksumConfig(algorithm=algorithm, location=S3ChecksumLocation.TRAILER)
        for algorithm in (
            S3ChecksumAlgorithm.CRC32,
            S3ChecksumAlgorithm.CRC32C,
            S3ChecksumAlgorithm.CRC64NVME,
            S3ChecksumAlgorithm.SHA1,
            S3ChecksumAlgorithm.SHA256,
        )
    ),
]


def named(checksum: S3ChecksumConfig | None) -> str:
    if checksum is None or checksum.algorithm is None or checksum.location is None:
        return "no checksum"
    return f"{checksum.algorithm.name} {checksum.location.name}"


@pytest.mark.parametrize("checksum", CHECKSUMS, ids=named)
def test_uploads_with_checksums(crt: Crt, origin: Any, bucket: str, checksum: S3ChecksumConfig | None) -> None:
    for key, body in (("large", LARGE), ("small", b"hello"), ("empty", b"")):
        crt.put(path_of(bucket, key), body, checksum)
    assert stored(origin, bucket) == {"large": sha256(LARGE), "small": sha256(b"hello"), "empty": sha256(b"")}
    assert was_multipart(origin, bucket, "large") and not was_multipart(origin, bucket, "small")
    for key, body in (("large", LARGE), ("small", b"hello"), ("empty", b"")):
        answer = crt.get(path_of(bucket, key), checksum_config=S3ChecksumConfig(validate_response=True))
        assert sha256(bytes(answer.body)) == sha256(body)


def test_downloads_whole_and_ranged(crt: Crt, bucket: str, tmp_path: Path) -> None:
    path = path_of(bucket, ODD_KEY)
    crt.put(path, LARGE)
    for n in range(2):
        answer = crt.get(path)
        assert answer.status == 200 and sha256(bytes(answer.body)) == sha256(LARGE)
        assert answer.headers["content-length"] == str(LARGE_BYTES)
        crt.get(path, recv_filepath=str(tmp_path / f"whole{n}"))
        assert sha256((tmp_path / f"whole{n}").read_bytes()) == sha256(LARGE)
        for start, stop in ((0, 1), (PART_BYTES - 3, PART_BYTES + 3), (1_000_000, LARGE_BYTES)):
            answer = crt.get(path, {"Range": f"bytes={start}-{stop - 1}"})
            assert answer.status == 206 and bytes(answer.body) == LARGE[start:stop]
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{LARGE_BYTES}"


def test_small_objects_are_validated_by_their_checksum(crt: Crt, bucket: str) -> None:
    path, body = path_of(bucket, "small"), random_bytes(100_000)
    checksum = S3ChecksumConfig(algorithm=S3ChecksumAlgorithm.CRC32, location=S3ChecksumLocation.TRAILER)
    crt.put(path, body, checksum)
    for _ in range(2):
        answer = crt.get(path, checksum_config=S3ChecksumConfig(validate_response=True))
        assert answer.validated and bytes(answer.body) == body
        expected = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        assert answer.headers["x-amz-checksum-crc32"] == expected


def test_the_rest_of_a_round_trip(crt: Crt, origin: Any, bucket: str) -> None:
    bodies = objects()
    for key, body in bodies.items():
        crt.put(path_of(bucket, key), body)
    assert stored(origin, bucket) == digests(bodies)
    plain = S3RequestType.DEFAULT
    listing = crt.request(plain, "GET", f"/{bucket}?list-type=2&prefix=deep%2F", operation_name="ListObjectsV2")
    assert b"<Key>deep/down/with space.txt</Key>" in listing.body and b"<Key>empty</Key>" not in listing.body
    source = {"x-amz-copy-source": path_of(bucket, ODD_KEY), "Content-Length": "0"}
    crt.request(plain, "PUT", path_of(bucket, "copy"), source, operation_name="CopyObject")
    assert sha256(bytes(crt.get(path_of(bucket, "copy")).body)) == sha256(bodies[ODD_KEY])
    head = crt.request(plain, "HEAD", path_of(bucket, "copy"), operation_name="HeadObject")
    assert head.headers["content-length"] == str(len(bodies[ODD_KEY]))
    for key in [*bodies, "copy"]:
        crt.request(plain, "DELETE", path_of(bucket, key), operation_name="DeleteObject")
    assert stored(origin, bucket) == {}


def test_what_is_wrong_is_said(connect: Connect, crt: Crt, bucket: str) -> None:
    with pytest.raises(S3ResponseError) as missing:
        crt.get(path_of(bucket, "missing"))
    assert missing.value.status_code == 404
    stranger = connect(secret_key="wrong")
    for use in (lambda: stranger.put(path_of(bucket, "k"), LARGE), lambda: stranger.get(path_of(bucket, "k"))):
        with pytest.raises(S3ResponseError) as refusal:
            use()
        assert refusal.value.status_code == 403 and b"SignatureDoesNotMatch" in (refusal.value.body or b"")


@pytest.fixture
def fast_boto3(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
    """boto3 whose transfers go through the CRT.

    boto3 makes the one CRT client of its process by itself: with https, the system's authorities, and the endpoint of the
    environment. So here only whether to use TLS and whom to trust is put in; the lock between processes has a name of its
    own, or boto3 would take its ordinary transfers when another process has it.
    """

    def make(**settings: Any) -> S3Client:
        return create_s3_crt_client(**{**settings, "use_ssl": endpoint.secure, "verify": endpoint.verify})

    monkeypatch.setattr(boto3.crt, "create_s3_crt_client", make)
    monkeypatch.setattr(boto3.crt, "CRT_S3_CLIENT", None)
    monkeypatch.setattr(boto3.crt, "BOTOCORE_CRT_SERIALIZER", None)
    monkeypatch.setattr(boto3.crt, "PROCESS_LOCK_NAME", f"kos-{uuid.uuid4()}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint.url)
    return endpoint.boto3()


def test_transfers_of_boto3(fast_boto3: Any, origin: Any, bucket: str, tmp_path: Path) -> None:
    config = TransferConfig(
        preferred_transfer_client="crt", multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES
    )
    assert isinstance(create_transfer_manager(fast_boto3, config), CRTTransferManager)
    (tmp_path / "up").write_bytes(LARGE)
    fast_boto3.upload_file(str(tmp_path / "up"), bucket, ODD_KEY, Config=config)
    sha = {"ChecksumAlgorithm": "SHA256", "Metadata": {"colour": "blue"}}
    fast_boto3.upload_fileobj(io.BytesIO(LARGE), bucket, "sha", ExtraArgs=sha, Config=config)
    fast_boto3.upload_fileobj(io.BytesIO(b""), bucket, "empty", Config=config)
    assert stored(origin, bucket) == {ODD_KEY: sha256(LARGE), "sha": sha256(LARGE), "empty": sha256(b"")}
    assert was_multipart(origin, bucket, ODD_KEY)
    assert origin.head_object(Bucket=bucket, Key="sha")["Metadata"] == {"colour": "blue"}
    for n in range(2):
        fast_boto3.download_file(bucket, ODD_KEY, str(tmp_path / f"down{n}"), Config=config)
        assert sha256((tmp_path / f"down{n}").read_bytes()) == sha256(LARGE)
        for key, body in (("sha", LARGE), ("empty", b"")):
            whole = io.BytesIO()
            fast_boto3.download_fileobj(bucket, key, whole, Config=config)
            assert sha256(whole.getvalue()) == sha256(body)
    with pytest.raises(ClientError) as refusal:
        fast_boto3.download_file(bucket, "missing", str(tmp_path / "none"), Config=config)
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 404
