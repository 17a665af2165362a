"""What can go wrong with the control store.

Owns: the errors of kos.control. Does not own: what a node does about them.

Invariant: ControlUnavailable says nothing about whether a change was made: its answer may be all that was lost. So
every change can be asked for again.
"""

from __future__ import annotations

from kos.errors import KosError


class ControlError(KosError):
    """The control store failed, or refused."""


class ControlUnavailable(ControlError):
    """The database could not be reached, did not answer in time, or could not do what it was asked."""


class SchemaMissing(ControlUnavailable):
    """What the code asks for is not there (any more): kos.control.migrations makes it. What the store knew is gone."""


class WentBack(ControlError):
    """The store has lost the member's last heartbeat, which it had acknowledged, and perhaps what others told it."""


class SchemaTooNew(ControlError):
    """A newer kos has been at this database; an older one would misread it. For an operator to mend."""


class Expelled(ControlError):
    """The member has no row any more, or one of a later incarnation: what it knew can no longer be trusted."""


class LastActive(ControlError):
    """No other member is active: nobody could take over what this one keeps."""


class Superseded(ControlError):
    """Another process has taken over the member's row: it was restarted, or two nodes have one name."""
