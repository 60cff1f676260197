"""What a lab needs of the machine it runs on, checked before anything starts."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.lab import bmc, qemu
from provisioner.lab.model import Firmware

TUN: Final = Path("/dev/net/tun")

# Program or file, and the Debian package that brings it.
PACKAGES: Final = {
    qemu.QEMU: "qemu-system-x86",
    bmc.IPMI_SIM: "openipmi",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "/usr/lib/ipxe/qemu/efi-virtio.rom": "ipxe-qemu",
}
OVMF_PACKAGE: Final = "ovmf"


def require_tools(firmwares: Iterable[Firmware]) -> None:
    """Raise ConfigError that names every missing program with its Debian package."""
    flashes = {
        files[firmware]
        for firmware in firmwares
        for files in (qemu.CODE, qemu.VARS)
        if firmware in files
    }
    wanted = {**PACKAGES, **dict.fromkeys(sorted(flashes), OVMF_PACKAGE)}
    missing = {tool: package for tool, package in wanted.items() if not _is_there(tool)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise ConfigError(
            f"the lab needs programs that are not installed: {', '.join(missing)}",
            hint=f"apt-get install --no-install-recommends {packages}",
        )
    if not os.access(TUN, os.R_OK | os.W_OK):
        raise ConfigError(
            f"the lab cannot open {TUN}",
            hint="load the kernel module tun, and let this user read and write the device",
        )


def _is_there(tool: str) -> bool:
    return Path(tool).exists() if tool.startswith("/") else shutil.which(tool) is not None
