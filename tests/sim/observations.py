"""What the simulated world sees happen, as plain values for the invariants to judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .disks import SimDisk
    from .hosts import SimHost
    from .ledger import Grant


@dataclass(frozen=True)
class Committed:
    """A transaction is in the database; the ledger's snapshot is that of this moment."""


@dataclass(frozen=True)
class TimePassed:
    """One event of the scheduler is over."""


@dataclass(frozen=True)
class ServiceStarted:
    """A process of the service has looked at its database, and is about to begin."""

    name: str


@dataclass(frozen=True)
class BootAnswered:
    """The service told a host to boot this ramdisk; `ticket` is the secret in its script."""

    mac: str
    ticket: str


@dataclass(frozen=True)
class Permitted:
    """The service permitted a write; nobody has heard of it yet."""

    host: SimHost
    operation_id: str
    generation: int
    release: str
    serial: str


@dataclass(frozen=True)
class AgentAnswered:
    """A call of an agent, with a ticket or a token, had success."""

    what: str
    operation_id: str


@dataclass(frozen=True)
class SeedLeft:
    """A seed went out as the answer to a call."""

    operation_id: str


@dataclass(frozen=True)
class Wrote:
    """The agent on a host writes to a disk now, on this permission."""

    host: SimHost
    disk: SimDisk
    operation_id: str
    grant: Grant | None
    is_first: bool


@dataclass(frozen=True)
class DiskBooted:
    """A firmware starts what is on a disk."""

    host: SimHost
    disk: SimDisk


@dataclass(frozen=True)
class BmcChanged:
    """The service had a BMC change something: its power, or the next boot."""

    host: SimHost
    verb: str
    cuts_power: bool


@dataclass(frozen=True)
class EffectBegan:
    """The queue handed an effect to the performer."""

    key: str
    partition: str


@dataclass(frozen=True)
class BugRaised:
    """Our own code raised what nobody expects."""

    where: str
    error: Exception


@dataclass(frozen=True)
class Ended:
    """The faults are over, everything was given time, and nothing moves any more."""


Observation = (
    Committed
    | TimePassed
    | ServiceStarted
    | BootAnswered
    | Permitted
    | AgentAnswered
    | SeedLeft
    | Wrote
    | DiskBooted
    | BmcChanged
    | EffectBegan
    | BugRaised
    | Ended
)
