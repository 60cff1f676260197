"""Requests for operations: deployments, inspections, verifications, cancelling. Decides
nothing about what follows; that is `lifecycle`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from provisioner.core.contracts import Archive, Clock, Store, Tx
from provisioner.core.lifecycle import E
from provisioner.core.manifest import Manifest
from provisioner.core.model import (
    FINAL,
    Event,
    Host,
    Json,
    Kind,
    Operation,
    OperationId,
    Phase,
    ReleaseRow,
)
from provisioner.core.releases import check_present, check_standing
from provisioner.core.trust import check_version_floor
from provisioner.errors import Conflict, NotFound

from .chance import new_operation_id
from .lookup import channel_in, find_release, host_named, version_floor
from .observing import check_acting
from .requests import (
    check_can_be_proven,
    check_may_deploy,
    check_may_disturb,
    check_options,
    check_selection,
    profile_of,
)
from .seeds import check_renders_for
from .transitions import Transitions


class Operations:
    """Queues operations and shows them. `archive` says whether a release can be trusted."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        newest_ramdisk: Callable[[], str],
        archive: Archive,
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._newest_ramdisk = newest_ramdisk
        self._archive = archive

    def request_deployment(
        self, hosts: Sequence[str], release: str, *, options: Json, actor: str
    ) -> list[Operation]:
        """Queue one deployment for each named host, all in one transaction or none.

        A release named by a channel must have what that channel asks for. Raises
        RequestError for an empty or doubled selection, NotFound for unknown names, Conflict
        for a host that is busy, protected or otherwise not to be rebuilt, and TrustError for
        a release that was revoked or changed, or that nobody may deploy now.
        """
        check_selection(hosts)
        check_options(options)
        ramdisk = self._newest_ramdisk()
        with self._store.read() as tx:
            row, channel = find_release(tx, release), channel_in(release)
        check_standing(row)
        manifest = self._trusted(row.digest, channel)
        with self._store.begin() as tx:
            row = _held(tx, manifest.digest)
            check_version_floor(manifest, version_floor(tx, row.image))
            check_standing(row)
            made = []
            for name in hosts:
                host = host_named(tx, name)
                check_may_deploy(tx, host, row)
                profile = profile_of(tx, host)
                check_renders_for(host, profile)
                check_can_be_proven(host, profile, self._transitions.limits)
                pins = {"ramdisk": ramdisk, "profile": profile.digest, "release_name": row.name}
                if channel is not None:
                    pins["channel"] = channel
                operation = self._new(host, Kind.DEPLOYMENT, row.digest, pins, options, actor)
                made.append(self._add(tx, host, operation, actor))
            return made

    def request_verification(
        self, hosts: Sequence[str], release: str | None, *, actor: str
    ) -> list[Operation]:
        """Queue for each named host a comparison of its disk with a release, by default with
        the one it runs; all in one transaction or none. Nothing will be written.

        A release that is revoked, expired or below its image's minimum version may be
        compared with: where it still runs is worth knowing. Raises what a deployment raises
        for a selection, NotFound, Conflict and TrustError for a release that is unknown,
        removed or not signed by enough keys, and Conflict for a host that is busy, in
        maintenance, or not known to run a release when none is named.
        """
        check_selection(hosts)
        ramdisk = self._newest_ramdisk()
        with self._store.read() as tx:
            wanted = {name: _to_compare(tx, host_named(tx, name), release) for name in hosts}
        digests = sorted(set(wanted.values()))
        for digest in digests:
            self._archive.check_signed(digest)
        with self._store.begin() as tx:
            # In one order, as whoever removes releases locks them.
            rows = {digest: _held(tx, digest) for digest in digests}
            made = []
            for name, digest in wanted.items():
                host = host_named(tx, name)
                check_may_disturb(tx, host, "verified")
                # The rule of its profile says which disk is meant.
                profile = profile_of(tx, host)
                pins = {
                    "ramdisk": ramdisk,
                    "profile": profile.digest,
                    "release_name": rows[digest].name,
                }
                operation = self._new(host, Kind.VERIFICATION, digest, pins, {}, actor)
                made.append(self._add(tx, host, operation, actor))
            return made

    def request_inspection(self, host: str, *, actor: str) -> Operation:
        """Queue an inspection: netboot the host, take its inventory, return it to its disk."""
        ramdisk = self._newest_ramdisk()
        with self._store.begin() as tx:
            found = host_named(tx, host)
            check_may_disturb(tx, found, "inspected")
            operation = self._new(found, Kind.INSPECTION, None, {"ramdisk": ramdisk}, {}, actor)
            return self._add(tx, found, operation, actor)

    def cancel(self, operation_id: str, *, actor: str) -> Operation:
        """Cancel an operation whose host was not written yet.

        Raises NotAllowed with the way out when the disk is already being rewritten.
        """
        with self._store.begin() as tx:
            check_acting(tx)
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

    def _trusted(self, digest: str, channel: str | None) -> Manifest:
        """Return the manifest of a release that may be deployed, as far as trust goes.

        Not in the transaction that queues: reading what belongs to a release takes a while.
        """
        return self._archive.check(digest, channel=channel, now=self._clock())

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
            id=new_operation_id(now),
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
        check_acting(tx)
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


def _held(tx: Tx, digest: str) -> ReleaseRow:
    """Return the release that operations are about to refer to.

    Held, so that nobody removes or revokes it before they do. Raises Conflict when it was
    removed.
    """
    row = tx.hold_release(digest)
    check_present(row)
    return row


def _to_compare(tx: Tx, host: Host, reference: str | None) -> str:
    """Return the digest of the release that a host's disk is compared with."""
    if reference is None and host.release is None:
        raise Conflict(
            f"host {host.name} is not known to run a release",
            host=host.name,
            expected="a host that is active",
            found=str(host.state),
            hint="name the release to compare its disk with",
        )
    row = find_release(tx, reference or host.release or "")
    check_present(row)
    return row.digest


def why_not_started(operation: Operation, host: Host) -> str | None:
    """Why a queued operation may not begin after all; None when it may."""
    if operation.kind is Kind.DEPLOYMENT:
        return host.why_not_rebuilt
    return host.why_not_disturbed


def missing_ramdisk() -> NotFound:
    """Return the error for a service that has no ramdisk to boot hosts with."""
    return NotFound(
        "there is no deploy ramdisk",
        expected="a ramdisk in the data directory",
        found="none",
        hint="provisioner ramdisk build",
    )
