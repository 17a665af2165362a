"""`kos version`."""

from __future__ import annotations

import argparse

import kos


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    print(f"kos {kos.__version__}")
    return 0
