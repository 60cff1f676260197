"""A service that is broken on purpose, in one place each: for every invariant what breaks it.

A simulation that finds nothing may be blind. Here it has to find what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from provisioner.agent.session import Session
from provisioner.core.bootplan import BootPlan, BootRequest, LocalDisk, Ramdisk
from provisioner.core.contracts import Bmc, Outgoing, Tx
from provisioner.core.effects import PowerOffQuarantined, ReturnToDisk
from provisioner.core.fleet import Fleet, Load, Rules
from provisioner.core.guard import HostRefused, TicketPermit, authorise_ticket, left_alone
from provisioner.core.lifecycle import E, Limits, NotAllowed
from provisioner.core.model import (
    BmcAddress,
    BootDevice,
    Event,
    Host,
    HostState,
    Json,
    Operation,
    OperationId,
    Phase,
    Secret,
)
from provisioner.core.recovery import ATTEMPT, FollowUp
from provisioner.errors import ProvisionerError, TrustError
from provisioner.service.agents import AgentSessions
from provisioner.service.boot import BootService
from provisioner.service.chance import digest_of
from provisioner.service.health import Finding
from provisioner.service.lookup import host_named
from provisioner.service.operations import Operations
from provisioner.service.performer import Performer
from provisioner.service.permissions import PERMISSION_S
from provisioner.service.reconciliation import HostPlan, Reconciliation
from provisioner.service.recovery import Recovery
from provisioner.service.selections import Asked
from provisioner.service.sightings import HighWater, Mark
from provisioner.service.worker import Worker

from . import invariants as never
from . import invariants_limits as limits
from . import invariants_recovery as after
from . import invariants_restore as restored
from .bmcs import SimBmcPool
from .disks import SimDisk
from .effect_queue import SimEffectWorker
from .ramdisk_agent import RamdiskAgent
from .service_process import Parts
from .shelf import RAMDISK
from .weak_stores import (
    READING,
    ActivatesEarly,
    ActsAnyway,
    BlamesAlways,
    CountsBack,
    CountsTheSick,
    ForgetsFailures,
    ForgetsQuarantine,
    ForgetsStarts,
    ForgetsToChain,
    KnowsNoGroups,
    SeedsForAll,
    SeesNoBreaker,
    ShowsThePast,
    everywhere,
    weak_store,
)

PERMITTED: Final[Json] = {"permitted": True, "expires_in_s": PERMISSION_S}


class RamdiskForAll(BootService):
    """Netboots whoever asks."""

    def answer(self, request: BootRequest, source: str) -> BootPlan:
        plan = super().answer(request, source)
        return Ramdisk(RAMDISK, Secret("bt_invented")) if isinstance(plan, LocalDisk) else plan


class SelectsEverything(Operations):
    """Reads a selection as all hosts."""

    def request_deployment(
        self,
        hosts: Sequence[str],
        release: str,
        *,
        options: Json,
        actor: str,
        asked: Asked | None = None,
    ) -> list[Operation]:
        with self._store.read() as tx:
            every = [host.name for host in tx.hosts() if tx.open_operation(host.id) is None]
        return super().request_deployment(
            every or hosts, release, options=options, actor=actor, asked=asked
        )


class ReleasesByItself(Operations):
    """Lifts the quarantine of whoever is to be reimaged."""

    def request_deployment(
        self,
        hosts: Sequence[str],
        release: str,
        *,
        options: Json,
        actor: str,
        asked: Asked | None = None,
    ) -> list[Operation]:
        with self._store.begin() as tx:
            for name in hosts:
                tx.save_host(replace(host_named(tx, name), quarantine_reason=None))
        return super().request_deployment(hosts, release, options=options, actor=actor, asked=asked)


class PermitsAlways(AgentSessions):
    """Asks nobody whether a write may be."""

    def authorise(self, token: str, body: Json, source: str) -> Json:
        try:
            return super().authorise(token, body, source)
        except TrustError:
            return PERMITTED


class SavesLater(AgentSessions):
    """Permits a write, and does not save that the host's release is gone from here on."""

    def authorise(self, token: str, body: Json, source: str) -> Json:
        with self._store.read() as tx:
            agent = tx.agent_token(digest_of(token))
            if agent is not None and tx.host(agent.host_id).state is HostState.ACTIVE:
                return PERMITTED
        return super().authorise(token, body, source)


class BelievesItsAgent(AgentSessions):
    """Takes the agent's last word for all that the new system has to prove."""

    def done(self, token: str, body: Json, source: str) -> Json:
        answer = super().done(token, body, source)
        with self._store.begin() as tx:
            for operation in tx.operations(phases=[Phase.BOOTING], release=body["release"]):
                for event in (E.PHONED_HOME, E.SOAKED):
                    self._transitions.apply(
                        tx, operation.id, event, generation=operation.generation, actor="agent"
                    )
        return answer


class GoesOnForEver(AgentSessions):
    """Tells every agent to go on, whatever became of its operation."""

    def progress(self, token: str, body: Json, source: str) -> Json:
        try:
            return super().progress(token, body, source)
        except ProvisionerError:
            return {"go_on": True}


class WritesItsTokensDown(AgentSessions):
    """Puts an agent's token into the timeline."""

    def hello(self, body: Json, source: str) -> Json:
        answer = super().hello(body, source)
        with self._store.begin() as tx:
            tx.add_event(Event(self._clock(), "agent", f"was given {answer['token']}"))
        return answer


class KeepsHosts(Performer):
    """Never gives a host back to its disk."""

    def perform(self, outgoing: Outgoing) -> None:
        if not isinstance(outgoing.effect, ReturnToDisk):
            super().perform(outgoing)


class LeavesOn(Performer):
    """Does not switch a quarantined host off."""

    def perform(self, outgoing: Outgoing) -> None:
        if not isinstance(outgoing.effect, PowerOffQuarantined):
            super().perform(outgoing)


class NeverCounts(Recovery):
    """Takes every attempt for the first one."""

    def _pins(self, tx: Tx, operation: Operation, host: Host, decided: FollowUp) -> Json:
        return {**super()._pins(tx, operation, host, decided), ATTEMPT: 1}


class NeverFollows(Recovery):
    """Does not look at what is due."""

    def take_due(self) -> None:
        """Nothing is done."""


class ResetsAnyway(SimBmcPool):
    """Has a BMC reset its host with every change of the boot device."""

    def bmc(self, where: BmcAddress) -> Bmc:
        return _ResettingBmc(super().bmc(where))


class _ResettingBmc:
    def __init__(self, bmc: Bmc) -> None:
        self._bmc = bmc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bmc, name)

    def set_next_boot(self, device: BootDevice, **how: bool) -> None:
        self._bmc.set_next_boot(device, **how)
        self._bmc.reset()


class Stumbles(SimBmcPool):
    """Has a bug, which whoever performs effects catches and writes down."""

    def bmc(self, where: BmcAddress) -> Bmc:
        raise KeyError(where.address)


class NeverEnds(Worker):
    """Does not look at deadlines."""

    def end_overdue(self) -> None:
        """Nothing is done."""


class LooksAway(Worker):
    """Takes a host for healthy once it was."""

    def check(self, operation_id: OperationId) -> None:
        self._examine = lambda checks, _address, _evidence: [
            Finding(check, True, "as before") for check in checks
        ]
        super().check(operation_id)


class StartsByItsLook(Worker):
    """Counts once for its look through the queue, and not again when it starts something."""

    def _start(self, operation_id: OperationId) -> bool:
        with suppress(NotAllowed, HostRefused), self._store.begin() as tx:
            operation = tx.operation(operation_id)
            host = tx.host(operation.host_id)
            facts = self._guard.of(tx, operation, host)
            permit = authorise_ticket(operation, host, facts, Fleet(Load()), self._guard.rules)
            assert isinstance(permit, TicketPermit)
            self._move(tx, operation, E.START, permit=permit, progress={})
            return True
        return False


class RefusesWhatIsStarted(Worker):
    """Takes an operation that another worker has started for one that may not start."""

    def _start(self, operation_id: OperationId) -> bool:
        with self._store.begin() as tx:
            operation = tx.operation(operation_id)
            if operation.phase is Phase.NETBOOTING:
                error = left_alone(tx.host(operation.host_id), "it has started").as_dict()
                self._move(tx, operation, E.REFUSED, error=error)
                return False
        return super()._start(operation_id)


class Reopens(Worker):
    """Has what has failed tried again by setting it back."""

    def end_overdue(self) -> None:
        super().end_overdue()
        with self._store.begin() as tx:
            for failed in tx.operations(phases=[Phase.FAILED], limit=1):
                if tx.open_operation(failed.host_id) is None:
                    again = replace(failed, phase=Phase.QUEUED, ended_at=None)
                    tx.save_operation(replace(again, deadline_at=failed.phase_at))


class BelievesItsDatabase(HighWater):
    """Sees that its database is behind the mark, and goes on."""

    def _save(self, mark: Mark, found: int) -> None:
        """Nothing is done."""


class ClosesItsEyes(Reconciliation):
    """Takes a person's word for it that nothing is amiss, and goes on."""

    def _carry_out(self, tx: Tx, one: HostPlan, actor: str) -> None:
        """Nothing is done."""


class Timeless(Limits):
    """Knows a phase without a limit."""

    def deadline(self, phase: Phase, phase_at: datetime, now: datetime) -> datetime | None:
        return None if phase is Phase.WRITING else super().deadline(phase, phase_at, now)


class LosesEffects(SimEffectWorker):
    """Forgets what a dead worker left unfinished."""

    def take_over(self, name: str) -> None:
        """Nothing is done."""


class PushesForward(SimEffectWorker):
    """Hands out what waits, whatever else is being done to the same BMC."""

    NEXT = "SELECT key, saved FROM sim_effects WHERE state = 'waiting' ORDER BY place DESC LIMIT ?"


class WritesItsTableFirst(RamdiskAgent):
    """Makes a disk bootable before its content is there."""

    def _write_image(self, session: Session, disk: SimDisk) -> None:
        disk.table = session.release
        super()._write_image(session, disk)

    def _make_unbootable(self, disk: SimDisk) -> None:
        """Nothing is done."""


class WritesOn(RamdiskAgent):
    """Does not care whether its permission still lasts, and does not renew it."""

    def _beat(self, patience_s: float) -> None:
        """Nothing is said."""

    def _check_permission(self) -> None:
        """Nothing is done."""


# The performer alone sees an old state: it acts without a look at what has become of it.
PAST: Final = Parts(performer_store=weak_store(ShowsThePast, READING))
# What only a second service at work makes wrong.
RACES: Final[dict[str, Parts]] = {
    limits.nothing_starts_beyond_the_limits.__name__: Parts(worker=StartsByItsLook),
}
# For each invariant something that breaks it.
BREAKS: Final[dict[str, Parts]] = {
    judge.__name__: parts
    for judge, parts in (
        (never.the_ramdisk_is_only_for_the_holder_of_a_live_ticket, Parts(boot=RamdiskForAll)),
        (
            never.nothing_happens_to_a_host_that_nobody_selected,
            Parts(operations=SelectsEverything),
        ),
        (never.a_half_written_disk_never_boots, Parts(agent=WritesItsTableFirst)),
        (never.a_permission_is_given_only_for_what_was_asked, Parts(agents=PermitsAlways)),
        (never.a_flagged_host_gets_no_permission, Parts(agents=PermitsAlways)),
        (never.nothing_is_written_without_a_live_permission, Parts(agent=WritesOn)),
        (never.a_host_is_dirty_before_its_first_write, Parts(agents=SavesLater)),
        (never.nobody_cuts_the_power_of_a_disk_being_written, PAST),
        (never.nobody_resets_a_system_at_work, Parts(pool=ResetsAnyway)),
        (never.success_rests_on_a_whole_soak_and_a_fresh_look, Parts(worker=LooksAway)),
        (never.active_means_proven, Parts(agents=BelievesItsAgent)),
        (never.a_host_is_active_only_by_success, Parts(store=weak_store(ActivatesEarly))),
        (never.every_open_operation_has_a_deadline, Parts(limits=Timeless())),
        (never.nothing_is_stuck, Parts(worker=NeverEnds)),
        (never.every_saved_effect_is_performed, Parts(effects=LosesEffects)),
        (never.one_effect_at_a_time_for_each_bmc, Parts(effects=PushesForward)),
        (never.an_untouched_host_is_given_back, Parts(performer=KeepsHosts)),
        (after.a_chain_has_its_attempts_and_one_way_back, Parts(recovery=NeverCounts)),
        (after.what_is_due_follows, Parts(recovery=NeverFollows)),
        (
            after.a_disk_that_was_written_is_proven_or_quarantined,
            Parts(store=weak_store(ForgetsQuarantine)),
        ),
        (after.a_release_that_failed_is_remembered, Parts(store=weak_store(ForgetsFailures))),
        (after.what_was_not_begun_is_not_remembered, Parts(store=weak_store(BlamesAlways))),
        (after.a_quarantined_host_is_left_alone, Parts(operations=ReleasesByItself)),
        (after.a_quarantined_host_is_switched_off, Parts(performer=LeavesOn)),
        (limits.nothing_starts_beyond_the_limits, Parts(rules=Rules(breaker_hosts_max=1000))),
        (
            limits.nothing_starts_while_the_breaker_is_open,
            everywhere(SeesNoBreaker),
        ),
        (limits.no_group_has_more_in_flight_than_it_may, everywhere(KnowsNoGroups)),
        (limits.no_group_starts_faster_than_it_may, everywhere(ForgetsStarts)),
        (limits.a_group_keeps_its_healthy_hosts, everywhere(CountsTheSick)),
        (limits.nothing_is_refused_without_a_reason, Parts(worker=RefusesWhatIsStarted)),
        (restored.nothing_is_done_until_a_person_reconciles, everywhere(ActsAnyway)),
        (
            restored.a_restored_database_is_noticed_and_no_other_one,
            Parts(high_water=BelievesItsDatabase),
        ),
        (
            restored.reconciling_ends_what_was_of_then,
            Parts(reconciliation=ClosesItsEyes),
        ),
        (restored.one_agent_writes_for_each_generation, everywhere(ActsAnyway)),
        (never.generations_only_rise, Parts(store=weak_store(CountsBack))),
        (never.what_has_ended_stays_ended, Parts(worker=Reopens)),
        (never.what_has_ended_opens_nothing, Parts(agents=GoesOnForEver)),
        (never.each_seed_leaves_once, Parts(store=weak_store(SeedsForAll))),
        (never.no_secret_is_written_down, Parts(agents=WritesItsTokensDown)),
        (never.the_audit_chain_holds, Parts(store=weak_store(ForgetsToChain))),
        (never.nothing_unexpected_is_raised, Parts(pool=Stumbles)),
    )
}
