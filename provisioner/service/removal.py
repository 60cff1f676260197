"""Gives up releases that nothing refers to, in the caller's transaction.

Only marks rows: the archive's files are collected afterwards, when nobody can begin to refer
to them any more.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.model import ReleaseRow
from provisioner.core.releases import unused

KEEP_NEWEST: Final = 3
GRACE: Final = timedelta(days=1)


@dataclass(frozen=True)
class Keeping:
    """What is kept although nothing refers to it: the newest of each image, and all that
    was published less than `grace` ago."""

    newest: int = KEEP_NEWEST
    grace: timedelta = GRACE


def unused_now(tx: Tx, keeping: Keeping, now: datetime) -> list[ReleaseRow]:
    """Return the releases that may be given up, by digest."""
    found = unused(
        tx.releases(),
        tx.used_releases(),
        keep_newest=keeping.newest,
        published_before=now - keeping.grace,
    )
    return sorted(found, key=lambda row: row.digest)


def mark_unused(tx: Tx, keeping: Keeping, *, now: datetime, actor: str) -> list[ReleaseRow]:
    """Mark as removed what nothing refers to, and return it.

    Who begins to refer to a release holds its row. So each is locked first, which waits for
    them, and then everything is looked at once more: of a removal and a deployment that
    begin together, exactly one succeeds.
    """
    locked = {tx.lock_release(row.digest).digest for row in unused_now(tx, keeping, now)}
    removed = []
    for row in unused_now(tx, keeping, now):
        if row.digest in locked:
            gone = replace(row, removed_at=now)
            tx.save_release(gone)
            tx.audit(now, actor, "release.removed", row.name, {"digest": row.digest})
            removed.append(gone)
    return removed
