"""What a booting host is told: looks up what the boot rule needs, asks it, records it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Final

from provisioner.core.bootplan import (
    BootPlan,
    BootRequest,
    Inspect,
    KnownHost,
    Loader,
    LocalDisk,
    Ramdisk,
    TicketOffer,
    plan_boot,
)
from provisioner.core.contracts import Clock, Store, Tx
from provisioner.core.fleet import Fleet, Load, Rules
from provisioner.core.guard import HostRefused, Wait, authorise_ticket, why_not_begun
from provisioner.core.lifecycle import RUNG_LAST
from provisioner.core.model import (
    Event,
    Host,
    Json,
    Kind,
    LocalBoot,
    Operation,
    Phase,
    new_host,
)
from provisioner.core.own_host import known_serial, known_uuid
from provisioner.errors import Conflict

from .addresses import Addresses
from .chance import Derived, new_host_id
from .facts import DISCOVERY_ACTOR
from .observing import WHY
from .queueing import new_operation
from .ramdisks import Ramdisks
from .selections import select_hosts
from .transitions import Transitions

DISCOVERED_HOSTS_MAX_DEFAULT: Final = 100
_TOO_MANY: Final = LocalDisk(LocalBoot.AUTO, "too many discovered hosts await confirmation")


class BootService:
    """Answers boot requests by the rule of `core.bootplan`."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        derived: Derived,
        ramdisks: Ramdisks,
        *,
        record: Callable[[Event], None],
        discovery: bool,
        discovered_hosts_max: int = DISCOVERED_HOSTS_MAX_DEFAULT,
        addresses: Addresses | None = None,
    ) -> None:
        """`record` keeps an event for the timeline, and may not wait for the database.
        `addresses` says what our own DHCP gave to whom, where it does."""
        self._addresses = addresses or Addresses()
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._derived = derived
        self._ramdisks = ramdisks
        self._keep = record
        self._discovery = discovery
        self._discovered_hosts_max = discovered_hosts_max

    def may_speak_for_others(self, source: str) -> bool:
        """Say whether what asks from `source` is our own relay, which names who asked it."""
        return self._addresses.is_own(source)

    def answer(self, request: BootRequest, source: str) -> BootPlan:
        """Return LocalDisk or Ramdisk for the asking host. `source` is its address."""
        try:
            return self._answer(request, source)
        except HostRefused as refusal:
            return LocalDisk(LocalBoot.AUTO, refusal.message)
        except Conflict:
            # A firmware that asks twice at once: the other answer has made host and ticket
            # by now, and this one finds them.
            return self._answer(request, source)

    def _answer(self, request: BootRequest, source: str) -> BootPlan:
        now = self._clock()
        with self._store.read() as tx:
            plan, host = self._plan(tx, request, now, source)
            # Where nothing is discovered, machines that nobody knows leave no trace.
            is_noted = host is not None or self._discovery
        if isinstance(plan, Inspect):
            return self._begin_inspection(request, host, source)
        if is_noted:
            self._record(request, host, plan, source)
        return plan

    def _plan(
        self, tx: Tx, request: BootRequest, now: datetime, source: str
    ) -> tuple[BootPlan, Host | None]:
        hosts = tx.hosts_with_mac(request.mac)
        if len(hosts) > 1:
            names = ", ".join(host.name for host in hosts)
            return LocalDisk(LocalBoot.AUTO, f"this MAC is known for {names}"), hosts[0]
        host = hosts[0] if hosts else None
        if tx.is_observing():
            return LocalDisk(host.local_boot if host else LocalBoot.AUTO, WHY), host
        if host is not None and (doubt := self._identity_doubt(tx, request, host, source)):
            return LocalDisk(host.local_boot, doubt), host
        if host is None and _is_nobody(request) and self._discovery:
            return LocalDisk(LocalBoot.AUTO, f"its UUID {request.uuid} identifies nobody"), None
        if host is None and (twin := self._twin(tx, request)) is not None:
            reason = f"{request.mac} is no MAC of {twin.name}, whose UUID it has"
            return LocalDisk(twin.local_boot, reason), twin
        known = KnownHost(host.id, host.name, host.macs, host.local_boot) if host else None
        offer = self._offer(tx, host) if host else None
        if host is not None and self._wants_inspection(tx, host):
            return Inspect(request.mac), host
        return plan_boot(request, known, offer, now=now, discovery=self._discovery), host

    def _identity_doubt(self, tx: Tx, request: BootRequest, host: Host, source: str) -> str | None:
        """Return why the asking host may not be the enrolled one, or not that one alone."""
        uuid, serial = known_uuid(request.uuid), known_serial(request.serial)
        if _is_nobody(request):
            return f"its UUID {request.uuid} identifies nobody"
        enrolled = known_uuid(host.uuid)
        if uuid and enrolled and uuid != enrolled:
            return f"its UUID is {uuid}, and {host.name} was enrolled with {enrolled}"
        marked = known_serial(host.serial)
        if serial and marked and serial != marked:
            return f"its serial is {serial}, and {host.name} was enrolled with {marked}"
        names = {other.name for one in {uuid, enrolled} if one for other in tx.hosts_with_uuid(one)}
        if len(names | {host.name}) > 1:
            return f"its UUID is known for {', '.join(sorted(names | {host.name}))}"
        return self._addresses.doubt(host.macs, source)

    def _twin(self, tx: Tx, request: BootRequest) -> Host | None:
        """Return the host that already has the UUID of a machine about to be discovered.

        It is most likely another NIC of that host. Discovered as a second host with the same
        UUID it would keep both of them from ever being netbooted again.
        """
        uuid = known_uuid(request.uuid)
        if not self._discovery or uuid is None:
            return None
        return next(iter(tx.hosts_with_uuid(uuid)), None)

    def _offer(self, tx: Tx, host: Host) -> TicketOffer | None:
        ticket = tx.open_ticket(host.id)
        operation = tx.open_operation(host.id)
        if ticket is None or operation is None or operation.phase is not Phase.NETBOOTING:
            return None
        if ticket.operation_id != operation.id or ticket.generation != host.generation:
            return None
        if why_not_begun(operation, host) is not None:
            return None  # flagged since it started
        value = self._derived.ticket(operation.id, operation.generation)
        return TicketOffer(ticket, value, operation.pins["ramdisk"])

    def _wants_inspection(self, tx: Tx, host: Host) -> bool:
        """A discovered host whose inspection never came back is inspected again."""
        return (
            self._discovery
            and not host.is_confirmed
            and host.inventory is None
            and tx.open_operation(host.id) is None
        )

    def _begin_inspection(self, request: BootRequest, host: Host | None, source: str) -> BootPlan:
        if self._ramdisks.newest_or_none() is None:
            return LocalDisk(LocalBoot.AUTO, "there is no ramdisk to inspect it with")
        # Asked before the write lock is taken: a flood of unknown MACs must hold up nobody.
        with self._store.read() as tx:
            if host is None and self._is_full(tx):
                return _TOO_MANY
            if (reason := tx.breaker().why_open) is not None:
                return LocalDisk(LocalBoot.AUTO, f"it is not inspected now: {reason}")
        now = self._clock()
        with self._store.begin() as tx:
            if host is None:
                if self._is_full(tx):
                    return _TOO_MANY
                host = _discovered(request, now)
                tx.add_host(host)
                tx.audit(now, DISCOVERY_ACTOR, "host.discovered", host.name, {"source": source})
            else:
                # Read again: it may have been confirmed, or asked for, since we looked.
                host = tx.host(host.id)
                if not self._wants_inspection(tx, host):
                    raise Conflict(f"{host.name} was taken up meanwhile", host=host.name)
            pins = select_hosts(tx, [host], actor=DISCOVERY_ACTOR, now=now)
            queued = self._inspection(host, pins, now)
            host = replace(host, generation=queued.generation)
            facts = self._transitions.guard.of(tx, queued, host)
            # Its own limit is the number of unconfirmed hosts; no other cap delays it.
            permit = authorise_ticket(queued, host, facts, Fleet(Load()), Rules())
            if isinstance(permit, Wait):
                return LocalDisk(host.local_boot, f"it is not inspected now: {permit.reason}")
            operation = replace(
                queued,
                phase=Phase.NETBOOTING,
                started_at=now,
                deadline_at=self._transitions.limits.deadline(Phase.NETBOOTING, now, now),
            )
            tx.save_host(host)
            tx.add_operation(operation)
            self._transitions.issue_ticket(tx, operation, host, permit)
            tx.audit(
                now, DISCOVERY_ACTOR, "inspection.requested", host.name, {"operation": operation.id}
            )
        value = self._derived.ticket(operation.id, operation.generation)
        plan = Ramdisk(operation.pins["ramdisk"], value, host.local_boot)
        self._record(request, host, plan, source)
        return plan

    def _is_full(self, tx: Tx) -> bool:
        return tx.count_unconfirmed_hosts() >= self._discovered_hosts_max

    def _inspection(self, host: Host, pins: Json, now: datetime) -> Operation:
        queued = new_operation(
            host,
            Kind.INSPECTION,
            None,
            pins={**pins, "ramdisk": self._ramdisks.newest()},
            options={},
            actor=DISCOVERY_ACTOR,
            now=now,
            limits=self._transitions.limits,
        )
        # It is booting from the network already; there is no ladder.
        return replace(queued, rung=RUNG_LAST)

    def _record(self, request: BootRequest, host: Host | None, plan: BootPlan, source: str) -> None:
        said, answer = "ramdisk", "deploy ramdisk"
        if isinstance(plan, LocalDisk):
            said, answer = "disk", f"{plan.method}, {plan.reason}"
        asked_for = "boot script" if request.loader is Loader.IPXE else "grub.cfg"
        self._keep(
            Event(
                at=self._clock(),
                source="http",
                text=f"{asked_for}: {answer}",
                host_id=host.id if host else None,
                mac=request.mac,
                detail={"address": source, "answer": said, "loader": str(request.loader)},
            )
        )


def _is_nobody(request: BootRequest) -> bool:
    """Say whether the firmware tells a UUID, and one that identifies nobody."""
    return bool((request.uuid or "").strip()) and known_uuid(request.uuid) is None


def _discovered(request: BootRequest, now: datetime) -> Host:
    return new_host(
        new_host_id(),
        f"new-{request.mac.replace(':', '')}",
        (request.mac,),
        now,
        is_confirmed=False,
        firmware=request.firmware,
        uuid=known_uuid(request.uuid),
        serial=request.serial,
    )
