"""Buckets and everything that can be set about them. kos decides none of this: it is passed on, and answers come back."""

from __future__ import annotations

import json
from typing import Any

from tests.contract.s3.registry import case, each
from tests.contract.s3.scene import Scene


@case
def create_head_delete(s: Scene) -> None:
    name = f"{s.bucket}-new"
    s.call("head_bucket", Bucket=name)
    s.call("create_bucket", Bucket=name)
    s.call("head_bucket", Bucket=name)
    s.call("get_bucket_location", Bucket=name)
    s.call("list_objects_v2", Bucket=name)
    s.call("delete_bucket", Bucket=name)
    s.call("head_bucket", Bucket=name)
    s.call("list_objects_v2", Bucket=name)
    s.call("delete_bucket", Bucket=name)


@case
def create_again(s: Scene) -> None:
    s.put()
    s.call("create_bucket")
    s.call("create_bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s.get()


@each(
    {
        "location": {"CreateBucketConfiguration": {"LocationConstraint": "eu-central-1"}},
        "unknown location": {"CreateBucketConfiguration": {"LocationConstraint": "nowhere"}},
        "acl": {"ACL": "public-read"},
        "ownership": {"ObjectOwnership": "BucketOwnerEnforced"},
    }
)
def create(s: Scene, arguments: dict[str, Any]) -> None:
    name = f"{s.bucket}-new"
    s.call("create_bucket", Bucket=name, **arguments)
    s.call("get_bucket_location", Bucket=name)
    s.call("head_bucket", Bucket=name)


@case
def delete_what_is_not_empty(s: Scene) -> None:
    s.put()
    s.call("delete_bucket")
    s.get()
    s.delete()
    s.call("delete_bucket")
    s.get()


@case
def create_after_delete(s: Scene) -> None:
    s.put()
    s.get()
    s.delete()
    s.call("delete_bucket")
    s.get()
    s.call("create_bucket")
    s.get()
    s.put(body=b"in the new one")
    s.get()


@case
def list_buckets(s: Scene) -> None:
    listed = s.client.list_buckets(Prefix=s.bucket)
    s.note("list_buckets", [one["Name"] for one in listed["Buckets"]])
    s.note("owner", listed["Owner"])
    s.client.create_bucket(Bucket=f"{s.bucket}-2")
    s.note("list_buckets", [one["Name"] for one in s.client.list_buckets(Prefix=s.bucket)["Buckets"]])


@each({"two letters": "ab", "capitals": "Capitals", "underscore": "under_score", "dots": "a..b", "address": "10.1.2.3",
       "64 letters": "b" * 64, "dash at the end": "dash-", "blank": "a%20b", "star": "a*b"})  # fmt: skip
def name(s: Scene, name: str) -> None:
    s.raw_service("PUT", f"/{name}")
    s.raw_service("GET", f"/{name}?list-type=2&max-keys=1")


@each({method: method for method in ("POST", "PATCH", "FROB", "DELETE", "PUT")})
def method_on_the_service(s: Scene, method: str) -> None:
    s.raw_service(method, "/")


@each({method: method for method in ("POST", "PATCH", "OPTIONS")})
def method_on_a_bucket(s: Scene, method: str) -> None:
    s.raw(method, "")


READS = (
    "get_bucket_accelerate_configuration", "get_bucket_acl", "get_bucket_cors", "get_bucket_encryption",
    "get_bucket_lifecycle_configuration", "get_bucket_location", "get_bucket_logging",
    "get_bucket_notification_configuration", "get_bucket_ownership_controls", "get_bucket_policy",
    "get_bucket_policy_status", "get_bucket_replication", "get_bucket_request_payment", "get_bucket_tagging",
    "get_bucket_versioning", "get_bucket_website", "get_object_lock_configuration", "get_public_access_block",
    "list_bucket_analytics_configurations", "list_bucket_inventory_configurations",
    "list_bucket_metrics_configurations", "list_bucket_intelligent_tiering_configurations",
)  # fmt: skip


@each({operation: operation for operation in READS})
def nothing_set(s: Scene, operation: str) -> None:
    s.call(operation)
    s.call(operation, Bucket="no-such-bucket-here")


QUEUE = {"Id": "q", "QueueArn": "arn:aws:sqs:us-east-1:123456789012:q", "Events": ["s3:ObjectCreated:*"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "bucket_versioning": {"VersioningConfiguration": {"Status": "Enabled"}},
    "bucket_tagging": {"Tagging": {"TagSet": [{"Key": "a", "Value": "b c"}]}},
    "bucket_cors": {
        "CORSConfiguration": {
            "CORSRules": [{"AllowedMethods": ["GET", "PUT"], "AllowedOrigins": ["https://a.example"], "MaxAgeSeconds": 5}]
        }
    },
    "bucket_lifecycle_configuration": {
        "LifecycleConfiguration": {
            "Rules": [{"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "tmp/"}, "Expiration": {"Days": 3}}]
        }
    },
    "bucket_policy": {
        "Policy": json.dumps(
            {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "*"}]}
        )
    },
    "bucket_acl": {"ACL": "public-read"},
    "bucket_encryption": {
        "ServerSideEncryptionConfiguration": {
            "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
        }
    },
    "bucket_website": {
        "WebsiteConfiguration": {"IndexDocument": {"Suffix": "index.html"}, "ErrorDocument": {"Key": "error.html"}}
    },
    "bucket_logging": {"BucketLoggingStatus": {}},
    "bucket_notification_configuration": {"NotificationConfiguration": {"QueueConfigurations": [QUEUE]}},
    "bucket_ownership_controls": {"OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerPreferred"}]}},
    "public_access_block": {
        "PublicAccessBlockConfiguration": {
            "BlockPublicAcls": True, "IgnorePublicAcls": False, "BlockPublicPolicy": True, "RestrictPublicBuckets": False,
        }
    },
    "bucket_accelerate_configuration": {"AccelerateConfiguration": {"Status": "Enabled"}},
    "bucket_request_payment": {"RequestPaymentConfiguration": {"Payer": "Requester"}},
    "bucket_replication": {
        "ReplicationConfiguration": {
            "Role": "arn:aws:iam::123456789012:role/r",
            "Rules": [{"ID": "r", "Status": "Enabled", "Prefix": "", "Destination": {"Bucket": "arn:aws:s3:::elsewhere"}}],
        }
    },
}  # fmt: skip


@each(SETTINGS)
def setting(s: Scene, arguments: dict[str, Any]) -> None:
    # The setting's name is the one that has these arguments.
    name = next(name for name, known in SETTINGS.items() if known is arguments)
    s.put()
    s.get()
    s.call(f"put_{name}", **arguments)
    s.call(f"get_{name}")
    remove = {"bucket_lifecycle_configuration": "bucket_lifecycle"}.get(name, name)
    if hasattr(s.client, f"delete_{remove}"):
        s.call(f"delete_{remove}")
        s.call(f"get_{name}")
    s.get()


@each(
    {
        "metrics": "metrics",
        "analytics": "analytics",
        "inventory": "inventory",
        "intelligent tiering": "intelligent-tiering",
    }
)
def setting_by_id(s: Scene, name: str) -> None:
    s.raw("GET", f"?{name}&id=one")
    s.raw("DELETE", f"?{name}&id=one")


@each({"abac": "abac", "metadata": "metadataConfiguration", "unknown": "colour", "unknown with value": "colour=blue"})
def newer_setting(s: Scene, query: str) -> None:
    s.raw("GET", f"?{query}")


@each({"versioning": "versioning", "tagging": "tagging", "cors": "cors", "lifecycle": "lifecycle", "acl": "acl"})
def setting_in_bad_form(s: Scene, name: str) -> None:
    s.raw("PUT", f"?{name}", body=b"<Broken")


@case
def cors_preflight(s: Scene) -> None:
    rules = SETTINGS["bucket_cors"]
    s.put()
    s.call("put_bucket_cors", **rules)
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    s.raw("OPTIONS", "/k", headers=asked)
    s.raw("GET", "/k", headers={"Origin": "https://a.example"})
    s.raw("GET", "/k", headers={"Origin": "https://b.example"})


@case
def expected_owner(s: Scene) -> None:
    for owner in ("123456789012", "999999999999"):
        s.call("head_bucket", ExpectedBucketOwner=owner)
        s.call("list_objects_v2", ExpectedBucketOwner=owner)


@case
def default_encryption_shows_on_objects(s: Scene) -> None:
    s.call("put_bucket_encryption", **SETTINGS["bucket_encryption"])
    s.put()
    s.head()
    s.get()


@case
def session(s: Scene) -> None:
    s.raw("GET", "?session")
