"""Pins which hosts a request is for, when it is made: what it does not name gets nothing."""

from collections.abc import Sequence
from datetime import datetime

from provisioner.core.contracts import Tx
from provisioner.core.fleet import Selection
from provisioner.core.model import Host, Json

from .chance import new_request_id


def select_hosts(tx: Tx, hosts: Sequence[Host], *, actor: str, now: datetime) -> Json:
    """Save the selection of one request, and return what each of its operations pins."""
    ids = tuple(sorted(host.id for host in hosts))
    selection = Selection(new_request_id(), ids, actor, now)
    tx.add_selection(selection)
    return {"request": selection.request_id, "selection": selection.digest}
