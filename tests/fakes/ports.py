"""Free ports for servers that a test starts as processes.

Between finding a port free and a server's taking it somebody else may be given it. Tests that run in several processes
would be each other's somebody else: so each process takes only ports of its own share.
"""

from __future__ import annotations

import os
from typing import Final

from koscli.demo import processes

_SHARES: Final = 16


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, and that no other process of this test run will take for free."""
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
    found: set[int] = set()
    while len(found) < count:
        # The kernel gives servers ports of one parity as long as it can, so the shares are made above the lowest bit.
        found.update(port for port in processes.free_ports(_SHARES) if port // 2 % _SHARES == share)
    return sorted(found)[:count]
