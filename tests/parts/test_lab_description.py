"""What a lab is made of: names, addresses, lab.json, QEMU's command line and the faults."""

import dataclasses
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from provisioner.errors import NotFound, RequestError
from provisioner.lab import LabHost
from provisioner.lab.faults import FAULTS, fault_named
from provisioner.lab.kvm import _cpio_entry
from provisioner.lab.model import (
    HOSTS_MAX,
    Disk,
    Firmware,
    Host,
    describe,
    read_description,
    same_wish,
    write_description,
)
from provisioner.lab.processes import Process
from provisioner.lab.qemu import NO_TROUBLE, First, Trouble, command

WANTED = [LabHost("bios"), LabHost("uefi", disks_mib=(64, 32))]


def test_lab_json_holds_all_and_is_its_owners_alone(tmp_path: Path) -> None:
    lab = dataclasses.replace(describe(tmp_path, WANTED, "tcg"), holder=Process(1, 2))
    write_description(tmp_path, lab)
    assert read_description(tmp_path) == lab
    assert stat.S_IMODE((tmp_path / "lab.json").stat().st_mode) == 0o600


def test_no_lab_json_is_no_lab(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no lab is up"):
        read_description(tmp_path)


def test_hosts_have_fixed_names_and_addresses_and_fresh_passwords(tmp_path: Path) -> None:
    first, second = describe(tmp_path, WANTED, "tcg").hosts
    assert (first.name, first.mac, first.bmc.address) == ("lab-1", "52:54:00:77:00:01", "127.0.1.1")
    assert (second.name, second.mac) == ("lab-2", "52:54:00:77:00:02")
    assert [disk.serial for disk in second.disks] == ["LAB-lab-2-0", "LAB-lab-2-1"]
    assert first.bmc.password != second.bmc.password
    assert first.bmc.password not in repr(first)
    again = describe(tmp_path, WANTED, "tcg").hosts
    assert again[0].bmc.password != first.bmc.password


def test_same_wish_tells_an_equal_lab_from_another(tmp_path: Path) -> None:
    hosts = describe(tmp_path, WANTED, "tcg").hosts
    assert same_wish(hosts, WANTED)
    assert not same_wish(hosts, WANTED[:1])
    assert not same_wish(hosts, [WANTED[0], LabHost("bios")])


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        [LabHost()] * (HOSTS_MAX + 1),
        [LabHost(name="Lab_1")],
        [LabHost(name="a-name-too-long-for-a-serial")],
        [LabHost(name="x"), LabHost(name="x")],
    ],
)
def test_a_lab_that_cannot_be_is_refused(tmp_path: Path, wanted: list[LabHost]) -> None:
    with pytest.raises(RequestError):
        describe(tmp_path, wanted, "tcg")


@pytest.mark.parametrize("firmware", ["bios", "uefi", "secure-boot"])
def test_what_is_tried_first_has_the_lower_boot_index(tmp_path: Path, firmware: Firmware) -> None:
    host = describe(tmp_path, [LabHost(firmware, disks_mib=(8, 8))], "tcg").hosts[0]

    def index(first: First, device: str) -> int:
        words = _command(host, disks=host.disks, first=first)
        found = next(word for word in words if word.startswith(device))
        return int(found.partition("bootindex=")[2].partition(",")[0])

    assert index("network", "virtio-net-pci") < index("network", "virtio-blk-pci")
    assert index("disk", "virtio-blk-pci") < index("disk", "virtio-net-pci")


def test_a_host_that_netboots_by_its_own_firmware_has_no_rom(tmp_path: Path) -> None:
    wanted = [
        LabHost("bios"),
        LabHost("uefi"),
        LabHost("uefi", nic_rom="ipxe"),
        LabHost("secure-boot", nic_rom="ipxe"),
    ]
    rom_off = [
        any("romfile=" in word for word in _command(host))
        for host in describe(tmp_path, wanted, "tcg").hosts
    ]
    assert rom_off == [False, True, False, True]


def test_only_the_firmware_writes_the_variables_of_a_host_with_secure_boot(tmp_path: Path) -> None:
    plain, secure = (
        " ".join(_command(host))
        for host in describe(tmp_path, [LabHost("uefi"), LabHost("secure-boot")], "tcg").hosts
    )
    for word in ("smm=on", "property=secure,value=on", "OVMF_CODE_4M.secboot.fd"):
        assert word in secure
        assert word not in plain


def _command(
    host: Host,
    disks: Sequence[Disk] = (),
    *,
    first: First = "disk",
    trouble: Trouble = NO_TROUBLE,
) -> list[str]:
    return command(
        host, first=first, accel="tcg", qmp_handle=9, tap_handle=8, disks=disks, trouble=trouble
    )


def test_only_the_first_disk_fails_wherever_it_is_plugged_in(tmp_path: Path) -> None:
    host = describe(tmp_path, [LabHost("bios", disks_mib=(8, 8))], "tcg").hosts[0]
    own, other = host.disks
    words = _command(host, [other, own], trouble=Trouble(bad_write=1024, bad_read=4096))
    first, second = (word for word in words if word.startswith("if=none"))
    assert "blkdebug" not in first
    assert (
        "inject-error.0.iotype=write,file.inject-error.0.errno=5,file.inject-error.0.sector=2"
        in (second)
    )
    assert "file.inject-error.1.sector=8" in second
    assert [word.rpartition("bootindex=")[2] for word in words if "virtio-blk" in word] == [
        "1",
        "2",
    ]
    turned = _command(host, [own, other], trouble=Trouble(other_first=True))
    assert [word.rpartition("bootindex=")[2] for word in turned if "virtio-blk" in word] == [
        *("2", "1")
    ]
    alone = " ".join(_command(host, [own], trouble=Trouble(bad_read=4096)))
    assert "inject-error.0.iotype=read" in alone
    assert "inject-error.1" not in alone
    assert "-S" in _command(host, trouble=Trouble(hangs=True))
    assert "-S" not in _command(host)


def test_each_fault_takes_its_default_and_refuses_nonsense() -> None:
    for fault in FAULTS.values():
        if fault.takes and fault.default is None:
            with pytest.raises(RequestError, match="needs a value"):
                fault.value_from(None)
        else:
            assert fault.value_from(None) == fault.default
        with pytest.raises(RequestError):
            fault.value_from("nonsense")
    with pytest.raises(RequestError, match="no such fault"):
        fault_named("gremlins")


def test_a_recycled_pid_is_not_our_process() -> None:
    me = Process.parent_of_this_one()
    assert me.is_alive
    other = dataclasses.replace(me, started=me.started + 1)
    assert not other.is_alive


def test_cpio_entries_are_aligned() -> None:
    for name in ("a", "ab", "abc", "abcd"):
        entry = _cpio_entry(name, b"xyz", 0o100644)
        assert len(entry) % 4 == 0
        assert entry.startswith(b"070701")
