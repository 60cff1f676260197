"""What this host is: read from /sys and /proc, nothing asked of the disks themselves.

The root of the file systems is an argument, so that a folder can stand for a host.
"""

import os
import re
from typing import Any, Final

from provisioner.core.disks import Disk
from provisioner.errors import RequestError

# Block devices that are no disks: loops, memory, device mapper, arrays, optical, floppy.
_NOT_DISKS: Final = re.compile(r"(loop|ram|zram|dm-|md|sr|fd|nbd|mtdblock|mmcblk\d+boot)\d*.*")
_PCI_ADDRESS: Final = re.compile(r"/([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?=/)")
# What the kernel's EFI stub found before anything else ran. The variable itself would need
# the module efivarfs. Source: linux, Documentation/x86/zero-page.rst (1EC secure_boot) and
# include/linux/efi.h (efi_secureboot_mode_enabled).
_SECURE_BOOT_PLACE: Final = 0x1EC
_SECURE_BOOT_ENABLED: Final = b"\x03"
SECTOR_BYTES: Final = 512
TEXT_MAX: Final = 256
# "Not specified" and the like, as board makers leave it.
_MEANINGLESS: Final = frozenset(
    {"", "none", "not specified", "to be filled by o.e.m.", "default string", "0123456789"}
)


def inventory(root: str = "/", *, bmc_address: str | None = None) -> dict[str, Any]:
    """Return the inventory as the service expects it. Never raises for what is missing.

    bmc_address is what the BMC itself says; nothing in /sys tells it.
    """
    dmi = os.path.join(root, "sys/class/dmi/id")
    return {
        "cpu": _cpu(root),
        "memory_bytes": _memory_bytes(root),
        "firmware": firmware(root),
        "uuid": _meaningful(read_text(f"{dmi}/product_uuid")),
        "serial": _meaningful(read_text(f"{dmi}/product_serial")),
        "vendor": _meaningful(read_text(f"{dmi}/sys_vendor")),
        "model": _meaningful(read_text(f"{dmi}/product_name")),
        "disks": [disk.as_dict() for disk in disks(root)],
        "nics": _nics(root),
        "bmc_address": bmc_address,
    }


def firmware(root: str = "/") -> str:
    """Return "bios", "uefi", or "secure-boot" where the firmware starts only what is signed."""
    if not os.path.isdir(os.path.join(root, "sys/firmware/efi")):
        return "bios"
    told = _read(os.path.join(root, "sys/kernel/boot_params/data"))
    is_secure = told[_SECURE_BOOT_PLACE : _SECURE_BOOT_PLACE + 1] == _SECURE_BOOT_ENABLED
    return "secure-boot" if is_secure else "uefi"


def disks(root: str = "/") -> list[Disk]:
    """Return the disks that could be written, sorted by name.

    Removable and read-only ones are left out: a BMC's virtual media is no place to deploy to.
    """
    block = os.path.join(root, "sys/block")
    found = []
    for name in sorted(_list(block)):
        if _NOT_DISKS.fullmatch(name):
            continue
        folder = f"{block}/{name}"
        size = _number(f"{folder}/size") * SECTOR_BYTES
        if size and not _number(f"{folder}/removable") and not _number(f"{folder}/ro"):
            found.append(_disk(name, folder, size))
    return found


def _disk(name: str, folder: str, size_bytes: int) -> Disk:
    place = os.path.realpath(f"{folder}/device")
    bus = _bus(name, place)
    parts = {
        "name": name,
        "serial": _serial(folder),
        "wwn": _wwn(folder),
        "size_bytes": size_bytes,
        "rotational": bool(_number(f"{folder}/queue/rotational")),
        "bus": bus,
        "by_path": _by_path(place, bus),
        "model": read_text(f"{folder}/device/model"),
    }
    try:
        return Disk.from_dict(parts)
    except RequestError:
        # A text that is too long to be one; the disk is still there, and has no such name.
        return Disk.from_dict({**parts, "serial": None, "wwn": None, "model": None})


def _bus(name: str, place: str) -> str:
    if name.startswith("vd"):
        return "virtio"
    if name.startswith("nvme"):
        return "nvme"
    if "/usb" in place:
        return "usb"
    return "sata" if re.search(r"/ata\d+/", place) else "scsi"


def _serial(folder: str) -> str | None:
    """Return the serial number; SCSI disks give it as VPD page 0x80, after 4 bytes of header."""
    for name in ("serial", "device/serial"):
        if text := read_text(f"{folder}/{name}"):
            return text
    page = _read(f"{folder}/device/vpd_pg80")
    return _clean(page[4:]) if len(page) > 4 else None


def _wwn(folder: str) -> str | None:
    for name in ("wwid", "device/wwid"):
        text = read_text(f"{folder}/{name}")
        # Others ("t10.…") are made of model and serial, and are as good as those.
        if text and text.startswith(("naa.", "eui.", "uuid.")):
            return text
    return None


def _by_path(place: str, bus: str) -> str | None:
    """Return udev's ID_PATH as far as we can tell it: the last PCI device, then the port."""
    addresses = _PCI_ADDRESS.findall(f"{place}/")
    if not addresses:
        return None
    path = f"pci-{addresses[-1]}"
    if bus == "nvme":
        return f"{path}-nvme-1"
    if bus == "sata" and (port := re.search(r"/ata(\d+)/", place)):
        base = place[: port.end()]
        number = read_text(f"{base}ata_port/ata{port[1]}/port_no") or port[1]
        return f"{path}-ata-{number}"
    if bus == "scsi" and (address := re.search(r"/\d+:(\d+:\d+:\d+)$", place)):
        return f"{path}-scsi-0:{address[1]}"
    return path


def _nics(root: str) -> list[dict[str, Any]]:
    folder = os.path.join(root, "sys/class/net")
    # A NIC is a device with hardware behind it; "lo" has none.
    names = [n for n in sorted(_list(folder)) if os.path.exists(f"{folder}/{n}/device")]
    return [
        {
            "name": name,
            "mac": read_text(f"{folder}/{name}/address"),
            "link": _number(f"{folder}/{name}/carrier") == 1,
        }
        for name in names
    ]


def _cpu(root: str) -> dict[str, Any]:
    text = _read(os.path.join(root, "proc/cpuinfo")).decode("utf-8", "replace")
    models = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {"model": models[0][:TEXT_MAX] if models else None, "count": os.cpu_count() or 1}


def _memory_bytes(root: str) -> int:
    text = _read(os.path.join(root, "proc/meminfo")).decode("ascii", "replace")
    match = re.search(r"^MemTotal:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _meaningful(text: str | None) -> str | None:
    return None if text is None or text.lower() in _MEANINGLESS else text


def read_text(path: str) -> str | None:
    """Return a small file's text, printable and without blanks around it, or None."""
    return _clean(_read(path))


def _clean(data: bytes) -> str | None:
    text = data.decode("utf-8", "replace").replace("\0", "").strip()
    return "".join(letter for letter in text if letter.isprintable())[:TEXT_MAX] or None


def _number(path: str) -> int:
    text = read_text(path)
    return int(text) if text and text.isdigit() else 0


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
