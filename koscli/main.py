"""The `kos` command.

Owns: which commands there are and how they are found. Does not own: what they do: one module each, with
`add_arguments(parser)` and `run(arguments) -> exit code`, imported only when its command is given, so that `kos explain`
does not wait for a server's imports.

Invariant: exit codes are 0 (done), 1 (could not), 2 (asked wrongly: arguments or configuration).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, Protocol

import kos
from kos.errors import KosError

#: command -> (module, what it does)
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "up": ("koscli.up", "run a node in the foreground: the cache daemon and the proxy workers"),
    "demo": ("koscli.demo.command", "start an origin and a node with temporary directories and show what kos does"),
    "check-config": ("koscli.check_config", "check a configuration file; exit 0 if it is good, 2 if not"),
    "explain": ("koscli.explain", "what a node knows of an object, and what the next GET would do"),
    "status": ("koscli.status", "the parts of a node, and whether it is ready"),
    "cluster": ("koscli.cluster", "the nodes of a cluster: status, locate an object, drain and rejoin a node"),
    "version": ("koscli.version", "print the version"),
}

#: commands that need more than kos itself -> the extra that brings it
EXTRAS: Final = {"demo": "demo"}


class Command(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="kos",
        description="An S3 endpoint beside the GPUs.",
        epilog="commands:\n" + "\n".join(f"  {name:14}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kos {kos.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    arguments = parser.parse_args(words[:1])
    module, text = COMMANDS[arguments.command]
    try:
        command: Command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(arguments.command)
        if extra is None or (error.name or "").split(".")[0] in ("kos", "koscli", "koscache", "kosproxy"):
            raise
        print(f"kos {arguments.command} needs {error.name}: pip install 'kos[{extra}]'", file=sys.stderr)
        return 1
    own = argparse.ArgumentParser(prog=f"kos {arguments.command}", description=f"{text[0].upper()}{text[1:]}.")
    command.add_arguments(own)
    try:
        return command.run(own.parse_args(words[1:]))
    except KosError as error:
        print(f"kos {arguments.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `kos explain … | head`: the reader left; without this the interpreter complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
