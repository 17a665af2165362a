"""`koscache --config FILE`: the daemon alone, without workers on the S3 port; in a cluster with those that serve the peer port.

Owns: the command line of this role. Does not own: processes (kos.node.supervisor), the daemon (koscache.daemon_main), the
workers (kosproxy.worker).
"""

from __future__ import annotations

import argparse
import sys

from kos.node.role import Role, run_role
from koscache.cluster.admin import asker
from koscache.explain import explainer


def main(argv: list[str] | None = None) -> int:
    """Run in the foreground until told to stop; the exit code."""
    parser = argparse.ArgumentParser(
        prog="koscache", description="The cache daemon of a kos node, without workers for clients."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the node's configuration, as configs/kos.yaml")
    arguments = parser.parse_args(argv)
    return run_role(arguments.config, cache())


def cache() -> Role:
    """Without workers on the S3 ports. What is here is here for other nodes as well."""
    return Role(
        name="cache",
        daemon=(sys.executable, "-m", "koscache.daemon_main"),
        worker=(sys.executable, "-m", "kosproxy.worker"),
        explain=explainer,
        cluster=asker,
        serves=("peer",),
    )


if __name__ == "__main__":
    sys.exit(main())
