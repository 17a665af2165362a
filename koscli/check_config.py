"""`kos check-config FILE`: everything that is wrong with a file, a line each."""

from __future__ import annotations

import argparse
import sys

from kos import config
from kos.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = config.load(arguments.file)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{arguments.file}: good: region {settings.region}, origin {settings.origin.endpoint}, "
        f"workers {settings.workers}, key pairs {len(settings.credentials)}, rules {len(settings.rules)}"
    )
    return 0
