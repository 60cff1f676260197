"""Disks that fail or were swapped, a host that hangs in its firmware, one that no DHCP answers:
each deployment ends with a reason a person can act on, and never with half a system that boots.

The systems here are of one boot sector, and the releases small, so that a boot takes seconds.
"""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.manifest import Manifest
from provisioner.core.model import Json
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.sites import (
    MIB,
    OLD_SYSTEM,
    TABLE_BYTES,
    TINY_SYSTEM,
    a_site,
    deploy,
    differing_chunks,
    disk_digest,
    disk_path,
    host_of,
    is_actionable,
    is_told,
    publish_tiny,
    put_old_system,
    reached,
    restart_with,
    says,
    spoken,
    timeline,
    tiny_profile,
)

pytestmark = pytest.mark.lab

DISK_MIB: Final = 64
SMALL_MIB: Final = 32
# Fits on a disk of 64 MiB, and not on one of 32.
LARGE_MIB: Final = 40
# Within data of the release and of the old system.
BAD_BYTE: Final = MIB + MIB // 2 + 512
FAILED_LIMIT: Final = timedelta(minutes=5)
# Shorter than a boot into the ramdisk, and than a firmware's patience with DHCP.
HASTY_RUNG_S: Final = 8
PATIENT_RUNG_S: Final = 180
LIMITS: Final[dict[str, object]] = {
    "netbooting_s": HASTY_RUNG_S,
    "booting_s": 5,
    "soft_shutdown_s": 1,
    "bmc_exchange_s": 4,
}
# What a firmware says when no disk has anything to start.
NOTHING_TO_BOOT: Final = "No bootable device"
ONE, TWO = "lab-1", "lab-2"


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Manifest]]:
    """Two BIOS hosts with a service whose limits are short, and two releases."""
    directory = tmp_path_factory.mktemp("broken")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)) for _ in (ONE, TWO)]
    with a_site(directory, hosts, {"limits": LIMITS}) as site:
        tiny_profile(site, bus="virtio")
        tiny_profile(site, "large", bus="virtio", size_min_bytes=DISK_MIB * MIB)
        for host in site.lab.hosts:
            site.enrol(host)
        release = publish_tiny(site, directory, "1")
        publish_tiny(site, directory, "large", size_mib=LARGE_MIB)
        yield site, release


@pytest.fixture(scope="module")
def patient_rack(rack: tuple[Site, Manifest]) -> tuple[Site, Manifest]:
    """The rack with time for a boot into the ramdisk. A service that was restarted ends nothing
    for a while, so this is done once."""
    restart_with(rack[0], {"limits": {"netbooting_s": PATIENT_RUNG_S}})
    return rack


@pytest.fixture
def site(rack: tuple[Site, Manifest]) -> Site:
    """The rack with both hosts off, sound, and with their old systems."""
    site = rack[0]
    for name in (ONE, TWO):
        site.lab.clear(name)
        site.lab.power(name, "off")
        put_old_system(disk_path(site, name))
    return site


def failed(site: Site, operation: str) -> Json:
    return reached(site, operation, "failed", limit=FAILED_LIMIT)


def permissions(site: Site, name: str) -> int:
    return sum("may write" in line for line in timeline(site, name))


def test_a_host_that_hangs_in_its_firmware_and_one_that_no_dhcp_answers(site: Site) -> None:
    """Three rungs, and then the end: the hosts are given back with their old systems."""
    before = {name: disk_digest(disk_path(site, name)) for name in (ONE, TWO)}
    states = {name: host_of(site, name)["state"] for name in (ONE, TWO)}
    written = {name: permissions(site, name) for name in (ONE, TWO)}
    events = {name: len(timeline(site, name)) for name in (ONE, TWO)}
    boots = {name: len(site.lab.boots(name)) for name in (ONE, TWO)}
    starts = {name: len(site.lab.console(name)) for name in (ONE, TWO)}
    site.lab.fault(ONE, "hangs-in-firmware")
    site.lab.fault(TWO, "dhcp-silent")
    operations = deploy(site, [ONE, TWO], "tiny@1")
    ended = {name: failed(site, operation) for name, operation in operations.items()}

    for name in (ONE, TWO):
        assert ended[name]["error"]["code"] == "netbooting_timed_out"
        is_actionable(ended[name]["error"], name)
        assert ended[name]["rung"] == 2
        news = timeline(site, name)[events[name] :]
        rungs = [line for line in news if "rung" in line]
        assert [line.rpartition(" ")[2] for line in rungs] == ["1", "2"]
        # Each rung told its BMC to boot from the network, and the host did try.
        taken = [(boot.first, boot.flag) for boot in site.lab.boots(name)[boots[name] :]]
        assert taken == [("network", "once"), ("network", "once"), ("network", "persistent")]
        assert ended[name]["phase_seconds"].keys() == {"queued", "netbooting"}
        assert "boot/ipxe" not in spoken(site, name, starts[name])
    assert asked_dhcp(site, TWO) > 3
    assert asked_dhcp(site, ONE) == 0
    told = is_told(site, ONE, "nothing_heard")
    assert {line["source"] for line in told["evidence"]} == {"bmc"}
    told = is_told(site, TWO, "dhcp_offer_not_taken")
    assert "dhcp" in {line["source"] for line in told["evidence"]}
    # Nobody gets the one out of its firmware but by its power; the other goes on by itself.
    assert site.lab.status_of(ONE).power == "on"
    said = spoken(site, ONE, starts[ONE]).split("\n")
    assert [line for line in said if line and "lab: boot" not in line] == []
    site.lab.clear(ONE)
    site.lab.power(ONE, "reset")
    for name in (ONE, TWO):
        says(site, name, OLD_SYSTEM, start=starts[name])
        site.lab.power(name, "off")
        assert site.lab.boots(name)[-1].first == "disk" or name == TWO
        assert site.lab.status_of(name).next_boot in (None, "disk (persistent)")
        assert disk_digest(disk_path(site, name)) == before[name]
        assert permissions(site, name) == written[name]
        host = host_of(site, name)
        assert (host["state"], host["operation"]) == (states[name], None)


def asked_dhcp(site: Site, name: str) -> int:
    """Return how often our DHCP server has heard the host ask for an address."""
    log = site.log_path("boot,tftp,dhcp,worker").read_text().splitlines()
    mac = site.lab.host(name).mac
    return sum('"kind": "DISCOVER"' in line and mac in line for line in log)


def small_disk_path(site: Site, name: str) -> Path:
    return Path(site.lab.host(name).directory) / "disk-small.raw"


def bytes_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as disk:
        disk.seek(offset)
        return disk.read(length)


@pytest.mark.usefixtures("patient_rack")
def test_field_23_a_disk_swapped_for_a_smaller_one_after_the_inspection(site: Site) -> None:
    """Whether the profile asks for a size or not, nothing is written, and the other's data,
    which nobody has seen before, is what it was."""
    with site.client() as client:
        client.change_host(TWO, {"profile": "large"})
        inspections = [client.inspect_host(name)["id"] for name in (ONE, TWO)]
    for inspection in inspections:
        reached(site, inspection, "succeeded", limit=FAILED_LIMIT)
    before = {}
    for name in (ONE, TWO):
        assert host_of(site, name)["inventory"]["disks"][0]["size_bytes"] == DISK_MIB * MIB
        site.lab.power(name, "off")
        small = small_disk_path(site, name)
        with small.open("wb") as disk:
            disk.truncate(SMALL_MIB * MIB)
        put_old_system(small)
        before[name] = disk_digest(small), disk_digest(disk_path(site, name))
        site.lab.fault(name, "small-disk", SMALL_MIB)
    starts = {name: len(site.lab.console(name)) for name in (ONE, TWO)}

    operations = deploy(site, [ONE, TWO], "tiny@large")
    errors = {name: failed(site, operation)["error"] for name, operation in operations.items()}

    assert errors[ONE]["code"] == "disk_too_small"
    assert "vda (LAB-lab-1-0)" in errors[ONE]["message"]
    assert errors[ONE]["found"] == f"{SMALL_MIB * MIB} bytes"
    assert errors[TWO]["code"] == "no_disk_matches"
    assert "LAB-lab-2-0" in str(errors[TWO]["found"])
    assert str(SMALL_MIB * MIB) in str(errors[TWO]["found"])
    assert "vda (LAB-lab-1-0)" in is_told(site, ONE, "disk_too_small")["why"]
    assert str(SMALL_MIB * MIB) in is_told(site, TWO, "no_disk_matches")["why"]
    for name in (ONE, TWO):
        is_actionable(errors[name], name)
        assert permissions(site, name) == 0
        said = spoken(site, name, starts[name])
        says(site, name, OLD_SYSTEM, start=starts[name] + said.find("FAILED"))
        site.lab.power(name, "off")
        assert (disk_digest(small_disk_path(site, name)), disk_digest(disk_path(site, name))) == (
            before[name]
        )
        host = host_of(site, name)
        assert (host["state"], host["release"], host["operation"]) == ("dirty", None, None)
        assert host["inventory"]["disks"][0]["size_bytes"] == SMALL_MIB * MIB
    with site.client() as client:
        client.change_host(TWO, {"profile": "lab"})


def test_field_23_a_sector_that_takes_no_write_and_one_that_cannot_be_read_back(
    patient_rack: tuple[Site, Manifest], site: Site
) -> None:
    """Neither host boots what is on its disk; both do once they have a sound one."""
    release = patient_rack[1]
    old = bytes_at(disk_path(site, ONE), BAD_BYTE, 512)
    site.lab.fault(ONE, "disk-error-at-byte", BAD_BYTE)
    site.lab.fault(TWO, "disk-error-at-read", BAD_BYTE)
    starts = {name: len(site.lab.console(name)) for name in (ONE, TWO)}

    operations = deploy(site, [ONE, TWO], release.name)
    ended = {name: failed(site, operation) for name, operation in operations.items()}

    for name, verb in ((ONE, "write"), (TWO, "read")):
        error = is_actionable(ended[name]["error"], name)
        assert error["code"] == "disk_failed"
        message, _, at = error["message"].rpartition(" at byte ")
        assert message == f"could not {verb} disk vda (LAB-{name}-0)"
        first, length = int(at), int(error["expected"].split()[0])
        assert first <= BAD_BYTE < first + length
        assert "Input/output error" in error["found"]
        assert ended[name]["evidence"]["disk"]["serial"] == f"LAB-{name}-0"
        assert ("verifying" in ended[name]["phase_seconds"]) == (verb == "read")
        assert f"vda (LAB-{name}-0)" in is_told(site, name, f"disk_{verb}_failed")["why"]
        never_boots(site, name, starts[name])
        host = host_of(site, name)
        assert (host["state"], host["release"], host["operation"]) == ("dirty", None, None)
    assert bytes_at(disk_path(site, ONE), BAD_BYTE, 512) == old, "it did not take the write"

    for name in (ONE, TWO):
        site.lab.clear(name)
        starts[name] = len(site.lab.console(name))
    for name, operation in deploy(site, [ONE, TWO], release.name).items():
        # Written and verified; a system of one sector does not phone home.
        assert failed(site, operation)["error"]["code"] == "booting_timed_out"
        is_told(site, name, "system_not_heard")
        says(site, name, TINY_SYSTEM, start=starts[name])
        site.lab.power(name, "off")
        assert differing_chunks(disk_path(site, name), release, site.settings.data_dir) == []


def never_boots(site: Site, name: str, start: int) -> None:
    """However it is started, the host finds neither its old system nor half of the new one."""
    site.lab.power(name, "off")
    assert not bytes_at(disk_path(site, name), 0, TABLE_BYTES).strip(b"\0")
    site.lab.power(name, "on")
    restarted = len(site.lab.console(name))
    says(site, name, NOTHING_TO_BOOT, start=restarted)
    site.lab.power(name, "off")
    said = spoken(site, name, start)
    assert OLD_SYSTEM not in said
    assert TINY_SYSTEM not in said
