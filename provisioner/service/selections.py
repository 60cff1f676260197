"""Pins which hosts a request is for, when it is made: what it does not name gets nothing. And
knows a request again that is sent a second time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.fleet import Selection
from provisioner.core.model import Host, Json, Operation
from provisioner.errors import Conflict, RequestError

from .chance import new_request_id

REQUEST: Final = "request"
# Where an operation pins what its request asked for, when that may be sent again.
ASKED: Final = "asked"
# How far back among a host's operations those of a repeated request are looked for.
LOOKED_AT_MAX: Final = 200


@dataclass(frozen=True)
class Asked:
    """A request that may be sent again: its id is the same each time. `digest` is that of what
    it asks for."""

    request_id: str
    digest: str


def select_hosts(
    tx: Tx, hosts: Sequence[Host], *, actor: str, now: datetime, asked: Asked | None = None
) -> Json:
    """Save the selection of one request, and return what each of its operations pins.

    Raises Conflict when the same request is being carried out by another service just now.
    """
    ids = tuple(sorted(host.id for host in hosts))
    request_id = asked.request_id if asked is not None else new_request_id()
    selection = Selection(request_id, ids, actor, now)
    tx.add_selection(selection)
    pins: Json = {REQUEST: selection.request_id, "selection": selection.digest}
    return {**pins, ASKED: asked.digest} if asked is not None else pins


def made_before(tx: Tx, asked: Asked | None) -> list[Operation]:
    """Return the operations that the same request has made already; none when it is new.

    Raises RequestError when it asked for something else then, and Conflict when what it made
    is not known any more.
    """
    selection = tx.selection(asked.request_id) if asked is not None else None
    if asked is None or selection is None:
        return []
    made = [
        operation
        for host_id in selection.hosts
        for operation in tx.operations(host_id=host_id, limit=LOOKED_AT_MAX)
        if operation.pins.get(REQUEST) == asked.request_id
    ]
    if not made:
        raise Conflict(
            "this request was carried out already, and what it made is not known any more",
            hint="use a new Idempotency-Key for each change",
        )
    if any(operation.pins.get(ASKED) != asked.digest for operation in made):
        raise RequestError(
            "this Idempotency-Key was used for another request",
            hint="use a new key for each change",
        )
    return made
