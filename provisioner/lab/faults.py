"""The faults a lab offers, as data: name, what it does, and what value it takes."""

from dataclasses import dataclass
from typing import Final

from provisioner.errors import RequestError

BMC_SILENT: Final = "bmc-silent"
BMC_FORGETS_BOOT: Final = "bmc-forgets-boot"
BMC_NEEDS_EFI_BIT: Final = "bmc-needs-efi-bit"
BMC_LIES_POWER: Final = "bmc-lies-power"
BMC_SLOW: Final = "bmc-slow"
BMC_IGNORES_POWER: Final = "bmc-ignores-power"
SOFT_OFF_IGNORED: Final = "soft-off-ignored"
NETWORK_FIRST: Final = "network-first"
LINK_DOWN: Final = "link-down"
DHCP_SILENT: Final = "dhcp-silent"
HANGS_IN_FIRMWARE: Final = "hangs-in-firmware"
SECOND_DISK: Final = "second-disk"
SECOND_DISK_FIRST: Final = "second-disk-first"
SMALL_DISK: Final = "small-disk"
NO_DISK: Final = "no-disk"
DISK_ERROR_AT_BYTE: Final = "disk-error-at-byte"
DISK_ERROR_AT_READ: Final = "disk-error-at-read"
POWER_CUT_AT_BYTE: Final = "power-cut-at-byte"
POWER_CUT_AFTER_BYTES: Final = "power-cut-after-bytes"

Value = str | int | float | None


@dataclass(frozen=True)
class Fault:
    """One fault. `default` is its value when none is given; None means that it takes none."""

    name: str
    does: str
    takes: str = ""
    default: Value = None
    choices: tuple[str, ...] = ()

    def value_from(self, given: str | int | float | None) -> Value:
        """Return the value to keep. Raises RequestError when it is not of the fault's kind."""
        if given is None:
            if self.takes and self.default is None:
                raise RequestError(f"fault {self.name} needs a value", expected=self.takes)
            return self.default
        if not self.takes:
            raise RequestError(f"fault {self.name} takes no value", found=given)
        if self.choices:
            if given in self.choices:
                return given
            raise RequestError(
                f"fault {self.name} does not know this value",
                expected=list(self.choices),
                found=given,
            )
        try:
            return float(given) if self.name == BMC_SLOW else int(given)
        except ValueError as error:
            raise RequestError(
                f"fault {self.name} takes a number", expected=self.takes, found=given
            ) from error


FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault(BMC_SILENT, "the BMC answers nothing; cleared, it comes back as after a restart"),
        Fault(
            BMC_FORGETS_BOOT,
            "the BMC acknowledges a boot device and forgets it",
            "which: all or once (it honours persistent ones)",
            "all",
            ("all", "once"),
        ),
        Fault(BMC_NEEDS_EFI_BIT, "the BMC forgets a boot device that came without the EFI bit"),
        Fault(
            BMC_LIES_POWER,
            "the BMC says that power is on, or off, whatever is true",
            "on or off",
            None,
            ("on", "off"),
        ),
        Fault(BMC_IGNORES_POWER, "the BMC acknowledges power commands and does nothing"),
        Fault(BMC_SLOW, "the BMC takes this long for each chassis command", "seconds", 3.0),
        Fault(SOFT_OFF_IGNORED, "the host ignores a soft shutdown"),
        Fault(NETWORK_FIRST, "the firmware tries the network before the disk, always"),
        Fault(LINK_DOWN, "the host's port on the bridge is down: silence on DHCP and all else"),
        Fault(DHCP_SILENT, "no DHCP answer reaches the host; all else does"),
        Fault(HANGS_IN_FIRMWARE, "from the next start on, the host is on and never gets anywhere"),
        Fault(SECOND_DISK, "from the next start on, another disk is there", "MiB", 4096),
        Fault(SECOND_DISK_FIRST, "with second-disk: the firmware tries that one first"),
        Fault(SMALL_DISK, "from the next start on, the first disk is this small", "MiB", 64),
        Fault(NO_DISK, "from the next start on, no disk is there"),
        Fault(
            DISK_ERROR_AT_BYTE,
            "from the next start on, writing to the first disk's sector with this byte fails",
            "byte offset",
        ),
        Fault(
            DISK_ERROR_AT_READ,
            "from the next start on, once the host has written to its first disk, reading its "
            "sector with this byte fails",
            "byte offset",
        ),
        Fault(
            POWER_CUT_AT_BYTE,
            "power fails, once, when the host writes its first disk beyond this byte",
            "byte offset",
        ),
        Fault(
            POWER_CUT_AFTER_BYTES,
            "power fails, once, when the host has written so many bytes to its first disk",
            "bytes since its start",
        ),
    )
}


def fault_named(name: str) -> Fault:
    """Return the fault of that name. Raises RequestError, listing the names, when none is."""
    if name not in FAULTS:
        raise RequestError("no such fault", expected=sorted(FAULTS), found=name)
    return FAULTS[name]
