"""Which disk a host is deployed to: the disks it has, a profile's rule, and the choice.

No I/O. Imports only the standard library: it runs in the ramdisk, too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from provisioner.errors import DeviceError, RequestError

BUSES: Final = frozenset({"virtio", "nvme", "sata", "scsi", "usb"})
RULE_TEXT_MAX: Final = 256


class NoDiskMatches(DeviceError):
    """No disk of the host fits the rule; `found` lists the disks it has."""

    code = "no_disk_matches"


class SeveralDisksMatch(DeviceError):
    """The rule fits more than one disk, and we never guess; `found` lists those it fits."""

    code = "several_disks_match"


@dataclass(frozen=True)
class Disk:
    """A disk as the host sees it now. Only serial and wwn mean the same disk tomorrow.

    by_path is where it is plugged in, written as udev writes it: `pci-0000:00:04.0`.
    """

    name: str
    serial: str | None
    wwn: str | None
    size_bytes: int
    rotational: bool
    bus: str
    by_path: str | None = None
    model: str | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the disk an inventory describes; keys we do not know are left out.

        Raises RequestError for a missing key or a value of the wrong type.
        """
        texts = {key: _text(key, value.get(key)) for key in ("serial", "wwn", "by_path", "model")}
        name, bus = _text("name", value.get("name")), _text("bus", value.get("bus"))
        if name is None or bus not in BUSES:
            raise RequestError("a disk lacks its name or its bus", found=repr(dict(value))[:200])
        return cls(
            name=name,
            bus=bus,
            size_bytes=_size("size_bytes", value.get("size_bytes")),
            rotational=_truth("rotational", value.get("rotational")),
            **texts,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the disk as plain JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class DiskRule:
    """What a profile asks of the one disk to write; None means that it does not care.

    Texts compare exactly, a WWN without regard to case and prefix (`0x`, `naa.`, `eui.`).
    """

    serial: str | None = None
    wwn: str | None = None
    size_min_bytes: int | None = None
    size_max_bytes: int | None = None
    rotational: bool | None = None
    bus: str | None = None
    by_path: str | None = None
    model: str | None = None

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the rule, checked.

        Raises RequestError for anything but an object of known keys with values of the
        right type. An empty rule is refused: what asks for nothing must not get a disk.
        """
        if not isinstance(value, Mapping) or not value:
            raise RequestError("a disk rule must say which disk", found=repr(value)[:200])
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(key) for key in value if key not in known):
            raise RequestError(
                f"a disk rule does not know {', '.join(unknown)}", expected=", ".join(known)
            )
        rule = cls(**{key: _CHECKS[key](key, item) for key, item in value.items()})
        _refuse_contradictions(rule)
        return rule

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values, without what it does not care about."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {key: value for key, value in pairs if value is not None}

    def fits(self, disk: Disk) -> bool:
        """Say whether the disk is all that the rule asks."""
        return (
            self.serial in (None, disk.serial)
            and (self.wwn is None or bare_wwn(self.wwn) == bare_wwn(disk.wwn))
            and (self.size_min_bytes is None or disk.size_bytes >= self.size_min_bytes)
            and (self.size_max_bytes is None or disk.size_bytes <= self.size_max_bytes)
            and self.rotational in (None, disk.rotational)
            and self.bus in (None, disk.bus)
            and self.by_path in (None, disk.by_path)
            and self.model in (None, disk.model)
        )


def choose_disk(rule: DiskRule, disks: Iterable[Disk]) -> Disk:
    """Return the only disk that fits the rule.

    Raises NoDiskMatches or SeveralDisksMatch with the inventory in `found`.
    """
    everything = list(disks)
    fitting = [disk for disk in everything if rule.fits(disk)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SeveralDisksMatch(
            f"{len(fitting)} disks fit the profile's disk rule; nothing was written",
            expected=rule.as_dict(),
            found=[disk.as_dict() for disk in fitting],
            hint="make the rule narrower, for example with the serial of one of them",
        )
    raise NoDiskMatches(
        f"none of {len(everything)} disks fits the profile's disk rule; nothing was written",
        expected=rule.as_dict(),
        found=[disk.as_dict() for disk in everything],
        hint="compare the rule with the disks that were found",
    )


def bare_wwn(wwn: str | None) -> str | None:
    """Return the WWN in the one spelling in which two of them may be compared."""
    if wwn is None:
        return None
    bare = wwn.lower()
    for prefix in ("0x", "naa.", "eui."):
        bare = bare.removeprefix(prefix)
    return bare


def _refuse_contradictions(rule: DiskRule) -> None:
    if all(getattr(rule, field.name) is None for field in fields(rule)):
        raise RequestError("a disk rule must say which disk", found="only nulls")
    least, most = rule.size_min_bytes, rule.size_max_bytes
    if least is not None and most is not None and least > most:
        raise RequestError(
            "a disk rule's size_min_bytes is above its size_max_bytes", found=[least, most]
        )
    if rule.bus is not None and rule.bus not in BUSES:
        raise RequestError(
            "a disk rule names an unknown bus", expected=", ".join(sorted(BUSES)), found=rule.bus
        )


def _text(key: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or len(value) > RULE_TEXT_MAX:
        raise RequestError(
            f"{key} must be a text of 1 to {RULE_TEXT_MAX} characters", found=repr(value)[:200]
        )
    return value


def _size(key: str, value: object) -> int:
    # type() and not isinstance(): true is an int to Python, and 1 to nobody else.
    if type(value) is not int or value < 0:
        raise RequestError(f"{key} must be a whole number of bytes", found=repr(value)[:200])
    return value


def _size_or_none(key: str, value: object) -> int | None:
    return None if value is None else _size(key, value)


def _truth(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{key} must be true or false", found=repr(value)[:200])
    return value


def _truth_or_none(key: str, value: object) -> bool | None:
    return None if value is None else _truth(key, value)


_CHECKS: Final[dict[str, Any]] = {
    "serial": _text,
    "wwn": _text,
    "size_min_bytes": _size_or_none,
    "size_max_bytes": _size_or_none,
    "rotational": _truth_or_none,
    "bus": _text,
    "by_path": _text,
    "model": _text,
}
