"""Simulated BMCs: the `Bmc` and `BmcPool` ports, with the lies that real ones tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from provisioner.core.contracts import Bmc
from provisioner.core.model import BmcAddress, BootDevice, PowerState
from provisioner.errors import BmcAuthFailed, BmcUnreachable

from .observations import BmcChanged

if TYPE_CHECKING:
    from .hosts import SimHost
    from .world import World

# The hard deadline of one exchange, as the real pool has it.
EXCHANGE_LIMIT_S: Final = 20.0
FLAG_TIMER_S: Final = 60.0
SECOND_RESET_S: Final = (2.0, 15.0)


@dataclass
class Quirks:
    """What is wrong with a BMC: for good where it is a truth value, else until that second."""

    clears_flag_after_60_s: bool = False
    takes_once_as_persistent: bool = False
    runs_reset_twice: bool = False
    resets_its_password: bool = False
    forgets_flag_until_s: float = 0.0
    says_off_until_s: float = 0.0
    says_on_until_s: float = 0.0
    slow_until_s: float = 0.0
    silent_until_s: float = 0.0
    flaps_until_s: float = 0.0
    refuses_login_until_s: float = 0.0


@dataclass
class BootFlag:
    device: BootDevice
    is_persistent: bool
    set_at_s: float
    timer_is_held: bool


class SimBmc:
    """One BMC and the power of the host behind it."""

    def __init__(self, world: World, host: SimHost) -> None:
        self._world = world
        self._host = host
        self.quirks = Quirks()
        self.flag: BootFlag | None = None

    # The port.

    def power(self) -> PowerState:
        self._exchange("power", None)
        now, quirks = self._world.now_s, self.quirks
        is_on = self._host.is_on
        if now < quirks.says_off_until_s:
            is_on = False
        elif now < quirks.says_on_until_s:
            is_on = True
        return PowerState.ON if is_on else PowerState.OFF

    def power_on(self) -> None:
        self._exchange("power on", self._host.switch_on)

    def power_off(self, *, soft: bool) -> None:
        if soft:
            self._exchange("soft off", self._host.press_power_button)
        else:
            self._exchange("power off", self._host.switch_off, cuts_power=True)

    def reset(self) -> None:
        def act() -> None:
            self._host.restart("reset by its BMC")
            if self.quirks.runs_reset_twice:
                again_s = self._world.chance.uniform(*SECOND_RESET_S)
                self._world.scheduler.after(again_s, self._reset_again)
            if self.quirks.resets_its_password:
                self.quirks.refuses_login_until_s = self._world.now_s + 600.0

        self._exchange("reset", act, cuts_power=True)

    def set_next_boot(
        self,
        device: BootDevice,
        *,
        persistent: bool,
        uefi: bool,  # noqa: ARG002 # the port's signature
        hold_timer: bool,
    ) -> None:
        def act() -> None:
            if self._world.now_s < self.quirks.forgets_flag_until_s:
                return
            for_good = persistent or self.quirks.takes_once_as_persistent
            self.flag = BootFlag(device, for_good, self._world.now_s, hold_timer)

        how = "persistent" if persistent else "held" if hold_timer else "once"
        self._exchange(f"next boot {device} {how}", act)

    # The host's side.

    def take_flag(self) -> BootDevice | None:
        """Return from where the firmware is told to boot, as it reads it at the end of POST."""
        flag = self.flag
        if flag is None or flag.is_persistent:
            return flag.device if flag is not None else None
        self.flag = None
        is_late = self._world.now_s - flag.set_at_s > FLAG_TIMER_S
        if is_late and self.quirks.clears_flag_after_60_s and not flag.timer_is_held:
            return None
        return flag.device

    def _reset_again(self) -> None:
        if self._host.is_on:
            self._host.restart("its BMC runs the reset twice")

    def _exchange(
        self, verb: str, act: Callable[[], None] | None, *, cuts_power: bool = False
    ) -> None:
        """Carry out one exchange. What it does happens on its way, whatever becomes of the
        process that asked: an exchange is a child's, and cannot be called back."""
        world, now, quirks = self._world, self._world.now_s, self.quirks
        world.faults.before_exchange()
        flaps = now < quirks.flaps_until_s and world.chance.random() < 0.5
        if now < quirks.silent_until_s or flaps:
            world.scheduler.sleep(world.chance.uniform(5.0, EXCHANGE_LIMIT_S))
            raise BmcUnreachable("the BMC did not answer")
        if now < quirks.refuses_login_until_s:
            world.scheduler.sleep(world.chance.uniform(0.02, 0.1))
            raise BmcAuthFailed("the BMC refused the credentials")
        takes_s = world.chance.uniform(0.1, 0.9)
        if now < quirks.slow_until_s:
            takes_s = world.chance.uniform(5.0, 30.0)
        if act is not None:
            self._have_done(verb, act, takes_s / 2, cuts_power)
        if takes_s > EXCHANGE_LIMIT_S:
            world.scheduler.sleep(EXCHANGE_LIMIT_S)
            raise BmcUnreachable("the BMC did not finish the exchange")
        world.scheduler.sleep(takes_s)
        if act is not None:
            world.faults.after_exchange()

    def _have_done(
        self, verb: str, act: Callable[[], None], after_s: float, cuts_power: bool
    ) -> None:
        def do() -> None:
            self._world.note(f"{self._host.name}: BMC: {verb}")
            self._world.saw(BmcChanged(self._host, verb, cuts_power))
            act()

        self._world.scheduler.after(after_s, do)


class SimBmcPool:
    """The `BmcPool` port over the BMCs of a world, by address."""

    def __init__(self, world: World) -> None:
        self._world = world

    def bmc(self, where: BmcAddress) -> Bmc:
        return self._world.bmc_at(where.address)

    def close(self) -> None:
        """Nothing is held."""
