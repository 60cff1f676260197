"""A BMC in memory for tests of the use cases, with the faults that real ones have.

`test_service_effects.py` holds it to the contract that the IPMI one keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from provisioner.core.contracts import Bmc
from provisioner.core.model import BmcAddress, BootDevice, PowerState, WeakLogin
from provisioner.errors import BmcAuthFailed, BmcRejected, BmcUnreachable


@dataclass
class FakeBmc:
    """One BMC and the host behind it. Every call is written down in `exchanges`.

    `booted` says from where the host started each time. `on_exchange` lets a test have
    something else happen in the middle.
    """

    is_on: bool = False
    next_boot: BootDevice = BootDevice.DISK
    is_persistent: bool = False
    exchanges: list[str] = field(default_factory=list)
    booted: list[BootDevice] = field(default_factory=list)
    on_exchange: Callable[[str], None] = lambda _: None

    # What is wrong with it.
    is_silent: bool = False
    refuses_login: bool = False
    rejects: str = ""  # the verb that it says no to
    forgets_boot: bool = False
    ignores_soft_off: bool = False
    lies_about_off: bool = False

    def power(self) -> PowerState:
        self._exchange("power")
        return PowerState.ON if self.is_on else PowerState.OFF

    def power_on(self) -> None:
        self._exchange("power_on")
        if not self.is_on:
            self._start()

    def power_off(self, *, soft: bool) -> None:
        self._exchange("soft_off" if soft else "power_off")
        if not (soft and self.ignores_soft_off) and not self.lies_about_off:
            self.is_on = False

    def reset(self) -> None:
        self._exchange("reset")
        if self.is_on:
            self._start()

    def set_next_boot(
        self,
        device: BootDevice,
        *,
        persistent: bool,
        uefi: bool,  # noqa: ARG002 # the port's signature
        hold_timer: bool,
    ) -> None:
        how = "persistent" if persistent else "held" if hold_timer else "once"
        self._exchange(f"next_boot {device} {how}")
        if not self.forgets_boot:
            self.next_boot, self.is_persistent = device, persistent

    def changes(self) -> list[str]:
        """Return the exchanges that were more than looking."""
        return [verb for verb in self.exchanges if verb != "power"]

    def _start(self) -> None:
        self.is_on = True
        self.booted.append(self.next_boot)
        if not self.is_persistent:
            self.next_boot = BootDevice.DISK

    def _exchange(self, verb: str) -> None:
        self.exchanges.append(verb)
        self.on_exchange(verb)
        if self.refuses_login:
            raise BmcAuthFailed("the BMC refused the credentials")
        if self.is_silent:
            raise BmcUnreachable("the BMC did not answer")
        if self.rejects and verb.startswith(self.rejects):
            raise BmcRejected(f"the BMC said no to {verb}")


class FakeBmcPool:
    """The `BmcPool` port over fakes, by address."""

    def __init__(self) -> None:
        self.bmcs: dict[str, FakeBmc] = {}
        self.passwords: set[str] = set()

    def bmc(self, where: BmcAddress) -> Bmc:
        self.passwords.add(where.password.reveal())
        return self.bmcs.setdefault(where.address, FakeBmc())

    def weak_logins(
        self, where: BmcAddress, weak: Mapping[str, tuple[WeakLogin, ...]]
    ) -> tuple[WeakLogin, ...]:
        """Return how the BMC lets people in, of those that are `weak`, unless it is silent."""
        if self.bmcs.get(where.address, FakeBmc()).is_silent:
            raise BmcUnreachable(f"BMC {where.address} did not say who may log in")
        return weak.get(where.address, ())

    def close(self) -> None:
        """Nothing is held."""
