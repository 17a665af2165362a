"""What SDKs send that Python cannot install: Java (both versions), Go, and what Hadoop, Spark and JuiceFS make of them.

Each test sends a job's requests in the form that its SDK gives them: which headers there are and which of them are signed,
how bodies are encoded, which listing is asked for. The programs themselves are not here: these are their requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.clients.conftest import Endpoint
from tests.clients.roundtrip import ODD_KEY, digests, objects, random_bytes, sha256, stored, was_multipart
from tests.clients.wire import (
    SIGNED_CHUNKS,
    SIGNED_CHUNKS_TRAILER,
    UNSIGNED,
    UNSIGNED_CHUNKS_TRAILER,
    Connection,
    crc32,
    md5,
)
from tests.conditions import eventually

INVOCATION = "8f3b0c1e-52a1-4d7b-9c0e-1f5a3d2b7c11"
JAVA_1 = {
    "amz-sdk-invocation-id": INVOCATION,
    "amz-sdk-request": "attempt=1;max=4",
    "amz-sdk-retry": "0/0/500",
    "User-Agent": "aws-sdk-java/1.12.770 Linux/6.1 OpenJDK_64-Bit_Server_VM/17.0.9 java/17.0.9 vendor/Debian",
    "Connection": "Keep-Alive",
}
JAVA_2 = {
    "amz-sdk-invocation-id": INVOCATION,
    "amz-sdk-request": "attempt=1; max=4",
    "User-Agent": "aws-sdk-java/2.31.5 md/io#async md/http#NettyNio ua/2.1 os/Linux#6.1 lang/java#17.0.9",
}
#: Signed although a proxy could change it: the signature must be computed over what came.
GO_2 = {
    "Accept-Encoding": "identity",
    "Amz-Sdk-Invocation-Id": INVOCATION,
    "Amz-Sdk-Request": "attempt=1; max=3",
    "User-Agent": "aws-sdk-go-v2/1.36.3 ua/2.1 os/linux lang/go#1.23.4 md/GOARCH#amd64 api/s3#1.79.0",
}
GO_NOT_SIGNED = ("User-Agent",)


@pytest.fixture
def wire(endpoint: Endpoint) -> Iterator[Connection]:
    with Connection(endpoint) as connection:
        yield connection


def parts_xml(etags: list[str]) -> bytes:
    parts = "".join(
        f"<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>" for n, etag in enumerate(etags, start=1)
    )
    namespace = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    return f"<CompleteMultipartUpload {namespace}>{parts}</CompleteMultipartUpload>".encode()


def delete_xml(keys: list[str], quiet: bool) -> bytes:
    escaped = (key.replace("&", "&amp;").replace("<", "&lt;").replace("\r", "&#13;") for key in keys)
    listed = "".join(f"<Object><Key>{key}</Key></Object>" for key in escaped)
    return f"<Delete><Quiet>{str(quiet).lower()}</Quiet>{listed}</Delete>".encode()


def test_java_1(wire: Connection, origin: Any, bucket: str) -> None:
    """Over http its bodies are signed chunk by chunk, without saying aws-chunked; over https they are not signed."""
    payload = UNSIGNED if wire.endpoint.secure else SIGNED_CHUNKS
    bodies = objects()
    for key, body in bodies.items():
        if key == ODD_KEY:
            continue
        put = wire.request(
            "PUT",
            f"/{bucket}/{key}",
            headers=JAVA_1 | {"Content-Type": "application/octet-stream", "Expect": "100-continue"},
            body=body,
            payload=payload,
        )
        assert (put.status, put.body) == (200, b"")
    begun = wire.request(
        "POST", f"/{bucket}/{ODD_KEY}", [("uploads", None)], JAVA_1 | {"Content-Type": "application/octet-stream"}
    )
    upload = begun.text("UploadId")
    body, size = bodies[ODD_KEY], 5 << 20
    etags = []
    for n, piece in enumerate((body[:size], body[size:]), start=1):
        about = [("uploadId", upload), ("partNumber", str(n))]
        headers = JAVA_1 | {"Content-Type": "application/octet-stream", "Expect": "100-continue"}
        part = wire.request("PUT", f"/{bucket}/{ODD_KEY}", about, headers, piece, payload=payload)
        assert part.status == 200
        etags.append(part.headers["etag"])
    done = wire.request(
        "POST",
        f"/{bucket}/{ODD_KEY}",
        [("uploadId", upload)],
        JAVA_1 | {"Content-Type": "application/xml"},
        parts_xml(etags),
    )
    assert done.status == 200 and done.text("ETag").strip('"').endswith("-2")
    assert stored(origin, bucket) == digests(bodies)
    assert was_multipart(origin, bucket, ODD_KEY)

    # It gives GET and HEAD a content type, and signs it.
    plain = JAVA_1 | {"Content-Type": "application/octet-stream"}
    for key, body in bodies.items():
        for _ in range(2):
            assert wire.request("GET", f"/{bucket}/{key}", headers=plain).body == body
        head = wire.request("HEAD", f"/{bucket}/{key}", headers=plain)
        assert (head.status, head.headers["content-length"]) == (200, str(len(body)))
    ranged = wire.request("GET", f"/{bucket}/{ODD_KEY}", headers=plain | {"Range": "bytes=100-70099"})
    assert (ranged.status, ranged.body) == (206, bodies[ODD_KEY][100:70_100])
    source = quote(f"/{bucket}/{ODD_KEY}", safe="/")
    copy = wire.request("PUT", f"/{bucket}/copy +é", headers=plain | {"x-amz-copy-source": source})
    assert copy.status == 200 and copy.texts("ETag")
    assert wire.request("DELETE", f"/{bucket}/{ODD_KEY}", headers=plain).status == 204
    assert wire.request("GET", f"/{bucket}/{ODD_KEY}", headers=plain).text("Code") == "NoSuchKey"
    assert stored(origin, bucket)["copy +é"] == sha256(bodies[ODD_KEY])


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 300_001])
def test_java_2_sends_a_trailer(wire: Connection, origin: Any, bucket: str, size: int) -> None:
    """In signed chunks over http and in unsigned ones over https."""
    body = random_bytes(size, 20)
    headers = JAVA_2 | {
        "Content-Encoding": "aws-chunked",
        "Content-Type": "text/x-odd",
        "x-amz-sdk-checksum-algorithm": "CRC32",
        "x-amz-meta-colour": "blue",
        "Expect": "100-continue",
    }
    payload = UNSIGNED_CHUNKS_TRAILER if wire.endpoint.secure else SIGNED_CHUNKS_TRAILER
    trailer = ("x-amz-checksum-crc32", crc32(body))
    put = wire.request("PUT", f"/{bucket}/{ODD_KEY}", (), headers, body, payload=payload, trailer=trailer)
    assert (put.status, put.headers["x-amz-checksum-crc32"]) == (200, crc32(body))
    assert stored(origin, bucket) == {ODD_KEY: sha256(body)}
    for _ in range(2):
        got = wire.request("GET", f"/{bucket}/{ODD_KEY}", headers=JAVA_2 | {"x-amz-checksum-mode": "ENABLED"})
        assert got.body == body and got.headers["x-amz-checksum-crc32"] == crc32(body)
        assert (got.headers["content-type"], got.headers["x-amz-meta-colour"]) == ("text/x-odd", "blue")
        assert "content-encoding" not in got.headers

    wrong = ("x-amz-checksum-crc32", crc32(body + b"x"))
    put = wire.request("PUT", f"/{bucket}/{ODD_KEY}", (), headers, body, payload=payload, trailer=wrong)
    assert (put.status, put.text("Code")) == (400, "BadDigest")
    assert stored(origin, bucket) == {ODD_KEY: sha256(body)}


def test_go_2(endpoint: Endpoint, bucket: str, origin: Any) -> None:
    """It names the operation in the query, and signs that it wants no compression."""
    body = random_bytes(200_000, 21)
    put = GO_2 | {"Content-Type": "application/octet-stream", "x-amz-sdk-checksum-algorithm": "CRC32"}
    with Connection(endpoint) as wire:
        if endpoint.secure:
            answer = wire.request(
                "PUT",
                f"/{bucket}/{ODD_KEY}",
                [("x-id", "PutObject")],
                put | {"Content-Encoding": "aws-chunked"},
                body,
                payload=UNSIGNED_CHUNKS_TRAILER,
                trailer=("x-amz-checksum-crc32", crc32(body)),
                chunk_bytes=64 * 1024,
                not_signed=GO_NOT_SIGNED,
            )
        else:
            headers = put | {"x-amz-checksum-crc32": crc32(body)}
            answer = wire.request(
                "PUT", f"/{bucket}/{ODD_KEY}", [("x-id", "PutObject")], headers, body, not_signed=GO_NOT_SIGNED
            )
        assert answer.status == 200
    assert stored(origin, bucket) == {ODD_KEY: sha256(body)}

    def get(wire: Connection) -> str:
        headers = GO_2 | {"x-amz-checksum-mode": "ENABLED", "Range": "bytes=1000-150999"}
        got = wire.request("GET", f"/{bucket}/{ODD_KEY}", [("x-id", "GetObject")], headers, not_signed=GO_NOT_SIGNED)
        assert (got.status, got.body) == (206, body[1000:151_000])
        return got.cache

    with Connection(endpoint) as wire:
        get(wire)
        eventually(lambda: get(wire) == "hit", "these headers do not keep it from the cache")
        head = wire.request("HEAD", f"/{bucket}/{ODD_KEY}", headers=GO_2, not_signed=GO_NOT_SIGNED)
        assert (head.status, head.headers["content-length"]) == (200, "200000")
        page = wire.request(
            "GET", f"/{bucket}", [("list-type", "2"), ("prefix", "20m +é")], GO_2, not_signed=GO_NOT_SIGNED
        )
        assert page.texts("Key") == [ODD_KEY]
        gone = wire.request(
            "DELETE", f"/{bucket}/{ODD_KEY}", [("x-id", "DeleteObject")], GO_2, not_signed=GO_NOT_SIGNED
        )
        assert gone.status == 204


def test_hadoop_folders(wire: Connection, origin: Any, bucket: str) -> None:
    """S3A: empty keys with a slash for folders, probes with HEAD and a listing of two, renames by copy and bulk delete."""
    java = JAVA_2 | {"User-Agent": "Hadoop 3.4.1, " + JAVA_2["User-Agent"], "Referer": "https://audit.example.org/"}

    def head(key: str) -> int:
        return wire.request("HEAD", f"/{bucket}/{key}", headers=java).status

    def probe(folder: str) -> list[str]:
        about = [
            ("list-type", "2"),
            ("delimiter", "/"),
            ("max-keys", "2"),
            ("prefix", folder),
            ("fetch-owner", "false"),
        ]
        return wire.request("GET", f"/{bucket}", about, java).texts("Key")

    def page(**about: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in about.items()}
        return wire.request("GET", f"/{bucket}", [("list-type", "2"), *named.items()], java)

    assert (head("warehouse"), head("warehouse/"), probe("warehouse/")) == (404, 404, [])
    marker = java | {"Content-Type": "application/x-directory"}
    assert wire.request("PUT", f"/{bucket}/warehouse/", headers=marker).status == 200
    assert (head("warehouse"), head("warehouse/"), probe("warehouse/")) == (404, 200, ["warehouse/"])

    names = [f"warehouse/t/day={day}/part-{n:05}-{INVOCATION}.c000.snappy.parquet" for day in (1, 2) for n in range(3)]
    bodies = {name: random_bytes(3000, n) for n, name in enumerate(names)}
    for name, body in bodies.items():
        # Version 3.4.2 creates a file only where there is none.
        create = java | {"Content-Type": "application/octet-stream", "If-None-Match": "*"}
        assert wire.request("PUT", f"/{bucket}/{name}", (), create, body, payload=UNSIGNED).status == 200
        again = wire.request("PUT", f"/{bucket}/{name}", (), create, b"other", payload=UNSIGNED)
        assert (again.status, again.text("Code")) == (412, "PreconditionFailed")
    assert stored(origin, bucket) == digests(bodies) | {"warehouse/": sha256(b"")}

    assert page(prefix="warehouse/", delimiter="/", max_keys="5000").texts("Prefix") == ["warehouse/", "warehouse/t/"]
    whole = page(prefix="warehouse/t/", max_keys="5000", fetch_owner="false")
    assert whole.texts("Key") == names and whole.text("IsTruncated") == "false"
    assert page(prefix="warehouse/t/", start_after=names[2]).texts("Key") == names[3:]
    first = page(prefix="warehouse/t/", max_keys="4")
    assert first.texts("Key") == names[:4] and first.text("IsTruncated") == "true"
    rest = page(prefix="warehouse/t/", max_keys="4", continuation_token=first.text("NextContinuationToken"))
    assert rest.texts("Key") == names[4:] and rest.text("IsTruncated") == "false"

    # A reader holds on to the version that it opened.
    etag = wire.request("HEAD", f"/{bucket}/{names[0]}", headers=java).headers["etag"]
    opened = java | {"If-Match": etag, "Range": "bytes=2000-2999"}
    assert wire.request("GET", f"/{bucket}/{names[0]}", headers=opened).body == bodies[names[0]][2000:]
    overwritten = java | {"Content-Type": "application/octet-stream"}
    assert wire.request("PUT", f"/{bucket}/{names[0]}", (), overwritten, b"new", payload=UNSIGNED).status == 200
    assert wire.request("GET", f"/{bucket}/{names[0]}", headers=opened).status == 412
    bodies[names[0]] = b"new"

    # A rename: copies, then one bulk delete; a thousand keys are the most that one may have.
    for name in names:
        source = quote(f"{bucket}/{name}", safe="")
        copied = java | {"x-amz-copy-source": source, "x-amz-metadata-directive": "COPY"}
        assert wire.request("PUT", f"/{bucket}/{name.replace('/t/', '/moved +é/')}", headers=copied).status == 200
    doomed = delete_xml([*names, *(f"warehouse/t/&<{n}>é" for n in range(1000 - len(names)))], quiet=True)
    bulk = java | {"Content-Type": "application/xml", "x-amz-sdk-checksum-algorithm": "CRC32"}
    bulk |= {"x-amz-checksum-crc32": crc32(doomed)}
    deleted = wire.request("POST", f"/{bucket}", [("delete", None)], bulk, doomed)
    assert (deleted.status, deleted.texts("Error")) == (200, [])
    assert all(head(name) == 404 for name in names) and probe("warehouse/t/") == []
    moved = {name.replace("/t/", "/moved +é/"): body for name, body in bodies.items()}
    assert stored(origin, bucket) == digests(moved) | {"warehouse/": sha256(b"")}
    for name, body in moved.items():
        assert wire.request("GET", f"/{bucket}/{name}", headers=java).body == body


def test_a_spark_commit_by_uploads_left_open(endpoint: Endpoint, origin: Any, bucket: str) -> None:
    """Magic committer: tasks upload parts, each over a connection of its own; only the driver's completion shows them."""
    name, folder = "out/part-00000.parquet", "out/__magic_job-1/"
    pieces = [random_bytes(5 << 20, 30), random_bytes(100_000, 31)]
    payload = UNSIGNED_CHUNKS_TRAILER if endpoint.secure else SIGNED_CHUNKS_TRAILER
    with Connection(endpoint) as task:
        headers = JAVA_2 | {"Content-Type": "application/octet-stream", "x-amz-checksum-algorithm": "CRC32"}
        upload = task.request("POST", f"/{bucket}/{name}", [("uploads", None)], headers).text("UploadId")
        etags = []
        for n, piece in enumerate(pieces, start=1):
            part = task.request(
                "PUT",
                f"/{bucket}/{name}",
                [("partNumber", str(n)), ("uploadId", upload)],
                JAVA_2 | {"Content-Encoding": "aws-chunked", "x-amz-sdk-checksum-algorithm": "CRC32"},
                piece,
                payload=payload,
                trailer=("x-amz-checksum-crc32", crc32(piece)),
            )
            assert part.status == 200
            etags.append(part.headers["etag"])
        magic = JAVA_2 | {"x-amz-meta-x-hadoop-s3a-magic-data-length": "5342880"}
        assert task.request("PUT", f"/{bucket}/{folder}p0", headers=magic).status == 200
    with Connection(endpoint) as driver:
        assert driver.request("GET", f"/{bucket}/{name}", headers=JAVA_2).status == 404
        marked = driver.request("HEAD", f"/{bucket}/{folder}p0", headers=JAVA_2)
        assert marked.headers["x-amz-meta-x-hadoop-s3a-magic-data-length"] == "5342880"
        pending = driver.request("GET", f"/{bucket}", [("uploads", None), ("prefix", "out/")], JAVA_2)
        assert (pending.texts("Key"), pending.texts("UploadId")) == ([name], [upload])
        listed = driver.request("GET", f"/{bucket}/{name}", [("uploadId", upload)], JAVA_2)
        assert listed.texts("PartNumber") == ["1", "2"]
        body = parts_xml(etags)
        done = driver.request("POST", f"/{bucket}/{name}", [("uploadId", upload)], JAVA_2, body)
        assert done.status == 200 and done.texts("ETag")
        assert driver.request("GET", f"/{bucket}/{name}", headers=JAVA_2).body == b"".join(pieces)
        bulk = JAVA_2 | {"Content-MD5": md5(delete_xml([folder + "p0"], quiet=False))}
        gone = driver.request("POST", f"/{bucket}", [("delete", None)], bulk, delete_xml([folder + "p0"], quiet=False))
        assert gone.texts("Key") == [folder + "p0"]
        # Another task's upload was given up.
        other = driver.request("POST", f"/{bucket}/out/x", [("uploads", None)], JAVA_2).text("UploadId")
        assert driver.request("DELETE", f"/{bucket}/out/x", [("uploadId", other)], JAVA_2).status == 204
        assert driver.request("GET", f"/{bucket}", [("uploads", None)], JAVA_2).texts("Key") == []
    assert stored(origin, bucket) == {name: sha256(b"".join(pieces))}


def test_juicefs(wire: Connection, origin: Any, bucket: str) -> None:
    """Blocks of 4 MiB under numbered names, read by ranges; listings of the first version with a marker."""
    go = {"User-Agent": "JuiceFS/1.2.1 aws-sdk-go/1.44.334 (go1.22; linux; amd64)", "Accept-Encoding": "gzip"}
    not_signed = ("User-Agent", "Accept-Encoding")

    def ask(method: str, key: str, headers: dict[str, str] | None = None, body: bytes = b"", query: Any = ()) -> Any:
        return wire.request(method, f"/{bucket}/{key}", query, go | (headers or {}), body, not_signed=not_signed)

    def names(prefix: str, marker: str = "", limit: str = "1000") -> list[str]:
        query = [("encoding-type", "url"), ("marker", marker), ("max-keys", limit), ("prefix", prefix)]
        return list(ask("GET", "", query=query).texts("Key"))

    # What `juicefs format` tries first.
    assert ask("GET", "myjfs/testing/absent").status == 404
    assert ask("PUT", "myjfs/testing/k +é", body=b"x" * 100).status == 200
    assert ask("GET", "myjfs/testing/k +é", {"Range": "bytes=50-"}).body == b"x" * 50
    assert ask("HEAD", "myjfs/testing/k +é").headers["content-length"] == "100"
    assert ask("DELETE", "myjfs/testing/k +é").status == 204
    assert ask("HEAD", "myjfs/testing/k +é").status == 404
    assert ask("DELETE", "myjfs/testing/k +é").status == 204

    block = 4 << 20
    bodies = {f"myjfs/chunks/0/0/1_{n}_{block}": random_bytes(block, 40 + n) for n in range(2)}
    bodies |= {"myjfs/chunks/0/0/1_2_777": random_bytes(777, 42), "myjfs/juicefs_uuid": INVOCATION.encode()}
    for key, body in bodies.items():
        # Its own checksum of the body travels as metadata and is compared after a whole read.
        meta = {"x-amz-meta-checksum": str(len(body)), "Content-MD5": md5(body)}
        assert ask("PUT", key, meta, body).status == 200
        head = ask("HEAD", key)
        assert (head.headers["content-length"], head.headers["x-amz-meta-checksum"]) == (str(len(body)),) * 2
    assert stored(origin, bucket) == digests(bodies)
    for key, body in bodies.items():
        for start in range(0, len(body), 1_310_720):
            last = min(start + 131_071, len(body) - 1)
            got = ask("GET", key, {"Range": f"bytes={start}-{last}"})
            assert (got.status, got.body) == (206, body[start : last + 1])
        got = ask("GET", key)
        assert got.body == body and "content-encoding" not in got.headers
    eventually(lambda: ask("GET", next(iter(bodies))).cache == "hit", "its headers do not keep it from the cache")

    everything = sorted(bodies)
    assert names("myjfs/") == everything
    assert names("myjfs/", limit="2") == everything[:2]
    assert names("myjfs/chunks/", marker=everything[0]) == everything[1:3]
    roots = ask("GET", "", query=[("delimiter", "/"), ("max-keys", "1000"), ("prefix", "myjfs/")])
    assert roots.texts("Key") == ["myjfs/juicefs_uuid"] and "myjfs/chunks/" in roots.texts("Prefix")
    for key in everything[:3]:
        assert ask("DELETE", key).status == 204
    assert names("myjfs/") == ["myjfs/juicefs_uuid"]
    assert stored(origin, bucket) == digests({"myjfs/juicefs_uuid": INVOCATION.encode()})
