"""Fuzz one target, guided by which lines of kos its inputs reach.

    python -m tests.fuzz.run TARGET [--seconds N] [--corpus DIR]

Ends with status 0 when nothing was found in that time. Otherwise the input is written to the working directory and named
on stderr: move it to tests/fuzz/found/TARGET/, where every run of the tests replays it. --corpus keeps what was learned
between runs. An input may take at most 5 s and all together 1 GiB: a hang and memory without bound are findings too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kos.s3", "kosproxy.server"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.seeds import seeds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        corpus = arguments.corpus or Path(own)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(seeds(arguments.target)):
            (corpus / f"seed-{number:03d}").write_bytes(sample)
        flags = [
            f"-max_total_time={arguments.seconds}",
            "-timeout=5",
            "-rss_limit_mb=1024",
            "-max_len=4096",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], TARGETS[arguments.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
