"""Performs effects on BMCs and feeds the result back as an event; `wishes` knows how.

Looks before acting: an effect may be performed twice, or late, and must then do no harm.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Final, TypeVar

import structlog

from provisioner.core.contracts import BmcPool, Clock, Outgoing, Store
from provisioner.core.effects import (
    Effect,
    PowerOff,
    PowerOffQuarantined,
    ReturnToDisk,
    SetNextBoot,
)
from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT, E, NotAllowed
from provisioner.core.model import BmcAddress, BootDevice, Event, Host, Operation, Phase
from provisioner.errors import (
    BmcAuthFailed,
    BmcBusy,
    BmcUnreachable,
    DeviceError,
    NotFound,
    Unavailable,
)

from .fence import CarefulBmc, Fence, Overtaken
from .transitions import Transitions
from .waited import Waited
from .wishes import Wish, Wishes

log = structlog.get_logger(__name__)

T = TypeVar("T")

# An exchange has its own hard deadline. Three of them, and the operation fails; a wrong
# password is never tried again, because BMCs lock accounts.
ATTEMPTS_MAX: Final = 3
RETRY_PAUSE_S: Final = 1.0
# Sessions that others left open end by themselves after a minute or so.
BUSY_PATIENCE: Final = timedelta(minutes=3)
BUSY_PAUSE_S: Final = 5.0
# A host that is off for our sake is not given up while its BMC restarts.
RETURN_PATIENCE: Final = timedelta(minutes=5)
RETURN_PAUSE_S: Final = 15.0
# For so much of a patience an attempt counts at most, or a clock set forward would end it.
ATTEMPT_MAX: Final = timedelta(minutes=2)
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
        return_patience: timedelta = RETURN_PATIENCE,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._return_patience = return_patience
        self._transitions = transitions
        self._pool = pool
        self._clock = clock
        self._fence = fence or Fence()
        self._pause = pause
        self._wishes = Wishes(
            clock, transitions.limits, soft_shutdown_limit=soft_shutdown_limit, pause=pause
        )

    def perform(self, outgoing: Outgoing) -> None:
        """Make one effect true, unless a newer decision has overtaken it."""
        try:
            self._perform(outgoing, *self._look(outgoing))
        except Overtaken:
            asked_by, effect = outgoing.operation_id, str(outgoing.effect)
            log.info("effect overtaken", operation=asked_by, effect=effect)

    def _perform(self, outgoing: Outgoing, operation: Operation, host: Host) -> None:
        try:
            fact = self._with_retries(outgoing, operation, host)
        except BmcAuthFailed as error:
            self._feed_patiently(outgoing, operation, host, E.BMC_LOGIN_REFUSED, error)
            return
        except DeviceError as error:
            self._feed_patiently(outgoing, operation, host, E.BMC_FAILED, error)
            return
        if fact is not None:
            self._feed_patiently(outgoing, operation, host, fact, None)

    def _look(self, outgoing: Outgoing) -> tuple[Operation, Host]:
        """Return what the database says now, however long it is away.

        Raises Overtaken when the effect is over: by a newer decision, with its host, or
        performed with its result saved.
        """
        try:
            operation, host, is_over = self._patiently(partial(self._read, outgoing))
        except NotFound as error:  # the host was deleted meanwhile, and nothing is owed to it
            raise Overtaken from error
        if is_over or not is_wanted(outgoing.effect, outgoing.generation, operation, host):
            raise Overtaken
        return operation, host

    def _read(self, outgoing: Outgoing) -> tuple[Operation, Host, bool]:
        with self._store.read() as tx:
            operation = tx.operation(outgoing.operation_id)
            # A restored queue holds wishes of the past; reconciling ends what they belong to.
            is_over = tx.is_observing() or tx.recall(_fed(outgoing)) is not None
            return operation, tx.host(operation.host_id), is_over

    def _patiently(self, ask_database: Callable[[], T]) -> T:
        """Return what `ask_database` returns, however long the database is away. The BMC's
        part is not repeated by it: a wrong password is used once.

        Without a limit: an effect that ended here with an error would never be performed again,
        and its host could stay off. One whose process ends meanwhile is performed by the next.
        """
        while True:
            try:
                return ask_database()
            except Unavailable as error:
                log.warning("effect waits for the database", why=error.message)
                self._pause(RETRY_PAUSE_S)

    def _with_retries(self, outgoing: Outgoing, operation: Operation, host: Host) -> E | None:
        """Make the effect true, in a few attempts. A wrong password is used in one only."""
        waited, pause_s = Waited(self._clock, ATTEMPT_MAX), 0.0
        attempts, effect = 0, outgoing.effect
        while True:
            assert host.bmc is not None
            try:
                return self._wishes.make_true(self._wish(outgoing, host.bmc, host, operation))
            except Overtaken:
                raise
            except BmcAuthFailed as error:
                raise _login_refused(error, host, effect) from error
            except DeviceError as error:
                failed = error
            except Exception as error:  # the top of an effect: raised, it would be lost
                log.exception("bug", host=host.name, effect=str(effect))
                failed = _bug(error, host)
            lasted = waited.add(pause_s)
            is_busy = isinstance(failed, BmcBusy) and lasted < BUSY_PATIENCE
            attempts += not is_busy
            pause = BUSY_PAUSE_S if is_busy else self._pause_after(attempts, effect, lasted)
            if pause is None:
                raise _named(failed, host) from failed
            log.warning("BMC exchange failed", host=host.name, why=failed.message)
            pause_s = pause
            self._pause(pause_s)
            # The host may have come into the network meanwhile, or been given up, or its BMC
            # been given another password.
            operation, host = self._look(outgoing)

    def _wish(
        self, outgoing: Outgoing, address: BmcAddress, host: Host, operation: Operation
    ) -> Wish:
        look = partial(self._look, outgoing)
        return Wish(
            outgoing.effect,
            CarefulBmc(self._pool.bmc(address), self._fence, look),
            host,
            operation,
            look,
            begin_reset=partial(self._begin_reset, operation),
        )

    def _pause_after(self, attempts: int, effect: Effect, lasted: timedelta) -> float | None:
        """Return the seconds until another attempt; None when there is no other."""
        if attempts < ATTEMPTS_MAX:
            return RETRY_PAUSE_S
        is_patient = isinstance(effect, ReturnToDisk) and lasted < self._return_patience
        return RETURN_PAUSE_S if is_patient else None

    def _begin_reset(self, operation: Operation) -> bool:
        """Note a reset before it is done; False when one was noted before.

        Whether it was carried out cannot be seen: rather none at all, after a crash, than a
        second one, which would hit the host's own system.
        """
        if RESET_AT in operation.evidence:
            return False
        self._patiently(lambda: self._note_reset(operation))
        return True

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
                Event(
                    self._clock(),
                    "bmc",
                    text,
                    host_id=host.id,
                    operation_id=operation.id,
                    detail={"event": event, "code": error.code if error else None},
                )
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
    if BMC_LOGIN_REFUSED_AT in operation.evidence:
        return False  # wished for before, and its BMC would see a refused login again
    if isinstance(effect, PowerOffQuarantined):
        return host.quarantine_reason is not None  # or a person has released it since
    towards_disk = isinstance(effect, ReturnToDisk) or (
        isinstance(effect, SetNextBoot) and effect.device is BootDevice.DISK
    )
    # The way into the network is over as soon as the agent is there: a PowerOff that comes
    # late, or for a second time after a crash, would cut the power of a disk being written.
    return operation.phase is Phase.NETBOOTING or towards_disk


def _login_refused(error: BmcAuthFailed, host: Host, effect: Effect) -> BmcAuthFailed:
    hint = f"provisioner host change {host.name} --bmc-user U --bmc-password-file F"
    if not (isinstance(effect, PowerOff) and effect.soft):
        hint += f"; then provisioner host power {host.name} on, for it may be off"
    is_told = error.host is not None  # its stored password does not open; no BMC was asked
    return BmcAuthFailed(
        error.message if is_told else f"the BMC of host {host.name} refused the credentials",
        host=host.name,
        expected=error.expected or "a login",
        found=error.found if is_told else error.message,
        hint=hint,
    )


def _bug(error: Exception, host: Host) -> DeviceError:
    # Not its text, which may show what it was called with.
    return DeviceError(
        f"the exchange with the BMC of host {host.name} broke off",
        host=host.name,
        expected="an answer",
        found=type(error).__name__,
        hint="a bug of ours: its traceback is in the log of the service's worker",
    )


def _named(error: DeviceError, host: Host) -> DeviceError:
    """Return the same kind of error with the host's name and what to do next."""
    if error.host is not None:
        return error
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
