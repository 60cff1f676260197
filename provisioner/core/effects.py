"""Effects: idempotent wishes that the worker makes true after the decision is saved.

Each says how the world shall be, never a toggle, so performing one twice does no harm.
"""

from dataclasses import asdict, dataclass
from typing import Any

from .model import BootDevice


@dataclass(frozen=True)
class PowerOff:
    """The host is off, proven by sustained reads. Soft asks its system first (ACPI)."""

    soft: bool


@dataclass(frozen=True)
class SetNextBoot:
    """The next start boots from `device`. `rung` chooses how hard the BMC is told."""

    device: BootDevice
    rung: int = 0


@dataclass(frozen=True)
class PowerOn:
    """The host is on."""


@dataclass(frozen=True)
class PowerOffQuarantined:
    """The host is off, for as long as it is quarantined: nobody vouches for its disk."""


@dataclass(frozen=True)
class ReturnToDisk:
    """The host runs from its own disk: no network boot is left set, and it is started
    again from the disk where it is surely in the ramdisk, or was switched off by us."""


Effect = PowerOff | SetNextBoot | PowerOn | PowerOffQuarantined | ReturnToDisk
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (PowerOff, SetNextBoot, PowerOn, PowerOffQuarantined, ReturnToDisk)
}


def to_json(effect: Effect) -> dict[str, Any]:
    """Return the effect as JSON values with its kind under "effect"."""
    return {"effect": type(effect).__name__, **asdict(effect)}


def from_json(data: dict[str, Any]) -> Effect:
    """Return the effect that `to_json` wrote. Raises KeyError for a kind we do not know."""
    fields = {key: value for key, value in data.items() if key != "effect"}
    if "device" in fields:
        fields["device"] = BootDevice(fields["device"])
    effect: Effect = _KINDS[data["effect"]](**fields)
    return effect
