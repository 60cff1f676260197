"""Why queued operations wait: for whoever asks, and a line in the timeline now and then."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from provisioner.core.contracts import Clock, Store
from provisioner.core.fleet import Queued
from provisioner.core.model import Event, HostState, Operation, OperationId, Phase

from .facts import GuardFacts, group_of

# What is in flight and what has started within a minute take turns as the reason.
TELL_AGAIN: Final = timedelta(minutes=10)
LINES_MAX: Final = 100  # written at a look


class Waits:
    """Looks at the queue as the guard does. Not shared between threads."""

    def __init__(self, store: Store, guard: GuardFacts, clock: Clock) -> None:
        self._store = store
        self._guard = guard
        self._clock = clock
        self._told: dict[OperationId, tuple[str, datetime]] = {}

    def why(self, operations: Sequence[Operation]) -> Mapping[OperationId, str]:
        """Return by id why those of the operations wait that are queued and must."""
        waiting = [one for one in operations if one.phase is Phase.QUEUED]
        if not waiting:
            return {}
        with self._store.read() as tx:
            hosts = {one.host_id: tx.host(one.host_id) for one in waiting}
            groups = {group_of(host) for host in hosts.values()}
            view = self._guard.view(tx, groups, self._clock())
        found = {}
        for one in waiting:
            host = hosts[one.host_id]
            is_active = host.state is HostState.ACTIVE
            queued = Queued(one.id, host.id, group_of(host), is_active)
            if (reason := view.why_waits(queued)) is not None:
                found[one.id] = reason
        return found

    def tell(self, held: Sequence[tuple[Queued, str]]) -> None:
        """Write a line for each that waits, once, and again when the reason has changed and
        the last line is old."""
        now = self._clock()
        self._told = {
            queued.operation_id: self._told[queued.operation_id]
            for queued, _ in held
            if queued.operation_id in self._told
        }
        fresh = [one for one in held if self._is_news(*one, now)][:LINES_MAX]
        if not fresh:
            return
        with self._store.begin() as tx:
            for queued, reason in fresh:
                tx.add_event(
                    Event(
                        at=now,
                        source="service",
                        text=f"waits: {reason}",
                        host_id=queued.host_id,
                        operation_id=queued.operation_id,
                    )
                )
        self._told |= {queued.operation_id: (reason, now) for queued, reason in fresh}

    def _is_news(self, queued: Queued, reason: str, now: datetime) -> bool:
        told = self._told.get(queued.operation_id)
        return told is None or (told[0] != reason and now - told[1] >= TELL_AGAIN)
