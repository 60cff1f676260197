"""The `Bmc` and `BmcPool` ports over IPMI, and the one place where IPMI errors become ours.

Each call is one exchange: the BMC's lock, a warm worker, a hard deadline. Retries nothing and
waits for no state: patience and evidence belong to the reconciler.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.boot_time import boot_time
from provisioner.core.model import BmcAddress, BootDevice, PowerState, WeakLogin
from provisioner.errors import (
    BmcAuthFailed,
    BmcBusy,
    BmcRejected,
    BmcUnreachable,
    DeviceError,
)

from .locks import bmc_lock
from .weak_logins import weak_logins
from .workers import IDLE_WORKERS_MAX, WORKERS_MAX, WorkerLost, Workers

# pyghmi gives up on a silent BMC after about 5 s. A slow one that answers each of the seven
# packets of an exchange late still makes it; a hang does not.
EXCHANGE_LIMIT: Final = timedelta(seconds=20)
# In this share of it the worker ends the exchange itself, and logs out. One that is killed
# leaves its session open, and a BMC has few.
OWN_SHARE: Final = 0.75
# For the BMC's lock and a worker together: two exchanges at their limit, and some.
WAIT_LIMIT: Final = timedelta(seconds=60)

# An exchange is ended by the service; this much later it ends by itself.
OWN_END_AFTER: Final = timedelta(seconds=1)
NO_LIMIT: Final = timedelta.max
# Verbs that change nothing, and may come late.
READING: Final = frozenset({"power"})

# pyghmi has one class for all of this; only the text tells them apart. First match wins.
_CREDENTIALS_REFUSED: Final = (
    "Incorrect password",
    "Unauthorized name",
    "Unauthorized role",
    "Invalid role",
    "Invalid username length",
    "Invalid integrity check value",
    "integrity code (wrong Kg?)",
    "Invalid user name",
    "user disabled",
)
_NO_ROOM: Final = ("Insufficient resources", "No available login slots", "No slot available")
_SILENT: Final = ("None", "", "timeout", "Session no longer connected")


@dataclass(frozen=True)
class _Answer:
    outcome: str
    value: Any = None
    text: str = ""


def translate(outcome: str, text: str, address: str) -> DeviceError:
    """Turn a worker's report that is not `done` into the error for whoever must act."""
    if outcome == "failed" and any(words in text for words in _CREDENTIALS_REFUSED):
        return BmcAuthFailed(
            f"BMC {address} refused the credentials",
            found=text,
            hint="set the right user and password; they are not tried again, BMCs lock accounts",
        )
    if any(words in text for words in _NO_ROOM):
        return BmcBusy(
            f"BMC {address} has no session free",
            found=text,
            hint="others hold its sessions open; they end by themselves within minutes",
        )
    if text in _SILENT or text.startswith("Unable to transmit"):
        return BmcUnreachable(
            f"BMC {address} did not answer",
            hint="check its power, cable and address, and that IPMI over LAN is switched on",
        )
    if outcome == "crashed":
        return BmcUnreachable(f"the exchange with BMC {address} broke off", found=text)
    return BmcRejected(f"BMC {address} said no", found=text)


class IpmiPool:
    """BMCs over IPMI; the `BmcPool` port. Safe for many threads and many processes.

    `lock_dir` is shared by every process on this machine that speaks to BMCs, and is made if
    it is missing. Make the pool after forking: its workers belong to the process that made it.
    `may_begin` is asked right before an exchange that changes something, and says within what
    time it has to begin and to end: it does, even when this process is stopped meanwhile.
    """

    def __init__(
        self,
        lock_dir: Path,
        *,
        workers_max: int = WORKERS_MAX,
        idle_workers_max: int = IDLE_WORKERS_MAX,
        exchange_limit: timedelta = EXCHANGE_LIMIT,
        wait_limit: timedelta = WAIT_LIMIT,
        may_begin: Callable[[], tuple[timedelta, timedelta]] = lambda: (NO_LIMIT, NO_LIMIT),
    ) -> None:
        lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_dir = lock_dir
        self._exchange_limit = exchange_limit
        self._wait_limit = wait_limit
        self._may_begin = may_begin
        self.workers = Workers(workers_max=workers_max, idle_workers_max=idle_workers_max)

    def bmc(self, where: BmcAddress) -> "IpmiBmc":
        return IpmiBmc(self, where)

    def weak_logins(self, where: BmcAddress) -> tuple[WeakLogin, ...]:
        """Return how the BMC lets somebody in without a password. Raises BmcUnreachable and
        BmcBusy; RequestError when the address is not an IP address."""
        with bmc_lock(self._lock_dir, where.address, where.port, self._wait_limit):
            return weak_logins(where)

    def close(self) -> None:
        """Kill the workers. The pool is good for nothing afterwards."""
        self.workers.close()

    def exchange(self, where: BmcAddress, verb: str, **arguments: object) -> object:
        """Do one verb at one BMC and return its value.

        Raises BmcAuthFailed, BmcUnreachable, BmcBusy or BmcRejected; RequestError when the
        address is not an IP address.
        """
        request = {
            "address": where.address,
            "port": where.port,
            "user": where.user,
            "password": where.password.reveal(),
            "verb": verb,
            "arguments": arguments,
            "seconds": self._exchange_limit.total_seconds() * OWN_SHARE,
        }
        deadline = time.monotonic() + self._wait_limit.total_seconds()
        with bmc_lock(self._lock_dir, where.address, where.port, self._wait_limit):
            left = timedelta(seconds=max(0.0, deadline - time.monotonic()))
            answer = self._ask_worker(where.address, request, left)
        if answer.outcome != "done":
            raise translate(answer.outcome, answer.text, where.address)
        return answer.value

    def _within(self, address: str, verb: str) -> dict[str, float]:
        """Return when the exchange must begin and be over, on the clock that goes on while we
        are stopped. Asked when nothing is left to wait for."""
        no_limit = self._exchange_limit + OWN_END_AFTER
        begin, end = (no_limit, no_limit) if verb in READING else self._may_begin()
        if min(begin, end) <= timedelta():
            raise BmcUnreachable(
                f"the exchange with BMC {address} was held up for too long, and not begun",
                hint="this process was stopped; it looks again first",
            )
        now = boot_time()
        return {
            "begin_by": now + min(begin, no_limit).total_seconds(),
            "until": now + min(end, no_limit).total_seconds(),
        }

    def _ask_worker(self, address: str, request: dict[str, Any], wait: timedelta) -> _Answer:
        try:
            with self.workers.lent(wait) as worker:
                request |= self._within(address, request["verb"])
                return _Answer(**worker.exchange(request, self._exchange_limit))
        except TimeoutError as error:
            raise BmcUnreachable(
                f"BMC {address} did not finish the exchange",
                expected=f"an answer within {self._exchange_limit.total_seconds():g} s",
                hint="a BMC that hangs often needs a cold reset of its own",
            ) from error
        except WorkerLost as error:
            raise BmcUnreachable(f"the worker for BMC {address} was killed") from error


class IpmiBmc:
    """One BMC; the `Bmc` port. An acknowledgement is not evidence that it happened."""

    def __init__(self, pool: IpmiPool, where: BmcAddress) -> None:
        self._pool = pool
        self._where = where

    def power(self) -> PowerState:
        return PowerState(str(self._pool.exchange(self._where, "power")))

    def power_on(self) -> None:
        self._pool.exchange(self._where, "power_on")

    def power_off(self, *, soft: bool) -> None:
        """Ask for power off: `soft` presses the power button (ACPI), else the power is cut.

        Returns when the BMC has agreed, not when the host is off.
        """
        self._pool.exchange(self._where, "power_off", soft=soft)

    def reset(self) -> None:
        self._pool.exchange(self._where, "reset")

    def set_next_boot(
        self, device: BootDevice, *, persistent: bool, uefi: bool, hold_timer: bool
    ) -> None:
        """Write the boot flags. DISK once, after a persistent NETWORK, also ends the latter:
        a BMC has one set of flags."""
        self._pool.exchange(
            self._where,
            "set_next_boot",
            device=device.value,
            persistent=persistent,
            uefi=uefi,
            hold_timer=hold_timer,
        )
