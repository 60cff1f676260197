"""A host behind a BMC: its power, its boot flags, and what it really did.

Time is handed in, and catches up when somebody looks: what was due happens then, in order.
"""

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .faults import READINGS, Command, Faults, Traits


class Source(StrEnum):
    """Where a host boots from. It has its disk first in its boot order."""

    NETWORK = "network"
    DISK = "disk"


@dataclass(frozen=True)
class Happened:
    """One line of what really happened, as opposed to what was said."""

    at: float
    what: str
    detail: str = ""


@dataclass(frozen=True)
class Flags:
    """Boot flags as they were set. Source: IPMI v2.0 table 28-14."""

    source: Source
    is_persistent: bool
    has_efi_bit: bool


class SimulatedHost:
    """One host. Safe for the thread of its BMC and for that of a test."""

    def __init__(self, clock: Callable[[], float], traits: Traits, faults: Faults) -> None:
        self._clock = clock
        self._traits = traits
        self._faults = faults
        self._guard = threading.RLock()
        self._born_at = clock()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._power_number = 0  # of the last change of power; what was due before it is void
        self._flags: Flags | None = None
        self._flags_before: Flags | None = None  # as they were at the start before
        self._flags_at = 0.0
        self._is_held = False
        self._is_on = traits.is_on
        self._was_told_off = False
        self._reads = 0
        self.log: list[Happened] = []

    # --- what a test may ask -----------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        with self._guard:
            self._catch_up()
            return self._is_on

    def boots(self) -> list[Source]:
        """Return from where it booted each time, up to now."""
        return [Source(line.detail) for line in self.happened("boots")]

    def happened(self, what: str) -> list[Happened]:
        with self._guard:
            self._catch_up()
            return [line for line in self.log if line.what == what]

    def restart(self) -> None:
        """Restart by itself, as the agent lets it when it is done."""
        with self._guard:
            self._catch_up()
            self._note(self._clock(), "restarts by itself")
            self._start(self._clock())

    # --- what its BMC does -------------------------------------------------------------------

    def power_read(self) -> bool:
        """Return what the BMC says of the power, true or not."""
        with self._guard:
            is_on, until = self.is_on, self._faults.lies_until
            self._reads += 1
            if until is not None and self._clock() - self._born_at >= until:
                return is_on
            return READINGS[self._faults.reading](is_on, self._was_told_off, self._reads)

    def obey(self, command: Command) -> None:
        """Do a power command, and once more later where the BMC is such."""
        with self._guard:
            self._catch_up()
            now = self._clock()
            self._flags_at = now  # each chassis command starts the 60 seconds anew
            self._reads = 0
            self._was_told_off = command in (Command.OFF, Command.SOFT_OFF)
            if command in self._faults.not_done:
                self._note(now, "not done", command)
                return
            self._do(command, now)
            if command in self._faults.again_after:
                again = now + self._faults.again_after[command]
                self._at(again, lambda at: self._do(command, at, "once more"))

    def set_flags(self, flags: Flags) -> None:
        with self._guard:
            self._catch_up()
            self._note(self._clock(), "flags", f"{flags.source}")
            if not self._faults.forgets_flags:
                self._flags, self._flags_at = flags, self._clock()

    def hold_timer(self, held: bool) -> None:
        with self._guard:
            self._is_held = held and self._faults.obeys_hold

    # --- inside ------------------------------------------------------------------------------

    def _do(self, command: Command, at: float, how: str = "") -> None:
        self._note(at, command, how)
        if command is Command.OFF:
            self._off(at)
        elif command is Command.SOFT_OFF and self._is_on and not self._traits.ignores_button:
            self._later(at + self._traits.shutdown_seconds, self._off)
        elif (command is Command.ON and not self._is_on) or (
            command is Command.RESET and self._is_on
        ):
            self._start(at)

    def _off(self, at: float) -> None:
        self._power_number += 1
        if self._is_on:
            self._note(at, "goes off")
        self._is_on = False

    def _start(self, at: float) -> None:
        self._power_number += 1
        self._is_on = True
        self._note(at, "starts")
        self._later(at + self._traits.post_seconds, self._boot)

    def _boot(self, at: float) -> None:
        self._note(at, "boots", self._firmware_chooses(at))

    def _firmware_chooses(self, at: float) -> Source:
        """Return what the firmware makes of the flags, and use up those that are for once."""
        faults, flags = self._faults, self._flags
        is_timed = flags is not None and not flags.is_persistent and not self._is_held
        if is_timed and at - self._flags_at > faults.flag_seconds:
            self._note(at, "flags void")
            self._flags = flags = None
        if flags is not None and not flags.is_persistent and not faults.keeps_once:
            self._flags = None
        if faults.is_one_start_late:
            flags, self._flags_before = self._flags_before, flags
        if flags is None or (faults.needs_efi_bit and not flags.has_efi_bit):
            return Source.DISK
        return flags.source

    def _catch_up(self) -> None:
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            at, _, act = heapq.heappop(self._due)
            act(at)

    def _at(self, at: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (at, next(self._numbers), act))

    def _later(self, at: float, act: Callable[[float], None]) -> None:
        """Let `act` happen, unless the power changes before."""
        number = self._power_number

        def unless_void(due_at: float) -> None:
            if number == self._power_number:
                act(due_at)

        self._at(at, unless_void)

    def _note(self, at: float, what: str, detail: str = "") -> None:
        self.log.append(Happened(at, what, detail))
