"""What is true of the fleet beyond one host: who was selected, how much is under way, how
many hosts of a group are healthy, and whether the breaker is open. Plain values."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from .model import HostId, OperationId

# The label that says which group a host belongs to.
GROUP_LABEL: Final = "group"
NO_LIMIT: Final = 0
# How far apart the clocks of services on one database may be.
CLOCKS_APART: Final = timedelta(seconds=5)


@dataclass(frozen=True)
class Selection:
    """The hosts of one request, by id and in order. What it does not name gets nothing."""

    request_id: str
    hosts: tuple[HostId, ...]
    requested_by: str
    requested_at: datetime

    @property
    def digest(self) -> str:
        """Return what each operation of the request pins: nobody can add a host later on."""
        return hashlib.sha256("\n".join(self.hosts).encode()).hexdigest()


# What a request selected that nobody made.
NOTHING_SELECTED: Final = Selection("", (), "", datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True)
class Floor:
    """How many hosts of a group stay healthy: a number, or a share of the group in percent."""

    hosts: int = 0
    percent: int = 0

    def of(self, group_hosts: int) -> int:
        """Return the number for a group of so many hosts."""
        return max(self.hosts, math.ceil(group_hosts * self.percent / 100))

    def __str__(self) -> str:
        return f"{self.percent}%" if self.percent else str(self.hosts)


@dataclass(frozen=True)
class Rules:
    """How much may happen at once. NO_LIMIT switches a cap off, but for `in_flight_max`."""

    in_flight_max: int = 50
    starts_per_minute_max: int = 300
    group_in_flight_max: int = NO_LIMIT
    group_starts_per_minute_max: int = NO_LIMIT
    group_floor: Floor = field(default_factory=Floor)
    breaker_hosts_max: int = 10
    breaker_window: timedelta = timedelta(minutes=10)


@dataclass(frozen=True)
class Load:
    """What is under way: operations in flight, those started within the last minute, and
    how many of the hosts in flight are active ones."""

    in_flight: int = 0
    started: int = 0
    active_in_flight: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.in_flight + other.in_flight,
            self.started + other.started,
            self.active_in_flight + other.active_in_flight,
        )


@dataclass(frozen=True)
class Group:
    """The hosts that carry one group label, without retired ones."""

    name: str
    hosts: int
    active: int
    load: Load

    @property
    def healthy(self) -> int:
        """Serving hosts that nothing is being done to."""
        return self.active - self.load.active_in_flight


# That of a host without a group: nothing is capped by it.
NO_GROUP: Final = Group("", 0, 0, Load())


@dataclass(frozen=True)
class Fleet:
    """The load of everything, and of the host's own group."""

    load: Load
    group: Group = NO_GROUP


@dataclass(frozen=True)
class Breaker:
    """Stops every start once too many hosts failed, until a person closes it.

    Open while `opened_at` is later than `closed_at`. Clocks are set back, and those of several
    services differ: neither is ever noted as before what it follows upon.
    """

    opened_at: datetime | None = None
    reason: str | None = None
    closed_at: datetime | None = None
    closed_by: str | None = None
    closed_reason: str | None = None

    @property
    def is_open(self) -> bool:
        if self.opened_at is None:
            return False
        return self.closed_at is None or self.closed_at < self.opened_at

    @property
    def why_open(self) -> str | None:
        return self.reason if self.is_open else None

    def opened(self, now: datetime, reason: str) -> "Breaker":
        at = now if self.closed_at is None else max(now, self.closed_at + datetime.resolution)
        return replace(self, opened_at=at, reason=reason)

    def closed(self, now: datetime, by: str, reason: str) -> "Breaker":
        at = now if self.opened_at is None else max(now, self.opened_at)
        return replace(self, closed_at=at, closed_by=by, closed_reason=reason)

    def counts(
        self, now: datetime, window: timedelta
    ) -> Sequence[tuple[datetime, datetime | None]]:
        """Return after and until which moments failures count: what a person has judged counts
        no more. Where the clock leaves that open it counts: rather opened once too often."""
        begin = now - window
        if self.opened_at is None or self.closed_at is None:
            return [(begin, None)]
        judged_at = max(self.opened_at, self.closed_at - CLOCKS_APART)
        if judged_at <= now:
            return [(max(begin, judged_at), None)]
        # The clock was set back since. What it has shown lately is new; what lies between it
        # and the close was judged.
        return [(begin, now + CLOCKS_APART), (judged_at, None)]


@dataclass(frozen=True)
class Failure:
    """A deployment that failed after its host was disturbed. `code` is that of its error."""

    host_id: HostId
    code: str


@dataclass(frozen=True)
class Queued:
    """The little that is needed to see whether a queued operation's turn has come."""

    operation_id: OperationId
    host_id: HostId
    group: str | None
    is_active: bool
