"""Where a host's boot stands, why, and what to do: reads the facts, and asks the core."""

from dataclasses import dataclass
from typing import Final

from provisioner.core.causes import CAUSES
from provisioner.core.contracts import Clock, Store, Tx
from provisioner.core.diagnosis import Dhcp, Diagnosis, Facts, diagnose
from provisioner.core.fleet import Queued
from provisioner.core.model import Event, Host, HostState, Kind, Operation, Phase
from provisioner.core.recovery import AFTER, CAUSE, Cause

from .facts import GuardFacts, group_of
from .follow_ups import operations_of, told
from .lookup import host_named

# More than a timeline holds of one host.
EVENTS_MAX: Final = 1000


@dataclass(frozen=True)
class Answer:
    """The diagnosis, with the host and the operation that it is of."""

    host: Host
    operation: Operation | None
    diagnosis: Diagnosis


class Why:
    """The one use case, which changes nothing. `dhcp` is whose DHCP answers on the network."""

    def __init__(self, store: Store, guard: GuardFacts, clock: Clock, dhcp: Dhcp) -> None:
        self._store = store
        self._guard = guard
        self._clock = clock
        self._dhcp = dhcp

    def ask(self, name: str) -> Answer:
        """Return why the host named so, or with that id, stands where it stands."""
        with self._store.read() as tx:
            host = host_named(tx, name)
            operation = _present(tx, host)
            facts = self._facts(tx, host, operation)
        return Answer(host, operation, diagnose(facts, CAUSES))

    def _facts(self, tx: Tx, host: Host, operation: Operation | None) -> Facts:
        digest = (operation.release if operation else None) or host.release
        row = tx.release(digest) if digest else None
        return Facts(
            now=self._clock(),
            host=host,
            operation=operation,
            events=_events(tx, host, operation),
            waits=self._waits(tx, host, operation),
            breaker=tx.breaker().why_open,
            is_observing=tx.is_observing(),
            follows=_follows(operation),
            before=_before(tx, host, operation),
            release_name=row.name if row else None,
            dhcp=self._dhcp,
        )

    def _waits(self, tx: Tx, host: Host, operation: Operation | None) -> str | None:
        if operation is None or operation.phase is not Phase.QUEUED:
            return None
        group = group_of(host)
        queued = Queued(operation.id, host.id, group, host.state is HostState.ACTIVE)
        return self._guard.view(tx, [group], self._clock()).why_waits(queued)


def _present(tx: Tx, host: Host) -> Operation | None:
    """Return the operation that the host's state is the outcome of: the open one, or the
    newest. One that only looked at the host does not hide a deployment that failed."""
    rows = operations_of(tx, host)
    if not rows or not rows[0].is_final or rows[0].phase is Phase.FAILED:
        return rows[0] if rows else None
    deployments = [row for row in rows if row.kind is Kind.DEPLOYMENT]
    return deployments[0] if deployments else rows[0]


def _events(tx: Tx, host: Host, operation: Operation | None) -> list[Event]:
    """Return the lines since the operation was requested, by their own times: several
    processes save them."""
    lines = [event for _, event in tx.events(host_id=host.id, limit=EVENTS_MAX)]
    if operation is not None:
        lines = [one for one in lines if one.at >= operation.requested_at]
    return sorted(lines, key=lambda one: one.at)


def _follows(operation: Operation | None) -> str | None:
    if operation is None or operation.follow_up is None:
        return None
    if operation.follow_up_at is not None:
        return told(operation.follow_up, operation.follow_up_at)
    return None


def _before(tx: Tx, host: Host, operation: Operation | None) -> str | None:
    """Return of which failure this operation is the consequence."""
    after = operation.pins.get(AFTER) if operation else None
    if operation is None or after is None:
        return None
    failed = next((row for row in operations_of(tx, host) if row.id == after), None)
    code = (failed.error or {}).get("code") if failed else None
    what = "the way back" if operation.pins.get(CAUSE) == Cause.ROLLBACK else "another attempt"
    return f"{what}, since {after} failed ({code or 'its error is not kept'})"
