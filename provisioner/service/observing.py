"""Observe only: what every use case asks before it lets something happen to a host.

A database that was restored from a backup does not know what has happened since. Until a
person reconciles (`reconciliation`), nothing is started, permitted, handed out or performed.
"""

from typing import ClassVar, Final

from provisioner.core.contracts import Tx
from provisioner.errors import DeviceError

HINT: Final = "an admin looks at `provisioner reconcile --plan`, and then applies it"
WHY: Final = "observe only: the database is older than what it looks after"


class ObserveOnly(DeviceError):
    """The database was restored, and nobody has reconciled it yet."""

    code = "observe_only"
    status: ClassVar[int] = 409


def check_acting(tx: Tx) -> None:
    """Raise ObserveOnly while this service only observes."""
    if tx.is_observing():
        raise ObserveOnly(
            "this service only observes: its database is older than what it looks after",
            expected="the database that these hosts were last looked after with",
            found="one that was restored",
            hint=HINT,
        )
