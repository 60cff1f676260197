"""The inventory, read from folders that look like the /sys of known machines."""

from pathlib import Path

import pytest

from provisioner.agent.inventory import disks, firmware, inventory
from provisioner.core.disks import Disk

PCI = "sys/devices/pci0000:00/0000:00"


def put(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())


def add_disk(root: Path, name: str, device: str, **files: str | bytes) -> None:
    """Add a block device on a device's folder; `__` in a key stands for `/`."""
    place = root / device / "block" / name
    put(place, "size", "2048")
    put(place, "queue/rotational", "1")
    for key, text in files.items():
        put(place if not key.startswith("device__") else root / device,
            key.removeprefix("device__").replace("__", "/"), text)  # fmt: skip
    (place / "device").symlink_to(root / device)
    (root / "sys/block").mkdir(parents=True, exist_ok=True)
    (root / "sys/block" / name).symlink_to(place)


def test_disks_of_every_bus_are_told_apart(tmp_path: Path) -> None:
    """Name, serial, WWN, bus and place, as the kernel shows them for each kind."""
    add_disk(tmp_path, "vda", f"{PCI}:04.0/virtio1", serial="LAB-1-0")
    add_disk(tmp_path, "nvme0n1", f"{PCI}:1d.0/0000:03:00.0/nvme/nvme0", wwid="eui.0025385b",
             device__serial="S4EV  ", device__model="Samsung  ", queue__rotational="0")  # fmt: skip
    add_disk(tmp_path, "sda", f"{PCI}:1f.2/ata2/host1/target1:0:0/1:0:0:0",
             device__vpd_pg80=b"\0\x80\0\x08WD-1234 ", device__wwid="naa.50014ee2")  # fmt: skip
    put(tmp_path, f"{PCI}:1f.2/ata2/ata_port/ata2/port_no", "2")
    add_disk(tmp_path, "sdb", f"{PCI}:05.0/host2/target2:2:1/2:2:1:0", device__model="PERC H730")
    found = {disk.name: disk for disk in disks(str(tmp_path))}
    assert found == {
        "nvme0n1": Disk("nvme0n1", "S4EV", "eui.0025385b", 1 << 20, False, "nvme",
                        "pci-0000:03:00.0-nvme-1", "Samsung"),
        "sda": Disk("sda", "WD-1234", "naa.50014ee2", 1 << 20, True, "sata",
                    "pci-0000:00:1f.2-ata-2"),
        "sdb": Disk("sdb", None, None, 1 << 20, True, "scsi",
                    "pci-0000:00:05.0-scsi-0:2:1:0", "PERC H730"),
        "vda": Disk("vda", "LAB-1-0", None, 1 << 20, True, "virtio", "pci-0000:00:04.0"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("loop0", {}),
        ("sr0", {}),
        ("dm-0", {}),
        ("md127", {}),
        ("zram0", {}),
        ("sda", {"removable": "1"}),
        ("sdb", {"ro": "1"}),
        ("sdc", {"size": "0"}),
    ],
)
def test_what_is_no_disk_to_deploy_to_is_left_out(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    """Virtual media of a BMC, arrays, empty card readers and loops are never offered."""
    add_disk(tmp_path, name, f"{PCI}:01.0/x", **files)
    assert disks(str(tmp_path)) == []


def test_the_inventory_of_a_virtual_host(tmp_path: Path) -> None:
    """All keys of the protocol are there, and makers' placeholders are not serials."""
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+")
    put(tmp_path, "proc/meminfo", "MemTotal:         737308 kB\nMemFree: 1 kB")
    put(tmp_path, "sys/class/dmi/id/product_uuid", "52540077-0001-4000-8000-000000000001")
    put(tmp_path, "sys/class/dmi/id/product_serial", "To Be Filled By O.E.M.")
    put(tmp_path, "sys/class/dmi/id/sys_vendor", "QEMU")
    put(tmp_path, "sys/class/net/eth0/address", "52:54:00:77:00:01")
    put(tmp_path, "sys/class/net/eth0/carrier", "1")
    (tmp_path / "sys/class/net/eth0/device").mkdir()
    put(tmp_path, "sys/class/net/lo/address", "00:00:00:00:00:00")
    (tmp_path / "sys/firmware/efi").mkdir(parents=True)
    found = inventory(str(tmp_path))
    assert found["cpu"]["model"] == "QEMU TCG CPU version 2.5+"
    assert found["memory_bytes"] == 737308 * 1024
    assert found["firmware"] == "uefi"
    assert found["serial"] is None
    assert found["nics"] == [{"name": "eth0", "mac": "52:54:00:77:00:01", "link": True}]
    assert set(found) == {
        "cpu", "memory_bytes", "firmware", "uuid", "serial", "vendor", "model", "disks", "nics",
        "bmc_address",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("told", "expected"),
    [(0, "uefi"), (1, "uefi"), (2, "uefi"), (3, "secure-boot"), (None, "uefi")],
)
def test_the_kernel_tells_whether_secure_boot_is_on(
    tmp_path: Path, told: int | None, expected: str
) -> None:
    """In its boot parameters: unset, unknown, disabled, enabled; a kernel may not have them."""
    (tmp_path / "sys/firmware/efi").mkdir(parents=True)
    if told is not None:
        page = bytearray(4096)
        page[0x1EC] = told
        folder = tmp_path / "sys/kernel/boot_params"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(page)
    assert firmware(str(tmp_path)) == expected


def test_a_host_without_anything_has_an_inventory(tmp_path: Path) -> None:
    """What is missing is None or empty, never an error."""
    found = inventory(str(tmp_path))
    assert (found["disks"], found["nics"], found["memory_bytes"]) == ([], [], 0)
    assert found["firmware"] == "bios"
