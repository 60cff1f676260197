"""The command line of one QEMU host. Pure: it starts nothing and reads nothing."""

from collections.abc import Sequence
from typing import Final, Literal

from provisioner.lab.model import INBAND_PORT, Accel, Disk, Firmware, Host

QEMU: Final = "qemu-system-x86_64"
OVMF: Final = "/usr/share/OVMF"
# What UEFI runs from, and what a new host's variables are copied from. Debian's second pair
# has Secure Boot on, with the keys of Microsoft enrolled.
CODE: Final[dict[Firmware, str]] = {
    "uefi": f"{OVMF}/OVMF_CODE_4M.fd",
    "secure-boot": f"{OVMF}/OVMF_CODE_4M.secboot.fd",
}
VARS: Final[dict[Firmware, str]] = {
    "uefi": f"{OVMF}/OVMF_VARS_4M.fd",
    "secure-boot": f"{OVMF}/OVMF_VARS_4M.ms.fd",
}
VARS_FILE: Final = "vars.fd"
CPUS: Final = 2
SECTOR_BYTES: Final = 512
EIO: Final = 5

First = Literal["network", "disk"]


def command(
    host: Host,
    *,
    first: First,
    accel: Accel,
    qmp_handle: int,
    disks: Sequence[Disk],
    bad_byte: int | None = None,
) -> list[str]:
    """Return how to start this host so that its firmware tries `first`, then the other.

    To be run in the host's directory. QEMU neither restarts nor leaves on the guest's wish,
    but stops and says so over QMP (a connected socket, qmp_handle): who starts it again with
    which boot order is decided elsewhere. Writing to the sector with bad_byte on the first
    disk fails.
    """
    network_index, disk_index = (1, 2) if first == "network" else (len(disks) + 1, 1)
    return [
        QEMU,
        *("-name", host.name),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"),
        *("-accel", "kvm" if accel == "kvm" else "tcg,thread=multi"),
        *("-cpu", "host" if accel == "kvm" else "max"),
        *("-smp", str(CPUS)),
        *("-m", str(host.memory_mib)),
        *_firmware(host),
        *("-boot", "strict=on"),
        *("-uuid", host.uuid),
        *("-smbios", _smbios(host)),
        *("-action", "reboot=shutdown,shutdown=pause"),
        *("-chardev", "file,id=console,path=console.log,append=on"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={qmp_handle}"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-device", "virtio-rng-pci"),
        *_inband_bmc(host),
        *_nic(host, network_index),
        *[
            part
            for index, disk in enumerate(disks)
            for part in _disk(host, disk, index, disk_index, None if index else bad_byte)
        ],
    ]


def _firmware(host: Host) -> list[str]:
    if host.firmware == "bios":
        # Without graphics SeaBIOS brings its screen, and iPXE's, to the serial console.
        return ["-machine", "q35,graphics=off"]
    flash = "if=pflash,format=raw"
    return [
        *(_guarded_flash() if host.firmware == "secure-boot" else ("-machine", "q35")),
        *("-drive", f"{flash},unit=0,readonly=on,file={CODE[host.firmware]}"),
        *("-drive", f"{flash},unit=1,file={VARS_FILE}"),
    ]


def _guarded_flash() -> tuple[str, ...]:
    """Let only the firmware, in system management mode, write its variables.

    Without that an operating system could switch Secure Boot off. Sleep would need more.
    """
    return (
        *("-machine", "q35,smm=on"),
        *("-global", "driver=cfi.pflash01,property=secure,value=on"),
        *("-global", "ICH9-LPC.disable_s3=1"),
    )


def _smbios(host: Host) -> str:
    return (
        f"type=1,manufacturer={host.manufacturer},product={host.product},"
        f"serial={host.serial},uuid={host.uuid}"
    )


def _inband_bmc(host: Host) -> list[str]:
    """Connect the host with its BMC from within, as a board does.

    `reconnect` lets a host start, and stay up, while its BMC is away.
    """
    where = f"host={host.bmc.address},port={INBAND_PORT}"
    return [
        *("-chardev", f"socket,id=bmc,{where},reconnect=1"),
        *("-device", "ipmi-bmc-extern,id=bmc0,chardev=bmc"),
        *("-device", "isa-ipmi-kcs,bmc=bmc0"),
    ]


def _nic(host: Host, boot_index: int) -> list[str]:
    has_rom = host.firmware == "bios" or (host.firmware == "uefi" and host.nic_rom == "ipxe")
    device = f"virtio-net-pci,netdev=net0,mac={host.mac},bootindex={boot_index}"
    return [
        *("-netdev", f"tap,id=net0,ifname={host.tap},script=no,downscript=no"),
        *("-device", device if has_rom else f"{device},romfile="),
    ]


def _disk(host: Host, disk: Disk, index: int, first_index: int, bad_byte: int | None) -> list[str]:
    # "unsafe" keeps a guest's flush in the page cache, which outlives a killed QEMU, too:
    # what a guest was told is written stays written through a power cut of the host.
    cache = "writeback" if host.honest_flush else "unsafe"
    drive = f"if=none,id=disk{index},node-name=blocks{index},format=raw"
    device = f"virtio-blk-pci,drive=disk{index},serial={disk.serial}"
    return [
        *("-drive", f"{drive},cache={cache},discard=unmap,{_file(disk, bad_byte)}"),
        *("-device", f"{device},bootindex={first_index + index}"),
    ]


def _file(disk: Disk, bad_byte: int | None) -> str:
    name = disk.path.rpartition("/")[2]
    if bad_byte is None:
        return f"file={name}"
    error = "file.inject-error.0"
    return (
        f"file.driver=blkdebug,file.image.driver=file,file.image.filename={name},"
        f"{error}.event=none,{error}.iotype=write,{error}.errno={EIO},"
        f"{error}.sector={bad_byte // SECTOR_BYTES}"
    )
