"""Keeps what follows a failed operation, in the caller's transaction: on its row while it is to
come, in the audit log and on the timeline. What it is, `core.recovery` decides."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.effects import Effect, PowerOffQuarantined, ReturnToDisk, SetNextBoot
from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT
from provisioner.core.model import (
    BootDevice,
    Event,
    Host,
    HostState,
    Json,
    Kind,
    Operation,
    Phase,
    ReleaseFailure,
)
from provisioner.core.recovery import (
    AFTER,
    ATTEMPT,
    ATTEMPTS_MAX,
    CAUSE,
    Cause,
    Facts,
    FollowUp,
    Next,
    OnQuarantine,
    Policy,
    failure_of,
    follow_up,
    is_release_blamed,
)

from .lookup import version_floor

RECOVERY: Final = "recovery"
# More operations of one host than these are not kept.
OPERATIONS_LOOKED_AT: Final = 100
MESSAGE_CHARACTERS_MAX: Final = 500

# Where a follow-up stands, under "state" of what is kept of it.
WAITING: Final = "waiting"
TAKEN: Final = "taken"  # the next operation is under "operation"
DROPPED: Final = "dropped"  # why is under "dropped"
DONE: Final = "done"
# Whose request dropped it, if that was the reason.
SUPERSEDED_BY: Final = "superseded_by"


@dataclass(frozen=True)
class Ending:
    """How a failed operation and its host are saved, and what is wished for. `is_blamed`: the
    release is remembered as one that failed on this host."""

    operation: Operation
    host: Host
    effects: tuple[Effect, ...]
    decided: FollowUp | None
    is_blamed: bool


def ended(
    tx: Tx,
    operation: Operation,
    host: Host,
    effects: tuple[Effect, ...],
    policy: Policy,
    now: datetime,
) -> Ending:
    """Return an operation that has just failed or been cancelled with what follows it."""
    facts = facts_of(tx, operation, host)
    decided = follow_up(operation, host, policy, facts, now)
    return settled(tx, operation, host, effects, decided, policy)


def settled(
    tx: Tx,
    operation: Operation,
    host: Host,
    effects: tuple[Effect, ...],
    decided: FollowUp | None,
    policy: Policy,
) -> Ending:
    """Return operation and host with what was decided; nothing is saved yet."""
    was_begun = any("disk" in one.evidence for one in attempts_of(tx, operation, host))
    is_blamed = is_release_blamed(operation, host, decided, was_begun=was_begun)
    if decided is None:
        return Ending(operation, host, effects, None, is_blamed)
    is_waiting = decided.at is not None
    kept = {**decided.to_json(), "state": WAITING if is_waiting else DONE}
    operation = replace(operation, follow_up=kept, follow_up_at=decided.at)
    if decided.what is Next.QUARANTINE:
        host = replace(host, quarantine_reason=decided.why)
        effects = in_quarantine(effects, operation, policy)
    return Ending(operation, host, effects, decided, is_blamed)


def in_quarantine(
    effects: tuple[Effect, ...], operation: Operation, policy: Policy
) -> tuple[Effect, ...]:
    """Return what is wished for at the end of an operation whose host is quarantined."""
    # What stands on its disk is not started again: only the network boot is cleared.
    wished: tuple[Effect, ...] = tuple(
        SetNextBoot(BootDevice.DISK) if isinstance(effect, ReturnToDisk) else effect
        for effect in effects
    )
    if not failure_of(operation).may_use_bmc:
        return ()
    if policy.on_quarantine is OnQuarantine.POWER_OFF:
        return (*wished, PowerOffQuarantined())
    return wished


def facts_of(
    tx: Tx,
    operation: Operation,
    host: Host,
    *,
    refused: Mapping[str, str] | None = None,
    is_retry_over: bool = False,
) -> Facts:
    """Return what the database says for a decision. `refused` is what else is known of
    releases, by digest."""
    release = tx.release(operation.release or "")
    good = tx.release(host.last_good or "")
    images = {row.image for row in (release, good) if row is not None}
    floors = {image: version_floor(tx, image) for image in sorted(images)}
    return Facts(
        is_disk_written=is_disk_written(tx, operation, host),
        release=release,
        last_good=good,
        floors={image: floor for image, floor in floors.items() if floor is not None},
        failed_before={failure.release for failure in tx.failures_on(host.id)},
        refused=refused or {},
        is_retry_over=is_retry_over,
        has_superseded=any(
            (row.follow_up or {}).get(SUPERSEDED_BY) == operation.id
            for row in operations_of(tx, host)
        ),
    )


def is_disk_written(tx: Tx, operation: Operation, host: Host) -> bool:
    """Say whether the disk holds what a deployment was permitted to write, and none has
    proven since. `operation` is taken as it is here, saved or not."""
    if host.state is not HostState.DIRTY:
        return False
    if host.last_good is not None:
        return True  # it was active once, and only a write ends that
    for row in operations_of(tx, host):
        known = operation if row.id == operation.id else row
        if known.kind is Kind.DEPLOYMENT and known.phase is Phase.SUCCEEDED:
            return False
        if known.kind is Kind.DEPLOYMENT and "disk" in known.evidence:
            return True
    return False


def operations_of(tx: Tx, host: Host) -> list[Operation]:
    """Return the host's operations, the newest first: by generation, since clocks may be set
    back, and two may begin within one tick."""
    rows = tx.operations(host_id=host.id, limit=OPERATIONS_LOOKED_AT)
    return sorted(rows, key=lambda row: row.generation, reverse=True)


def attempts_of(tx: Tx, operation: Operation, host: Host) -> list[Operation]:
    """Return an operation, taken as it is here, and the attempts at the same release that it
    follows, the newest first."""
    known = {row.id: row for row in operations_of(tx, host)}
    attempts = [operation]
    while attempts[-1].pins.get(CAUSE) == Cause.RETRY:
        before = known.pop(attempts[-1].pins.get(AFTER, ""), None)
        if before is None:
            break
        attempts.append(before)
    return attempts


def record(tx: Tx, ending: Ending, now: datetime) -> None:
    """Write down what was decided, and remember a release that has failed for good."""
    operation, host, decided = ending.operation, ending.host, ending.decided
    if operation.release and ending.is_blamed:
        error = operation.error or {}
        failure = ReleaseFailure(
            host_id=host.id,
            release=operation.release,
            operation_id=operation.id,
            at=now,
            code=str(error.get("code", "")),
            message=str(error.get("message", ""))[:MESSAGE_CHARACTERS_MAX],
        )
        tx.remember_failure(failure)
    if decided is None:
        return
    is_quarantine = decided.what is Next.QUARANTINE
    detail: Json = {"operation": operation.id, **decided.to_json()}
    if decided.at is not None:
        detail["at"] = decided.at.isoformat()
    action = "host.quarantined" if is_quarantine else f"recovery.{decided.what}"
    tx.audit(now, RECOVERY, action, host.name, detail)
    _tell(tx, operation, _sentence(decided), now)


def drop(
    tx: Tx, operation: Operation, host: Host, why: str, actor: str, now: datetime
) -> Operation:
    """Save and return an operation whose follow-up does not come any more."""
    kept = {**(operation.follow_up or {}), "state": DROPPED, "dropped": why}
    operation = replace(operation, follow_up=kept, follow_up_at=None)
    tx.save_operation(operation)
    detail: Json = {"operation": operation.id, "what": kept.get("what"), "why": why}
    tx.audit(now, actor, "recovery.dropped", host.name, detail)
    _tell(tx, operation, f"nothing follows {operation.id} any more: {why}", now)
    return operation


def supersede(tx: Tx, host: Host, by: Operation) -> None:
    """Drop what waits for this host: somebody has just asked for a deployment of it."""
    for waiting in tx.waiting_follow_ups(host.id):
        kept = {**(waiting.follow_up or {}), SUPERSEDED_BY: by.id}
        over, why = replace(waiting, follow_up=kept), f"superseded by {by.id}"
        drop(tx, over, host, why, by.requested_by, by.requested_at)


def hand_over(tx: Tx, host: Host, actor: str, now: datetime) -> None:
    """Drop what waits for this host, which a person has just flagged and has as it is now. Said
    later it would come too late: they may have lifted the flag by then."""
    for waiting in tx.waiting_follow_ups(host.id):
        drop(tx, waiting, host, host.why_not_rebuilt or "it is theirs", actor, now)


def taken(tx: Tx, operation: Operation, by: Operation) -> None:
    """Save that the follow-up is on its way as the operation `by`."""
    kept = {**(operation.follow_up or {}), "state": TAKEN, "operation": by.id}
    tx.save_operation(replace(operation, follow_up=kept, follow_up_at=None))


def forget_refused_login(tx: Tx, host: Host) -> None:
    """Let the host's BMC be asked again: a person has given other credentials for it."""
    for operation in operations_of(tx, host):
        if BMC_LOGIN_REFUSED_AT in operation.evidence:
            kept = {**operation.evidence}
            del kept[BMC_LOGIN_REFUSED_AT]
            tx.save_operation(replace(operation, evidence=kept))


def standing_of(tx: Tx, host: Host) -> str | None:
    """Return what follows the host's last deployment, or why the host went back to an older
    release; None when there is nothing of the kind to say."""
    rows = operations_of(tx, host)
    last = next((row for row in rows if row.kind is Kind.DEPLOYMENT), None)
    if last is None:
        return None
    if last.follow_up_at is not None and last.follow_up is not None:
        return f"{last.follow_up['why']}; {told(last.follow_up, last.follow_up_at)}"
    if last.pins.get(CAUSE) != Cause.ROLLBACK:
        return None
    failed = next((row for row in rows if row.id == last.pins.get(AFTER)), None)
    why = f": {failed.follow_up['why']}" if failed and failed.follow_up else ""
    name = last.pins.get("release_name")
    if last.phase is Phase.SUCCEEDED:
        return f"went back to {name} at {last.phase_at:%F %T} UTC{why}"
    return None if last.is_final else f"is going back to {name}{why}"


def told(kept: Json, at: datetime) -> str:
    """Return in words what is to come, from what is kept of it."""
    if kept.get("what") == Next.ROLLBACK:
        return f"it goes back to {kept.get('release_name')}"
    number = f"attempt {kept.get(ATTEMPT)} of {kept.get(ATTEMPTS_MAX)}"
    return f"{number} follows at {at:%F %T} UTC"


def _sentence(decided: FollowUp) -> str:
    if decided.what is Next.QUARANTINE:
        return f"host is quarantined: {decided.why}"
    assert decided.at is not None
    return f"{decided.why}; {told(decided.to_json(), decided.at)}"


def _tell(tx: Tx, operation: Operation, text: str, now: datetime) -> None:
    tx.add_event(
        Event(
            at=now,
            source="service",
            text=text,
            host_id=operation.host_id,
            operation_id=operation.id,
        )
    )
