"""What the operator API needs of the service layer, and how model values look as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from provisioner.core.contracts import Archive, Store, Tx
from provisioner.core.model import (
    FINAL,
    BmcAddress,
    Host,
    HostId,
    Operation,
    Phase,
    ReleaseFailure,
    Secret,
)
from provisioner.service.audit import Audit
from provisioner.service.breaker import Breakers
from provisioner.service.follow_ups import standing_of
from provisioner.service.hosts import Hosts
from provisioner.service.operations import Operations
from provisioner.service.profiles import Profiles
from provisioner.service.reconciliation import Reconciliation
from provisioner.service.releases import Releases
from provisioner.service.services import Services
from provisioner.service.tokens import Tokens
from provisioner.service.why import Answer, Why

from .schemas import BmcIn

OPEN_PHASES = tuple(phase for phase in Phase if phase not in FINAL)
# More open operations than this are not shown beside their hosts in one list.
OPEN_OPERATIONS_MAX = 5000


class ApiServices(Protocol):
    """The use cases behind the API; `wiring` builds them."""

    @property
    def hosts(self) -> Hosts: ...
    @property
    def operations(self) -> Operations: ...
    @property
    def profiles(self) -> Profiles: ...
    @property
    def releases(self) -> Releases: ...
    @property
    def archive(self) -> Archive: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def audit(self) -> Audit: ...
    @property
    def breakers(self) -> Breakers: ...
    @property
    def services(self) -> Services: ...
    @property
    def reconciliation(self) -> Reconciliation: ...
    @property
    def why(self) -> Why: ...
    @property
    def store(self) -> Store: ...


def bmc_address(given: BmcIn | None) -> BmcAddress | None:
    if given is None:
        return None
    password = Secret(given.password.get_secret_value())
    return BmcAddress(str(given.address), given.port, given.user, password)


def show_host(store: Store, host: Host) -> dict[str, Any]:
    """Return one host as the API shows it, with its inventory and open operation."""
    with store.read() as tx:
        operation = tx.open_operation(host.id)
        names = _release_names(tx)
        failures = [_failure(one, names) for one in tx.failures_on(host.id)]
        recovery = standing_of(tx, host)
    open_ones = {host.id: operation} if operation else {}
    shown = _host(host, open_ones, names, with_inventory=True)
    return {**shown, "recovery": recovery, "failed_releases": failures}


def show_answer(answer: Answer) -> dict[str, Any]:
    """Return a diagnosis as the API shows it."""
    operation, found = answer.operation, answer.diagnosis
    return {
        "host": answer.host.name,
        "operation": operation.id if operation else None,
        "kind": operation.kind if operation else None,
        "phase": operation.phase if operation else None,
        "since": operation.phase_at if operation else None,
        "deadline_at": operation.deadline_at if operation else None,
        "cause": found.cause,
        "stands": found.stands,
        "why": found.why,
        "evidence": [
            {"at": one.at, "source": one.source, "text": one.text} for one in found.evidence
        ],
        "next": list(found.next),
    }


def _failure(failure: ReleaseFailure, release_names: Mapping[str, str]) -> dict[str, Any]:
    shown = asdict(failure)
    shown["operation"] = shown.pop("operation_id")
    del shown["host_id"]
    return {**shown, "release_name": release_names.get(failure.release)}


def show_hosts(store: Store, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """Return hosts as a list shows them: without inventories."""
    with store.read() as tx:
        found = tx.operations(phases=OPEN_PHASES, limit=OPEN_OPERATIONS_MAX)
        names = _release_names(tx)
    by_host = {operation.host_id: operation for operation in found}
    return [_host(host, by_host, names, with_inventory=False) for host in hosts]


def _host(
    host: Host,
    operations: Mapping[HostId, Operation],
    release_names: Mapping[str, str],
    *,
    with_inventory: bool,
) -> dict[str, Any]:
    operation, bmc = operations.get(host.id), host.bmc
    return {
        "id": host.id,
        "name": host.name,
        "state": host.state,
        "macs": list(host.macs),
        "firmware": host.firmware,
        "local_boot": host.local_boot,
        "uuid": host.uuid,
        "serial": host.serial,
        "profile": host.profile,
        # Never the password: it goes in, and does not come out again.
        "bmc": {"address": bmc.address, "port": bmc.port, "user": bmc.user} if bmc else None,
        "generation": host.generation,
        "release": host.release,
        "release_name": release_names.get(host.release or ""),
        "last_good": host.last_good,
        "is_confirmed": host.is_confirmed,
        "is_protected": host.is_protected,
        "in_maintenance": host.in_maintenance,
        "quarantine_reason": host.quarantine_reason,
        "labels": dict(host.labels),
        "root_disk": host.root_disk,
        "inventory": host.inventory if with_inventory else None,
        "operation": _open(operation) if operation else None,
        "recovery": None,
        "failed_releases": [],
        "created_at": host.created_at,
    }


def _open(operation: Operation) -> dict[str, Any]:
    return {"id": operation.id, "kind": operation.kind, "phase": operation.phase}


def show_operations(services: ApiServices, operations: Sequence[Operation]) -> list[dict[str, Any]]:
    """Return operations as the API shows them, each with the name of its host, and with what
    it waits for."""
    waits = services.operations.why_waiting(operations)
    with services.store.read() as tx:
        names: dict[str, str] = {}
        for host_id in {operation.host_id for operation in operations}:
            host = tx.host_named(host_id)
            names[host_id] = host.name if host else host_id
        releases = _release_names(tx)
    return [
        {**_operation(one, names[one.host_id], releases), "waits": waits.get(one.id)}
        for one in operations
    ]


def show_operation(services: ApiServices, operation: Operation) -> dict[str, Any]:
    return show_operations(services, [operation])[0]


def _operation(operation: Operation, host: str, releases: Mapping[str, str]) -> dict[str, Any]:
    shown = asdict(operation)
    del shown["host_id"]
    shown["phase_seconds"] = dict(operation.phase_seconds)
    return {
        **shown,
        "host": host,
        "is_final": operation.is_final,
        "release_name": releases.get(operation.release or ""),
    }


def _release_names(tx: Tx) -> dict[str, str]:
    return {release.digest: release.name for release in tx.releases()}
