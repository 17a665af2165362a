"""The certificate that a worker serves with, renewed while it runs.

Owns: noticing that the files have changed, taking the new pair for the handshakes to come, keeping the old one as long
as there is nothing better. Does not own: what a good pair is (kos.tls), handshakes (kosproxy.tls).

How files change: one after the other is rewritten, or a link is turned to another directory between two looks (as
Kubernetes does with a mounted secret). So a look may see the new certificate beside the old key, or half a file. Such a
pair does not load; the next look, some seconds later, sees what became of it.

Invariant: `context` is at all times one that loaded whole; open connections keep the one that they began with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from concurrent.futures import Executor
from typing import Final

from kos import metrics, tls
from kos.clock import Clock
from kos.config import Listen
from kos.errors import ConfigError

#: Between two looks at the files: two stat calls.
LOOK_EVERY_S: Final = 2.0

#: What tells one state of a file from another; the reason where there is no telling
_State = tuple[int, ...] | str

_log: Final = logging.getLogger("kosproxy.certificate")


class Certificate:
    """See the module. Making one reads the files at once; ConfigError when they are no good."""

    def __init__(self, listen: Listen) -> None:
        self._listen = listen
        # Before reading: a change in between then is seen by the next look.
        self._seen = self._look()
        self._loaded = tls.load(listen)
        self._complaint = ""
        self._again = False

    def context(self) -> ssl.SSLContext:
        """For a handshake that begins now."""
        return self._loaded.context

    @property
    def not_after(self) -> float:
        """The end of the certificate's validity, seconds since the epoch."""
        return self._loaded.not_after

    def reload(self) -> None:
        """Have the next look read the files whether they seem to have changed or not."""
        self._again = True

    async def watch(self, clock: Clock, threads: Executor) -> None:
        """Look again and again until cancelled. threads: where the files are read, which may wait for a disk."""
        self._show()
        if self.not_after <= clock.now():
            _log.error("the certificate has expired", extra={"not_after": self.not_after})
        while True:
            await clock.sleep(LOOK_EVERY_S)
            await self.renew(clock.now(), threads)

    async def renew(self, now: float, threads: Executor) -> bool:
        """Look at the files, and take what is there if it is new and good; whether that was so. now: epoch seconds."""
        loop = asyncio.get_running_loop()
        again, self._again = self._again, False
        seen = await loop.run_in_executor(threads, self._look)
        if seen == self._seen and not again:
            # What was complained about is gone: the old files are back.
            self._complaint = ""
            return False
        try:
            loaded = await loop.run_in_executor(threads, tls.load, self._listen)
            if loaded.not_after <= now < self.not_after:
                raise ConfigError(
                    f"listen.tls_cert_file: {self._listen.tls_cert_file}: found a certificate that has expired, "
                    "allowed: a valid one, as the one before still is"
                )
        except ConfigError as error:
            self._keep(str(error))
            return False
        self._seen, self._loaded, self._complaint = seen, loaded, ""
        self._show()
        _log.info("the certificate was read again", extra={"not_after": loaded.not_after})
        return True

    def _keep(self, complaint: str) -> None:
        """Stay with the old pair; say why once, not at every look."""
        if complaint == self._complaint:
            return
        self._complaint = complaint
        metrics.TLS_RELOAD_FAILURES.inc()
        _log.error("the certificate was not taken, the old one stays", extra={"reason": complaint})

    def _show(self) -> None:
        metrics.TLS_NOT_AFTER.labels("s3").set(self.not_after)

    def _look(self) -> tuple[_State, ...]:
        return tuple(_state_of(path) for path in (self._listen.tls_cert_file, self._listen.tls_key_file) if path)


def _state_of(path: str) -> _State:
    try:
        found = os.stat(path)
    except OSError as error:
        return str(error)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
