"""Makes one effect true at one BMC: tells it, and then looks. Knows no database.

Neither an acknowledgement nor silence is evidence. What is read may be a lie, too, so what is
told does not depend on it more than it must; netboot is proven by the ticket, later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

import structlog

from provisioner.core.contracts import Bmc, Clock
from provisioner.core.effects import (
    Effect,
    PowerOff,
    PowerOffQuarantined,
    PowerOn,
    SetNextBoot,
)
from provisioner.core.lifecycle import AGENT_HEARD_AT, RUNG_LAST, E, Limits
from provisioner.core.model import BootDevice, Host, Operation, PowerState
from provisioner.errors import (
    BmcAuthFailed,
    BmcBusy,
    BmcDisobeyed,
    BmcRejected,
    BmcUnreachable,
    DeviceError,
)

from .waited import Waited

log = structlog.get_logger(__name__)

# One read can be a lie or a moment; a host is off when this many reads in a row say so.
OFF_READS: Final = 2
POWER_LIMIT: Final = timedelta(seconds=60)
# The power is looked at soon and then ever less often: a BMC that is polled falls over.
POLL_FIRST_S: Final = 0.5
POLL_GROWTH: Final = 1.2
POLL_MAX_S: Final = 2.0
# A look counts for so much of a wait at most; one exchange is killed sooner than that.
LOOK_MAX: Final = timedelta(seconds=30)


@dataclass(frozen=True)
class Wish:
    """One effect on one host. `look` raises when something newer was decided; `begin_reset`
    notes the one reset that an operation may have, and says whether it is that."""

    effect: Effect
    bmc: Bmc
    host: Host
    operation: Operation
    look: Callable[[], object]
    begin_reset: Callable[[], bool]


class Wishes:
    """Makes wishes true. `pause` lets time pass."""

    def __init__(
        self,
        clock: Clock,
        limits: Limits,
        *,
        soft_shutdown_limit: timedelta,
        pause: Callable[[float], None],
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._soft_shutdown_limit = soft_shutdown_limit
        self._pause = pause

    def make_true(self, wish: Wish) -> E | None:
        """Return what has become true; None when nobody waits for it.

        Raises what looking and the BMC's exchanges raise, and BmcDisobeyed when it agreed and
        the host was not seen to follow.
        """
        effect = wish.effect
        if isinstance(effect, PowerOff):
            soft = effect.soft and wish.operation.options.get("soft_shutdown", True)
            self._power_off(wish, soft=bool(soft))
            return E.POWERED_OFF
        if isinstance(effect, SetNextBoot):
            _set_next_boot(wish, effect)
            return E.NEXT_BOOT_SET
        if isinstance(effect, PowerOn):
            self._power_on(wish)
            return E.POWERED_ON
        if isinstance(effect, PowerOffQuarantined):
            self._power_off(wish, soft=False)
            return None
        self._return_to_disk(wish)
        return None

    def _power_off(self, wish: Wish, *, soft: bool) -> None:
        """Return when the host is off.

        The power is cut whatever is read: this is asked for again when no ticket came back,
        and what was read the last time may be why.
        """
        bmc, host = wish.bmc, wish.host
        is_off = partial(_is_off, bmc)
        if soft:
            if is_off():
                return
            _tell(partial(bmc.power_off, soft=True))
            if self._comes_true(is_off, self._soft_shutdown_limit):
                return
            log.warning("soft shutdown took too long, switching off", host=host.name)
            # It may have been on its way into the network when it was asked: then it saw no
            # power button, and its agent may be writing by now.
            wish.look()
        _tell(partial(bmc.power_off, soft=False), is_so=is_off)
        if not self._comes_true(is_off, POWER_LIMIT):
            raise BmcDisobeyed(
                f"host {host.name} did not switch off",
                host=host.name,
                expected=f"off within {POWER_LIMIT.seconds} s",
                found="its BMC acknowledged and reports it on",
                hint="look at the BMC; it may need a cold reset",
            )

    def _power_on(self, wish: Wish) -> None:
        """Tell the host to be on, also when it is read to be: that may be the lie."""
        is_on = partial(_is_on, wish.bmc)
        _tell(wish.bmc.power_on, is_so=is_on)
        if not self._comes_true(is_on, POWER_LIMIT):
            raise BmcDisobeyed(
                f"host {wish.host.name} did not switch on",
                host=wish.host.name,
                expected=f"on within {POWER_LIMIT.seconds} s",
                found="its BMC acknowledged and reports it off",
                hint="it may be off: look at the host and at its BMC",
            )

    def _return_to_disk(self, wish: Wish) -> None:
        """Clear a network boot and let the host run its own system again.

        A host that never left its old system is not restarted: nothing of ours runs on it.
        Nor is one whose agent has been silent for long: its last word may have been lost,
        and a reset would hit the host's own system at work. But it is told to be on, whatever
        is read and whatever became of the boot flags: the boot rule sends it to its disk.
        """
        bmc = wish.bmc
        last = RUNG_LAST if wish.operation.rung >= RUNG_LAST else 0
        failed = _failure_of(partial(_set_next_boot, wish, SetNextBoot(BootDevice.DISK, last)))
        in_ramdisk = self._limits.is_in_ramdisk(wish.operation, self._clock())
        if in_ramdisk and failed is None and _is_on(bmc):
            # The agent restarts by itself when it gives up; this is for one that hangs then.
            # Unanswered it may have been done, and a second one would hit the own system.
            if wish.begin_reset():
                _tell(bmc.reset)
            return
        _tell(bmc.power_on, is_so=partial(_is_on, bmc))
        if failed is not None:
            raise failed
        self._stay_on(wish)

    def _stay_on(self, wish: Wish) -> None:
        """Switch a host on again that was still shutting down for us when it read on.

        Raises BmcUnreachable when the BMC does not say.
        """
        operation = wish.operation
        was_asked = bool(operation.options.get("soft_shutdown", True)) and operation.rung == 0
        may_shut_down = was_asked and AGENT_HEARD_AT not in operation.evidence
        for _ in self._looks(self._soft_shutdown_limit):
            wish.look()
            if wish.bmc.power() is PowerState.OFF:
                wish.bmc.power_on()
                return
            if not may_shut_down:
                return

    def _comes_true(self, look: Callable[[], bool], limit: timedelta) -> bool:
        """Return whether it was seen within `limit`. A look that fails shows nothing.

        Raises BmcUnreachable when every look failed.
        """
        seen, silence = 0, None
        for _ in self._looks(limit):
            try:
                if look():
                    return True
                seen += 1
            except BmcUnreachable as error:
                silence = error
        if silence is not None and not seen:
            raise silence
        return False

    def _looks(self, limit: timedelta) -> Iterator[None]:
        """Yield at once and then at growing intervals, until `limit` has passed."""
        waited, left_s, pause_s = Waited(self._clock, LOOK_MAX), limit.total_seconds(), POLL_FIRST_S
        while left_s > 0:
            yield
            paused_s = min(pause_s, left_s)
            self._pause(paused_s)
            left_s = (limit - waited.add(paused_s)).total_seconds()
            pause_s = min(pause_s * POLL_GROWTH, POLL_MAX_S)


def _is_off(bmc: Bmc) -> bool:
    return all(bmc.power() is PowerState.OFF for _ in range(OFF_READS))


def _is_on(bmc: Bmc) -> bool:
    return bmc.power() is PowerState.ON


def _set_next_boot(wish: Wish, effect: SetNextBoot) -> None:
    firmware = wish.host.firmware
    wish.bmc.set_next_boot(
        effect.device,
        persistent=effect.rung >= RUNG_LAST,
        # Some need the EFI bit. Where nobody knows the firmware, one rung has it.
        uefi=firmware.is_uefi if firmware is not None else effect.rung == 1,
        hold_timer=effect.rung == 1,
    )


def _tell(order: Callable[[], None], *, is_so: Callable[[], bool] = lambda: False) -> None:
    """Tell a BMC what is then looked for. Without an answer it may have been done; and some
    BMCs refuse what is so already."""
    try:
        order()
    except BmcBusy:
        raise  # it was not even told
    except BmcUnreachable as error:
        log.warning("BMC did not answer a power command", why=error.message)
    except BmcRejected:
        if not is_so():
            raise


def _failure_of(do: Callable[[], None]) -> DeviceError | None:
    """Return what went wrong, so that more can be done first. A refused login ends it all."""
    try:
        do()
    except BmcAuthFailed:
        raise
    except DeviceError as error:
        return error
    return None
