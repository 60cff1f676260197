"""Performs effects on BMCs and feeds the result back as an event.

Looks before acting: an effect may be performed twice, or late, and must then do no harm.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Final, TypeVar

import structlog

from provisioner.core.contracts import Bmc, BmcPool, Clock, Outgoing, Store
from provisioner.core.effects import (
    Effect,
    PowerOff,
    PowerOffQuarantined,
    PowerOn,
    ReturnToDisk,
    SetNextBoot,
)
from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT, RUNG_LAST, E, NotAllowed
from provisioner.core.model import (
    BootDevice,
    Event,
    Host,
    Operation,
    Phase,
    PowerState,
)
from provisioner.errors import (
    BmcAuthFailed,
    BmcUnreachable,
    DeviceError,
    NotFound,
    Unavailable,
)

from .fence import CarefulBmc, Fence, Overtaken
from .transitions import Transitions

log = structlog.get_logger(__name__)

T = TypeVar("T")

# One read can be a lie or a moment; a host is off when this many reads in a row say so.
OFF_READS: Final = 2
POWER_LIMIT: Final = timedelta(seconds=60)
POLL_S: Final = 0.5
# An exchange has its own hard deadline. Three of them, and the operation fails; a wrong
# password is never tried again, because BMCs lock accounts.
ATTEMPTS_MAX: Final = 3
RETRY_PAUSE_S: Final = 1.0
# How long a database that is away is waited for. An effect that ended here with an error
# would never be performed again, and its host could stay off.
DATABASE_PATIENCE: Final = timedelta(minutes=10)
WORKER: Final = "worker"
# Where an operation's evidence keeps that its host was reset on its way back to the disk.
RESET_AT: Final = "reset_at"


class Performer:
    """Makes effects true. `pause` is the clock's other half: it lets time pass."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        pool: BmcPool,
        clock: Clock,
        *,
        soft_shutdown_limit: timedelta,
        fence: Fence | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._pool = pool
        self._clock = clock
        self._soft_shutdown_limit = soft_shutdown_limit
        self._fence = fence or Fence()
        self._pause = pause

    def perform(self, outgoing: Outgoing) -> None:
        """Make one effect true, unless a newer decision has overtaken it."""
        try:
            operation, host, is_over = self._patiently(lambda: self._look(outgoing))
        except NotFound:
            return  # the host was deleted meanwhile, and nothing is owed to it
        if is_over:
            log.info("effect overtaken", host=host.name, effect=str(outgoing.effect))
            return
        try:
            fact = self._with_retries(host, operation, outgoing.effect)
        except Overtaken:
            log.info("effect overtaken", host=host.name, effect=str(outgoing.effect))
            return
        except BmcAuthFailed as error:
            self._feed_patiently(outgoing, operation, host, E.BMC_LOGIN_REFUSED, error)
            return
        except DeviceError as error:
            self._feed_patiently(outgoing, operation, host, E.BMC_FAILED, error)
            return
        if fact is not None:
            self._feed_patiently(outgoing, operation, host, fact, None)

    def _look(self, outgoing: Outgoing) -> tuple[Operation, Host, bool]:
        """Return the operation and its host, and whether the effect is over: overtaken by a
        newer decision, or performed with its result saved."""
        with self._store.read() as tx:
            operation = tx.operation(outgoing.operation_id)
            host = tx.host(operation.host_id)
            # A restored queue holds wishes of the past; reconciling ends what they belong to.
            was_fed = tx.is_observing() or tx.recall(_fed(outgoing)) is not None
        wanted = is_wanted(outgoing.effect, outgoing.generation, operation, host)
        return operation, host, was_fed or not wanted

    def _look_again(self, operation: Operation, effect: Effect) -> None:
        """Raise Overtaken when the effect is no longer wanted."""

        def look() -> None:
            with self._store.read() as tx:
                now = tx.operation(operation.id)
                wanted = is_wanted(effect, operation.generation, now, tx.host(now.host_id))
                if not wanted or tx.is_observing():
                    raise Overtaken

        try:
            self._patiently(look)
        except NotFound as error:
            raise Overtaken from error

    def _patiently(self, ask_database: Callable[[], T]) -> T:
        """Return what `ask_database` returns, however long the database is away. The BMC's
        part is not repeated by it: a wrong password is used once."""
        end = self._clock() + DATABASE_PATIENCE
        while True:
            try:
                return ask_database()
            except Unavailable as error:
                if self._clock() >= end:
                    raise
                log.warning("effect waits for the database", why=error.message)
                self._pause(RETRY_PAUSE_S)

    def _with_retries(self, host: Host, operation: Operation, effect: Effect) -> E | None:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return self._make_true(host, operation, effect)
            except BmcAuthFailed as error:
                raise BmcAuthFailed(
                    f"the BMC of host {host.name} refused the credentials",
                    host=host.name,
                    expected="a login",
                    found=error.message,
                    hint=f"provisioner host change {host.name} --bmc-user U --bmc-password-file F",
                ) from error
            except DeviceError as error:
                if attempt == ATTEMPTS_MAX:
                    raise _named(error, host) from error
                log.warning("BMC exchange failed", host=host.name, why=error.message)
                self._pause(RETRY_PAUSE_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _make_true(self, host: Host, operation: Operation, effect: Effect) -> E | None:
        assert host.bmc is not None
        pooled, fence = self._pool.bmc(host.bmc), self._fence
        bmc = CarefulBmc(pooled, fence, lambda: self._look_again(operation, effect))
        if isinstance(effect, PowerOff):
            soft = effect.soft and operation.options.get("soft_shutdown", True)
            is_off = self._power_off(bmc, host, operation, soft=bool(soft))
            return E.POWERED_OFF if is_off else None
        if isinstance(effect, SetNextBoot):
            self._set_next_boot(bmc, host, effect)
            return E.NEXT_BOOT_SET
        if isinstance(effect, PowerOn):
            self._power_on(bmc, host)
            return E.POWERED_ON
        if isinstance(effect, PowerOffQuarantined):
            self._power_off(bmc, host, operation, soft=False)
            return None
        self._return_to_disk(bmc, host, operation)
        return None

    def _power_off(self, bmc: Bmc, host: Host, operation: Operation, *, soft: bool) -> bool:
        """Return True when the host is off, False when that is no longer wanted."""
        if self._is_off(bmc):
            return True
        if soft:
            bmc.power_off(soft=True)
            if self._wait_for_off(bmc, self._soft_shutdown_limit):
                return True
            log.warning("soft shutdown took too long, switching off", host=host.name)
            # It may have been on its way into the network when it was asked: then it saw no
            # power button, and its agent may be writing by now.
            if not self._is_still_netbooting(operation):
                return False
        bmc.power_off(soft=False)
        if not self._wait_for_off(bmc, POWER_LIMIT):
            raise DeviceError(
                f"host {host.name} did not switch off",
                host=host.name,
                expected=f"off within {POWER_LIMIT.seconds} s",
                found="its BMC acknowledged and reports it on",
                hint="look at the BMC; it may need a cold reset",
            )
        return True

    def _is_still_netbooting(self, operation: Operation) -> bool:
        def ask() -> bool:
            with self._store.read() as tx:
                return tx.operation(operation.id).phase is Phase.NETBOOTING

        # A database that is away is not a BMC that failed.
        return self._patiently(ask)

    def _is_off(self, bmc: Bmc) -> bool:
        return all(bmc.power() is PowerState.OFF for _ in range(OFF_READS))

    def _wait_for_off(self, bmc: Bmc, limit: timedelta) -> bool:
        end = self._clock() + limit
        while self._clock() < end:
            if self._is_off(bmc):
                return True
            self._pause(POLL_S)
        return False

    def _power_on(self, bmc: Bmc, host: Host) -> None:
        if bmc.power() is PowerState.ON:
            return
        bmc.power_on()
        end = self._clock() + POWER_LIMIT
        while self._clock() < end:
            if bmc.power() is PowerState.ON:
                return
            self._pause(POLL_S)
        raise DeviceError(
            f"host {host.name} did not switch on",
            host=host.name,
            expected=f"on within {POWER_LIMIT.seconds} s",
            found="its BMC acknowledged and reports it off",
        )

    def _set_next_boot(self, bmc: Bmc, host: Host, effect: SetNextBoot) -> None:
        bmc.set_next_boot(
            effect.device,
            persistent=effect.rung >= RUNG_LAST,
            uefi=host.firmware is not None and host.firmware.is_uefi,
            hold_timer=effect.rung == 1,
        )

    def _return_to_disk(self, bmc: Bmc, host: Host, operation: Operation) -> None:
        """Clear a network boot and let the host run its own system again.

        A host that never left its old system is not restarted: nothing of ours runs on it.
        Nor is one whose agent has been silent for long: its last word may have been lost,
        and a reset would hit the host's own system at work.
        """
        last = RUNG_LAST if operation.rung >= RUNG_LAST else 0
        self._set_next_boot(bmc, host, SetNextBoot(BootDevice.DISK, last))
        if bmc.power() is PowerState.OFF:
            bmc.power_on()
        elif self._transitions.limits.is_in_ramdisk(operation, self._clock()):
            # The agent restarts by itself when it gives up; this is for one that hangs then.
            self._reset_once(bmc, operation)

    def _reset_once(self, bmc: Bmc, operation: Operation) -> None:
        # Whether a reset was carried out cannot be seen, so it is noted before: rather none
        # at all, after a crash, than a second one, which would hit the host's own system.
        if RESET_AT not in operation.evidence:
            self._patiently(lambda: self._note_reset(operation))
            bmc.reset()

    def _note_reset(self, operation: Operation) -> None:
        with self._store.begin() as tx:
            now = tx.operation(operation.id)
            evidence = {**now.evidence, RESET_AT: self._clock().isoformat()}
            tx.save_operation(replace(now, evidence=evidence))

    def _feed_patiently(
        self,
        outgoing: Outgoing,
        operation: Operation,
        host: Host,
        event: E,
        error: DeviceError | None,
    ) -> None:
        self._patiently(lambda: self._feed(outgoing, operation, host, event, error))

    def _feed(
        self,
        outgoing: Outgoing,
        operation: Operation,
        host: Host,
        event: E,
        error: DeviceError | None,
    ) -> None:
        text = error.message if error else f"{str(event).replace('_', ' ')}"
        with self._store.begin() as tx:
            # A commit whose outcome nobody heard may have been one, and the same result saved
            # twice would wish twice for what follows.
            if tx.recall(_fed(outgoing)) is not None:
                return
            tx.remember(_fed(outgoing), {"event": event}, self._clock())
            tx.add_event(
                Event(self._clock(), "bmc", text, host_id=host.id, operation_id=operation.id)
            )
            try:
                self._transitions.apply(
                    tx,
                    operation.id,
                    event,
                    generation=outgoing.generation,
                    actor=WORKER,
                    error=error.as_dict() if error else None,
                )
            except NotAllowed as refusal:
                log.info("late BMC result dropped", host=host.name, why=refusal.message)
                if event is E.BMC_LOGIN_REFUSED:
                    self._transitions.note_refused_login(tx, operation.id, outgoing.generation)


def _fed(outgoing: Outgoing) -> str:
    """Return under what it is remembered that the effect's result was saved."""
    return f"effect {outgoing.key}"


def is_wanted(effect: Effect, generation: int, operation: Operation, host: Host) -> bool:
    """Say whether an effect that was wished for in `generation` is still to be made true."""
    if host.bmc is None or generation != host.generation:
        return False
    if isinstance(effect, PowerOffQuarantined):
        # A person has released it since, or its BMC would see a refused login again.
        is_locked_out = BMC_LOGIN_REFUSED_AT in operation.evidence
        return host.quarantine_reason is not None and not is_locked_out
    towards_disk = isinstance(effect, ReturnToDisk) or (
        isinstance(effect, SetNextBoot) and effect.device is BootDevice.DISK
    )
    # The way into the network is over as soon as the agent is there: a PowerOff that comes
    # late, or for a second time after a crash, would cut the power of a disk being written.
    return operation.phase is Phase.NETBOOTING or towards_disk


def _named(error: DeviceError, host: Host) -> DeviceError:
    """Return the same kind of error with the host's name and what to do next."""
    hint = error.hint
    if isinstance(error, BmcUnreachable) and host.bmc is not None:
        hint = f"check the cable and the address {host.bmc.address} of its BMC, then try again"
    return type(error)(
        f"host {host.name}: {error.message}",
        host=host.name,
        expected=error.expected or "an answer",
        found=error.found or error.message,
        hint=hint,
    )
