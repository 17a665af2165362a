"""`kosproxy --config FILE`: workers alone, without a store of their own beside them.

Owns: the command line of this role. Does not own: processes (kos.node.supervisor), serving (kosproxy.worker).
"""

from __future__ import annotations

import argparse
import sys

from kos.node.role import Role, run_role


def main(argv: list[str] | None = None) -> int:
    """Run in the foreground until told to stop; the exit code."""
    parser = argparse.ArgumentParser(prog="kosproxy", description="The S3 workers of a kos node, without its daemon.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the node's configuration, as configs/kos.yaml")
    arguments = parser.parse_args(argv)
    # The peer port is left to the workers of the `koscache` beside it: of what both reserved, one could not start.
    worker = (sys.executable, "-m", "kosproxy.worker")
    return run_role(arguments.config, Role(name="proxy", worker=worker, serves=("s3", "s3_tls")))


if __name__ == "__main__":
    sys.exit(main())
