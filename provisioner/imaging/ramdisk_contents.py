"""What the deploy ramdisk takes from Debian: packages, programs, kernel modules, Python modules.

Lists, and what of them goes with which kernel. `ramdisk.py` does the work; whatever is not
named here stays out.
"""

from typing import Final

SUITE: Final = "bookworm"

PACKAGES: Final = (
    "busybox-static",
    "kexec-tools",
    "kmod",
    "libpython3.11-stdlib",
    "openssl",
    "python3-zstandard",
    "python3.11-minimal",
)

# Where each program stands in the packages, and so in the ramdisk.
PROGRAMS: Final = (
    "bin/busybox",
    "bin/kmod",
    "sbin/kexec",
    "usr/bin/openssl",  # Ed25519 signatures, which Python's own library lacks
    "usr/bin/python3.11",
)

# To erase disks that can do so themselves; a virtual host has none.
HARDWARE_PACKAGES: Final = ("hdparm", "nvme-cli")
HARDWARE_PROGRAMS: Final = ("sbin/hdparm", "usr/sbin/nvme")
VIRTUAL_KERNEL: Final = "linux-image-cloud-amd64"

# The shell of /init needs these, and nobody else gets a shell.
BUSYBOX_LINKS: Final = (
    "cat", "grep", "ifconfig", "mount", "poweroff", "reboot", "route", "sh", "sleep",
    "sort", "udhcpc", "xargs",
)  # fmt: skip

KMOD_LINKS: Final = ("modprobe",)

# Folders below kernel/ of which every module comes along. What they depend on follows.
MODULE_FOLDERS: Final = (
    "drivers/acpi/nfit",
    "drivers/ata",
    "drivers/char/ipmi",
    "drivers/hv",
    "drivers/message/fusion",
    "drivers/mmc/host",
    "drivers/net/ethernet",
    "drivers/net/fjes",
    "drivers/net/hyperv",
    "drivers/net/mdio",
    "drivers/net/pcs",
    "drivers/net/phy",
    "drivers/net/vmxnet3",
    "drivers/nvdimm",
    "drivers/nvme/host",
    "drivers/scsi",
    "drivers/usb/host",
    "drivers/usb/storage",
    "drivers/virtio",
)

MODULES: Final = (
    "hid-generic",
    "mmc_block",
    "net_failover",
    "nvme",
    "pinctrl-cannonlake",
    "sd_mod",
    "vmd",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "xen-blkfront",
    "xen-netfront",
)

# Parts of those folders that no server deploys through: targets, test devices, tapes,
# discs, and drivers that are of no use without firmware we do not ship.
MODULES_LEFT_OUT: Final = (
    "drivers/net/ethernet/netronome/",
    "drivers/net/ethernet/mellanox/mlxsw/",
    "drivers/net/ethernet/marvell/prestera/",
    "drivers/net/ethernet/8390/",
    "drivers/net/ethernet/microchip/",
    "drivers/scsi/aic94xx/",
    "drivers/scsi/bnx2fc/",
    "drivers/scsi/bfa/",
    "drivers/scsi/fcoe/",
    "drivers/scsi/lpfc/lpfc_nvmet",
    "drivers/scsi/pcmcia/",
    "drivers/scsi/qla4xxx/",
    "drivers/scsi/scsi_debug.ko",
    "drivers/scsi/sr_mod.ko",
    "drivers/scsi/st.ko",
    "drivers/scsi/osst.ko",
    "drivers/scsi/ch.ko",
    "drivers/scsi/ses.ko",
    "drivers/usb/storage/ums-",
)

# What the agent imports; everything these import comes along. encodings are loaded by name.
PYTHON_MODULES: Final = (
    "__future__",
    "contextlib",
    "array",
    "base64",
    "binascii",
    "dataclasses",
    "datetime",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8",
    "encodings.utf_16_le",
    "fcntl",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "linecache",
    "mmap",
    "re",
    "select",
    "signal",
    "socket",
    "ssl",
    "struct",
    "threading",
    "traceback",
    "typing",
    "zlib",
)

# Debian's zstandard package chooses its backend by the Python it runs on, and imports
# `platform` and `subprocess` to do so. The ramdisk has one Python, and knows.
ZSTANDARD_INIT: Final = (
    '"""The C backend of zstandard, without the search for it."""\nfrom .backend_c import *\n'
)
ZSTANDARD_BACKEND: Final = (
    "usr/lib/python3/dist-packages/zstandard/backend_c.cpython-311-x86_64-linux-gnu.so"
)


def packages_for(kernel_package: str) -> tuple[str, ...]:
    """Return the packages to unpack, the kernel's first."""
    extra = () if kernel_package == VIRTUAL_KERNEL else HARDWARE_PACKAGES
    return (kernel_package, *PACKAGES, *extra)


def programs_for(kernel_package: str) -> tuple[str, ...]:
    """Return the programs to keep."""
    return PROGRAMS if kernel_package == VIRTUAL_KERNEL else PROGRAMS + HARDWARE_PROGRAMS
