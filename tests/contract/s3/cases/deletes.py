"""DeleteObjects: many keys at once."""

from __future__ import annotations

from tests.contract.s3.cases.keys import KEYS
from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene


def _delete(s: Scene, keys: list[str], **settings: bool) -> None:
    s.call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], **settings})


@each({"loud": {}, "quiet": {"Quiet": True}, "not quiet": {"Quiet": False}})
def several(s: Scene, settings: dict[str, bool]) -> None:
    for key in ("a", "b", "c/d"):
        s.put(key)
        s.get(key)
    _delete(s, ["a", "c/d", "missing"], **settings)
    for key in ("a", "b", "c/d"):
        s.get(key)
    s.keys()


@case
def the_same_twice(s: Scene) -> None:
    s.put()
    _delete(s, ["k", "k"])
    s.get()


@case
def odd_keys(s: Scene) -> None:
    # No control characters: XML 1.0, which this request is written in, has none.
    odd = [key for key in KEYS.values() if key.isprintable()]
    for key in odd[::4]:
        s.put(key)
        s.get(key)
    _delete(s, odd)
    for key in odd[::4]:
        s.get(key)
    s.keys()


@case
def a_thousand(s: Scene) -> None:
    s.put("k/0007")
    s.get("k/0007")
    _delete(s, [f"k/{n:04}" for n in range(1000)], Quiet=True)
    s.get("k/0007")


@case
def a_thousand_and_one(s: Scene) -> None:
    _delete(s, [f"k/{n:04}" for n in range(1001)], Quiet=True)


@each({"enabled": "Enabled", "suspended": "Suspended"})
def of_versions(s: Scene, status: str) -> None:
    s.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
    first = s.put(body=b"first")["VersionId"]
    second = s.put(body=b"second")["VersionId"]
    s.call("put_bucket_versioning", VersioningConfiguration={"Status": status})
    s.get()
    _delete(s, ["k"])
    s.get()
    s.get(VersionId=first)
    s.call("delete_objects", Delete={"Objects": [{"Key": "k", "VersionId": second}]})
    s.get(VersionId=second)
    s.call("list_object_versions")


@case
def with_conditions(s: Scene) -> None:
    etag = s.put()["ETag"]
    s.get()
    s.call("delete_objects", Delete={"Objects": [{"Key": "k", "ETag": '"other"'}]})
    s.get()
    s.call("delete_objects", Delete={"Objects": [{"Key": "k", "ETag": etag}]})
    s.get()


@each(
    {
        "nothing": b"",
        "no XML": b"delete k",
        "broken XML": b"<Delete><Object><Key>k</Key>",
        "another root": b"<Remove><Object><Key>k</Key></Object></Remove>",
        "no objects": b"<Delete></Delete>",
        "no key": b"<Delete><Object></Object></Delete>",
        "with namespace": b'<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Object><Key>k</Key></Object></Delete>',
        "with blanks": b"<Delete>\n <Object>\n  <Key>k</Key>\n </Object>\n</Delete>",
        "with entities": b"<Delete><Object><Key>&#107;</Key></Object></Delete>",
    }
)
def document(s: Scene, body: bytes) -> None:
    import base64
    import hashlib

    s.put()
    s.get()
    md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
    s.raw("POST", "?delete", headers={"Content-MD5": md5}, body=body)
    s.get()


@case
def without_a_digest(s: Scene) -> None:
    s.put()
    s.raw("POST", "?delete", body=b"<Delete><Object><Key>k</Key></Object></Delete>")
    s.get()


@case
def in_no_bucket(s: Scene) -> None:
    s.call("delete_objects", Bucket="no-such-bucket-here", Delete={"Objects": [{"Key": "k"}]})
