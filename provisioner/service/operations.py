"""Requests for operations: deployments, inspections, cancelling. Decides nothing about
what follows; that is `lifecycle`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from provisioner.core.contracts import Clock, Store, Tx
from provisioner.core.lifecycle import E
from provisioner.core.model import (
    FINAL,
    Event,
    Host,
    Json,
    Kind,
    Operation,
    OperationId,
    Phase,
    Profile,
)
from provisioner.core.profile import health_of
from provisioner.errors import Conflict, NotFound, RequestError

from .chance import new_operation_id
from .lookup import find_release, host_named
from .seeds import check_renders_for
from .transitions import Transitions

HOSTS_PER_REQUEST_MAX: Final = 1000
_OPTIONS: Final = {"soft_shutdown": bool}


class Operations:
    """Queues operations and shows them."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        newest_ramdisk: Callable[[], str],
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._newest_ramdisk = newest_ramdisk

    def request_deployment(
        self, hosts: Sequence[str], release: str, *, options: Json, actor: str
    ) -> list[Operation]:
        """Queue one deployment for each named host, all in one transaction or none.

        Raises RequestError for an empty or doubled selection, NotFound for unknown names,
        and Conflict for a host that is busy, protected or otherwise not to be rebuilt.
        """
        _check_selection(hosts)
        _check_options(options)
        ramdisk = self._newest_ramdisk()
        with self._store.begin() as tx:
            row = find_release(tx, release)
            made = []
            for name in hosts:
                host = host_named(tx, name)
                self._check_may_deploy(tx, host, row.firmware, row.name)
                profile = tx.profile(host.profile) if host.profile else None
                if profile is None:
                    raise Conflict(
                        f"host {host.name} has no profile, so its disk and user data are unknown",
                        host=host.name,
                        expected="a saved profile",
                        found=host.profile,
                        hint=f"provisioner host change {host.name} --profile NAME",
                    )
                check_renders_for(host, profile)
                self._check_can_be_proven(host, profile)
                pins = {"ramdisk": ramdisk, "profile": profile.digest, "release_name": row.name}
                operation = self._new(host, Kind.DEPLOYMENT, row.digest, pins, options, actor)
                made.append(self._add(tx, host, operation, actor))
            return made

    def request_inspection(self, host: str, *, actor: str) -> Operation:
        """Queue an inspection: netboot the host, take its inventory, return it to its disk."""
        ramdisk = self._newest_ramdisk()
        with self._store.begin() as tx:
            found = host_named(tx, host)
            self._check_idle(tx, found)
            if (reason := found.why_not_disturbed) is not None:
                raise Conflict(
                    f"host {found.name} is not inspected: {reason}", host=found.name, found=reason
                )
            operation = self._new(found, Kind.INSPECTION, None, {"ramdisk": ramdisk}, {}, actor)
            return self._add(tx, found, operation, actor)

    def cancel(self, operation_id: str, *, actor: str) -> Operation:
        """Cancel an operation whose host was not written yet.

        Raises NotAllowed with the way out when the disk is already being rewritten.
        """
        with self._store.begin() as tx:
            found = tx.operation(OperationId(operation_id))
            if found.is_final:
                raise Conflict(
                    f"operation {found.id} has already ended",
                    found=str(found.phase),
                    hint="nothing is left to cancel",
                )
            step = self._transitions.apply(
                tx, found.id, E.CANCEL, generation=found.generation, actor=actor
            )
            return step.operation

    def show(self, operation_id: str) -> Operation:
        with self._store.read() as tx:
            return tx.operation(OperationId(operation_id))

    def list(
        self, host: str | None = None, *, only_open: bool = False, limit: int = 100
    ) -> Sequence[Operation]:
        phases = [phase for phase in Phase if phase not in FINAL] if only_open else None
        with self._store.read() as tx:
            host_id = host_named(tx, host).id if host else None
            return tx.operations(host_id=host_id, phases=phases, limit=limit)

    def _check_may_deploy(
        self, tx: Tx, host: Host, firmware: tuple[str, ...], release: str
    ) -> None:
        if (reason := host.why_not_rebuilt) is not None:
            raise Conflict(
                f"host {host.name} is not rebuilt: {reason}",
                host=host.name,
                expected="a confirmed host without flags",
                found=reason,
                hint=f"provisioner host show {host.name}",
            )
        self._check_idle(tx, host)
        if host.firmware is not None and firmware and host.firmware not in firmware:
            raise Conflict(
                f"release {release} does not boot on {host.firmware}",
                host=host.name,
                expected=list(firmware),
                found=str(host.firmware),
            )

    def _check_can_be_proven(self, host: Host, profile: Profile) -> None:
        """Raise Conflict for a soak that must fail, before the old system is gone."""
        soak_s, limit = health_of(profile.document).soak_s, self._transitions.limits
        limit_s = limit.phase[Phase.PROVING].total_seconds()
        if soak_s >= limit_s:
            raise Conflict(
                f"profile {profile.name} soaks for {soak_s:g} s, and proving ends before that",
                host=host.name,
                expected=f"less than {limit_s:g} s",
                found=soak_s,
                hint="shorten its health.soak_s, or raise limits.proving_s",
            )

    def _check_idle(self, tx: Tx, host: Host) -> None:
        if host.bmc is None:
            raise Conflict(
                f"host {host.name} has no BMC, so it cannot be started into the network",
                host=host.name,
                expected="a BMC address",
                found=None,
                hint=f"provisioner host change {host.name} --bmc ADDRESS",
            )
        busy = tx.open_operation(host.id)
        if busy is not None:
            raise Conflict(
                f"host {host.name} is busy with {busy.id}",
                host=host.name,
                expected="no open operation",
                found=f"{busy.kind} in {busy.phase}",
                hint=f"wait for it (provisioner operation watch {busy.id}), or cancel it",
            )

    def _new(
        self,
        host: Host,
        kind: Kind,
        release: str | None,
        pins: Json,
        options: Json,
        actor: str,
    ) -> Operation:
        now = self._clock()
        return Operation(
            id=new_operation_id(),
            host_id=host.id,
            kind=kind,
            phase=Phase.QUEUED,
            generation=host.generation + 1,
            rung=0,
            release=release,
            pins=pins,
            options=options,
            requested_by=actor,
            requested_at=now,
            phase_at=now,
            deadline_at=self._transitions.limits.deadline(Phase.QUEUED, now, now),
            ended_at=None,
        )

    def _add(self, tx: Tx, host: Host, operation: Operation, actor: str) -> Operation:
        tx.save_host(replace(host, generation=operation.generation))
        tx.add_operation(operation)
        detail: Json = {"operation": operation.id, "release": operation.release, **operation.pins}
        tx.audit(self._clock(), actor, f"{operation.kind}.requested", host.name, detail)
        what = operation.pins.get("release_name", "")
        tx.add_event(
            Event(
                at=self._clock(),
                source="service",
                text=f"{operation.kind} requested by {actor} {what}".rstrip(),
                host_id=host.id,
                operation_id=operation.id,
            )
        )
        return operation


def why_not_started(operation: Operation, host: Host) -> str | None:
    """Why a queued operation may not begin after all; None when it may."""
    if operation.kind is Kind.DEPLOYMENT:
        return host.why_not_rebuilt
    return host.why_not_disturbed


def _check_selection(hosts: Sequence[str]) -> None:
    if not hosts:
        raise RequestError(
            "no host was named, and an empty selection selects nothing",
            expected="one or more host names",
            found="none",
        )
    if len(hosts) > HOSTS_PER_REQUEST_MAX:
        raise RequestError(
            "too many hosts in one request", expected=HOSTS_PER_REQUEST_MAX, found=len(hosts)
        )
    doubled = sorted({name for name in hosts if hosts.count(name) > 1})
    if doubled:
        raise RequestError("a host was named twice", expected="each host once", found=doubled)


def _check_options(options: Json) -> None:
    for key, value in options.items():
        kind = _OPTIONS.get(key)
        if kind is None or not isinstance(value, kind):
            raise RequestError(
                f"option {key} is not known or of the wrong type",
                expected={name: wanted.__name__ for name, wanted in _OPTIONS.items()},
                found={key: value},
            )


def missing_ramdisk() -> NotFound:
    """Return the error for a service that has no ramdisk to boot hosts with."""
    return NotFound(
        "there is no deploy ramdisk",
        expected="a ramdisk in the data directory",
        found="none",
        hint="provisioner ramdisk build",
    )
