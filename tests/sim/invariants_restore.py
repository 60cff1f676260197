"""What must always be true of a database that was restored: nothing is done until somebody has
reconciled, and nothing of then is done after that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .judging import about
from .observations import (
    AgentAnswered,
    BmcChanged,
    BootAnswered,
    Committed,
    Permitted,
    SeedLeft,
    ServiceStarted,
    Wrote,
)

if TYPE_CHECKING:
    from .world import World

RESTORED: Final = "database_restored"
REVOKED: Final = "release_revoked"


@about(BmcChanged, BootAnswered, Permitted, SeedLeft, AgentAnswered, Committed)
def nothing_is_done_until_a_person_reconciles(
    saw: BmcChanged | BootAnswered | Permitted | SeedLeft | AgentAnswered | Committed,
    world: World,
) -> str | None:
    """From the moment on that a database was restored, until a person reconciles: no BMC is told
    anything, no ticket, permission or seed leaves, no agent is answered, no operation moves. A
    person may still revoke a release, which ends what was to bring it."""
    if not world.ledger.is_behind:
        return None
    if not isinstance(saw, Committed):
        return f"{saw}"
    moved = [one for _, one in world.ledger.changed if one.error_code != REVOKED]
    return f"{[f'{one.id} {one.phase}' for one in moved]} changed" if moved else None


@about(ServiceStarted, Committed)
def a_restored_database_is_noticed_and_no_other_one(
    saw: ServiceStarted | Committed, world: World
) -> str | None:
    """A service that begins on a database older than its mark only observes; nobody observes
    for any other reason, and nobody does any more once it is reconciled."""
    ledger = world.ledger
    if not world.keeps_backups:
        return None
    if isinstance(saw, ServiceStarted) and ledger.is_behind and not ledger.observes():
        return f"{saw.name} begins with a database of the past"
    if not ledger.is_behind and ledger.observes():
        return "it only observes, and no database was restored"
    return None


@about(Committed)
def reconciling_ends_what_was_of_then(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """Reconciling ends each operation that the backup takes for unfinished, whatever has become
    of it since, and drops what was to follow; its host's generation rises."""
    ledger = world.ledger
    if not ledger.is_reconciling:
        return None
    left = [one.id for one in (*ledger.now.open_operations, *ledger.now.to_follow)]
    if left:
        return f"{left} go on"
    for key in ledger.open_then:
        operation = ledger.now.operations[key]
        if operation.error_code == REVOKED:
            continue  # a person ended it before that
        if operation.error_code != RESTORED or operation.follow_up:
            return f"{key} is {operation.phase}, {operation.error_code}, {operation.follow_up}"
        if ledger.now.host_of(operation).generation <= operation.generation:
            return f"{key} is still the newest of its host"
    return None


@about(Wrote)
def one_agent_writes_for_each_generation(saw: Wrote, world: World) -> str | None:
    """For one generation of an operation one start of the ramdisk writes, and no second one,
    whatever the database has forgotten."""
    if saw.grant is None:
        return None
    key = (saw.operation_id, saw.grant.generation)
    first = world.ledger.written_by.setdefault(key, saw.host.machine.name)
    if first == saw.host.machine.name:
        return None
    return f"{saw.host.machine.name} writes {key}, and {first} did before"
