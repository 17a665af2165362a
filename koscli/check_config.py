"""`kos check-config FILE`: everything that is wrong with a file, a line each."""

from __future__ import annotations

import argparse
import sys
import time

from kos import config, tls
from kos.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = config.load(arguments.file)
        certificate = tls.load(settings.listen) if settings.listen.s3_tls is not None else None
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{arguments.file}: good: region {settings.region}, origin {settings.origin.endpoint}, "
        f"workers {settings.workers}, key pairs {len(settings.credentials)}, rules {len(settings.rules)}"
    )
    if certificate is not None:
        until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(certificate.not_after))
        expired = certificate.not_after <= time.time()
        print(f"https certificate {'EXPIRED' if expired else 'valid until'} {until}")
    return 0
