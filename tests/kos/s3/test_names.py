"""Keys and buckets in URLs: what is decoded, what is encoded, and what is left alone."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3 import names


@pytest.mark.parametrize(
    ("key", "encoded"),
    [
        ("plain/key.txt", "plain/key.txt"),
        ("a b+c", "a%20b%2Bc"),
        ("é", "%C3%A9"),
        ("~-._", "~-._"),
        ("//a//../.", "//a//../."),
        ("100%", "100%25"),
        ("a!'()*", "a%21%27%28%29%2A"),
        ("\udce9", "%E9"),
    ],
)
def test_keys_as_aws_encodes_them(key: str, encoded: str) -> None:
    assert names.encode_key(key) == encoded
    assert names.uri_encode(key, False) == encoded.replace("/", "%2F")
    assert names.query_decode(encoded) == names.percent_decode(encoded) == key


@pytest.mark.parametrize(
    ("raw", "decoded"),
    [("/a+b", "/a+b"), ("/a%20b", "/a b"), ("/%2F", "//"), ("/%C3%A9", "/é"), ("/é", "/é"), ("/a/../b", "/a/../b")],
)
def test_paths_are_decoded_and_nothing_else(raw: str, decoded: str) -> None:
    assert names.percent_decode_path(raw) == decoded


@pytest.mark.parametrize("raw", ["/%", "/%1", "/%zz", "/%C3", "/%ff", "/\udcff", "/a%C3%28"])
def test_paths_that_are_no_utf8(raw: str) -> None:
    with pytest.raises(S3Error, match="InvalidURI"):
        names.percent_decode_path(raw)


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a+b", "/a%2Bb"),
        ("/a%2fb", "/a/b"),
        ("/%7E%41", "/~A"),
        ("/é", "/%C3%A9"),
        ("//a/../b//", "//a/../b//"),
        ("/%e9", "/%E9"),
        ("/$:@", "/%24%3A%40"),
    ],
)
def test_canonical_path(raw: str, canonical: str) -> None:
    assert names.canonical_path(raw) == canonical


def test_query() -> None:
    assert names.parse_query("acl&prefix=a+b%20c&&x=1=2&y=&%C3%A9=%ff&z=%zz") == [
        ("acl", ""),
        ("prefix", "a b c"),
        ("x", "1=2"),
        ("y", ""),
        ("é", "\udcff"),
        ("z", "%zz"),
    ]
    assert names.parse_query("") == []


@pytest.mark.parametrize(
    ("path", "host", "domain", "target"),
    [
        ("/", "h", None, (None, None)),
        ("/bucket", "h", None, ("bucket", None)),
        ("/bucket/", "h", None, ("bucket", None)),
        ("/bucket/a/b", "h", None, ("bucket", "a/b")),
        ("/bucket//a", "h", None, ("bucket", "/a")),
        ("/bucket/..", "h", None, ("bucket", "..")),
        ("/bucket%2Fa", "h", None, ("bucket", "a")),
        ("/bucket/a+%2B%20", "h", None, ("bucket", "a++ ")),
        ("/a", "bucket.s3.local", "s3.local", ("bucket", "a")),
        ("//a", "bucket.s3.local:9000", "s3.local", ("bucket", "/a")),
        ("/", "my.bucket.S3.local", "s3.Local", ("my.bucket", None)),
        ("/bucket/a", "s3.local:9000", "s3.local", ("bucket", "a")),
        ("/bucket/a", "[::1]:9000", "s3.local", ("bucket", "a")),
        ("/bucket/a", "[::1]", "s3.local", ("bucket", "a")),
        ("/bucket/a", "evils3.local", "s3.local", ("bucket", "a")),
        ("/bucket/a", "", "s3.local", ("bucket", "a")),
    ],
)
def test_targets(path: str, host: str, domain: str | None, target: tuple[str | None, str | None]) -> None:
    assert names.split_target(path, host, domain) == target


@pytest.mark.parametrize("bucket", ["abc", "b", "a-b.c", "A_b", "0" * 255, "xn--a"])
def test_bucket_names(bucket: str) -> None:
    names.check_bucket(bucket)


@pytest.mark.parametrize("bucket", ["", "..", "...", ".abc", "-abc", "a/b", "a b c", "é12", "a" * 256, "abc\n"])
def test_bucket_names_that_are_none(bucket: str) -> None:
    with pytest.raises(S3Error, match="InvalidBucketName"):
        names.check_bucket(bucket)


def test_key_length_counts_bytes() -> None:
    names.check_key("k" * 1024)
    names.check_key("é" * 512)
    for key in ("k" * 1025, "é" * 513):
        with pytest.raises(S3Error, match="KeyTooLongError") as caught:
            names.check_key(key)
        assert caught.value.extra["MaxSizeAllowed"] == "1024"


def test_a_path_without_a_slash() -> None:
    with pytest.raises(S3Error, match="InvalidURI"):
        names.split_target("http://h/bucket", "h", None)
