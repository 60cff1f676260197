"""Requests for operations: deployments, inspections, verifications, cancelling. Decides
nothing about what follows; that is `lifecycle`."""

from collections.abc import Callable, Mapping, Sequence

from provisioner.core.contracts import Archive, Clock, Store, Tx
from provisioner.core.lifecycle import E
from provisioner.core.manifest import Manifest
from provisioner.core.model import (
    FINAL,
    Host,
    Json,
    Kind,
    Operation,
    OperationId,
    Phase,
    ReleaseRow,
)
from provisioner.core.recovery import Chain
from provisioner.core.releases import check_present, check_standing
from provisioner.core.trust import check_version_floor
from provisioner.errors import Conflict, NotFound

from .chance import new_operation_id
from .follow_ups import supersede
from .lookup import channel_in, find_release, host_named, version_floor
from .observing import check_acting
from .queueing import NewId, new_operation, queue
from .requests import (
    check_can_be_proven,
    check_may_deploy,
    check_may_disturb,
    check_options,
    check_selection,
    profile_of,
)
from .seeds import LABELS, check_renders_for
from .selections import Asked, made_before, select_hosts
from .transitions import Transitions
from .waiting import Waits


class Operations:
    """Queues operations and shows them. `archive` says whether a release can be trusted."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        newest_ramdisk: Callable[[], str],
        archive: Archive,
        new_id: NewId = new_operation_id,
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._newest_ramdisk = newest_ramdisk
        self._archive = archive
        self._new_id = new_id

    def request_deployment(
        self,
        hosts: Sequence[str],
        release: str,
        *,
        options: Json,
        actor: str,
        asked: Asked | None = None,
    ) -> list[Operation]:
        """Queue one deployment for each named host, all in one transaction or none. What waits
        to follow a failed one is superseded. What was `asked` before is not made again: its
        operations are returned.

        A release named by a channel must have what that channel asks for. Raises
        RequestError for an empty or doubled selection, NotFound for unknown names, Conflict
        for a host that is busy, protected or otherwise not to be rebuilt, and TrustError for
        a release that was revoked or changed, or that nobody may deploy now.
        """
        check_selection(hosts)
        check_options(options)
        with self._store.read() as tx:
            if made := made_before(tx, asked):
                return made
            row, channel = find_release(tx, release), channel_in(release)
        ramdisk = self._newest_ramdisk()
        check_standing(row)
        manifest = self._trusted(row.digest, channel)
        with self._store.begin() as tx:
            if made := made_before(tx, asked):
                return made
            row = _held(tx, manifest.digest)
            check_version_floor(manifest, version_floor(tx, row.image))
            check_standing(row)
            found = [host_named(tx, name) for name in hosts]
            selected = select_hosts(tx, found, actor=actor, now=self._clock(), asked=asked)
            own = self._transitions.guard.service_hosts(tx)
            for host in found:
                check_may_deploy(tx, host, row, own)
                profile = profile_of(tx, host)
                check_renders_for(host, profile)
                check_can_be_proven(host, profile, self._transitions.limits)
                pins = {
                    **selected,
                    "ramdisk": ramdisk,
                    "profile": profile.digest,
                    LABELS: dict(host.labels),
                    "release_name": row.name,
                    **self._attempts(options).pins(),
                    **_failed_before(tx, host, row.digest),
                }
                if channel is not None:
                    pins["channel"] = channel
                operation = self._new(host, Kind.DEPLOYMENT, row.digest, pins, options, actor)
                supersede(tx, host, operation)
                made.append(queue(tx, host, operation))
            return made

    def request_verification(
        self,
        hosts: Sequence[str],
        release: str | None,
        *,
        actor: str,
        asked: Asked | None = None,
    ) -> list[Operation]:
        """Queue for each named host a comparison of its disk with a release, by default with
        the one it runs; all in one transaction or none. Nothing will be written. `asked` is
        that of `request_deployment`.

        A release that is revoked, expired or below its image's minimum version may be
        compared with: where it still runs is worth knowing. Raises what a deployment raises
        for a selection, NotFound, Conflict and TrustError for a release that is unknown,
        removed or not signed by enough keys, and Conflict for a host that is busy, in
        maintenance, or not known to run a release when none is named.
        """
        check_selection(hosts)
        with self._store.read() as tx:
            if made := made_before(tx, asked):
                return made
            wanted = {name: _to_compare(tx, host_named(tx, name), release) for name in hosts}
        ramdisk = self._newest_ramdisk()
        digests = sorted(set(wanted.values()))
        for digest in digests:
            self._archive.check_signed(digest)
        with self._store.begin() as tx:
            if made := made_before(tx, asked):
                return made
            # In one order, as whoever removes releases locks them.
            rows = {digest: _held(tx, digest) for digest in digests}
            found = {name: host_named(tx, name) for name in wanted}
            chosen, now = list(found.values()), self._clock()
            selected = select_hosts(tx, chosen, actor=actor, now=now, asked=asked)
            own = self._transitions.guard.service_hosts(tx)
            for name, digest in wanted.items():
                host = found[name]
                check_may_disturb(tx, host, "verified", own)
                # The rule of its profile says which disk is meant.
                profile = profile_of(tx, host)
                pins = {
                    **selected,
                    "ramdisk": ramdisk,
                    "profile": profile.digest,
                    "release_name": rows[digest].name,
                }
                operation = self._new(host, Kind.VERIFICATION, digest, pins, {}, actor)
                made.append(queue(tx, host, operation))
            return made

    def request_inspection(self, host: str, *, actor: str, asked: Asked | None = None) -> Operation:
        """Queue an inspection: netboot the host, take its inventory, return it to its disk.
        `asked` is that of `request_deployment`."""
        with self._store.begin() as tx:
            if made := made_before(tx, asked):
                return made[0]
            ramdisk = self._newest_ramdisk()
            found = host_named(tx, host)
            check_may_disturb(tx, found, "inspected", self._transitions.guard.service_hosts(tx))
            pins = select_hosts(tx, [found], actor=actor, now=self._clock(), asked=asked)
            pins["ramdisk"] = ramdisk
            operation = self._new(found, Kind.INSPECTION, None, pins, {}, actor)
            return queue(tx, found, operation)

    def cancel(self, operation_id: str, *, actor: str) -> Operation:
        """Cancel an operation that has not begun to write, or what is to follow a failed one.

        A host whose disk was written before, and not proven since, is not left like that: it
        is quarantined. Raises NotAllowed with the way out while the disk is being rewritten.
        """
        with self._store.begin() as tx:
            check_acting(tx)
            found = tx.operation(OperationId(operation_id))
            if found.follow_up_at is not None:
                return self._transitions.call_off(tx, found, actor)
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

    def why_waiting(self, operations: Sequence[Operation]) -> Mapping[OperationId, str]:
        """Return by id what keeps those of the operations that are queued from starting."""
        return Waits(self._store, self._transitions.guard, self._clock).why(operations)

    def _trusted(self, digest: str, channel: str | None) -> Manifest:
        """Return the manifest of a release that may be deployed, as far as trust goes.

        Not in the transaction that queues: reading what belongs to a release takes a while.
        """
        return self._archive.check(digest, channel=channel, now=self._clock())

    def _new(
        self, host: Host, kind: Kind, release: str | None, pins: Json, options: Json, actor: str
    ) -> Operation:
        return new_operation(
            host,
            kind,
            release,
            pins=pins,
            options=options,
            actor=actor,
            now=self._clock(),
            limits=self._transitions.limits,
            new_id=self._new_id,
        )

    def _attempts(self, options: Json) -> Chain:
        """Return the first place in a chain of as many attempts as were asked for."""
        asked = options.get("attempts", self._transitions.policy.attempts_max)
        return Chain(1, int(asked))


def _failed_before(tx: Tx, host: Host, release: str) -> Json:
    """Return what is to be said of a release that has failed on this host: who names it may
    have it all the same."""
    for failure in tx.failures_on(host.id):
        if failure.release == release:
            told: Json = {
                "at": failure.at.isoformat(),
                "code": failure.code,
                "message": failure.message,
                "operation": failure.operation_id,
            }
            return {"failed_before": told}
    return {}


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


def missing_ramdisk() -> NotFound:
    """Return the error for a service that has no ramdisk to boot hosts with."""
    return NotFound(
        "there is no deploy ramdisk",
        expected="a ramdisk in the data directory",
        found="none",
        hint="provisioner ramdisk build",
    )
