"""docs/s3-compatibility.md says of every operation, bypass reason and error code what the code does."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from kos.errors import S3_CODES, S3Error
from kos.s3 import aws_chunked, listing, names, operation, xml
from kos.s3.head import RequestHead
from kos.s3.operation import Handling, Op
from koscache.carrier import Reason

PAGE = Path(__file__).parents[2] / "docs" / "s3-compatibility.md"
TEXT = PAGE.read_text()

_REQUEST = re.compile(r"`(?P<method>[A-Z]+) (?P<target>/\S*)`(?: with `(?P<header>[a-z-]+)`)?")


def rows(*heading: str) -> list[list[str]]:
    """The cells of all tables whose first columns are called so."""
    found: list[list[str]] = []
    inside = False
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif tuple(cells[: len(heading)]) == heading:
            inside = True
        elif inside and not set(line) <= set("|-"):
            found.append(cells)
    return found


class Row(NamedTuple):
    operation: str
    head: RequestHead
    handling: str

    def __str__(self) -> str:
        query = f"?{self.head.raw_query}" if self.head.raw_query else ""
        return f"{self.head.method} {self.head.raw_path}{query}"


def _operations() -> list[Row]:
    made: list[Row] = []
    for name, request, handling, *_ in rows("operation", "request", "handling"):
        match = _REQUEST.fullmatch(request)
        assert match is not None, request
        path, _, query = match["target"].partition("?")
        # A bucket's name has more than a letter to be one with every store.
        path = re.sub("^/B(?=/|$)", "/bucket", path)
        headers = {"host": "kos"} | ({match["header"]: "bucket/source"} if match["header"] else {})
        made.append(Row(name, RequestHead(match["method"], path, query, headers), handling))
    return made


OPERATIONS = _operations()


@pytest.mark.parametrize("row", OPERATIONS, ids=str)
def test_a_request_is_the_operation_that_the_page_says(row: Row) -> None:
    if row.handling == "refused":
        with pytest.raises(S3Error):
            operation.parse(row.head)
        return
    parsed = operation.parse(row.head)
    assert (parsed.op.name, parsed.handling.value) == (row.operation, row.handling)
    assert parsed.bypass_reason is None


def test_every_operation_and_every_way_to_handle_one_is_there() -> None:
    named = {row.operation for row in OPERATIONS if row.handling != "refused"}
    assert named == {op.name for op in Op}
    ways = {cells[0] for cells in rows("handling")}
    assert ways == {handling.value for handling in Handling} | {"refused"}
    assert {row.handling for row in OPERATIONS} == ways


def test_every_sub_resource_is_there() -> None:
    queries = {row.head.raw_query.partition("=")[0] for row in OPERATIONS} | {
        piece.partition("=")[0] for row in OPERATIONS for piece in row.head.raw_query.split("&")
    }
    tables = (operation._OBJECT, operation._BUCKET)
    assert {name for table in tables for entries in table.values() for name, _, _ in entries} <= queries
    said = TEXT[TEXT.index("Settings of a bucket") :].partition("They act")[0]
    settings = set(re.findall(r"`([A-Za-z-]+)`", said))
    assert settings == set(operation._BUCKET_SETTINGS)
    for name in sorted(settings):
        for method, op, handling in (
            ("GET", Op.BucketSubresourceRead, Handling.FORWARD),
            ("HEAD", Op.BucketSubresourceRead, Handling.FORWARD),
            ("PUT", Op.BucketSubresourceWrite, Handling.WRITE),
            ("DELETE", Op.BucketSubresourceWrite, Handling.WRITE),
        ):
            parsed = operation.parse(RequestHead(method, "/bucket", name, {"host": "kos"}))
            assert (parsed.op, parsed.handling) == (op, handling), name


def _bypass_reasons(module: ModuleType) -> set[str]:
    """Texts that a module returns from, or assigns to, something called a bypass reason."""
    found = set(module._BYPASS_HEADERS.values())
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        values: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef) and "bypass_reason" in node.name:
            values += [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
        if isinstance(node, ast.Assign) and any("bypass" in ast.unparse(target) for target in node.targets):
            values += [node.value]
        for value in values:
            found |= {
                inner.value
                for inner in ast.walk(value)
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
            }
    return found


def test_every_reason_is_there() -> None:
    told = {cells[0].strip("`"): cells[1] for cells in rows("reason", "phase")}
    # What the origin refused is told by the handlers of reads, not by the carrier.
    known = _bypass_reasons(operation) | _bypass_reasons(listing) | {reason.value for reason in Reason} | {"refused"}
    assert {"unknown_parameter", "repeated_parameter", "reserved_key", "sse_c", "list_type"} <= known
    assert told.keys() == known
    for reason in _bypass_reasons(operation) | _bypass_reasons(listing):
        assert told[reason] == "bypass", reason


def test_every_error_code_is_there_with_its_status() -> None:
    told = {cells[0]: int(cells[1]) for cells in rows("code", "status")}
    assert told == {code: status for code, (status, _) in S3_CODES.items()}
    assert all(cells[2] for cells in rows("code", "status"))


def test_the_limits_are_those_of_the_code() -> None:
    told = {cells[0]: cells[1] for cells in rows("what", "limit")}
    assert told["key"].startswith(f"{names.KEY_MAX_BYTES:,}".replace(",", " ") + " bytes")
    assert told["keys in one DeleteObjects"].startswith(f"{xml.KEYS_MAX:,}".replace(",", " "))
    assert f"{xml.DELETE_REQUEST_MAX_BYTES >> 20} MiB" in told["keys in one DeleteObjects"]
    assert told["one PUT or part"] == f"{aws_chunked.BODY_MAX_BYTES >> 30} GiB"
