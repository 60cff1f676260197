"""What a lab consists of, as plain values, and `lab.json`, the file that describes it.

Decides names, addresses and serial numbers; starts nothing.
"""

import json
import secrets
import string
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from provisioner.errors import NotFound, RequestError
from provisioner.lab.processes import Process
from provisioner.whole_files import FOR_ITS_OWNER, replace_whole

Firmware = Literal["bios", "uefi", "secure-boot"]
BootOrder = Literal["disk-first", "network-first"]
NicRom = Literal["firmware", "ipxe"]
Accel = Literal["kvm", "tcg"]

FORMAT: Final = 1
DESCRIPTION: Final = "lab.json"
SOCKET: Final = "holder.sock"
BRIDGE: Final = "br0"
BRIDGE_ADDRESS: Final = "10.77.0.1"
BMC_PORT: Final = 623
# Where a host's BMC waits for its QEMU, which stands for the wires on the board.
INBAND_PORT: Final = 9623
BMC_USER: Final = "admin"
# IPMI 1.5 takes 16 bytes of password, IPMI 2.0 takes 20; 16 letters are 95 bits.
BMC_PASSWORD_LENGTH: Final = 16
HOSTS_MAX: Final = 64
# virtio-blk reports at most 20 bytes of serial number, and ours is LAB-<host>-<n>.
NAME_LENGTH_MAX: Final = 14
MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class LabHost:
    """A host as asked for. An empty name becomes lab-1, lab-2, ... by position.

    `secure-boot` is UEFI that starts only what Microsoft signed, and a kernel that shim
    vouches for. disks_mib holds one size for each disk. boot_order is what the firmware does
    without a BMC's word. nic_rom says who netboots a `uefi` host: `firmware` loads a file by
    TFTP as most hardware does, `ipxe` starts iPXE from the NIC's ROM; a BIOS host always has
    the ROM, and `secure-boot` never, since nobody signed it.
    honest_flush makes a guest's flush reach the disk, which costs time and no test needs.
    uuid is given only to make two hosts claim the same one, as careless hardware does.
    """

    firmware: Firmware = "bios"
    name: str = ""
    disks_mib: tuple[int, ...] = (4096,)
    memory_mib: int = 1024
    boot_order: BootOrder = "disk-first"
    nic_rom: NicRom = "firmware"
    honest_flush: bool = False
    uuid: str = ""


@dataclass(frozen=True)
class Bmc:
    """How to reach a host's BMC, from inside the lab's network."""

    address: str
    port: int
    user: str
    password: str

    def __repr__(self) -> str:
        return f"Bmc({self.address}:{self.port})"


@dataclass(frozen=True)
class Disk:
    """One disk: its serial number as the host reads it, its size and its raw file."""

    serial: str
    size_bytes: int
    path: str


@dataclass(frozen=True)
class Host:
    """A host of a lab that is up. Paths are absolute."""

    name: str
    number: int
    firmware: Firmware
    mac: str
    uuid: str
    serial: str
    manufacturer: str
    product: str
    memory_mib: int
    boot_order: BootOrder
    nic_rom: NicRom
    honest_flush: bool
    disks: tuple[Disk, ...]
    disk_serial: str
    bmc: Bmc
    directory: str
    console: str

    @property
    def tap(self) -> str:
        """Return the name of its port on the bridge."""
        return f"tap{self.number}"


@dataclass(frozen=True)
class BootRecord:
    """How a host was started once: the honest answer to "was the boot flag honoured?".

    cause is `power-on`, `reset` or `guest-reset`; first is the device the firmware was
    told to try first; flag is `once`, `persistent` or None when no BMC's word was there;
    disks holds the size in bytes of each disk that was there, by serial number.
    """

    at: str
    cause: str
    first: Literal["network", "disk"]
    flag: str | None
    disks: dict[str, int]


@dataclass(frozen=True)
class HostStatus:
    """What is true of a host now, read from QEMU and not from its BMC.

    soft_offs counts how often its power button was pressed, and QEMU told the guest so.
    """

    name: str
    power: Literal["on", "off"]
    boots: int
    soft_offs: int
    next_boot: str | None
    faults: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """All of `lab.json`.

    holder is the process whose end is the end of the lab; keeper is its parent, which only
    waits for it and ends after it.
    """

    accel: Accel
    hosts: tuple[Host, ...]
    holder: Process | None = None
    keeper: Process | None = None


def describe(directory: Path, wanted: Sequence[LabHost], accel: Accel) -> Description:
    """Return the lab that was asked for, with fresh passwords and fixed names and addresses.

    Raises RequestError for no hosts, too many, or a name that does not fit.
    """
    if not 1 <= len(wanted) <= HOSTS_MAX:
        raise RequestError(
            "a lab has at least one host and a limited number of them",
            expected=f"1 to {HOSTS_MAX} hosts",
            found=len(wanted),
        )
    hosts = tuple(_host(directory, number, wish) for number, wish in enumerate(wanted, start=1))
    names = [host.name for host in hosts]
    if len(set(names)) != len(names):
        raise RequestError("two hosts of the lab have one name", found=names)
    return Description(accel=accel, hosts=hosts)


def _host(directory: Path, number: int, wish: LabHost) -> Host:
    name = wish.name or f"lab-{number}"
    allowed = set(string.ascii_lowercase + string.digits + "-")
    if not set(name) <= allowed or not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise RequestError(
            "a lab host's name is too long or has other characters than a-z, 0-9 and -",
            host=name,
            expected=f"at most {NAME_LENGTH_MAX} characters",
        )
    home = directory.resolve() / "hosts" / name
    disks = tuple(
        Disk(f"LAB-{name}-{index}", size * MIB, str(home / f"disk-{index}.raw"))
        for index, size in enumerate(wish.disks_mib)
    )
    return Host(
        name=name,
        number=number,
        firmware=wish.firmware,
        mac=f"52:54:00:77:00:{number:02x}",
        uuid=wish.uuid or str(uuid.uuid4()),
        serial=f"SN-{name}",
        manufacturer="Provisioner Lab",
        product=f"QEMU {wish.firmware}",
        memory_mib=wish.memory_mib,
        boot_order=wish.boot_order,
        nic_rom=wish.nic_rom,
        honest_flush=wish.honest_flush,
        disks=disks,
        disk_serial=f"LAB-{name}-0",
        bmc=Bmc(f"127.0.1.{number}", BMC_PORT, BMC_USER, _password()),
        directory=str(home),
        console=str(home / "console.log"),
    )


def _password() -> str:
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(BMC_PASSWORD_LENGTH))


def same_wish(hosts: Sequence[Host], wanted: Sequence[LabHost]) -> bool:
    """Say whether these hosts are what is asked for, so that `lab up` has nothing to do."""
    return [_wish_of(host) for host in hosts] == [
        replace(wish, name=wish.name or f"lab-{number}", uuid="")
        for number, wish in enumerate(wanted, start=1)
    ]


def _wish_of(host: Host) -> LabHost:
    return LabHost(
        firmware=host.firmware,
        name=host.name,
        disks_mib=tuple(disk.size_bytes // MIB for disk in host.disks),
        memory_mib=host.memory_mib,
        boot_order=host.boot_order,
        nic_rom=host.nic_rom,
        honest_flush=host.honest_flush,
    )


def write_description(directory: Path, description: Description) -> None:
    """Write `lab.json` in one step, for its owner's eyes only: it holds the BMC passwords."""
    values = {"format": FORMAT, "bridge": BRIDGE, "address": BRIDGE_ADDRESS, **asdict(description)}
    text = json.dumps(values, indent=2) + "\n"
    replace_whole(directory / DESCRIPTION, text, FOR_ITS_OWNER)


def read_description(directory: Path) -> Description:
    """Read `lab.json`. Raises NotFound when there is none, RequestError for another format."""
    try:
        values = json.loads((directory / DESCRIPTION).read_text())
    except FileNotFoundError as error:
        raise NotFound(
            f"no lab is up in {directory}", hint="bring one up with: provisioner lab up"
        ) from error
    if values.get("format") != FORMAT:
        raise RequestError(
            f"{directory / DESCRIPTION} was written by another version of the lab",
            expected=FORMAT,
            found=values.get("format"),
        )
    return Description(
        accel=cast(Accel, values["accel"]),
        hosts=tuple(_host_from(host) for host in values["hosts"]),
        holder=_process_from(values["holder"]),
        keeper=_process_from(values["keeper"]),
    )


def _process_from(values: dict[str, int] | None) -> Process | None:
    return Process(**values) if values else None


def _host_from(values: dict[str, Any]) -> Host:
    disks = tuple(Disk(**disk) for disk in values["disks"])
    return Host(**{**values, "disks": disks, "bmc": Bmc(**values["bmc"])})
