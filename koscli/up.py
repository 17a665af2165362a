"""`kos up --config FILE`: a whole node in the foreground."""

from __future__ import annotations

import argparse
import sys

from kos.config import Config
from kos.node.admin import AskCluster, Explain
from kos.node.role import Role, run_role


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the node's configuration, as configs/kos.yaml")


def run(arguments: argparse.Namespace) -> int:
    return run_role(arguments.config, node())


def node() -> Role:
    """The role of a whole node: the daemon, which decides, and workers, which carry."""
    return Role(
        name="node",
        daemon=(sys.executable, "-m", "koscache.daemon_main"),
        worker=(sys.executable, "-m", "kosproxy.worker"),
        explain=_explain,
        cluster=_cluster,
    )


def _explain(settings: Config) -> Explain:
    from koscache.explain import explainer

    return explainer(settings)


def _cluster(settings: Config) -> AskCluster:
    from koscache.cluster.admin import asker

    return asker(settings)
