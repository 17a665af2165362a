"""`koscache --config FILE`: the daemon alone, without workers on the S3 port.

Owns: the command line of this role. Does not own: processes (kos.node.supervisor), the daemon (koscache.daemon_main).
"""

from __future__ import annotations

import argparse
import sys

from kos.node.role import Role, run_role
from koscache.explain import explainer


def main(argv: list[str] | None = None) -> int:
    """Run in the foreground until told to stop; the exit code."""
    parser = argparse.ArgumentParser(
        prog="koscache", description="The cache daemon of a kos node, without its workers."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the node's configuration, as configs/kos.yaml")
    arguments = parser.parse_args(argv)
    daemon = (sys.executable, "-m", "koscache.daemon_main")
    return run_role(arguments.config, Role(name="cache", daemon=daemon, explain=explainer))


if __name__ == "__main__":
    sys.exit(main())
