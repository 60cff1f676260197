"""The command line of one QEMU host. Pure: it starts nothing and reads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
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
# What QEMU calls the host's first disk, wherever that is plugged in.
FIRST_DISK: Final = "first"
FIRST_BLOCKS: Final = f"{FIRST_DISK}-blocks"

First = Literal["network", "disk"]


@dataclass(frozen=True)
class Trouble:
    """What goes wrong with the machine itself. Bytes are offsets on the host's first disk.

    Writing to the sector with bad_write fails. So does reading that with bad_read, once
    anything was written. other_first: the firmware tries all other disks before that one.
    hangs: no instruction is ever executed.
    """

    bad_write: int | None = None
    bad_read: int | None = None
    other_first: bool = False
    hangs: bool = False


NO_TROUBLE: Final = Trouble()


def command(
    host: Host,
    *,
    first: First,
    accel: Accel,
    qmp_handle: int,
    tap_handle: int,
    disks: Sequence[Disk],
    trouble: Trouble = NO_TROUBLE,
) -> list[str]:
    """Return how to start this host so that its firmware tries `first`, then the other.

    To be run in the host's directory. QEMU neither restarts nor leaves on the guest's wish,
    but stops and says so over QMP (a connected socket, qmp_handle): who starts it again with
    which boot order is decided elsewhere. tap_handle is the host's open port on the bridge.
    The host finds the disks in their order here.
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
        *_nic(host, network_index, tap_handle),
        *[
            part
            for index, disk in enumerate(disks)
            for part in _disk(
                host, disk, index, disk_index + _rank(host, disk, disks, trouble), trouble
            )
        ],
        *(["-S"] if trouble.hangs else []),
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


def _nic(host: Host, boot_index: int, tap_handle: int) -> list[str]:
    has_rom = host.firmware == "bios" or (host.firmware == "uefi" and host.nic_rom == "ipxe")
    device = f"virtio-net-pci,netdev=net0,mac={host.mac},bootindex={boot_index}"
    return [
        *("-netdev", f"tap,id=net0,fd={tap_handle}"),
        *("-device", device if has_rom else f"{device},romfile="),
    ]


def _rank(host: Host, disk: Disk, disks: Sequence[Disk], trouble: Trouble) -> int:
    """Return as the how manieth of the disks the firmware tries this one, from 0 on."""
    order = list(disks)
    if trouble.other_first:
        order.sort(key=lambda one: one.serial == host.disk_serial)
    return order.index(disk)


def _disk(host: Host, disk: Disk, index: int, boot_index: int, trouble: Trouble) -> list[str]:
    # "unsafe" keeps a guest's flush in the page cache, which outlives a killed QEMU, too:
    # what a guest was told is written stays written through a power cut of the host.
    cache = "writeback" if host.honest_flush else "unsafe"
    is_first = disk.serial == host.disk_serial
    name = FIRST_DISK if is_first else f"other{index}"
    drive = f"if=none,id={name},node-name={name}-blocks,format=raw,cache={cache},discard=unmap"
    device = f"virtio-blk-pci,drive={name},serial={disk.serial}"
    return [
        *("-drive", f"{drive},{_file(disk, trouble if is_first else NO_TROUBLE)}"),
        *("-device", f"{device},bootindex={boot_index}"),
    ]


def _file(disk: Disk, trouble: Trouble) -> str:
    """Return where a disk's bytes are, and what of them fails. Source: QEMU's blkdebug.txt."""
    name = disk.path.rpartition("/")[2]
    errors, states = [], []
    if trouble.bad_write is not None:
        errors.append(_error("write", trouble.bad_write, "event=none"))
    if trouble.bad_read is not None:
        # The first write of data, wherever to, lets the next read bring the error about.
        errors.append(_error("read", trouble.bad_read, "event=read_aio", "state=2"))
        states = ["set-state.0.event=write_aio", "set-state.0.new_state=2"]
    if not errors:
        return f"file={name}"
    rules = [f"inject-error.{n}.{part}" for n, error in enumerate(errors) for part in error]
    image = ("driver=blkdebug", "image.driver=file", f"image.filename={name}")
    return ",".join(f"file.{part}" for part in (*image, *states, *rules))


def _error(what: Literal["read", "write"], byte: int, *when: str) -> tuple[str, ...]:
    return (*when, f"iotype={what}", f"errno={EIO}", f"sector={byte // SECTOR_BYTES}")
