"""What Debian's signed GRUB is told by TFTP, and the names by which it asks.

For hosts with Secure Boot on, which start nothing but what is signed: shim, then this GRUB.
It has no HTTP, so its configuration, kernel and ramdisk all come by TFTP (see `relay.py`).
"""

from functools import cache
from typing import Final

from provisioner.core.model import LocalBoot
from provisioner.netboot.quoting import Render, constant, renderer

# Where GRUB looks for its first configuration on the TFTP server; built into it.
FIRST_CONFIG: Final = "/grub/grub.cfg"
# With `/<mac>/<uuid>` the answer for one host. GRUB knows both by itself; the UUID may be
# empty.
ANSWERS: Final = "/boot/grub"
# As the boot listener serves them by HTTP.
RAMDISKS: Final = "/ramdisks"
# What is started from a disk that names nothing else: UEFI Specification 2.10 §3.5.1.1.
DISK_LOADER: Final = "/EFI/BOOT/BOOTX64.EFI"


def first_config() -> str:
    """Return the configuration that GRUB fetches by itself, the same for every host.

    It asks for the host's own answer; without one the host boots its disk.
    """
    values = {"answers": constant(ANSWERS), **disk_values(LocalBoot.AUTO)}
    return render()("first.cfg.j2", values)


def disk_values(method: LocalBoot) -> dict[str, object]:
    """Return what the templates need to send a host to its disk."""
    return {"local_boot": constant(method.value), "disk_loader": constant(DISK_LOADER)}


@cache
def render() -> Render:
    return renderer("grub")
