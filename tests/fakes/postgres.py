"""A PostgreSQL of the tests' own, from the package pgserver: one server for each process that runs tests, started when the
first test asks for one, and a database for each test.

Only the programs of pgserver are used. Its own way to start them makes a user of the system and opens directories up to
the root to it when root runs it; here a server of root's runs as `nobody`, and what nobody could not reach is copied.

The server listens on 127.0.0.1 and asks for a password, as real ones do. It does not sync to disk unless asked to.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from tests.conditions import eventually
from tests.fakes.ports import free_ports

PASSWORD: Final = "correct horse"
_START_S: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1


class Postgres:
    """A running server. Its directory is removed with it by close()."""

    def __init__(self, *, sync: bool = False) -> None:
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self.directory = Path(tempfile.mkdtemp(prefix="kos-postgres-"))
        self._own(self.directory)
        self._bin = self._programs()
        self.port = free_ports(1)[0]
        self._names = itertools.count(1)
        self._sync = sync
        self._server: subprocess.Popen[bytes] | None = None
        password = self.directory / "password"
        password.write_text(PASSWORD)
        self._own(password)
        self._run(
            "initdb",
            "-D",
            self._files,
            "-U",
            "postgres",
            "--pwfile",
            str(password),
            "--auth",
            "scram-sha-256",
            "--encoding",
            "utf8",
            "--no-locale",
            "--no-sync",
        )
        self.start()

    @property
    def _files(self) -> str:
        return str(self.directory / "files")

    def url(self, database: str, *, password: str | None = PASSWORD) -> str:
        secret = "" if password is None else f":{password.replace(' ', '%20')}"
        return f"postgresql://postgres{secret}@127.0.0.1:{self.port}/{database}"

    async def connect(self, database: str = "postgres") -> Any:
        """A connection of asyncpg's, for what a test does itself."""
        return await asyncpg.connect(self.url(database))

    async def new_database(self) -> str:
        """The name of an empty one."""
        name = f"kos_{next(self._names)}"
        connection = await self.connect()
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return name

    async def empty(self, database: str) -> None:
        """Drop all of its tables."""
        connection = await self.connect(database)
        try:
            for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
                await connection.execute(f'DROP TABLE "{row["tablename"]}"')
        finally:
            await connection.close()

    def start(self) -> None:
        """Also after stop(), on the same port with the same databases."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "on" if self._sync else "off",
            "max_connections": 200,
            "shared_buffers": "32MB",
            "dynamic_shared_memory_type": "mmap",  # containers have little of the other
        }
        log = (self.directory / "log").open("ab")
        with log:
            self._server = subprocess.Popen(
                [self._bin / "postgres", "-D", self._files, *(f"--{name}={value}" for name, value in settings.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
                **self._as_user(),
            )
        eventually(self._ready, f"PostgreSQL is ready: {self.directory}/log", _START_S)

    def stop(self) -> None:
        """As an operator stops it: connections are cut, nothing is lost."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            try:
                self._server.wait(_START_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    def _ready(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, (self.directory / "log").read_text()
        status = Path(self._files) / "postmaster.pid"
        return status.exists() and status.read_text().rstrip().endswith("ready")

    def _programs(self) -> Path:
        """Where initdb and postgres are, in reach of the user that runs them."""
        spec = importlib.util.find_spec("pgserver")
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        if self._user is not None and any(not path.stat().st_mode & 0o001 for path in package.parents):
            copy = self.directory / "package"
            shutil.copytree(package / "pginstall", copy / package.name / "pginstall")
            if (libraries := package.parent / "pgserver.libs").exists():
                shutil.copytree(libraries, copy / libraries.name)
            package = copy / package.name
        return package / "pginstall" / "bin"

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _as_user(self) -> dict[str, Any]:
        # Of root's directories it may not even look at the present one.
        where: dict[str, Any] = {
            "cwd": self.directory,
            "env": {"PATH": os.environ["PATH"], "HOME": str(self.directory)},
        }
        if self._user is None:
            return where
        return {**where, "user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run([self._bin / program, *arguments], capture_output=True, text=True, **self._as_user())
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


def _die_with_parent() -> None:
    """In the child: a test run that is killed leaves no server behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


@functools.cache
def shared() -> Postgres:
    """The server of this process."""
    server = Postgres()
    atexit.register(server.close)
    return server


@pytest.fixture(scope="session")
def postgres() -> Postgres:
    """The server of this process, for a conftest to import; several may. A test that stops it starts it again."""
    return shared()
