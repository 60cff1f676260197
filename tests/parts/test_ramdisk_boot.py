"""The ramdisk on a virtual host: kernel, drivers, NIC, agent, disk. No part of it is faked.

The network is QEMU's own, in which 10.0.2.2 is this machine's loopback.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from provisioner.imaging.ramdisk import LAB_KERNEL, Pins, build_base, build_ramdisk
from tests.parts.agent_service import (
    CHUNK,
    MIB,
    SEED,
    Release,
    Service,
    deployment,
    make_image,
    make_release,
    running,
)
from tests.parts.test_ramdisk_build import cache_dir

pytestmark = pytest.mark.lab

BOOT_LIMIT_S = 900
GUEST_SEES_US_AT = "10.0.2.2"
MAC = "52:54:00:77:00:01"


@dataclass
class VirtualHost:
    """A host with one disk, whose serial is LAB-1-0, and one NIC."""

    folder: Path
    service: Service
    release: Release

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def run(self, *, memory_mib: int = 768, network: str | None = None) -> str:
        """Boot the ramdisk, wait until it restarts, and return its console."""
        pins = Pins(self.release.trust, self.service.ca_pem)
        made = build_ramdisk(build_base(LAB_KERNEL, cache_dir()), pins, self.folder / "ramdisks")
        net = f"{MAC},10.0.2.15,255.255.255.0,10.0.2.2" if network is None else network
        words = (
            f"provisioner.boot={self.service.boot_url} provisioner.agent={self.service.agent_url}"
            f" provisioner.ticket={self.service.ticket} provisioner.net={net}"
            " console=ttyS0,115200 quiet panic=30"
        )
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
            *("-m", str(memory_mib), "-display", "none", "-nodefaults", "-no-reboot"),
            *("-serial", f"file:{self.folder / 'console'}", "-append", words),
            *("-kernel", str(made.folder / "vmlinuz"), "-initrd", str(made.folder / "initrd")),
            *("-drive", f"if=none,id=d,file={self.disk},format=raw,cache=unsafe,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=d,serial=LAB-1-0"),
            *("-netdev", "user,id=n,restrict=off", "-device", f"virtio-net-pci,netdev=n,mac={MAC}"),
        ]
        subprocess.run(command, check=True, timeout=BOOT_LIMIT_S)
        return (self.folder / "console").read_text(errors="replace")


@contextmanager
def virtual_host(folder: Path, release: Release) -> Iterator[VirtualHost]:
    service = Service(files=release.files(), hello=deployment(release))
    with running(service, seen_at=GUEST_SEES_US_AT):
        yield VirtualHost(folder, service, release)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(make_image(tmp_path / "image", size_mib=64))


def test_a_virtual_host_deploys_a_release(tmp_path: Path, release: Release) -> None:
    """768 MiB of memory, a dirty disk: afterwards it is the release, its table and its seed."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.fail("qemu-system-x86_64 is not installed; script/setup installs it")
    with virtual_host(tmp_path, release) as host:
        host.disk.write_bytes(b"\xa5" * 128 * MIB)
        console = host.run()
        assert not host.service.told("failed"), host.service.told("failed")
        [done] = host.service.told("done")
    assert done["release"] == release.manifest.digest
    assert "the disk is complete" in console
    assert "ticket-1" not in console
    assert "token-1" not in console
    found = host.disk.read_bytes()
    assert found[CHUNK : 64 * MIB] == release.raw[CHUNK:]
    checked = subprocess.run(
        ["sgdisk", "-v", host.disk], capture_output=True, text=True, check=True
    )
    assert "No problems found" in checked.stdout
    [inventory] = [body["inventory"] for body in host.service.told("hello")]
    assert [disk["serial"] for disk in inventory["disks"]] == ["LAB-1-0"]
    assert [nic["mac"] for nic in inventory["nics"]] == [MAC]
    start = found.index(b"PROVISNR") - 3
    (tmp_path / "cidata").write_bytes(found[start : start + 4 * MIB])
    read = ["mtype", "-i", str(tmp_path / "cidata"), "::user-data"]
    assert (
        subprocess.run(read, capture_output=True, check=True).stdout.decode() == (SEED["user-data"])
    )


def test_a_virtual_host_is_compared_with_its_release(tmp_path: Path, release: Release) -> None:
    """Deployed, changed in one place, and looked at: the change is found, and stays."""
    with virtual_host(tmp_path, release) as host:
        host.disk.write_bytes(b"\xa5" * 128 * MIB)
        host.run()
        with host.disk.open("r+b") as file:
            file.seek(40 * MIB)
            file.write(b"changed")
        before = host.disk.read_bytes()
        host.service.calls.clear()
        host.service.hello = deployment(release, kind="verification", mode="verify")
        host.run()
        assert not host.service.told("failed"), host.service.told("failed")
        assert not host.service.told("authorise")
        [compared] = host.service.told("compared")
    assert compared["compared_chunks"] == 64 * MIB // CHUNK
    assert (compared["differing_chunks"], compared["differing_bytes"]) == (1, CHUNK)
    assert host.disk.read_bytes() == before


def test_without_what_the_firmware_got_it_asks_by_dhcp_and_an_inspection_writes_nothing(
    tmp_path: Path, release: Release
) -> None:
    """The command line has no network; the host is inspected and switched off."""
    with virtual_host(tmp_path, release) as host:
        host.service.hello = {
            **deployment(release, kind="inspection", then="poweroff"),
            "release": None,
            "disk_rule": None,
        }
        host.disk.write_bytes(b"\xa5" * 16 * MIB)
        host.run(network="")
        assert [name for name, _ in host.service.calls] == ["hello"]
    assert host.disk.read_bytes().count(b"\xa5") == 16 * MIB


def test_what_goes_wrong_is_told_and_the_host_restarts(tmp_path: Path, release: Release) -> None:
    """No disk fits: the service hears code and inventory, the disk keeps its bytes."""
    with virtual_host(tmp_path, release) as host:
        host.service.hello = deployment(release, disk_rule={"serial": "another"})
        host.disk.write_bytes(b"\xa5" * 16 * MIB)
        console = host.run()
        [failed] = host.service.told("failed")
    assert failed["code"] == "no_disk_matches"
    assert failed["found"][0]["serial"] == "LAB-1-0"
    assert "FAILED: none of 1 disks fits" in console
    assert host.disk.read_bytes().count(b"\xa5") == 16 * MIB
