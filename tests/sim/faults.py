"""What goes wrong: the catalogue of faults, and when each strikes.

A fault is counted when it has had its effect: a message that was lost, a commit that failed,
a lie that began to be told. A new fault is one row of `CATALOGUE` and one function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .database import Fate

if TYPE_CHECKING:
    from .hosts import SimHost
    from .world import World

# A reimage takes some five minutes when nothing goes wrong; its faults fall into these.
STRIKES_WITHIN_S: Final = 420.0
COMMITS_UNTIL_MAX: Final = 25
EXCHANGES_UNTIL_MAX: Final = 8
PAUSE_S: Final = (5.0, 90.0)
# The lock of SQLite is waited for this long at most; see LOCK_WAIT_MAX of the store.
LOCK_S: Final = (0.5, 15.0)
# Which call a lost message is: any, or that of a kind, since most are heartbeats.
CALLS: Final = ("", "", "boot", "hello", "authorise", "seed", "done", "phone home")

Act = Callable[["Faults", "SimHost"], None]


class Faults:
    """Strikes hosts and the service of one world."""

    def __init__(self, world: World, intensity: float) -> None:
        self._world = world
        self._intensity = intensity
        self._rows = [row for row in CATALOGUE if row[0].startswith(world.size.faults)]
        self.had: Counter[str] = Counter()
        self.is_over = False
        # Each waits for so many commits, or exchanges, of the service to pass.
        self._commits: list[tuple[int, Fate]] = []
        self._exchanges: list[tuple[int, str]] = []
        self._pauses: list[int] = []
        self._lock_share = intensity * world.size.lock_share

    def plan_for(self, host: SimHost) -> None:
        """Plan what happens around one reimage: as much as the intensity says on average."""
        chance = self._world.chance
        for _ in range(round(chance.uniform(0.0, 2.0 * self._intensity))):
            after_s = chance.uniform(0.0, STRIKES_WITHIN_S)
            self._world.scheduler.after(after_s, lambda: self._strike(host))

    def count(self, name: str, about: str = "") -> None:
        self.had[name] += 1
        self._world.note(f"FAULT {name} {about}".rstrip())

    def _strike(self, host: SimHost) -> None:
        if self.is_over:
            return
        weights = [weight for _, weight, _ in self._rows]
        name, _, act = self._world.chance.choices(self._rows, weights)[0]
        if name.startswith(LATENT):
            self._world.note(f"fault in waiting: {name} {host.name}")
        else:
            self.count(name, host.name)
        act(self, host)

    # Where faults in waiting have their moment.

    def fate_of_message(self, host: SimHost, what: str) -> str:
        waiting = host.troubles.messages
        fitting = [one for one in waiting if one[0] in ("", what)]
        if not fitting or self.is_over:
            return ""
        waiting.remove(fitting[0])
        fate = fitting[0][1]
        self.count(f"message {fate}", f"{host.name} {what}")
        return fate

    def fate_of_commit(self) -> Fate:
        if self._world.process_of_task() is None or self.is_over:
            return Fate.GOOD
        left = [(number - 1, fate) for number, fate in self._commits]
        self._commits = [(number, fate) for number, fate in left if number > 0]
        due = [fate for number, fate in left if number <= 0]
        if not due:
            return Fate.GOOD
        self.count(f"commit {due[0].value}")
        return due[0]

    def before_transaction(self, *, writes: bool) -> None:
        """Wait as long as a lock is held by others, or stand still for a while right here."""
        process = self._world.process_of_task()
        if process is None or self.is_over:
            return
        if self._pauses:
            self._pauses[0] -= 1
            if self._pauses[0] <= 0:
                self._pauses.pop(0)
                self.count("transaction waits for a frozen process")
                self._world.freeze(process, self._world.chance.uniform(*PAUSE_S))
        if writes and self._world.chance.random() < self._lock_share:
            self.count("transaction waits for a lock")
            self._world.scheduler.sleep(self._world.chance.uniform(*LOCK_S))

    def before_exchange(self) -> None:
        self._die_at_exchange("before", 1)

    def after_exchange(self) -> None:
        self._die_at_exchange("after", 0)

    def _die_at_exchange(self, when: str, step: int) -> None:
        if self.is_over:
            return
        self._exchanges = [(number - step, which) for number, which in self._exchanges]
        due = [entry for entry in self._exchanges if entry[0] <= 0 and entry[1] == when]
        if due:
            self._exchanges.remove(due[0])
            self.count(f"exchange dies {when}")
            self._world.die()

    # The faults.

    def message(self, host: SimHost, fate: str) -> None:
        host.troubles.messages.append((self._world.chance.choice(CALLS), fate))

    def commit(self, fate: Fate) -> None:
        self._commits.append((self._world.chance.randint(1, COMMITS_UNTIL_MAX), fate))

    def exchange(self, when: str) -> None:
        self._exchanges.append((self._world.chance.randint(1, EXCHANGES_UNTIL_MAX), when))

    def pause(self) -> None:
        self._pauses.append(self._world.chance.randint(1, COMMITS_UNTIL_MAX))

    def until(self, shortest_s: float, longest_s: float) -> float:
        return self._world.now_s + self._world.chance.uniform(shortest_s, longest_s)

    def bmc(self, host: SimHost, quirk: str, shortest_s: float, longest_s: float) -> None:
        end = self.until(shortest_s, longest_s)
        setattr(host.bmc.quirks, quirk, end)
        host.troubled_until_s = max(host.troubled_until_s, end)

    def host(self, host: SimHost, trouble: str, shortest_s: float, longest_s: float) -> None:
        setattr(host.troubles, trouble, self.until(shortest_s, longest_s))

    def hang(self, host: SimHost, trouble: str) -> None:
        setattr(host.troubles, trouble, True)
        host.troubled_until_s = self._world.now_s + 3600.0

    def slow_post(self, host: SimHost) -> None:
        # Half of them come back just when the service gives the first try up.
        shortest_s, longest_s = self._world.chance.choice(((200.0, 900.0), (540.0, 640.0)))
        host.troubled_until_s = self._world.now_s + 3600.0
        host.troubles.next_post_s = self._world.chance.uniform(shortest_s, longest_s)

    def power_cut(self, host: SimHost) -> None:
        # Most come back by themselves when the power does.
        if self._world.chance.random() < 0.8:
            host.lose_power(self._world.chance.uniform(1.0, 60.0))
        else:
            host.lose_power(None)
            host.troubled_until_s = self._world.now_s + 3600.0

    def kill(self) -> None:
        self._world.kill_one()

    def freeze(self) -> None:
        self._world.freeze_one(self._world.chance.uniform(*PAUSE_S))

    def database_away(self) -> None:
        self._world.take_database_away(self._world.chance.uniform(1.0, 120.0))


# Counted when they bite, and not when they are planned.
LATENT: Final = ("message", "commit", "exchange", "transaction")


def _message(fate: str) -> Act:
    return lambda faults, host: faults.message(host, fate)


def _commit(fate: Fate) -> Act:
    return lambda faults, _: faults.commit(fate)


def _exchange(when: str) -> Act:
    return lambda faults, _: faults.exchange(when)


def _bmc(quirk: str, shortest_s: float, longest_s: float) -> Act:
    return lambda faults, host: faults.bmc(host, quirk, shortest_s, longest_s)


def _host(trouble: str, shortest_s: float, longest_s: float) -> Act:
    return lambda faults, host: faults.host(host, trouble, shortest_s, longest_s)


def _hang(trouble: str) -> Act:
    return lambda faults, host: faults.hang(host, trouble)


def _disk(fault: str) -> Act:
    return lambda _, host: setattr(host.disks[0], "at_fault", fault)


# Name, weight, and what it does to a host or to the service.
CATALOGUE: Final[tuple[tuple[str, float, Act], ...]] = (
    ("message lost", 6, _message("lost")),
    ("message unanswered", 8, _message("unanswered")),
    ("message doubled", 8, _message("doubled")),
    ("message late", 6, _message("late")),
    ("commit fails", 3, _commit(Fate.FAILS)),
    ("commit unknown", 4, _commit(Fate.UNKNOWN)),
    ("commit dies before", 4, _commit(Fate.DIES_BEFORE)),
    ("commit dies after", 5, _commit(Fate.DIES_AFTER)),
    ("exchange dies before", 3, _exchange("before")),
    ("exchange dies after", 4, _exchange("after")),
    ("service killed", 2, lambda faults, _: faults.kill()),
    ("transaction of a frozen process", 3, lambda faults, _: faults.pause()),
    ("service frozen", 2, lambda faults, _: faults.freeze()),
    ("database away", 2, lambda faults, _: faults.database_away()),
    ("BMC forgets the flag", 2, _bmc("forgets_flag_until_s", 30, 300)),
    ("BMC says off", 1.5, _bmc("says_off_until_s", 5, 120)),
    ("BMC says on", 1, _bmc("says_on_until_s", 5, 120)),
    ("BMC slow", 2, _bmc("slow_until_s", 30, 400)),
    ("BMC silent", 1.5, _bmc("silent_until_s", 5, 120)),
    ("BMC flaps", 2, _bmc("flaps_until_s", 20, 240)),
    ("BMC refuses the login", 0.5, _bmc("refuses_login_until_s", 5, 120)),
    ("no DHCP", 1.5, _host("has_no_dhcp_until_s", 20, 400)),
    ("host apart", 2, _host("is_apart_until_s", 5, 200)),
    ("host unhealthy", 2, _host("is_unhealthy_until_s", 5, 120)),
    ("agent hangs", 0.7, _hang("hangs")),
    ("firmware hangs", 0.7, _hang("hangs_in_firmware")),
    ("slow POST", 1.5, lambda faults, host: faults.slow_post(host)),
    ("power cut", 1, lambda faults, host: faults.power_cut(host)),
    ("disk fails a write", 0.7, _disk("EIO")),
)
