"""Tags of objects, legal holds, retention and locks: what is kept beside an object and shown with it."""

from __future__ import annotations

import datetime
from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene

UNTIL = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)


def _tags(**pairs: str) -> dict[str, Any]:
    return {"TagSet": [{"Key": key, "Value": value} for key, value in pairs.items()]}


@case
def tags(s: Scene) -> None:
    s.put()
    s.get()
    s.call("get_object_tagging", Key="k")
    s.call("put_object_tagging", Key="k", Tagging=_tags(a="1", b="c d+e"))
    s.call("get_object_tagging", Key="k")
    s.get()
    s.head()
    s.call("put_object_tagging", Key="k", Tagging=_tags(z="2"))
    s.get()
    s.call("delete_object_tagging", Key="k")
    s.call("get_object_tagging", Key="k")
    s.get()
    s.head()


@each(
    {
        "none": {"TagSet": []},
        "the same key twice": {"TagSet": [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]},
        "eleven": _tags(**{f"k{n}": "v" for n in range(11)}),
        "long key": _tags(**{"k" * 129: "v"}),
        "long value": _tags(k="v" * 257),
        "reserved": {"TagSet": [{"Key": "aws:own", "Value": "v"}]},
        "beyond ASCII": _tags(größe="schön"),
        "empty value": _tags(k=""),
        "odd characters": {"TagSet": [{"Key": "a:b/c=d", "Value": "+-@_. "}]},
        "forbidden characters": {"TagSet": [{"Key": "a&b", "Value": "<>"}]},
    }
)
def tag_set(s: Scene, tagging: dict[str, Any]) -> None:
    s.put()
    s.call("put_object_tagging", Key="k", Tagging=tagging)
    s.call("get_object_tagging", Key="k")
    s.get()


@each({"one": "a=1", "two": "a=1&b=2", "escaped": "a%20b=c%26d", "no value": "a", "empty": "", "plus": "a=b+c"})
def tags_in_a_header(s: Scene, text: str) -> None:
    s.raw("PUT", "/k", headers={"x-amz-tagging": text}, body=b"x")
    s.call("get_object_tagging", Key="k")
    s.head()


@case
def tags_of_what_is_missing(s: Scene) -> None:
    s.call("get_object_tagging", Key="missing")
    s.call("put_object_tagging", Key="missing", Tagging=_tags(a="1"))
    s.call("delete_object_tagging", Key="missing")


@case
def tags_in_bad_form(s: Scene) -> None:
    s.put()
    for body in (b"", b"tags", b"<Tagging>", b"<Other/>"):
        s.raw("PUT", "/k?tagging", body=body)
    s.get()


@case
def locked_bucket(s: Scene) -> None:
    bucket = f"{s.bucket}-lock"
    s.call("create_bucket", Bucket=bucket, ObjectLockEnabledForBucket=True)
    s.call("get_object_lock_configuration", Bucket=bucket)
    s.call("get_bucket_versioning", Bucket=bucket)
    rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
    s.call("put_object_lock_configuration", Bucket=bucket, ObjectLockConfiguration=rule)
    s.call("get_object_lock_configuration", Bucket=bucket)


@case
def no_lock_wanted(s: Scene) -> None:
    s.call("create_bucket", Bucket=f"{s.bucket}-free", ObjectLockEnabledForBucket=False)
    s.call("get_object_lock_configuration", Bucket=f"{s.bucket}-free")


def _locked(s: Scene, **arguments: Any) -> tuple[str, str]:
    bucket = f"{s.bucket}-lock"
    s.call("create_bucket", Bucket=bucket, ObjectLockEnabledForBucket=True)
    version = s.call("put_object", Bucket=bucket, Key="k", Body=b"held", **arguments)["VersionId"]
    return bucket, version


@case
def legal_hold(s: Scene) -> None:
    bucket, version = _locked(s)
    s.call("get_object", Bucket=bucket, Key="k")
    s.call("get_object_legal_hold", Bucket=bucket, Key="k")
    for status in ("ON", "OFF"):
        s.call("put_object_legal_hold", Bucket=bucket, Key="k", LegalHold={"Status": status})
        s.call("get_object_legal_hold", Bucket=bucket, Key="k")
        s.call("get_object", Bucket=bucket, Key="k")
        s.call("head_object", Bucket=bucket, Key="k")
        s.call("get_object", Bucket=bucket, Key="k", VersionId=version)
        s.call("delete_object", Bucket=bucket, Key="k", VersionId=version)
        s.call("get_object", Bucket=bucket, Key="k", VersionId=version)


@each({"GOVERNANCE": "GOVERNANCE", "COMPLIANCE": "COMPLIANCE"})
def retention(s: Scene, mode: str) -> None:
    bucket, version = _locked(s)
    s.call("get_object_retention", Bucket=bucket, Key="k")
    s.call("put_object_retention", Bucket=bucket, Key="k", Retention={"Mode": mode, "RetainUntilDate": UNTIL})
    s.call("get_object_retention", Bucket=bucket, Key="k")
    s.call("get_object", Bucket=bucket, Key="k")
    s.call("delete_object", Bucket=bucket, Key="k", VersionId=version)
    s.call("delete_object", Bucket=bucket, Key="k", VersionId=version, BypassGovernanceRetention=True)
    s.call("get_object", Bucket=bucket, Key="k", VersionId=version)


@case
def held_from_the_start(s: Scene) -> None:
    bucket, version = _locked(
        s, ObjectLockMode="GOVERNANCE", ObjectLockRetainUntilDate=UNTIL, ObjectLockLegalHoldStatus="ON"
    )
    s.call("head_object", Bucket=bucket, Key="k")
    s.call("get_object", Bucket=bucket, Key="k")
    s.call("delete_object", Bucket=bucket, Key="k", VersionId=version)
    s.call("delete_object", Bucket=bucket, Key="k")
    s.call("get_object", Bucket=bucket, Key="k")


@case
def lock_in_a_bucket_without(s: Scene) -> None:
    s.put()
    s.call("put_object_legal_hold", Key="k", LegalHold={"Status": "ON"})
    s.call("get_object_legal_hold", Key="k")
    s.call("put_object_retention", Key="k", Retention={"Mode": "GOVERNANCE", "RetainUntilDate": UNTIL})
    s.call("get_object_retention", Key="k")
    s.call("get_object_lock_configuration")
    s.get()
