"""Clients that are programs: run one, and have what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Where the programs of the environment lie that runs the tests.
BIN = Path(sys.executable).parent
_TIMEOUT_S = 100


class Command:
    """A program with the arguments and the environment that all its uses share.

    command("ls", "x") returns its standard output, and fails the test if the program does; failing() is for those that
    must fail, and returns what they say.
    """

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        self._arguments = arguments
        self._env = env

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> str:
        return self.binary(*arguments, stdin=stdin).decode()

    def binary(self, *arguments: str, stdin: bytes | None = None) -> bytes:
        done = self._run(arguments, stdin)
        assert done.returncode == 0, f"{arguments}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        return done.stdout

    def failing(self, *arguments: str) -> str:
        done = self._run(arguments, None)
        assert done.returncode != 0, f"{arguments}\n{done.stdout.decode()}"
        return done.stderr.decode()

    def _run(self, arguments: tuple[str, ...], stdin: bytes | None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self._arguments, *arguments],
            env=self._env,
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
