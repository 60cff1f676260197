"""What must always be true of one operation and its host (DESIGN §1); `judging` says how each is
written."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Final

from provisioner.core.lifecycle import AGENT_SILENCE_LIMIT
from provisioner.core.model import HostState, Kind, Phase
from provisioner.errors import TrustError
from provisioner.service.chance import digest_of
from provisioner.service.permissions import PERMISSION_S
from provisioner.service.proof import REPORT_AGE_MAX
from provisioner.service.worker import LOOK_LIMIT, OUTAGE, OUTAGE_GRACE

from .judging import about
from .observations import (
    AgentAnswered,
    BmcChanged,
    BootAnswered,
    BugRaised,
    Committed,
    DiskBooted,
    EffectBegan,
    Ended,
    Permitted,
    SeedLeft,
    TimePassed,
    Wrote,
)

if TYPE_CHECKING:
    from .world import World

# A permission lasts PERMISSION_S from when its answer has arrived, and an agent waits for an
# answer no longer than this; so that is how old one can be when it is used.
ANSWER_LIMIT_S: Final = 15.0
PERMISSION_AGE_MAX_S: Final = PERMISSION_S + ANSWER_LIMIT_S
# After an outage the reconciler gives everybody time to be heard, and it looks every few
# seconds; what is later than this is stuck.
LATE_MAX_S: Final = OUTAGE.total_seconds() + OUTAGE_GRACE.total_seconds() + 60.0
SOAK_S: Final = 10.0  # of the simulation's profile
# Its two checks may take 5 s each; the rest is what a database may be waited for.
LOOK_AGE_MAX_S: Final = LOOK_LIMIT.total_seconds() + 10.0
# And a little, for the round that is saved.
HEARD_AGE_MAX_S: Final = REPORT_AGE_MAX.total_seconds() + 10.0
WRITING: Final = (Phase.WRITING, Phase.VERIFYING)

# --- netboot ------------------------------------------------------------------------------


@about(BootAnswered)
def the_ramdisk_is_only_for_the_holder_of_a_live_ticket(
    saw: BootAnswered, world: World
) -> str | None:
    """A host is told to boot the ramdisk only with a live ticket of its own."""
    ticket = world.ledger.live_ticket(digest_of(saw.ticket))
    if ticket is None:
        return f"{saw.mac} was handed a ticket that is not live"
    operation_id, host_id, generation, expires_at = ticket
    operation = world.ledger.now.operations[operation_id]
    if host_id != world.ledger.owner_of(saw.mac) or operation.host_id != host_id:
        return f"{saw.mac} was handed the ticket of {operation_id}, another host's"
    if datetime.fromisoformat(expires_at) <= world.scheduler.clock():
        return f"{saw.mac} was handed a ticket that has expired"
    newest = world.ledger.now.host_of(operation).generation
    if operation.phase != Phase.NETBOOTING or generation != newest:
        return f"{saw.mac} was handed a ticket of {operation_id}, which is {operation.phase}"
    return None


@about(BootAnswered, BmcChanged, Wrote)
def nothing_happens_to_a_host_that_nobody_selected(
    saw: BootAnswered | BmcChanged | Wrote, world: World
) -> str | None:
    """No host is netbooted, powered or written that nobody named in a request."""
    name = world.name_of(saw.mac) if isinstance(saw, BootAnswered) else saw.host.name
    return None if name in world.ledger.selected else f"{name}, by {saw}"


@about(DiskBooted)
def a_half_written_disk_never_boots(saw: DiskBooted, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A disk that a firmware starts holds all of one system, and its seed."""
    if saw.disk.is_whole(str(saw.disk.table)):
        return None
    return f"{saw.host.name} boots {saw.disk}, seed {saw.disk.seed}"


# --- writing ------------------------------------------------------------------------------


@about(Permitted)
def a_permission_is_given_only_for_what_was_asked(saw: Permitted, world: World) -> str | None:
    """A write is permitted only to the newest open deployment of this host, in a phase that
    writes, within its deadline, for its own release in good standing and the rule's disk."""
    operation = world.ledger.now.operations.get(saw.operation_id)
    if operation is None or not operation.is_open or operation.kind != Kind.DEPLOYMENT:
        return f"{saw.operation_id} is no open deployment"
    host = world.ledger.now.host_of(operation)
    if host.name != saw.host.name or host.generation != saw.generation:
        return f"{saw.host.name} was permitted generation {saw.generation} of {host}"
    if operation.phase not in WRITING or operation.generation != saw.generation:
        return f"{saw.operation_id} is {operation.phase}, generation {operation.generation}"
    if operation.release != saw.release or world.ledger.revoked(saw.release):
        return f"release {saw.release[:8]} was permitted, or one that is revoked"
    if saw.serial != world.disk_meant_on(saw.host):
        return f"disk {saw.serial} was permitted"
    deadline_s = world.ledger.deadline_s(operation)
    if deadline_s is None or deadline_s <= world.now_s:
        return f"the deadline of {saw.operation_id} has passed"
    return None


@about(Permitted)
def a_flagged_host_gets_no_permission(saw: Permitted, world: World) -> str | None:
    """A host that is protected, in maintenance or quarantined is never written anew."""
    found = [one for one in world.ledger.now.hosts.values() if one.name == saw.host.name]
    return None if not found[0].is_flagged else f"{found[0]}"


@about(Wrote)
def nothing_is_written_without_a_live_permission(saw: Wrote, world: World) -> str | None:
    """A write has a permission for this host, disk, release and generation, and it lasts."""
    grant, operation = saw.grant, world.ledger.operation(saw.operation_id)
    if grant is None or grant not in world.ledger.grants:
        return f"{saw.host.name} writes without one"
    if (grant.host, grant.serial) != (saw.host.name, saw.disk.serial):
        return f"{saw.host.name} writes {saw.disk.serial} by {grant}"
    if (grant.operation_id, grant.generation) != (operation.id, operation.generation):
        return f"{saw.host.name} writes for {saw.operation_id} by {grant}"
    if world.now_s - grant.granted_s > PERMISSION_AGE_MAX_S:
        return f"{saw.host.name} writes {world.now_s - grant.granted_s:.0f} s after {grant}"
    return None


@about(Wrote)
def a_host_is_dirty_before_its_first_write(saw: Wrote, world: World) -> str | None:
    """A host that is being written is saved as one whose disk nobody vouches for; a permission
    that was lost with its database lasts for a moment all the same."""
    if world.ledger.is_lost(saw.grant):
        return None
    operation = world.ledger.now.operations[saw.operation_id]
    host = world.ledger.now.host_of(operation)
    if host.state == HostState.DIRTY and host.release is None:
        return None
    return f"{saw.host.name} is written while it is {host.state} on {host.release}"


@about(BmcChanged)
def nobody_resets_a_system_at_work(saw: BmcChanged, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A reset is for a ramdisk that hangs, never for a system that runs from its disk."""
    if saw.verb != "reset" or saw.host.runs_from is None:
        return None
    return f"{saw.host.name} runs {saw.host.runs_from}"


@about(BmcChanged)
def nobody_cuts_the_power_of_a_disk_being_written(saw: BmcChanged, world: World) -> str | None:
    """The service never switches off a host whose agent writes for the open operation."""
    if not saw.cuts_power or saw.host.writing is None or not saw.host.is_on:
        return None
    operation = world.ledger.now.operations.get(saw.host.writing)
    if operation is None:  # lost with its database
        return None
    newest = world.ledger.now.host_of(operation).generation
    if not operation.is_open or operation.generation != newest:
        return None
    return f"{saw.verb} on {saw.host.name} while {operation.id} is {operation.phase}"


# --- evidence -----------------------------------------------------------------------------


@about(Committed)
def active_means_proven(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A host becomes active only when it runs that release, whole, from the disk that was
    meant, and the system on that disk reported the operation's nonce."""
    before = world.ledger.before.operations
    for operation in world.ledger.now.operations.values():
        known = before.get(operation.id)
        has_ended = known is None or known.is_open
        if operation.phase != Phase.SUCCEEDED or operation.kind != Kind.DEPLOYMENT or not has_ended:
            continue
        row = world.ledger.now.host_of(operation)
        host = world.host_named(row.name)
        disk = next(one for one in host.disks if one.serial == world.disk_meant_on(host))
        if not disk.is_whole(str(operation.release)):
            return f"{host.name} is active on {str(operation.release)[:8]} with {disk}"
        if disk.seed is None or disk.seed.operation_id != operation.id:
            return f"{host.name} has another deployment's seed: {disk.seed}"
        if world.ledger.reported_from.get(operation.id) != disk.serial:
            return f"{host.name} never reported the nonce of {operation.id} from {disk.serial}"
        if row.state != HostState.ACTIVE or row.release != operation.release:
            return f"{operation.id} succeeded, and {host.name} is {row.state} on {row.release}"
    return None


@about(Committed)
def success_rests_on_a_whole_soak_and_a_fresh_look(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A deployment succeeds when its soak time has passed since it was last saved as not
    healthy, by a look at the host that is fresh, and while its new system still reports."""
    ledger = world.ledger
    for operation in ledger.now.operations.values():
        known = ledger.before.operations.get(operation.id)
        if operation.phase == Phase.PROVING and operation.healthy_since is None:
            ledger.ill_s[operation.id] = world.now_s
        if operation.phase != Phase.SUCCEEDED or known is None or known.phase != Phase.PROVING:
            continue
        host = world.host_named(ledger.now.host_of(operation).name)
        healthy_s = world.now_s - ledger.ill_s[operation.id]
        look_s = world.now_s - ledger.looked_s.get(host.address, float("-inf"))
        if healthy_s < SOAK_S or look_s > LOOK_AGE_MAX_S:
            return f"{host.name}: healthy for {healthy_s:.1f} s, seen {look_s:.1f} s ago"
        silent_s = world.now_s - ledger.heard_s.get(operation.id, float("-inf"))
        if silent_s > HEARD_AGE_MAX_S:
            return f"{host.name}: its new system was silent for {silent_s:.1f} s"
    return None


@about(Committed)
def a_host_is_active_only_by_success(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No host comes to be active but by a deployment of it that succeeded in that commit."""
    for host_id, host in world.ledger.now.hosts.items():
        known = world.ledger.before.hosts.get(host_id)
        if host.state != HostState.ACTIVE or known is None or known.state == HostState.ACTIVE:
            continue
        newest = [
            one
            for one in world.ledger.now.operations.values()
            if one.host_id == host_id and one.generation == host.generation
        ]
        if not newest or newest[0].phase != Phase.SUCCEEDED:
            return f"{host.name} is active on {host.release}, and {newest}"
    return None


# --- nothing stuck, nothing lost ----------------------------------------------------------


@about(Committed)
def every_open_operation_has_a_deadline(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """Every operation that has not ended knows when its phase is over."""
    for operation in world.ledger.now.open_operations:
        if operation.deadline_at is None:
            return f"{operation.id} is {operation.phase} without one"
    return None


@about(TimePassed, Ended)
def nothing_is_stuck(saw: TimePassed | Ended, world: World) -> str | None:
    """No operation outlives its deadline while a service and its database are there."""
    if world.ledger.stuck_at_s is None:
        first_s = max(world.ledger.first_deadline_s, world.ledger.well_since_s)
        world.ledger.stuck_at_s = first_s + LATE_MAX_S
    if world.now_s > world.ledger.stuck_at_s:
        return f"{[f'{one.id} {one.phase}' for one in world.ledger.now.open_operations]}"
    if isinstance(saw, Ended) and world.ledger.now.open_operations:
        return f"{[one.id for one in world.ledger.now.open_operations]} at the end"
    return None


@about(Ended)
def every_saved_effect_is_performed(saw: Ended, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """What was saved to be done was begun, and nothing still waits."""
    never = [key for key in world.ledger.effects_saved() if key not in world.ledger.effects_begun]
    waiting = world.ledger.waiting_effects()
    return f"never begun {never}, waiting {waiting}" if never or waiting else None


@about(EffectBegan)
def one_effect_at_a_time_for_each_bmc(saw: EffectBegan, world: World) -> str | None:
    """Of the effects for one BMC only one is handed out, and in the order they were saved."""
    earlier = world.ledger.unfinished_before(saw.key, saw.partition)
    return f"{saw.key} begins before {earlier}" if earlier else None


@about(Ended)
def an_untouched_host_is_given_back(saw: Ended, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """A host whose last operation ended before its first write runs its own system again,
    where neither its BMC nor it itself was broken meanwhile, and it was never quarantined."""
    for host in world.hosts_to_reimage:
        mine = [
            one
            for one in world.ledger.now.operations.values()
            if world.ledger.now.host_of(one).name == host.name
        ]
        last = max(mine, key=lambda one: one.generation, default=None)
        if last is None or last.id in world.ledger.written or host.troubled_until_s > 0:
            continue
        if host.name in world.ledger.ever_quarantined:
            continue
        if any(disk.is_bootable for disk in host.disks) and host.runs_from is None:
            return f"{host.name} after {last.id}, {last.phase}: on {host.is_on}, runs nothing"
    return None


@about(Committed)
def generations_only_rise(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """The generation of a host never goes back, and that of an operation never changes; but to
    what a backup says, at the moment when it is put back."""
    before, now = world.ledger.before, world.ledger.now
    for host_id, host in before.hosts.items():
        if host_id in now.hosts and now.hosts[host_id].generation < host.generation:
            return f"{host.name}: {host.generation} to {now.hosts[host_id].generation}"
    for key, operation in before.operations.items():
        if key in now.operations and now.operations[key].generation != operation.generation:
            return f"{key}: {operation.generation} to {now.operations[key].generation}"
    return None


@about(Committed)
def what_has_ended_stays_ended(saw: Committed, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No operation leaves a final phase."""
    for key, operation in world.ledger.before.operations.items():
        after = world.ledger.now.operations.get(key, operation)
        if not operation.is_open and after.phase != operation.phase:
            return f"{key}: {operation.phase} to {after.phase}"
    return None


# --- secrets ------------------------------------------------------------------------------


@about(AgentAnswered)
def what_has_ended_opens_nothing(saw: AgentAnswered, world: World) -> str | None:
    """No ticket and no token of an operation that has ended is good for anything."""
    operation = world.ledger.now.operations.get(saw.operation_id)
    if operation is None:
        return f"{saw.what} for {saw.operation_id}"
    is_inspected = saw.what == "hello" and operation.kind == Kind.INSPECTION
    if operation.is_open or is_inspected:
        return None
    return f"{saw.what} for {operation.id}, which is {operation.phase}"


@about(SeedLeft)
def each_seed_leaves_once(saw: SeedLeft, world: World) -> str | None:
    """The seed of a deployment is handed out once."""
    world.ledger.seeds_out[saw.operation_id] += 1
    count = world.ledger.seeds_out[saw.operation_id]
    return None if count == 1 else f"that of {saw.operation_id} left {count} times"


@about(Ended)
def no_secret_is_written_down(saw: Ended, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """No ticket, token, session or nonce stands in what people can read."""
    texts = world.ledger.written_texts()
    # The first part of a nonce is the operation's name, which may be read.
    found = [one for one in world.ledger.secrets if json.dumps(one)[1:-1] in texts]
    return f"{len(found)} of them" if found else None


@about(Ended)
def the_audit_chain_holds(saw: Ended, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """The audit log is whole: no row was changed, removed or slipped in."""
    try:
        world.verify_audit()
    except TrustError as error:
        return f"{error.message}"
    return None


@about(BugRaised)
def nothing_unexpected_is_raised(saw: BugRaised, world: World) -> str | None:  # noqa: ARG001 # every judge is asked alike
    """The service raises only errors that say who must act."""
    return f"in {saw.where}: {saw.error!r}"


assert AGENT_SILENCE_LIMIT.total_seconds() > PERMISSION_AGE_MAX_S, (
    "an agent that is given up for its silence must have lost its permission by then"
)
