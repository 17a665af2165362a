"""The arguments of `kos demo`. What it shows is run by hand, and by `make demo CHECK=1`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kos import config
from koscli.demo.stage import Stage
from koscli.main import main


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--nodes", "17"], ["--large-mib", "0"], ["--small-count", "-1"]])
def test_asked_wrongly(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 2
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 5])
def test_the_nodes_configurations_are_good(tmp_path: Path, count: int) -> None:
    stage = Stage(tmp_path, nodes=count)
    stage.origin_url, stage.ca_file, stage._key_file = "http://127.0.0.1:9", tmp_path / "crt", tmp_path / "key"
    nodes = [stage._prepare(n, range(10_000 + 5 * n, 10_005 + 5 * n)) for n in range(count)]
    settings = [config.load(node.directory / "kos.yaml") for node in nodes]
    assert {each.cluster.membership for each in settings} == {"off" if count == 1 else "control"}
    assert len({each.control.url for each in settings}) == 1
    taken = [yaml.safe_load((node.directory / "kos.yaml").read_text())["listen"] for node in nodes]
    addresses = [one[port] for one in taken for port in ("s3", "s3_tls", "admin", "peer", "cluster")]
    assert len(set(addresses)) == 5 * count
