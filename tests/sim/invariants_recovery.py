"""What must always be true of what follows a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from provisioner.core.model import Kind, Phase
from provisioner.core.recovery import Cause, Next, OnQuarantine

from .invariants import LATE_MAX_S
from .judging import about
from .observations import BootAnswered, Committed, Ended, TimePassed

if TYPE_CHECKING:
    from .ledger import OperationFacts
    from .world import World

# After these it is not the release that is remembered as failed.
NOT_THE_RELEASE: Final = (
    "release_revoked", "queued_timed_out", "ticket_contested", "identity_doubtful",
    "own_host", "bmc_auth_failed",
)  # fmt: skip
# These speak of the release on this host, so that nothing need be written for them.
OF_THE_RELEASE: Final = (
    "chunk_corrupt", "manifest_digest", "manifest_malformed", "manifest_signature",
    "host_unfit", "disk_too_small", "image_unfit",
)  # fmt: skip
# What follows these is left to a person.
A_PERSONS: Final = ("host_refused", "database_restored")


# --- chains -------------------------------------------------------------------------------


@about(Committed)
def a_chain_has_its_attempts_and_one_way_back(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No chain is longer than its attempts and one way back. What follows an operation is one,
    on the same host, after it has failed; an attempt is of the same release."""
    for before, operation in world.ledger.changed:
        if before is not None or operation.after is None:
            continue
        chain = world.ledger.chain_of(operation)
        last = chain[1]
        ways_back = [one for one in chain if one.cause == Cause.ROLLBACK]
        if not world.policy.is_automatic or last.phase != Phase.FAILED:
            return f"{operation.id} follows {last.id}, which is {last.phase}"
        if last.host_id != operation.host_id or last.cause == Cause.ROLLBACK:
            return f"{operation.id} on {operation.host_id} follows {last.id}, {last.cause}"
        if len(chain) - len(ways_back) > world.policy.attempts_max or len(ways_back) > 1:
            return f"{[one.id for one in chain]}, and {world.policy.attempts_max} are allowed"
        if not ways_back and last.release != operation.release:
            return f"{operation.id} is another release's than {last.id}"
        followers = [one for one in world.ledger.now.operations.values() if one.after == last.id]
        if len(followers) > 1:
            return f"{[one.id for one in followers]} follow {last.id}"
    return None


@about(TimePassed, Ended)
def what_is_due_follows(saw: TimePassed | Ended, world: World) -> str | None:
    """What is to follow comes in its time, while a service and its database are there."""
    ledger = world.ledger
    if not ledger.now.to_follow:
        return None
    if ledger.overdue_at_s is None:
        since_s = max(ledger.first_follow_up_s, ledger.well_since_s, ledger.committed_s)
        ledger.overdue_at_s = since_s + LATE_MAX_S
    if isinstance(saw, Ended) or world.now_s > ledger.overdue_at_s:
        return f"never after {[one.id for one in ledger.now.to_follow]}"
    return None


def _newly_over(world: World) -> list[OperationFacts]:
    """Return the deployments without success after which nothing comes any more, as decided in
    the last commit."""
    found = []
    for before, operation in world.ledger.changed:
        is_deployment = operation.kind == Kind.DEPLOYMENT and operation.phase != Phase.SUCCEEDED
        is_new = before is None or not before.is_over
        # Another one is there at once when it was taken, or somebody asked for something else.
        host = world.ledger.now.host_of(operation)
        is_followed = world.ledger.now.open_on(host.name) is not None
        if is_deployment and operation.is_over and is_new and not is_followed:
            found.append(operation)
    return found


def _is_called_off(operation: OperationFacts) -> bool:
    """Return whether a person ended an operation, or what was to come after it."""
    was_to_be_followed = operation.follow_up in (Next.RETRY, Next.ROLLBACK)
    return operation.phase == Phase.CANCELLED or was_to_be_followed


@about(Committed)
def a_disk_that_was_written_is_proven_or_quarantined(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """When nothing follows a failure any more, its host is quarantined, with a reason, if its
    disk was written and not proven since; unless a person has it, as after reconciling, or
    failures are left to them. A host whose disk was not written is not, and what never started
    leaves a host as it was."""
    for operation in _newly_over(world):
        host = world.ledger.now.host_of(operation)
        is_a_persons = host.is_flagged_by_hand or world.ledger.is_reconciling
        if is_a_persons or operation.error_code in A_PERSONS or not world.policy.is_automatic:
            continue
        if world.ledger.did_nothing(operation) and _is_called_off(operation):
            continue
        if host.id in world.ledger.unproven and not host.quarantine_reason:
            return f"{host.name} is left with half a disk after {operation.id}"
    for host_id, host in world.ledger.now.hosts.items():
        known = world.ledger.before.hosts.get(host_id)
        is_new = host.quarantine_reason and known is not None and not known.quarantine_reason
        if is_new and host_id not in world.ledger.permitted:
            return f"{host.name} is quarantined, and was not written: {host.quarantine_reason}"
    return None


@about(Committed)
def a_release_that_failed_is_remembered(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A release that was begun on a host, and whose last attempt there has failed, is remembered
    for it, and the way back is never to such a one."""
    ledger = world.ledger
    for before, operation in ledger.changed:
        if before is None and operation.cause == Cause.ROLLBACK:
            if ledger.has_failed_on(operation.host_id, operation.release):
                return f"{operation.id} goes back to what has failed there"
            continue
        if operation.kind != Kind.DEPLOYMENT or operation.phase != Phase.FAILED:
            continue
        was_decided = before is not None and not before.is_open and before.follow_up != Next.RETRY
        code, host = operation.error_code, ledger.now.host_of(operation)
        is_excused = code in (*NOT_THE_RELEASE, *A_PERSONS) or operation.login_refused_at
        is_its_own = _was_begun(operation, world) or code in OF_THE_RELEASE
        if (
            was_decided
            or is_excused
            or not is_its_own
            or operation.follow_up == Next.RETRY
            or host.is_flagged_by_hand
        ):
            continue
        if not ledger.has_failed_on(operation.host_id, operation.release):
            return f"{operation.id} failed with {code}, and nobody remembers"
    return None


@about(Committed)
def what_was_not_begun_is_not_remembered(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A release that was never permitted to be written on a host is not remembered for it as
    failed, unless what failed is the release itself: the host may run it still."""
    for _, operation in world.ledger.changed:
        is_its_own = operation.error_code in OF_THE_RELEASE or _was_begun(operation, world)
        if not is_its_own and world.ledger.blames(operation.id):
            return f"{operation.id} touched no disk ({operation.error_code}), and is remembered"
    return None


def _was_begun(operation: OperationFacts, world: World) -> bool:
    """Return whether this attempt, or one that it repeats, was permitted to write."""
    chain = world.ledger.chain_of(operation)
    return any(one.id in world.ledger.begun for one in chain if one.release == operation.release)


# --- quarantine ---------------------------------------------------------------------------


@about(Committed, BootAnswered)
def a_quarantined_host_is_left_alone(saw: Committed | BootAnswered, world: World) -> str | None:
    """No deployment begins on a quarantined host, until a person has released it. It may be
    looked at, when somebody asks for that."""
    before, now = world.ledger.before, world.ledger.now
    kept = {key: host for key, host in before.hosts.items() if host.quarantine_reason}
    if isinstance(saw, BootAnswered):
        row = now.host_named(world.name_of(saw.mac))
        found = now.open_on(row.name)
        is_looked_at = found is not None and found.kind != Kind.DEPLOYMENT
        return f"{row.name} netboots" if row.quarantine_reason and not is_looked_at else None
    for host_id, host in kept.items():
        after = now.hosts.get(host_id, host)
        if not after.quarantine_reason and host.name not in world.ledger.released:
            return f"{host.name} was released by nobody"
    for known, operation in world.ledger.changed:
        if known is None and operation.host_id in kept and operation.kind == Kind.DEPLOYMENT:
            return f"{operation.id} of {kept[operation.host_id].name}"
    return None


@about(Ended)
def a_quarantined_host_is_switched_off(saw: Ended, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """Where the policy says so, a quarantined host is off at last: if its BMC, or it itself, was
    not broken meanwhile."""
    if world.policy.on_quarantine is not OnQuarantine.POWER_OFF:
        return None
    for host in world.hosts_to_reimage:
        row = world.ledger.now.host_named(host.name)
        is_excused = host.troubled_until_s > 0 or host.bmc.quirks.resets_its_password
        # Being put aside by a backup ends what was wished for then, and is no new wish.
        is_excused = is_excused or row.id in world.ledger.quarantined_then
        if row.quarantine_reason and host.is_on and not is_excused:
            return f"{host.name} is on: {row.quarantine_reason}"
    return None
