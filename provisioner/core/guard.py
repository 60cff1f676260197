"""The one place that permits: `authorise_ticket` a boot ticket, `authorise_write` a write.

Pure. Every check stands alone in `_never`, `_ticket_refusals`, `_write_refusals` or
`_delays`, and the tests remove each in turn. What is refused fails; what is only delayed
stays queued. Whoever acts needs the permit that comes out here: there is no other way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ..errors import Conflict, TrustError
from .disks import Disk
from .fleet import NO_LIMIT, Failure, Fleet, Rules, Selection
from .model import Host, HostId, HostState, Kind, Operation, OperationId, Phase
from .own_host import ServiceHosts


class WriteRefused(TrustError):
    """The agent may not write; nothing was, or nothing more will be."""

    code = "write_refused"


class HostRefused(Conflict):
    """An operation may not start on this host after all; the host was left alone."""

    code = "host_refused"


@dataclass(frozen=True)
class WriteRequest:
    """What the agent asks for right before its first write, and again as it goes.

    `host_id` and `generation` are those of its token; `disk` is what it found in the host.
    """

    host_id: HostId
    generation: int
    release: str
    disk: Disk


@dataclass(frozen=True)
class Facts:
    """What the database says of one operation right now, read in the transaction that acts.

    `selection` is what the operation's request selected (NOTHING_SELECTED when there is no
    such request), `twins` are the names of other
    hosts with its host's UUID, `breaker` is why the breaker is open, None while it is closed.
    """

    selection: Selection
    own: ServiceHosts
    release_is_revoked: bool
    twins: tuple[str, ...] = ()
    breaker: str | None = None
    is_observing: bool = False


@dataclass(frozen=True)
class TicketPermit:
    """An operation may start, and its host may have one boot ticket. Made here only."""

    operation_id: OperationId
    generation: int


@dataclass(frozen=True)
class WritePermit:
    """An operation's disk may be written. Made here only."""

    operation_id: OperationId
    generation: int


@dataclass(frozen=True)
class Wait:
    """An operation may start, but not yet. The reason holds no count, so it stays the same
    while nothing changes."""

    reason: str


Refusal = tuple[object, object, str]


def authorise_ticket(
    operation: Operation, host: Host, facts: Facts, fleet: Fleet, rules: Rules
) -> TicketPermit | Wait:
    """Return the permit to start a queued operation, or why it has to wait for its turn.

    Raises HostRefused when it may not start at all: waiting would not help.
    """
    for expected, found, why in _ticket_refusals(operation, host, facts):
        raise left_alone(host, why, expected, found)
    is_active = host.state is HostState.ACTIVE
    for reason in _delays(facts.breaker, facts.is_observing, is_active, fleet, rules):
        return Wait(reason)
    return TicketPermit(operation.id, operation.generation)


def why_waits(
    breaker: str | None, is_observing: bool, is_active: bool, fleet: Fleet, rules: Rules
) -> str | None:
    """Return what keeps a host's operation from starting now; None when its turn has come.

    The same checks as for a ticket, to look through a queue without loading all of it.
    """
    return next(_delays(breaker, is_observing, is_active, fleet, rules), None)


def authorise_write(
    request: WriteRequest,
    operation: Operation,
    host: Host,
    chosen: Disk,
    facts: Facts,
    *,
    now: datetime,
) -> WritePermit:
    """Return the permit when `request` may write, and raise WriteRefused otherwise.

    `chosen` is the disk that the pinned profile's rule picks from the inventory that the
    agent sent at its hello: the service chooses for itself, too.
    """
    for expected, found, why in _write_refusals(request, operation, host, chosen, facts, now):
        raise WriteRefused(
            f"host {host.name} may not be written: {why}",
            host=host.name,
            expected=expected,
            found=found,
            hint="nothing more is written under this permission; see the operation's timeline",
        )
    return WritePermit(operation.id, operation.generation)


_WRITING_PHASES: Final = frozenset({Phase.PREPARING, Phase.WRITING, Phase.VERIFYING})


def _never(operation: Operation, host: Host, facts: Facts) -> Iterator[Refusal]:
    """Yield what forbids a ticket and a write alike."""
    chosen, pins = facts.selection, operation.pins
    if operation.host_id != host.id:
        yield host.id, operation.host_id, "the operation is for another host"
    if host.generation != operation.generation:
        yield host.generation, operation.generation, "a newer operation owns the host"
    if chosen.request_id != pins.get("request"):
        yield "the request it came from", pins.get("request"), "nobody requested the operation"
    if host.id not in chosen.hosts:
        yield "a host that was selected", host.id, "its request did not select the host"
    if chosen.digest != pins.get("selection"):
        yield pins.get("selection"), chosen.digest, "the selection is not the one requested"
    if chosen.requested_by != operation.requested_by:
        yield chosen.requested_by, operation.requested_by, "somebody else requested it"
    if facts.release_is_revoked:
        yield "a release in good standing", "a revoked one", "the release was revoked"
    if (own := facts.own.why(host)) is not None:
        yield "a host that no service runs on", own, "the service runs on it"
    if facts.twins:
        yield "a UUID of its own", list(facts.twins), "another host has the same UUID"
    if (reason := why_not_begun(operation, host)) is not None:
        yield "a host without flags", reason, reason


def _ticket_refusals(operation: Operation, host: Host, facts: Facts) -> Iterator[Refusal]:
    yield from _never(operation, host, facts)
    if operation.phase is not Phase.QUEUED:
        yield Phase.QUEUED, operation.phase, "the operation has started already"
    if operation.kind is not Kind.INSPECTION and not operation.release:
        yield "the digest of a release", operation.release, "no release was requested"


def _write_refusals(
    request: WriteRequest,
    operation: Operation,
    host: Host,
    chosen: Disk,
    facts: Facts,
    now: datetime,
) -> Iterator[Refusal]:
    yield from _never(operation, host, facts)
    asked, allowed = identity(request.disk), identity(chosen)
    if operation.kind is not Kind.DEPLOYMENT:
        yield Kind.DEPLOYMENT, operation.kind, "the operation is not a deployment"
    if operation.phase not in _WRITING_PHASES:
        yield "preparing", operation.phase, "the operation is in no phase that writes"
    if operation.deadline_at is None or now >= operation.deadline_at:
        yield operation.deadline_at, now, "the operation's deadline has passed"
    if request.host_id != host.id:
        yield host.id, request.host_id, "the request is for another host"
    if request.generation != operation.generation:
        yield operation.generation, request.generation, "the generation is not the present one"
    if request.release != operation.release:
        yield operation.release, request.release, "the release is not the one requested"
    if host.state is HostState.ENROLLED:
        yield "an inspected host", host.state, "the host is not in a state to be written"
    # A write that has begun is not stopped by it: half a system helps nobody.
    if facts.breaker is not None and operation.phase is Phase.PREPARING:
        yield "a closed breaker", facts.breaker, "the breaker is open"
    if facts.is_observing:
        yield "a service that acts", "one that observes", "the service only observes"
    if not (request.disk.serial or request.disk.wwn):
        yield "a serial or a WWN", request.disk.name, "the disk cannot be told from others"
    found = host.inventory["disks"] if host.inventory is not None else ()
    if [identity(Disk.from_dict(one)) for one in found].count(allowed) > 1:
        yield "a disk like no other", allowed, "several disks have the same identity"
    if asked != allowed:
        yield allowed, asked, "the disk is not the one that the profile's rule picks"
    first = operation.evidence.get("disk")
    if first is not None and first != asked:
        yield first, asked, "the disk is not the one that was permitted first"


def _delays(
    breaker: str | None, is_observing: bool, is_active: bool, fleet: Fleet, rules: Rules
) -> Iterator[str]:
    """Yield what makes a start wait, that which a person must end first."""
    load, group = fleet.load, fleet.group
    if is_observing:
        yield "the service only observes: `provisioner reconcile`"
    if breaker is not None:
        yield f"the breaker is open, since {breaker}: `provisioner breaker close`"
    if load.in_flight >= rules.in_flight_max:
        yield (
            "as many as may be are in flight "
            f"(limits.deployments_in_flight_max {rules.in_flight_max})"
        )
    if NO_LIMIT < rules.group_in_flight_max <= group.load.in_flight:
        yield (
            f"as many of group {group.name} as may be are in flight "
            f"(limits.group_in_flight_max {rules.group_in_flight_max})"
        )
    if is_active and group.name and group.healthy <= rules.group_floor.of(group.hosts):
        yield (
            f"group {group.name} must not have fewer healthy hosts "
            f"(limits.group_healthy_min {rules.group_floor})"
        )
    if NO_LIMIT < rules.starts_per_minute_max <= load.started:
        yield (
            "enough have started within a minute "
            f"(limits.starts_per_minute_max {rules.starts_per_minute_max})"
        )
    if NO_LIMIT < rules.group_starts_per_minute_max <= group.load.started:
        yield (
            f"enough of group {group.name} have started within a minute "
            f"(limits.group_starts_per_minute_max {rules.group_starts_per_minute_max})"
        )


def left_alone(
    host: Host, why: str, expected: object = "a host without flags", found: object = None
) -> HostRefused:
    """Return the error for an operation that may not start, or not go on to its netboot."""
    return HostRefused(
        f"host {host.name} was left alone: {why}",
        host=host.name,
        expected=expected,
        found=found if found is not None else why,
        hint=f"provisioner host show {host.name}; then request it again",
    )


def why_not_begun(operation: Operation, host: Host) -> str | None:
    """Why the host's flags forbid this kind of operation now; None when they do not."""
    if operation.kind is Kind.DEPLOYMENT:
        return host.why_not_rebuilt
    return host.why_not_disturbed


# Failures that say nothing against going on: a person stopped them on purpose.
_NOT_COUNTED: Final = frozenset({"release_revoked", "database_restored"})


def why_breaker_opens(failures: Sequence[Failure], rules: Rules) -> str | None:
    """Return why nothing more may start; None while few enough hosts have failed.

    Hosts are counted, not operations: one bad host that is tried again stops nobody else.
    """
    failed = {one.host_id for one in failures if one.code not in _NOT_COUNTED}
    if len(failed) < rules.breaker_hosts_max:
        return None
    minutes = rules.breaker_window.total_seconds() / 60
    return f"deployments failed within {minutes:g} minutes, on so many hosts: {len(failed)}"


def check_permit(
    permit: TicketPermit | WritePermit | None,
    wanted: type[TicketPermit] | type[WritePermit],
    operation: Operation,
) -> None:
    """Raise TypeError unless the permit is one for this operation: acting without is a bug."""
    if type(permit) is not wanted or permit != wanted(operation.id, operation.generation):
        raise TypeError(f"{operation.id} goes on without a {wanted.__name__} of its own")


def identity(disk: Disk) -> dict[str, object]:
    """Return what makes a disk that disk: serial, WWN and size, never its /dev name."""
    return {"serial": disk.serial, "wwn": disk.wwn, "size_bytes": disk.size_bytes}
