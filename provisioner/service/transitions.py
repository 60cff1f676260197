"""One event on one operation: load, decide, save with audit row and outbox. No network."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from provisioner.core.contracts import Clock, Outgoing, Tx
from provisioner.core.effects import Effect, PowerOffQuarantined
from provisioner.core.guard import TicketPermit, WritePermit, check_permit
from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT, E, Limits, Step, advance
from provisioner.core.model import (
    Event,
    Host,
    HostId,
    Json,
    Kind,
    Operation,
    OperationId,
    Phase,
    Ticket,
)
from provisioner.core.own_host import known_serial, known_uuid
from provisioner.core.recovery import FollowUp, OnQuarantine, Policy, called_off, follow_up

from .chance import Derived, digest_of, new_token
from .facts import GuardFacts
from .follow_ups import RECOVERY, Ending, drop, ended, facts_of, in_quarantine, record, settled

# Beyond these events lies what cannot be taken back. Only the guard makes the permits.
_NEEDS: Final[Mapping[E, type[TicketPermit] | type[WritePermit]]] = {
    E.START: TicketPermit,
    E.WRITE_PERMITTED: WritePermit,
}


class Transitions:
    """Moves operations, each in the caller's transaction. `guard` reads what the guard is
    asked with, for those who need a permit."""

    def __init__(
        self,
        clock: Clock,
        derived: Derived,
        limits: Limits,
        ticket_lifetime: timedelta,
        new_key: Callable[[], str] = lambda: new_token("fx").reveal(),
        *,
        policy: Policy = Policy(),  # noqa: B008 # a frozen value
        guard: GuardFacts | None = None,
    ) -> None:
        self._clock = clock
        self._derived = derived
        self._limits = limits
        self._ticket_lifetime = ticket_lifetime
        self._new_key = new_key
        self._policy = policy
        self.guard = guard or GuardFacts()

    @property
    def policy(self) -> Policy:
        """How failures are dealt with."""
        return self._policy

    @property
    def limits(self) -> Limits:
        return self._limits

    def apply(
        self,
        tx: Tx,
        operation_id: OperationId,
        event: E,
        *,
        generation: int,
        actor: str,
        error: Json | None = None,
        evidence: Json | None = None,
        progress: Json | None = None,
        permit: TicketPermit | WritePermit | None = None,
    ) -> Step:
        """Carry out `event` and return the step taken.

        START and WRITE_PERMITTED need the guard's `permit` for this operation. Raises
        NotAllowed when the generation is old or the tables have no such move; then nothing
        was changed.
        """
        before = tx.operation(operation_id)
        host = tx.host(before.host_id)
        if event in _NEEDS:
            check_permit(permit, _NEEDS[event], before)
        step = advance(
            before,
            host,
            event,
            now=self._clock(),
            generation=generation,
            limits=self._limits,
            error=error,
            evidence=evidence,
            progress=progress,
        )
        ending, kind = None, step.operation.kind
        if kind is Kind.DEPLOYMENT and step.operation.phase in (Phase.FAILED, Phase.CANCELLED):
            now = self._clock()
            ending = ended(tx, step.operation, step.host, step.effects, self._policy, now)
            step = replace(
                step, operation=ending.operation, host=ending.host, effects=ending.effects
            )
        elif step.operation.is_final and self._goes_off_again(step):
            step = replace(step, effects=in_quarantine(step.effects, step.operation, self._policy))
        self._save(tx, host, step)
        self._record(tx, before, host, step, actor)
        if event is E.BMC_LOGIN_REFUSED:
            self._let_nothing_log_in(tx, host.id)
        if isinstance(permit, TicketPermit):
            self.issue_ticket(tx, step.operation, host, permit)
        if step.operation.is_final:
            self._close(tx, step, ending)
        return step

    def _goes_off_again(self, step: Step) -> bool:
        """Say whether a quarantined host was only looked at, and is off for its quarantine."""
        is_off = self._policy.on_quarantine is OnQuarantine.POWER_OFF
        return is_off and step.host.quarantine_reason is not None and bool(step.effects)

    def _close(self, tx: Tx, step: Step, ending: Ending | None) -> None:
        """Take back what an operation that has ended had permitted, and keep what became of its
        release on the host."""
        operation = step.operation
        if ending is not None:
            record(tx, ending, self._clock())
        elif operation.kind is Kind.DEPLOYMENT and operation.phase is Phase.SUCCEEDED:
            tx.forget_failure(operation.host_id, operation.release or "")
        # An agent whose report ends its operation may have to say so twice, with its token.
        # Its ticket is consumed, and an operation that has ended permits nothing.
        if step.event not in (E.AGENT_FAILED, E.COMPARED):
            tx.revoke_operation(operation.id, self._clock())
        if operation.phase is Phase.FAILED and operation.kind is Kind.DEPLOYMENT:
            self.guard.look_at_breaker(tx, self._clock())

    def settle(self, tx: Tx, operation: Operation, host: Host, decided: FollowUp) -> Ending:
        """Save another follow-up of an operation that has ended, instead of what was to come."""
        instead_of = (operation.follow_up or {}).get("what")
        ending = settled(tx, operation, host, (), decided, self._policy)
        kept = {**(ending.operation.follow_up or {}), "instead_of": instead_of}
        ending = replace(ending, operation=replace(ending.operation, follow_up=kept))
        self._save(tx, host, ending)
        record(tx, ending, self._clock())
        return ending

    def call_off(self, tx: Tx, operation: Operation, actor: str) -> Operation:
        """Let nothing follow an operation that has failed, because a person says so. A disk
        that was written is not left half for that: then the host is quarantined."""
        host, now = tx.host(operation.host_id), self._clock()
        dropped = drop(tx, operation, host, f"called off by {actor}", actor, now)
        decided = called_off(dropped, facts_of(tx, dropped, host))
        if decided is None or host.why_not_rebuilt is not None:
            return dropped
        return self.settle(tx, dropped, host, decided).operation

    def note_refused_login(self, tx: Tx, operation_id: OperationId, generation: int) -> None:
        """Let nothing that asks its BMC follow an ended operation: the login was refused, and
        another try could lock the account."""
        operation = tx.operation(operation_id)
        if operation.generation != generation:
            return
        tx.save_operation(_locked_out(operation, self._clock()))
        self._let_nothing_log_in(tx, operation.host_id)

    def _let_nothing_log_in(self, tx: Tx, host_id: HostId) -> None:
        """Settle what waits to follow this host's operations without its BMC, or drop it. It
        was decided before the login was refused, perhaps to an inspection in between."""
        now = self._clock()
        for waiting in tx.waiting_follow_ups(host_id):
            host, operation = tx.host(host_id), _locked_out(waiting, now)
            tx.save_operation(operation)
            decided = follow_up(operation, host, self._policy, facts_of(tx, operation, host), now)
            if decided is None:
                drop(tx, operation, host, "its BMC refused the login", RECOVERY, now)
            else:
                self.settle(tx, operation, host, decided)

    def keeps_in_ramdisk(self, host: Host) -> bool:
        """Say whether an agent whose operation has failed is to stay where it is."""
        is_kept = self._policy.on_quarantine is OnQuarantine.RAMDISK
        return is_kept and host.quarantine_reason is not None

    def issue_ticket(self, tx: Tx, operation: Operation, host: Host, permit: TicketPermit) -> None:
        """Give the operation its one boot ticket, for this host as it is enrolled now; of the
        ticket only the hash is stored."""
        check_permit(permit, TicketPermit, operation)
        ticket = self._derived.ticket(operation.id, operation.generation)
        tx.add_ticket(
            Ticket(
                digest=digest_of(ticket.reveal()),
                operation_id=operation.id,
                host_id=operation.host_id,
                generation=operation.generation,
                expires_at=self._clock() + self._ticket_lifetime,
                macs=host.macs,
                uuid=known_uuid(host.uuid),
                serial=known_serial(host.serial),
            )
        )

    def _save(self, tx: Tx, was: Host, decided: Step | Ending) -> None:
        """Save an operation, its host where it is not what it was, and what is wished for."""
        tx.save_operation(decided.operation)
        if decided.host != was:
            tx.save_host(decided.host)
        for effect in decided.effects:
            self._enqueue(tx, decided.operation, decided.host, effect)

    def _enqueue(self, tx: Tx, operation: Operation, host: Host, effect: Effect) -> None:
        if host.bmc is None:  # discovered hosts have none yet; there is nobody to tell
            return
        is_late = isinstance(effect, PowerOffQuarantined)
        tx.enqueue(
            Outgoing(
                key=self._new_key(),
                partition=f"{host.bmc.address}:{host.bmc.port}",
                operation_id=operation.id,
                # Who is quarantined late is the host as it is now: an inspection of it may have
                # come after the operation that has failed.
                generation=host.generation if is_late else operation.generation,
                effect=effect,
            )
        )

    def _record(self, tx: Tx, before: Operation, host: Host, step: Step, actor: str) -> None:
        after = step.operation
        moved = after.phase is not before.phase or after.rung != before.rung
        if not moved and step.host.state is host.state:
            return
        detail: Json = {"event": step.event, "from": before.phase, "to": after.phase}
        if after.rung != before.rung:
            detail["rung"] = after.rung
        if step.host.state is not host.state:
            detail["host_state"] = step.host.state
        if after.phase is Phase.FAILED and after.error:
            detail["error"] = after.error
        action = f"{after.kind}.{after.phase}"
        tx.audit(self._clock(), actor, action, host.name, {"operation": after.id, **detail})
        tx.add_event(
            Event(
                at=self._clock(),
                source="service",
                text=_sentence(before, step),
                host_id=host.id,
                operation_id=after.id,
                detail=detail,
            )
        )


def _locked_out(operation: Operation, now: datetime) -> Operation:
    refused = {**operation.evidence, BMC_LOGIN_REFUSED_AT: now.isoformat()}
    return replace(operation, evidence=refused)


def _sentence(before: Operation, step: Step) -> str:
    after = step.operation
    if step.event is E.RUNG_TIMED_OUT:
        return f"no boot ticket came back in time; network boot is tried again, rung {after.rung}"
    if after.phase is Phase.FAILED and after.error:
        return f"{after.kind} failed in {before.phase}: {after.error.get('message', '')}"
    return f"{after.kind} is {after.phase}"
