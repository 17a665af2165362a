"""What kos signs with towards the origin: configured keys, or AWS's default chain with refresh.

Owns: finding and refreshing credentials, and the endpoint of a region where none is configured.
Does not own: signing (kos.s3.sigv4), client credentials (configuration and the control store).

The chain (environment, profile, web identity, instance role …) is botocore's, through aiobotocore. Importing it takes
half a second and looking things up reads files and loads service models, so all of it happens in a thread with a loop
of its own, and only when no keys are configured.

Invariant: get() returns at once while the known keys are good; a refresh runs beside the requests until the keys are
about to end, and at most one refresh runs at a time.

Source: https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kos.clock import Clock
from kos.config import Origin
from kos.errors import ConfigError, OriginUnavailable
from kos.tasks import Tasks

#: botocore's own: from 15 minutes before their end keys are refreshed, in the last 10 they must be.
_ADVISORY_S: Final = 15 * 60
_MANDATORY_S: Final = 10 * 60
_LOOK_EVERY_S: Final = 10.0
_RETRY_S: Final = 30.0
_RESOLVE_TIMEOUT_S: Final = 30.0

_log: Final = logging.getLogger("kos.origin")


@dataclass(frozen=True, slots=True)
class Credentials:
    access_key: str
    secret_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.access_key!r})"


class CredentialSource(Protocol):
    async def get(self) -> Credentials:
        """The keys to sign with now. OriginUnavailable if there are none."""

    async def close(self) -> None: ...


class StaticCredentials:
    """Keys from the configuration."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def get(self) -> Credentials:
        return self._credentials

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class Found:
    """What the chain gave. ends_within(seconds): whether the keys end before that; always False if they never do."""

    credentials: Credentials
    ends_within: Callable[[float], bool]


class ChainCredentials:
    """AWS's default chain. resolve: looks the keys up, blocking; runs in a thread."""

    def __init__(
        self, clock: Clock, profile: str | None = None, resolve: Callable[[str | None], Found] | None = None
    ) -> None:
        self._clock = clock
        self._profile = profile
        self._resolve = resolve or resolve_chain
        self._tasks = Tasks("credentials")
        self._found: Found | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")
        self._failed_at = float("-inf")

    async def get(self) -> Credentials:
        now = self._clock.monotonic()
        found = self._found
        if found is not None and now - self._looked_at < _LOOK_EVERY_S:
            return found.credentials
        if found is None or found.ends_within(_ADVISORY_S):
            if self._refresh is None and now - self._failed_at >= _RETRY_S:
                self._refresh = self._tasks.spawn(self._look_up(), "refresh")
            if self._refresh is not None and (found is None or found.ends_within(_MANDATORY_S)):
                # shield: a client that goes away must not end the lookup that others wait for
                await asyncio.shield(self._refresh)
        found = self._found
        if found is None:
            raise OriginUnavailable("no credentials for the origin", retry_after_s=_RETRY_S)
        self._looked_at = self._clock.monotonic()
        return found.credentials

    async def _look_up(self) -> None:
        try:
            self._found = await asyncio.wait_for(asyncio.to_thread(self._resolve, self._profile), _RESOLVE_TIMEOUT_S)
        except Exception as error:
            # Old keys go on being used to their end: the origin is the judge of them.
            self._failed_at = self._clock.monotonic()
            _log.error("no credentials from the AWS chain", extra={"error": f"{type(error).__name__}: {error}"})
        finally:
            self._refresh = None

    async def close(self) -> None:
        await self._tasks.close()


def from_config(origin: Origin, clock: Clock) -> CredentialSource:
    """Configured keys if there are any, else the chain."""
    if origin.access_key and origin.secret_key:
        return StaticCredentials(Credentials(origin.access_key, origin.secret_key, origin.session_token))
    return ChainCredentials(clock, origin.profile)


def resolve_chain(profile: str | None) -> Found:
    """Look the keys up; blocks, imports botocore. Raises what botocore raises, ConfigError if the chain is empty."""
    return asyncio.run(_resolve_chain(profile))


async def _resolve_chain(profile: str | None) -> Found:
    session = _session(profile)
    held = await session.get_credentials()
    if held is None:
        raise ConfigError("no origin.access_key is configured and the AWS chain (env, profile, role) found no keys")
    frozen = await held.get_frozen_credentials()
    refresh_needed = getattr(held, "refresh_needed", None)

    def ends_within(seconds: float) -> bool:
        return bool(refresh_needed is not None and refresh_needed(int(seconds)))

    return Found(Credentials(frozen.access_key, frozen.secret_key, frozen.token), ends_within)


def _session(profile: str | None) -> Any:
    from aiobotocore.session import AioSession

    return AioSession(profile=profile)


async def resolve_endpoint(region: str, profile: str | None = None) -> str:
    """The S3 endpoint of a region, as AWS's own clients find it (environment, shared configuration, built-in rules)."""
    return await asyncio.to_thread(lambda: asyncio.run(_resolve_endpoint(region, profile)))


async def _resolve_endpoint(region: str, profile: str | None) -> str:
    # The keys are never used: without any, making a client would look for them.
    async with _session(profile).create_client(
        "s3", region_name=region, aws_access_key_id="-", aws_secret_access_key="-"
    ) as client:
        return str(client.meta.endpoint_url).rstrip("/")
