"""The kos command: which commands there are, what they say, what they exit with."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kos
from koscli import admin_client, explain, status
from koscli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs" / "kos.yaml"

EXPLAINED = {
    "bucket": "b",
    "key": "a/b",
    "rule": {
        "index": 0,
        "match": "b/*",
        "freshness": "30s",
        "stale_if_error": "1h",
        "why": "rules[0] is the first whose glob matches bucket and key",
    },
    "freshness": "fresh",
    "record": {
        "etag": '"e"',
        "size": 50,
        "last_modified": "Tue, 01 Jan 2030 00:00:00 GMT",
        "validated_at": "2030-01-01T00:00:00.000Z",
        "age_s": 3.25,
        "checksums": {},
    },
    "blocks": {"block_bytes": 10, "count": 5, "cached": 3, "cached_runs": [[0, 2], [4, 5]]},
    "next_get": "miss of blocks",
}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"kos {kos.__version__}\n"


def test_check_config_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(EXAMPLE)]) == 0
    assert "good: region city-a" in capsys.readouterr().out


def test_check_config_of_a_bad_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kos.yaml"
    path.write_text(EXAMPLE.read_text().replace("size: 100GiB", "size: 100Gb"))
    assert main(["check-config", str(path)]) == 2
    assert "cache.size: found '100Gb', allowed: bytes with unit KiB MiB GiB TiB" in capsys.readouterr().err


def test_up_with_a_bad_configuration_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["check-config"], ["explain", "bucket/key"], ["explain", "s3://bucket"]]
)
def test_asked_wrongly(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_module(name: str) -> None:
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 1 on loopback: nothing listens there.
    assert main(["explain", "s3://b/k", "--admin", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "kos explain: http://127.0.0.1:1: no answer: [Errno 111] Connection refused\n"
    assert main(["status", "--admin", "http://127.0.0.1:1"]) == 1


def test_objects() -> None:
    assert explain.object_of("s3://b/a//b c%20") == ("b", "a//b c%20")


def test_explain_for_people() -> None:
    assert explain.text(EXPLAINED).splitlines() == [
        "object    s3://b/a/b",
        'rule      match "b/*", freshness 30s, stale if error 1h',
        "          rules[0] is the first whose glob matches bucket and key",
        'record    ETag "e", 50 bytes, last modified Tue, 01 Jan 2030 00:00:00 GMT',
        "age       3.2 s, validated at 2030-01-01T00:00:00.000Z (fresh)",
        "blocks    3 of 5 cached, 10 bytes each: 0-1, 4",
        "next GET  miss of blocks",
    ]
    unknown = explain.text({**EXPLAINED, "record": None, "blocks": None})
    assert "record    none" in unknown


def test_status_for_people() -> None:
    part = {"name": "worker-0", "state": "dead", "pid": None, "restarts": 2, "reason": "killed by SIGKILL"}
    text = status.text(
        {
            "role": "node",
            "region": "r",
            "version": "1",
            "ready": False,
            "state": "starting",
            "listen": {"s3": "127.0.0.1:9000", "s3_tls": "127.0.0.1:9443"},
            "urls": {"s3": "http://127.0.0.1:9000", "s3_tls": "https://127.0.0.1:9443"},
            "parts": [part],
            "caching": "off",
            "caching_off_reasons": ["daemon: disk full"],
        }
    )
    assert text.splitlines() == [
        "node of region r, kos 1: not ready (starting)",
        "  s3        http://127.0.0.1:9000",
        "  s3_tls    https://127.0.0.1:9443",
        "  worker-0  dead, not running, 2 restarts: killed by SIGKILL",
        "  caching   off; daemon: disk full",
    ]


def test_an_admin_address_needs_no_scheme() -> None:
    with pytest.raises(admin_client.AdminError, match=r"http://127\.0\.0\.1:1: no answer"):
        admin_client.get("127.0.0.1:1", "/healthz")


def test_asking_imports_no_server() -> None:
    code = (
        "import sys; from koscli.main import main\n"
        "main(['explain', 's3://b/k', '--admin', '127.0.0.1:1'])\n"
        "print(sorted({'aiohttp', 'uvloop', 'botocore', 'lmdb'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_a_command_whose_extra_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "demo", ("a_client_that_is_not_here", "show"))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "kos demo needs a_client_that_is_not_here: pip install 'kos[demo]'\n"
