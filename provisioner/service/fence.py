"""When what was seen may be acted on: for a process that may be frozen at any line.

Whoever is stopped between looking and acting would act on a world of the past. So the last
look is taken when nothing is left to wait for, the command has to begin soon after it, and it
has to end before what it belongs to may be another process's.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from provisioner.boot_time import boot_time
from provisioner.core.contracts import Bmc
from provisioner.core.model import BootDevice, PowerState

# From the last look to the beginning of the command: milliseconds, unless we are stopped.
LOOK_HOLDS: Final = timedelta(seconds=5)
NO_LIMIT: Final = timedelta.max


class Overtaken(Exception):
    """What an effect wished for is no longer wanted."""


class Fence:
    """Asked by whoever gives a command, right before it begins.

    Each thread that acts for an effect says how to look; one that says nothing acts for a
    person, who has looked.
    """

    def __init__(self, clock: Callable[[], float] = boot_time) -> None:
        self._clock = clock
        self._acting = threading.local()
        self._lease_left: Callable[[], timedelta] = lambda: NO_LIMIT

    def hold(self, lease_left: Callable[[], timedelta]) -> None:
        """Let no command last longer than this process's own lease."""
        self._lease_left = lease_left

    @contextmanager
    def acting(self, look: Callable[[], object]) -> Iterator[None]:
        """Have this thread's commands looked for first; `look` raises Overtaken."""
        self._acting.look = look
        try:
            yield
        finally:
            self._acting.look = None

    def begin(self) -> tuple[timedelta, timedelta]:
        """Look once more. Return within what time the command has to begin, and to end; it must
        not be given when that is nothing."""
        look: Callable[[], object] | None = getattr(self._acting, "look", None)
        if look is None:
            return NO_LIMIT, NO_LIMIT
        while True:
            looked_at = self._clock()
            look()
            left = LOOK_HOLDS - timedelta(seconds=self._clock() - looked_at)
            # A database that took long to answer has told of a world of the past.
            if left > LOOK_HOLDS / 2:
                lease_left = self._lease_left()
                return min(left, lease_left), lease_left


class CarefulBmc:
    """The `Bmc` port for an effect: each command that changes something is looked for first.
    `look` raises Overtaken when it is no longer wanted."""

    def __init__(self, bmc: Bmc, fence: Fence, look: Callable[[], object]) -> None:
        self._bmc = bmc
        self._fence = fence
        self._look = look

    def power(self) -> PowerState:
        return self._bmc.power()

    def power_on(self) -> None:
        with self._looking():
            self._bmc.power_on()

    def power_off(self, *, soft: bool) -> None:
        with self._looking():
            self._bmc.power_off(soft=soft)

    def reset(self) -> None:
        with self._looking():
            self._bmc.reset()

    def set_next_boot(
        self, device: BootDevice, *, persistent: bool, uefi: bool, hold_timer: bool
    ) -> None:
        with self._looking():
            self._bmc.set_next_boot(device, persistent=persistent, uefi=uefi, hold_timer=hold_timer)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        # Now, so that nobody waits in line for what is not wanted; and when the line is over.
        self._look()
        with self._fence.acting(self._look):
            yield
