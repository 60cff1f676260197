"""A host has two disks, and the other carries an old system with the same UUIDs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.model import Json
from provisioner.lab.site import PROFILE, Site, lab_profile
from tests.lab.conftest import Fleet
from tests.lab.sites import (
    MIB,
    REIMAGE_LIMIT,
    deploy,
    disk_digest,
    disk_path,
    host_of,
    is_actionable,
    is_told,
    reached,
    spoken,
    until,
)

pytestmark = pytest.mark.lab

ONE_DISK: Final = "one-disk"
# Longer than a host takes to be switched off, and the usual one of the lab.
LONG_SOAK_S: Final = 300.0
SHORT_SOAK_S: Final = 2.0
STARTS_MAX: Final = 6
# Where a deployment has put CIDATA, of 4 MiB, and the backup table behind it.
CIDATA_FROM_END: Final = 5 * MIB


@pytest.fixture
def doubled(fleet: Fleet) -> Iterator[tuple[str, Path]]:
    """The BIOS host, switched off, and a copy of its whole disk that its firmware will try
    before the disk itself. Its profile names the disk by serial number."""
    site, name = fleet.site, fleet.names[0]
    site.lab.power(name, "off")
    disk = disk_path(site, name)
    stale = disk.with_name("disk-second.raw")
    subprocess.run(["cp", "--sparse=always", disk, stale], check=True)
    # Only the seed of the next deployment is there to be found: with one of its own, the old
    # system would know that it has seen it, and be silent.
    with stale.open("r+b") as file:
        file.seek(stale.stat().st_size - CIDATA_FROM_END)
        assert b"CIDATA" in file.read(512)
        file.seek(stale.stat().st_size - CIDATA_FROM_END)
        file.write(bytes(4 * MIB))
    site.lab.fault(name, "second-disk", disk.stat().st_size // MIB)
    site.lab.fault(name, "second-disk-first")
    use_profile_of_one_disk(site, name, LONG_SOAK_S)
    yield name, stale
    site.lab.clear(name)
    site.lab.power(name, "off")
    os.unlink(stale)
    with site.client() as client:
        client.change_host(name, {"profile": PROFILE})


def use_profile_of_one_disk(site: Site, name: str, soak_s: float) -> None:
    rule = {"serial": f"LAB-{name}-0"}
    with site.client() as client:
        document = {**lab_profile(site.ssh_key, soak_s=soak_s), "disk": rule}
        client.save_profile(ONE_DISK, document)
        client.change_host(name, {"profile": ONE_DISK})


def operation_of(site: Site, operation: str) -> Json:
    with site.client() as client:
        return client.operation(operation)


def boots_until_the_stale_one_runs(site: Site, name: str, operation: str) -> Json:
    """Start the host until its Linux runs from the stale disk, and return how the deployment
    ended. Of two equal roots Linux takes the one it saw last, which is a matter of chance: a
    start from the written disk is a good one, and its long soak is cut short."""
    heard_of: set[str] = set()

    def is_heard() -> bool:
        shown = operation_of(site, operation)
        return shown["is_final"] or shown["evidence"].get("boot_id") not in {None, *heard_of}

    for _ in range(STARTS_MAX):
        until("the new system", is_heard, REIMAGE_LIMIT)
        shown = operation_of(site, operation)
        if shown["is_final"]:
            break
        assert shown["evidence"]["root_disk"]["serial"] == f"LAB-{name}-0"
        heard_of.add(shown["evidence"]["boot_id"])
        site.lab.power(name, "off")
        site.lab.power(name, "on")
    return reached(site, operation, "failed")


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

    reached(site, operation, "booting")
    site.lab.power(name, "off")
    assert "Booting `" not in spoken(site, name).rpartition("--- lab: boot ")[2]
    assert disk_digest(stale) == before, "the other disk was written"
    site.lab.power(name, "on")

    ended = boots_until_the_stale_one_runs(site, name, operation)
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
    use_profile_of_one_disk(site, name, SHORT_SOAK_S)
    ended = reached(site, deploy(site, [name], release.name)[name], "succeeded")
    assert ended["evidence"]["root_disk"]["serial"] == f"LAB-{name}-0"
    assert host_of(site, name)["state"] == "active"
