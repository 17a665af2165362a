"""nginx as the yardstick: one worker, sendfile, the same files.

Owns: a private nginx (own prefix, configuration, port, logs). Does not own: the files' content.

As Debian ships it, that is without open_file_cache, which would trade freshness for a tenth to a fifth of its CPU.

Invariant: nothing of a system nginx is read or written.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.client import Address
from bench.processes import Server
from bench.results import BenchFailed

_CONF = """
daemon off;
worker_processes 1;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log {access_log};
  client_body_temp_path {prefix}/body;
  proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi;
  uwsgi_temp_path {prefix}/uwsgi;
  scgi_temp_path {prefix}/scgi;
  default_type binary/octet-stream;
  sendfile on;
  tcp_nopush on;
  tcp_nodelay on;
  keepalive_requests 100000000;
  server {{
    listen {host}:{port} backlog=1024;
    root {root};
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Nginx:
    """An nginx that answers."""

    server: Server
    at: Address

    def cpu_seconds(self) -> float:
        return self.server.cpu_seconds()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(root: Path, under: Path, *, access_log: bool, core: int | None = None) -> Iterator[Nginx]:
    """Run nginx over the files of `root`; raises BenchFailed where it is not installed."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")
    if binary is None:
        raise BenchFailed("nginx is not installed (Debian: apt-get install nginx-light)")
    prefix = Path(tempfile.mkdtemp(prefix="nginx-", dir=under))
    # A worker that was started by root gives its rights away and must still reach the files.
    for directory in (prefix, under, root):
        directory.chmod(0o755)
    host, port = "127.0.0.1", _free_port("127.0.0.1")
    conf = prefix / "nginx.conf"
    log = f"{prefix}/access.log" if access_log else "off"
    conf.write_text(_CONF.format(prefix=prefix, access_log=log, host=host, port=port, root=root))
    # It says nothing when it is ready, so the check of its configuration does.
    start = f'"{binary}" -t -q -p "{prefix}" -c "{conf}" && echo starting && exec "{binary}" -p "{prefix}" -c "{conf}"'
    try:
        with Server(["sh", "-c", start], r"^starting$", under / f"{prefix.name}.log", core=core) as server:
            _await_port(host, port)
            yield Nginx(server, Address(host, port))
    finally:
        shutil.rmtree(prefix, ignore_errors=True)


def _await_port(host: str, port: int, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise BenchFailed(f"nginx does not listen on {host}:{port}: {error}") from error
            time.sleep(0.02)
