"""Reads what the guard is asked with, in the caller's transaction. Decides nothing."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.fleet import (
    CLOCKS_APART,
    GROUP_LABEL,
    NOTHING_SELECTED,
    Fleet,
    Group,
    Load,
    Queued,
    Rules,
)
from provisioner.core.guard import Facts, why_breaker_opens, why_waits
from provisioner.core.model import Event, Host, Operation
from provisioner.core.own_host import OwnHost, ServiceHosts, known_uuid

# Unknown machines come on their own; a rack of them must not hold up those that somebody
# asked for. They have a limit of their own.
DISCOVERY_ACTOR: Final = "discovery"
STARTS_WINDOW: Final = timedelta(minutes=1)
BREAKER_SUBJECT: Final = "fleet"


class View:
    """How full the fleet is, as one transaction saw it, for a look through the queue."""

    def __init__(
        self,
        loads: Mapping[str | None, Load],
        sizes: Mapping[str, tuple[int, int]],
        breaker: str | None,
        rules: Rules,
        *,
        is_observing: bool,
    ) -> None:
        self._loads = dict(loads)
        self._total = sum(loads.values(), Load())
        self._sizes = sizes
        self._breaker = breaker
        self._rules = rules
        self._is_observing = is_observing

    def fleet(self, group: str | None) -> Fleet:
        return _fleet(self._total, self._loads, self._sizes, group)

    def why_waits(self, queued: Queued) -> str | None:
        """Return what keeps a queued operation waiting; None when its turn has come."""
        fleet = self.fleet(queued.group)
        return why_waits(self._breaker, self._is_observing, queued.is_active, fleet, self._rules)

    def count_start(self, queued: Queued) -> None:
        """Count an operation that was started since."""
        one = Load(in_flight=1, started=1, active_in_flight=int(queued.is_active))
        self._loads[queued.group] = self._loads.get(queued.group, Load()) + one
        self._total += one


class GuardFacts:
    """What this service knows beside the database: its own host, and the rules in force."""

    def __init__(self, own: OwnHost | None = None, rules: Rules | None = None) -> None:
        self.own = own or OwnHost()
        self.rules = rules or Rules()

    def service_hosts(self, tx: Tx) -> ServiceHosts:
        """Return the hosts that no operation touches, since a service runs on them."""
        return ServiceHosts(self.own, tuple(tx.services()))

    def of(self, tx: Tx, operation: Operation, host: Host) -> Facts:
        """Return what the guard must know of one operation."""
        row = tx.release(operation.release or "")
        uuid = known_uuid(host.uuid)
        same = tx.hosts_with_uuid(uuid) if uuid else ()
        return Facts(
            selection=tx.selection(str(operation.pins.get("request"))) or NOTHING_SELECTED,
            own=self.service_hosts(tx),
            release_is_revoked=row is not None and row.revoked_at is not None,
            twins=tuple(other.name for other in same if other.id != host.id),
            breaker=tx.breaker().why_open,
            is_observing=tx.is_observing(),
        )

    def view(self, tx: Tx, groups: Iterable[str | None], now: datetime) -> View:
        """Return how full the fleet is, with the sizes of these groups: two grouped queries."""
        loads, sizes = _counts(tx, groups, now)
        return View(loads, sizes, tx.breaker().why_open, self.rules, is_observing=tx.is_observing())

    def fleet(self, tx: Tx, host: Host, now: datetime) -> Fleet:
        """Return how full the fleet is, as one host sees it, and let nobody else start
        anything until the end of the transaction."""
        group = group_of(host)
        tx.breaker(lock=True)
        loads, sizes = _counts(tx, [group], now)
        return _fleet(sum(loads.values(), Load()), loads, sizes, group)

    def look_at_breaker(self, tx: Tx, now: datetime) -> None:
        """Open the breaker when too many hosts have failed, in the transaction of the last."""
        breaker = tx.breaker(lock=True)
        if breaker.is_open:
            return
        spans = breaker.counts(now, self.rules.breaker_window)
        failures = [one for after, until in spans for one in tx.failures(after, until)]
        reason = why_breaker_opens(failures, self.rules)
        if reason is None:
            return
        tx.save_breaker(breaker.opened(now, reason))
        failed = sorted({one.host_id for one in failures})
        detail = {"why": reason, "hosts": failed}
        tx.audit(now, "service", "breaker.opened", BREAKER_SUBJECT, detail)
        tx.add_event(Event(at=now, source="service", text=f"the breaker opened: {reason}"))


def _counts(
    tx: Tx, groups: Iterable[str | None], now: datetime
) -> tuple[Mapping[str | None, Load], Mapping[str, tuple[int, int]]]:
    # Starts of the future are those from before the clock was set back. They would count for
    # as long as it was set back; forgotten, as many may start once more.
    window = {"started_after": now - STARTS_WINDOW, "started_until": now + CLOCKS_APART}
    loads = tx.loads(**window, not_by=DISCOVERY_ACTOR)
    return loads, tx.group_sizes(group for group in groups if group is not None)


def _fleet(
    total: Load,
    loads: Mapping[str | None, Load],
    sizes: Mapping[str, tuple[int, int]],
    group: str | None,
) -> Fleet:
    """Return how full the fleet is, as a host of `group` sees it."""
    if group is None:
        return Fleet(total)
    hosts, active = sizes.get(group, (0, 0))
    return Fleet(total, Group(group, hosts, active, loads.get(group, Load())))


def group_of(host: Host) -> str | None:
    """Return the group that a host's label names; an empty one is none."""
    return host.labels.get(GROUP_LABEL) or None
