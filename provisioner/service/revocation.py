"""Revokes a release and ends every deployment of it, in the caller's transaction."""

from dataclasses import replace
from datetime import datetime
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.lifecycle import E
from provisioner.core.model import FINAL, Json, Kind, Operation, Phase, ReleaseRow
from provisioner.core.releases import revoked_error
from provisioner.errors import NotFound

from .transitions import Transitions

# One for each host at most. Should there be more, `authorise_write` stops the others.
DEPLOYMENTS_ENDED_MAX: Final = 100_000
_UNFINISHED: Final = [phase for phase in Phase if phase not in FINAL]


def revoke(
    tx: Tx, transitions: Transitions, digest: str, reason: str, *, now: datetime, actor: str
) -> ReleaseRow:
    """Return the release, revoked; one that was before keeps its reason.

    A deployment that is requested at this moment holds the release: it is either ended here
    or refused.
    """
    row = tx.lock_release(digest)
    ended = _locked_deployments(tx, digest)
    if row.revoked_at is None:
        row = replace(row, revoked_at=now, revoked_reason=reason)
        tx.save_release(row)
        detail: Json = {"digest": digest, "reason": reason, "deployments_ended": len(ended)}
        tx.audit(now, actor, "release.revoked", row.name, detail)
    for operation in ended:
        host = tx.host(operation.host_id)
        transitions.apply(
            tx,
            operation.id,
            E.REVOKED,
            generation=operation.generation,
            actor=actor,
            error={"host": host.name, **revoked_error(row)},
        )
    return row


def _locked_deployments(tx: Tx, digest: str) -> list[Operation]:
    """Return the unfinished deployments of a release, locked, in the order of their hosts."""
    found = tx.operations(phases=_UNFINISHED, release=digest, limit=DEPLOYMENTS_ENDED_MAX)
    deployments = [operation for operation in found if operation.kind is Kind.DEPLOYMENT]
    locked = []
    for seen in sorted(deployments, key=lambda operation: operation.host_id):
        # It was looked up without a lock: it may have ended since then, or be gone with its
        # host, and must not keep the release from being revoked.
        try:
            operation = tx.operation(seen.id)
        except NotFound:
            continue
        if not operation.is_final:
            locked.append(operation)
    return locked
