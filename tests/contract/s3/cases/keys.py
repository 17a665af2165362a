"""Keys as odd as they may be: each goes through a PUT, reads, a copy, a listing and a delete."""

from __future__ import annotations

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

KEYS = {
    "blank": "a b",
    "blanks at ends": " a ",
    "plus": "a+b",
    "percent": "100%",
    "percent that looks encoded": "a%41%2Fb",
    "clients' own": "20m +é&=.bin",
    "equals and ampersand": "a=b&c=d",
    "question mark": "a?b",
    "hash": "a#b",
    "colon and semicolon": "a:b;c",
    "comma": "a,b",
    "at": "a@b",
    "quotes": "'a\"b'",
    "brackets": "[a](b){c}<d>",
    "backslash": "a\\b",
    "pipe and caret": "a|b^c`d",
    "tilde and star": "~a*!",
    "dollar": "$a",
    "umlauts": "grüße/ärger",
    "japanese": "日本語/テスト",
    "emoji": "\N{SLIGHTLY SMILING FACE}/\N{PILE OF POO}",
    "combining": "e\u0301",
    "right to left": "שלום",
    "one slash between": "a/b/c",
    "two slashes": "a//b",
    "three slashes": "///a///",
    "leading slash": "/a",
    "only a slash": "/",
    "trailing slash": "a/",
    "dot": ".",
    "dots": "..",
    "dot segment": "a/./b",
    "dots segment": "a/../b",
    "leading dots": "../a",
    "tab": "a\tb",
    "newline": "a\nb",
    "escape": "a\x1bb",
    "delete": "a\x7fb",
    "next line": "a\x85b",
    "one letter": "x",
    "looks like a query": "k?versionId=1",
    "named like a sub-resource": "acl",
    "deep": "/".join("d" * 100),
    "1024 bytes": "k" * 1024,
    "1024 bytes of umlauts": "ü" * 512,
}


@each(KEYS)
def key(s: Scene, key: str) -> None:
    s.put(key, b"under an odd key")
    s.get(key)
    s.head(key)
    s.call("list_objects_v2")
    s.call("list_objects", Prefix=key)
    copy = f"copies/{key}" if len(key.encode()) < 1000 else "copy"
    s.call("copy_object", Key=copy, CopySource={"Bucket": s.bucket, "Key": key})
    s.get(copy)
    s.delete(key)
    s.get(key)


@case
def too_long(s: Scene) -> None:
    for text in ("k" * 1025, "ü" * 513):
        s.put(text)
        s.get(text)
        s.head(text)
        s.delete(text)
        s.call("copy_object", Key=text, CopySource={"Bucket": s.bucket, "Key": "k"})
        s.call("create_multipart_upload", Key=text)


@case
def not_normalized(s: Scene) -> None:
    """Each is an object of its own."""
    for text in ("a/b", "a//b", "a/./b", "a/../b", "A/b", "a/b/", "/a/b"):
        s.put(text, text.encode())
    for text in ("a/b", "a//b", "a/./b", "a/../b", "A/b", "a/b/", "/a/b", "b"):
        s.get(text)
    s.keys()


@each(
    {
        "lower-case escapes": "/a%c3%bcb",
        "more escaped than needed": "/%61%c3%bc%62",
        "unreserved escaped": "/a%C3%BC%62",
    }
)
def written_in_another_way(s: Scene, sent: str) -> None:
    s.put("aüb")
    s.raw("GET", "/a%C3%BCb", sent=sent)
    s.raw("HEAD", "/a%C3%BCb", sent=sent)


@each({"broken escape": "/a%zz", "cut escape": "/a%4", "not UTF-8": "/a%ff%fe"})
def not_readable(s: Scene, target: str) -> None:
    s.raw("GET", target)
    s.raw("PUT", target, body=b"x")
