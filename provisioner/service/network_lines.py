"""What DHCP, TFTP and HTTP saw of known hosts, as lines of their timelines: never of strangers, and
never so many that a host which asks on and on pushes everything else out.

A server only hands its line over. Whose it is, and whether it is kept, is found out by the
timeline's own thread, so that no packet waits for a database.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from provisioner.core.bootplan import Loader
from provisioner.core.contracts import Store, Tx
from provisioner.core.downloads import SEEN
from provisioner.core.model import Event, HostId
from provisioner.core.netboot_trace import SYSTEM

from .timeline import Timeline

# How soon a host that was just enrolled is known here. Also the pause between two looks when
# strangers ask and ask.
MACS_LOOK_S: Final = 5.0


@dataclass(frozen=True)
class Allowance:
    """How many lines at once, and one more after how many seconds."""

    lines: int
    seconds_per_line: float


# What one client may put into the queue: no more than a rack of them can.
OF_A_CLIENT: Final = Allowance(60, 1.0)
# What is kept of a host. One netboot is some twenty lines; a timeline holds 500.
WHILE_BUSY: Final = Allowance(80, 10.0)
WHILE_IDLE: Final = Allowance(20, 600.0)
# Clients that are told apart; the longest silent is forgotten first, and may begin anew.
CLIENTS_MAX: Final = 10_000


class Quota:
    """Counts lines by client against an allowance."""

    def __init__(
        self, allowance: Allowance, now: Callable[[], float], clients_max: int = CLIENTS_MAX
    ) -> None:
        self._allowance = allowance
        self._now = now
        self._clients_max = clients_max
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # lines, as of when

    def takes(self, client: str) -> bool:
        """Count one line of this client; False when it has had its lines."""
        now, most = self._now(), float(self._allowance.lines)
        left, at = self._left.pop(client, (most, now))
        left = min(most, left + (now - at) / self._allowance.seconds_per_line)
        is_taken = left >= 1
        self._left[client] = (left - is_taken, now)
        if len(self._left) > self._clients_max:
            self._left.popitem(last=False)
        return is_taken


class Admission:
    """Finds out whose lines they are, and drops those that no timeline keeps.

    `mac_at` returns the MAC that has an address, or None. A system's own requests (renewing
    a lease, for months) are of interest only while an operation is under way.
    """

    def __init__(
        self,
        store: Store,
        mac_at: Callable[[str], str | None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._mac_at = mac_at
        self._now = now
        self._macs: dict[str, HostId] = {}
        self._looked_at = float("-inf")
        self._busy, self._idle = Quota(WHILE_BUSY, now), Quota(WHILE_IDLE, now)

    def __call__(self, events: list[Event]) -> list[Event]:
        """Return the lines that are kept, each with its host. Raises Unavailable."""
        with self._store.read() as tx:
            return [kept for event in events if (kept := self._admit(tx, event)) is not None]

    def _admit(self, tx: Tx, event: Event) -> Event | None:
        mac = event.mac or self._mac_at(str(event.detail.get("address")))
        host_id = self._host_of(tx, mac) if mac else None
        if host_id is None:
            return None
        operation = tx.open_operation(host_id)
        if operation is None and event.detail.get("client") == SYSTEM:
            return None
        if not (self._idle if operation is None else self._busy).takes(host_id):
            return None
        return replace(event, mac=mac, host_id=host_id)

    def _host_of(self, tx: Tx, mac: str) -> HostId | None:
        if mac not in self._macs and self._now() - self._looked_at >= MACS_LOOK_S:
            self._macs, self._looked_at = dict(tx.macs()), self._now()
        return self._macs.get(mac)


class SeenFrom:
    """Notes with each answer to boot the ramdisk whether the downloads that follow, from the
    same address, will be known for this host's."""

    def __init__(self, mac_at: Callable[[str], str | None]) -> None:
        self._mac_at = mac_at

    def __call__(self, events: list[Event]) -> list[Event]:
        return [self._noted(one) for one in events]

    def _noted(self, event: Event) -> Event:
        told = event.detail
        # GRUB fetches by TFTP, which tells of a download only when it has ended.
        if told.get("answer") != "ramdisk" or told.get("loader") != Loader.IPXE:
            return event
        is_seen = self._mac_at(str(told.get("address"))) == event.mac
        return replace(event, detail={**told, SEEN: is_seen})


class NetworkLines:
    """Takes lines from a server's loop. Closed, it saves what waits."""

    def __init__(
        self,
        store: Store,
        mac_at: Callable[[str], str | None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeline = Timeline(store, Admission(store, mac_at, now))
        self._quota = Quota(OF_A_CLIENT, now)

    def add(self, event: Event) -> None:
        """Take a line; never waits and never raises."""
        if self._quota.takes(event.mac or str(event.detail.get("address"))):
            self._timeline.add(event)

    def close(self) -> None:
        self._timeline.close()
