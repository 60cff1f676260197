"""What must always be true of what starts, and of how much is under way at once: in the fleet,
and in each group.

The guard counts in the transaction that starts an operation, so what is held here is the row of
each start: caps and rates with it counted, and a floor that it leaves standing. What else takes
a healthy host away, such as a failure or a person, is bound by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from provisioner.core.fleet import NO_LIMIT
from provisioner.core.model import Phase
from provisioner.service.facts import STARTS_WINDOW

from .judging import about
from .observations import Committed

if TYPE_CHECKING:
    from .ledger import Start
    from .world import World


@about(Committed)
def nothing_starts_beyond_the_limits(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No more operations are in flight, or were started within a minute, than is allowed."""
    ledger, rules = world.ledger, world.rules
    if not ledger.newest_starts:
        return None
    in_flight = [one.id for one in ledger.now.in_flight.values()]
    if len(in_flight) > rules.in_flight_max:
        return f"{in_flight} are in flight"
    lately = _lately(world)
    if len(lately) > rules.starts_per_minute_max:
        return f"{len(lately)} were started within a minute"
    return None


@about(Committed)
def no_group_has_more_in_flight_than_it_may(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """When an operation starts, no more hosts of its group are in flight than is allowed."""
    limit, now = world.rules.group_in_flight_max, world.ledger.now
    for group in _groups_with_a_start(world):
        in_flight = [one.id for key, one in now.in_flight.items() if now.hosts[key].group == group]
        if NO_LIMIT < limit < len(in_flight):
            return f"{in_flight} of group {group} are in flight"
    return None


@about(Committed)
def no_group_starts_faster_than_it_may(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No more operations are started on hosts of a group within a minute than is allowed."""
    limit, hosts = world.rules.group_starts_per_minute_max, world.ledger.now.hosts
    for group in _groups_with_a_start(world):
        lately = [one for one in _lately(world) if hosts[one.host_id].group == group]
        if NO_LIMIT < limit < len(lately):
            return f"{len(lately)} of group {group} were started within a minute"
    return None


@about(Committed)
def a_group_keeps_its_healthy_hosts(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No start takes a healthy host of a group away when too few others are left."""
    ledger, hosts = world.ledger, world.ledger.now.hosts
    for start in ledger.newest_starts:
        group = hosts[start.host_id].group
        if group is None or not start.was_healthy:
            continue
        all_of_it = [key for key, host in hosts.items() if host.group == group]
        healthy = [key for key in all_of_it if ledger.is_healthy(key, ledger.now)]
        if len(healthy) < world.rules.group_floor.of(len(all_of_it)):
            name = hosts[start.host_id].name
            return f"{name} is taken, and {len(healthy)} of {len(all_of_it)} of {group} are left"
    return None


@about(Committed)
def nothing_starts_while_the_breaker_is_open(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """An open breaker stops every start, until a person closes it."""
    for before, operation in world.ledger.changed:
        is_start = before is not None and before.phase == Phase.QUEUED and operation.is_started
        if is_start and world.ledger.breaker_is_open():
            return f"{operation.id} starts"
    return None


@about(Committed)
def nothing_is_refused_without_a_reason(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A host is left alone because it is flagged, or its release is revoked. That another
    worker was quicker is no reason."""
    for _, operation in world.ledger.changed:
        if operation.error_code != "host_refused" or operation.is_open:
            continue
        is_flagged = world.ledger.now.host_of(operation).is_flagged
        if not is_flagged and not world.ledger.revoked(operation.release or ""):
            return f"{operation.id} was refused"
    return None


def _lately(world: World) -> list[Start]:
    """Return what was started within the last minute."""
    after_s = world.now_s - STARTS_WINDOW.total_seconds()
    return [one for one in world.ledger.starts if one.at_s > after_s]


def _groups_with_a_start(world: World) -> Iterator[str]:
    """Yield the groups of the hosts on which the last commit has started something."""
    hosts = world.ledger.now.hosts
    found = {hosts[one.host_id].group for one in world.ledger.newest_starts}
    yield from sorted(group for group in found if group is not None)
