"""The way out of observing: a plan that says what a restored database does not know and what
becomes of each host, and carrying out exactly that plan."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Final

from provisioner.core.contracts import Clock, Sighting, Store, Tx
from provisioner.core.lifecycle import E, NotAllowed, host_after
from provisioner.core.lifecycle import HostEvent as H
from provisioner.core.model import FINAL, Host, HostId, Json, Operation, Phase
from provisioner.errors import Conflict

from .follow_ups import drop
from .transitions import Transitions

HOSTS_PAGE: Final = 1000
_EVER: Final = datetime.max.replace(tzinfo=UTC)
_OPEN: Final = [phase for phase in Phase if phase not in FINAL]


@dataclass(frozen=True)
class HostPlan:
    """What is known of a host here, what was seen ahead of it, and what becomes of it.

    `operation` is the one that the restored database takes for unfinished.
    """

    host: str
    host_id: HostId
    state: str
    state_then: str
    generation: int
    generation_seen: int | None
    generation_then: int
    operation: str | None
    phase: str | None


@dataclass(frozen=True)
class Plan:
    """`digest` names all of it: applying it does exactly this, or is refused."""

    digest: str
    sightings: Sequence[Sighting]
    hosts: Sequence[HostPlan]

    @property
    def is_observing(self) -> bool:
        return bool(self.sightings)


class PlanOutdated(Conflict):
    """The world has moved on since the plan was shown."""

    code = "plan_outdated"


class Reconciliation:
    def __init__(self, store: Store, transitions: Transitions, clock: Clock) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock

    def plan(self) -> Plan:
        """Return what applying would do. Changes nothing."""
        with self._store.read() as tx:
            return _plan(tx)

    def apply(self, digest: str, *, actor: str) -> Plan:
        """Carry out the plan of that digest, in one transaction, and go on working.

        Raises PlanOutdated for another digest than that of the present plan, and Conflict when
        nothing is to be reconciled.
        """
        with self._store.begin() as tx:
            plan = _plan(tx)
            if not plan.is_observing:
                raise Conflict("this service does not only observe: nothing is to be reconciled")
            if digest != plan.digest:
                raise PlanOutdated(
                    "this is not the present plan",
                    expected=plan.digest,
                    found=digest,
                    hint="look at it anew: provisioner reconcile --plan",
                )
            now = self._clock()
            for one in plan.hosts:
                self._carry_out(tx, one, actor)
            # Decided from what was true before the backup; a person asks anew.
            while waiting := tx.due_follow_ups(_EVER):
                for old in waiting:
                    why = "the database was restored"
                    drop(tx, old, tx.host(old.host_id), why, actor, now)
            tx.reconcile_sightings(now)
            detail: Json = {
                "plan": digest,
                "hosts": len(plan.hosts),
                "sightings": len(plan.sightings),
            }
            tx.audit(now, actor, "service.reconciled", "service", detail)
            return plan

    def _carry_out(self, tx: Tx, one: HostPlan, actor: str) -> None:
        now = self._clock()
        operation = tx.open_operation(one.host_id)
        if operation is not None:
            self._transitions.apply(
                tx,
                operation.id,
                E.TIMED_OUT,
                generation=operation.generation,
                actor=actor,
                error=_error(one, operation),
            )
        # Read again: the end of its operation may have changed it. The generation rises after
        # that, so that what the end wished for is not wanted any more.
        host = tx.host(one.host_id)
        if one.generation_seen is not None:
            host = _unknown(host)
        tx.save_host(replace(host, generation=one.generation_then))
        tx.audit(now, actor, "host.reconciled", host.name, asdict(one))


def _plan(tx: Tx) -> Plan:
    sightings = tx.sightings()
    hosts = list(_host_plans(tx, sightings)) if sightings else []
    content = [[one.key for one in sightings], [asdict(one) for one in hosts]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Plan(digest, sightings, hosts)


def _host_plans(tx: Tx, sightings: Sequence[Sighting]) -> Iterator[HostPlan]:
    """Yield the hosts for which something changes: those with an unfinished operation, those
    that were seen ahead, and those that may be the one that was seen and did not say its name."""
    seen: dict[HostId | None, int] = {}
    for one in sightings:
        if one.generation is not None:
            seen[one.host_id] = max(seen.get(one.host_id, 0), one.generation)
    somebody = seen.get(None, 0)
    open_ones = {one.host_id: one for one in tx.operations(phases=_OPEN, limit=1_000_000)}
    for host in _all_hosts(tx):
        operation, own = open_ones.get(host.id), seen.get(host.id)
        highest = max(host.generation, own or 0, somebody)
        if operation is None and own is None and host.generation >= somebody:
            continue
        then = _unknown(host) if own is not None else host
        yield HostPlan(
            host=host.name,
            host_id=host.id,
            state=str(host.state),
            state_then=str(then.state),
            generation=host.generation,
            generation_seen=own,
            generation_then=highest + 1,
            operation=operation.id if operation is not None else None,
            phase=str(operation.phase) if operation is not None else None,
        )


def _all_hosts(tx: Tx) -> Iterator[Host]:
    after = ""
    while page := tx.hosts(after=after, limit=HOSTS_PAGE):
        yield from page
        after = page[-1].name


def _unknown(host: Host) -> Host:
    """Return the host as one of whose disk nothing is known any more: something newer than
    this database may have been written to it."""
    try:
        return host_after(host, H.WRITE_STARTED)
    except NotAllowed:
        return host  # nothing was known of it before either


def _error(one: HostPlan, operation: Operation) -> Json:
    return {
        "code": "database_restored",
        "message": f"the {operation.kind} of host {one.host} is one of a restored database",
        "host": one.host,
        "expected": "the database in which it went on",
        "found": f"{one.phase}, as it was when the backup was made",
        "hint": "look at the host; then reimage it, or compare its disk (reimage --verify-only)",
    }
