"""How long what was seen may still be acted on: for a process that may be frozen at any line.

Whoever is stopped between looking and acting would act on a world of the past. So each look
holds for a while only, and a command that was not carried out by then is not carried out.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from provisioner.core.contracts import Bmc
from provisioner.core.model import BootDevice, PowerState

# Longer than an exchange with a slow BMC, and shorter than the time in which a host that was
# switched on can have come so far that switching it off does harm.
LOOK_HOLDS: Final = timedelta(seconds=10)


def boot_time() -> float:
    """Return seconds that also pass while this process, or this machine, is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Overtaken(Exception):
    """What an effect wished for is no longer wanted."""


class Fence:
    """What each thread saw last, and when. A thread that never looked acts for a person."""

    def __init__(self, clock: Callable[[], float] = boot_time) -> None:
        self._clock = clock
        self._seen = threading.local()
        self._lease_left: Callable[[], timedelta] = lambda: timedelta.max

    def hold(self, lease_left: Callable[[], timedelta]) -> None:
        """Let no look hold for longer than this process's own lease."""
        self._lease_left = lease_left

    def look(self) -> None:
        """Note that this thread looks. Called before, since the answer is as old as that."""
        self._seen.at = self._clock()

    def left(self) -> timedelta:
        """Return how long this thread may still act on its last look; none when negative."""
        at = getattr(self._seen, "at", None)
        if at is None:
            return timedelta.max
        return min(LOOK_HOLDS - timedelta(seconds=self._clock() - at), self._lease_left())


class CarefulBmc:
    """The `Bmc` port for an effect: looks again, right before each command that changes
    something, whether it is still wanted. `look` raises Overtaken when it is not."""

    def __init__(self, bmc: Bmc, look: Callable[[], None]) -> None:
        self._bmc = bmc
        self._look = look

    def power(self) -> PowerState:
        return self._bmc.power()

    def power_on(self) -> None:
        self._look()
        self._bmc.power_on()

    def power_off(self, *, soft: bool) -> None:
        self._look()
        self._bmc.power_off(soft=soft)

    def reset(self) -> None:
        self._look()
        self._bmc.reset()

    def set_next_boot(
        self, device: BootDevice, *, persistent: bool, uefi: bool, hold_timer: bool
    ) -> None:
        self._look()
        self._bmc.set_next_boot(device, persistent=persistent, uefi=uefi, hold_timer=hold_timer)
