"""Who may import whom, read from the source: the layout of the project as a test.

Counts imports inside functions too, except for koscli, which imports the rest lazily; and not those under TYPE_CHECKING
when the rule is about what is loaded (botocore, uvloop, aiohttp.web), for those load nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kos", "koscache", "kosproxy", "koscli", "mirror", "bench")

#: package -> what of the project it may import; a prefix allows everything below it
ALLOWED = {
    "kos.s3": {"kos.s3", "kos.errors"},
    "kos": {"kos"},
    "koscache": {"kos", "koscache"},
    "mirror": {"kos", "mirror"},
    "kosproxy": {"kos", "kosproxy", "koscache.reader", "koscache.carrier"},
    "koscli": {"kos", "koscli"},
}
#: koscli imports these inside functions only
LAZY = {"koscli": {"koscache", "kosproxy", "mirror"}}

#: libraries that kos.s3 may use: checksums in C, nothing that does I/O
S3_LIBRARIES = {"awscrt", "xxhash"}

#: library -> modules that may import it; a prefix allows everything below it
CONFINED = {
    "botocore": {"kos.origin", "koscli.demo", "bench"},
    "aiobotocore": {"kos.origin"},
    "boto3": {"koscli.demo", "bench"},
    "moto": {"koscli.demo", "bench"},
    "aiohttp.web": {"kosproxy", "kos.node.admin", "bench"},
    "uvloop": {"kosproxy.worker", "koscache.daemon_main", "kos.node", "bench"},
    "lmdb": {"koscache", "bench"},
    "sqlalchemy": {"kos.control"},
    "alembic": {"kos.control"},
    "asyncpg": {"kos.control"},
    "aiosqlite": {"kos.control"},
    "uhashring": {"koscache.cluster.ring"},
}


@dataclass(frozen=True)
class Import:
    """module imports target. lazy: inside a function. typing: under TYPE_CHECKING."""

    module: str
    target: str
    lazy: bool
    typing: bool


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports_of(module: str, path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, lazy, typing)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                    parts = package.split(".")
                    base = ".".join([*parts[: len(parts) - child.level + 1], *([base] if base else [])])
                # `from kos import config` imports kos.config; `from kos.config import Rule` imports no kos.config.Rule,
                # but a longer name is under the same prefix, so it does no harm.
                for alias in child.names:
                    yield Import(module, f"{base}.{alias.name}", lazy, typing)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, True, typing)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for inner in child.body:
                    yield from walk(ast.Module([inner], []), lazy, True)
                for inner in child.orelse:
                    yield from walk(ast.Module([inner], []), lazy, typing)
            else:
                yield from walk(child, lazy, typing)

    yield from walk(ast.parse(path.read_text(), str(path)), False, False)


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def allowed_for(module: str, lazy: bool) -> set[str] | None:
    owner = next((name for name in ALLOWED if within(module, {name})), None)
    if owner is None:
        return None
    return ALLOWED[owner] | (LAZY.get(owner, set()) if lazy else set())


def faults(imported: Import) -> Iterator[str]:
    where = f"{imported.module} imports {imported.target}"
    top = imported.target.partition(".")[0]
    if top in PACKAGES:
        allowed = allowed_for(imported.module, imported.lazy)
        # `from kos import x` for a name of the package itself (kos.__version__) is within it.
        if allowed is not None and not within(imported.target, allowed):
            yield f"{where}; allowed: {sorted(allowed)}"
    elif within(imported.module, {"kos.s3"}) and top not in sys.stdlib_module_names | S3_LIBRARIES:
        yield f"{where}; allowed: the standard library, {sorted(S3_LIBRARIES)}"
    for library, owners in CONFINED.items():
        if within(imported.target, {library}) and not imported.typing and not within(imported.module, owners):
            yield f"{where}; only {sorted(owners)} may"


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports(module: str, path: Path) -> None:
    assert [fault for imported in imports_of(module, path) for fault in faults(imported)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kos.s3.xml", "import msgspec"),
        ("kos.s3.xml", "from kos import config"),
        ("kos.s3.xml", "from ..config import Rule"),
        ("kos.rules", "from koscache.content import Record"),
        ("kos.rules", "def f():\n    import koscache"),
        ("koscache.store", "from kosproxy import server"),
        ("koscache.store", "import botocore.session"),
        ("koscache.store", "from aiohttp import web"),
        ("koscache.store", "import uvloop"),
        ("kosproxy.server", "from koscache.store import Store"),
        ("koscli.up", "from koscache.explain import explainer"),
        ("mirror.feed", "import koscache.reader"),
    ],
)
def test_the_test_finds_what_it_is_for(tmp_path: Path, module: str, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [fault for imported in imports_of(module, path) for fault in faults(imported)]
