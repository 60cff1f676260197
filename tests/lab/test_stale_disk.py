"""A host has two disks, and the other carries an old system with the same UUIDs."""

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from provisioner.lab.site import PROFILE, lab_profile
from tests.lab.conftest import Fleet
from tests.lab.sites import (
    MIB,
    deploy,
    disk_digest,
    disk_path,
    host_of,
    is_actionable,
    is_told,
    reached,
    written_and_off,
)

pytestmark = pytest.mark.lab

ONE_DISK: Final = "one-disk"
# Where a deployment has put CIDATA, of 4 MiB, and the backup table behind it.
CIDATA_FROM_END: Final = 5 * MIB
# How GRUB's script begins the line that tells Linux its root, and what follows there.
KERNEL_LINE: Final = b"linux /vmlinuz root=PARTUUID="
PARTUUID_CHARS: Final = 36


@pytest.fixture
def doubled(fleet: Fleet) -> Iterator[tuple[str, Path]]:
    """The BIOS host, switched off, and a copy of its whole disk that its firmware will try
    before the disk itself. Its profile names the disk by serial number."""
    site, name = fleet.site, fleet.names[0]
    site.lab.power(name, "off")
    disk = disk_path(site, name)
    stale = disk.with_name("disk-second.raw")
    subprocess.run(["cp", "--sparse=always", disk, stale], check=True)
    forget_seed(stale)
    root = next(part for part in fleet.running_on(name).partitions if part.name == "root")
    keep_to_root(stale, f"/dev/disk/by-id/virtio-LAB-{name}-1-part{root.number}")
    site.lab.fault(name, "second-disk", disk.stat().st_size // MIB)
    site.lab.fault(name, "second-disk-first")
    with site.client() as client:
        rule = {"serial": f"LAB-{name}-0"}
        client.save_profile(ONE_DISK, {**lab_profile(site.ssh_key), "disk": rule})
        client.change_host(name, {"profile": ONE_DISK})
    yield name, stale
    site.lab.clear(name)
    os.unlink(stale)
    with site.client() as client:
        client.change_host(name, {"profile": PROFILE})


def forget_seed(stale: Path) -> None:
    """Only the seed of the next deployment is there to be found then: with one of its own, the
    old system would know that it has seen it, and be silent."""
    with stale.open("r+b") as file:
        file.seek(stale.stat().st_size - CIDATA_FROM_END)
        assert b"CIDATA" in file.read(512)
        file.seek(stale.stat().st_size - CIDATA_FROM_END)
        file.write(bytes(4 * MIB))


def keep_to_root(stale: Path, device: str) -> None:
    """Let the stale system's boot loader name its own disk. Of two equal roots Linux takes the
    one it saw last, which is a matter of chance."""
    with stale.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        start = data.find(KERNEL_LINE)
        assert start >= 0, "GRUB's script is not where it was looked for"
        while start >= 0:
            start, end = start + len(b"linux /vmlinuz "), start + len(KERNEL_LINE) + PARTUUID_CHARS
            data[start:end] = f"root={device}".encode().ljust(end - start)
            start = data.find(KERNEL_LINE, end)


def test_field_26_success_is_not_reported_of_a_stale_system_with_the_same_uuids(
    fleet: Fleet, doubled: tuple[str, Path]
) -> None:
    """The right disk is written, and the other one boots. It is of the same release, so that
    all UUIDs are the same, and it finds the seed of this very deployment on the right disk."""
    site, (name, stale) = fleet.site, doubled
    release = fleet.running_on(name)
    before = disk_digest(stale)
    generation = host_of(site, name)["generation"]
    operation = deploy(site, [name], release.name)[name]

    written_and_off(site, name, operation)
    assert disk_digest(stale) == before, "the other disk was written"
    site.lab.power(name, "on")

    ended = reached(site, operation, "failed")
    error = is_actionable(ended["error"], name)
    assert error["code"] == "wrong_disk"
    assert error["expected"]["serial"] == f"LAB-{name}-0"
    assert error["found"]["serial"] == f"LAB-{name}-1"
    assert "boot order" in error["hint"]
    report = ended["evidence"]["refused_report"]
    assert report["release_id"] == release.release_id, "by its release it was the right one"
    told = is_told(site, name, "wrong_disk")["why"]
    assert f"LAB-{name}-0" in told.partition("it runs from")[0]
    assert f"LAB-{name}-1" in told.partition("it runs from")[2]
    host = host_of(site, name)
    assert (host["state"], host["release"], host["operation"]) == ("dirty", None, None)
    assert host["generation"] == ended["generation"] == generation + 1
    assert disk_digest(stale) != before, "it did run from there"

    # Without the other disk the same deployment succeeds.
    site.lab.power(name, "off")
    site.lab.clear(name)
    ended = reached(site, deploy(site, [name], release.name)[name], "succeeded")
    assert ended["evidence"]["root_disk"]["serial"] == f"LAB-{name}-0"
    assert host_of(site, name)["state"] == "active"
