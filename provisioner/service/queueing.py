"""Makes a queued operation and saves it with its host's new generation. Checks nothing."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from provisioner.core.contracts import Tx
from provisioner.core.lifecycle import Limits
from provisioner.core.model import Event, Host, Json, Kind, Operation, OperationId, Phase

from .chance import new_operation_id
from .observing import check_acting

NewId = Callable[[datetime], OperationId]


def new_operation(
    host: Host,
    kind: Kind,
    release: str | None,
    *,
    pins: Json,
    options: Json,
    actor: str,
    now: datetime,
    limits: Limits,
    new_id: NewId = new_operation_id,
) -> Operation:
    """Return a queued operation on a host, as its next generation."""
    return Operation(
        id=new_id(now),
        host_id=host.id,
        kind=kind,
        phase=Phase.QUEUED,
        generation=host.generation + 1,
        rung=0,
        release=release,
        pins=pins,
        options=options,
        requested_by=actor,
        requested_at=now,
        phase_at=now,
        deadline_at=limits.deadline(Phase.QUEUED, now, now),
        ended_at=None,
    )


def queue(tx: Tx, host: Host, operation: Operation) -> Operation:
    """Save a new operation. Raises Conflict when the host has an unfinished one, and
    ObserveOnly when the database was restored."""
    check_acting(tx)
    now, actor = operation.requested_at, operation.requested_by
    tx.save_host(replace(host, generation=operation.generation))
    tx.add_operation(operation)
    detail: Json = {"operation": operation.id, "release": operation.release, **operation.pins}
    tx.audit(now, actor, f"{operation.kind}.requested", host.name, detail)
    what = operation.pins.get("release_name", "")
    tx.add_event(
        Event(
            at=now,
            source="service",
            text=f"{operation.kind} requested by {actor} {what}".rstrip(),
            host_id=host.id,
            operation_id=operation.id,
        )
    )
    return operation
