"""Disks that fail or were swapped, a firmware that hangs, a DHCP that is silent, BMCs that forget
or fall silent: each deployment ends with a reason a person can act on, and never with half a
system that boots.

The systems here are of one boot sector, and the releases small, so that a boot takes seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
PATIENT_RUNG_S: Final = 90
LIMITS: Final[dict[str, object]] = {
    "netbooting_s": HASTY_RUNG_S,
    "booting_s": 5,
    "soft_shutdown_s": 1,
    "bmc_exchange_s": 4,
}
# What the ramdisk says before its first write.
PERMITTED: Final = "permission to write"
# What a firmware says when no disk has anything to start.
NOTHING_TO_BOOT: Final = "No bootable device"
ONE, TWO, FORGETS, SILENT = NAMES = ("lab-1", "lab-2", "lab-3", "lab-4")


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Manifest]]:
    """Four BIOS hosts with a service whose limits are short, and two releases."""
    directory = tmp_path_factory.mktemp("broken")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)) for _ in NAMES]
    with a_site(directory, hosts, {"limits": LIMITS}) as site:
        tiny_profile(site, bus="virtio")
        tiny_profile(site, "large", bus="virtio", size_min_bytes=DISK_MIB * MIB)
        for host in site.lab.hosts:
            site.enrol(host)
        release = publish_tiny(site, directory, "1")
        publish_tiny(site, directory, "large", size_mib=LARGE_MIB)
        yield site, release


@dataclass(frozen=True)
class Before:
    """What is known of a host before it is deployed to, and where its records stand then."""

    disk: str
    state: str
    events: int
    boots: int
    said: int

    @classmethod
    def of(cls, site: Site, name: str) -> "Before":
        return cls(
            disk=disk_digest(disk_path(site, name)),
            state=host_of(site, name)["state"],
            events=len(timeline(site, name)),
            boots=len(site.lab.boots(name)),
            said=len(site.lab.console(name)),
        )


@dataclass(frozen=True)
class Given:
    """Four hosts that never came, how they were before, and how their deployments ended."""

    site: Site
    before: dict[str, Before]
    ended: dict[str, Json]

    def news(self, name: str) -> list[str]:
        """Return what the timeline says since the deployment was requested."""
        return timeline(self.site, name)[self.before[name].events :]

    def boots(self, name: str) -> list[tuple[str, str | None]]:
        """Return how the host was started since then: first device, and the flag for it."""
        boots = self.site.lab.boots(name)[self.before[name].boots :]
        return [(boot.first, boot.flag) for boot in boots]

    def timed_out_on_the_last_rung(self, name: str) -> None:
        assert self.ended[name]["error"]["code"] == "netbooting_timed_out"
        is_actionable(self.ended[name]["error"], name)
        assert self.ended[name]["rung"] == 2
        rungs = [line for line in self.news(name) if "rung" in line]
        assert [line.rpartition(" ")[2] for line in rungs] == ["1", "2"]
        assert self.ended[name]["phase_seconds"].keys() == {"queued", "netbooting"}
        assert "boot/ipxe" not in spoken(self.site, name, self.before[name].said)

    def is_as_before(self, name: str) -> None:
        """Check, and switch the host off for it, that nothing was done to it."""
        self.site.lab.power(name, "off")
        assert disk_digest(disk_path(self.site, name)) == self.before[name].disk
        assert not [line for line in self.news(name) if "may write" in line]
        host = host_of(self.site, name)
        assert host["state"] == self.before[name].state
        assert (host["release"], host["operation"]) == (None, None)


@pytest.fixture(scope="module")
def given_up(rack: tuple[Site, Manifest]) -> Given:
    """The rack, after each host was waited for in vain for another reason: one waits for all.

    Three rungs, and then the end; or, of the BMC that is silent, three tries.
    """
    site = rack[0]
    for name in NAMES:
        put_old_system(disk_path(site, name))
    site.lab.power(SILENT, "on")
    says(site, SILENT, OLD_SYSTEM, start=0)
    site.lab.fault(ONE, "hangs-in-firmware")
    site.lab.fault(TWO, "dhcp-silent")
    site.lab.fault(FORGETS, "bmc-forgets-boot")
    site.lab.fault(SILENT, "bmc-silent")
    before = {name: Before.of(site, name) for name in NAMES}
    operations = deploy(site, NAMES, "tiny@1")
    return Given(site, before, {name: failed(site, operations[name]) for name in NAMES})


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


def test_a_host_that_hangs_in_its_firmware_and_one_that_no_dhcp_answers(given_up: Given) -> None:
    """Three rungs, and then the end: the hosts are given back with their old systems."""
    site = given_up.site
    for name in (ONE, TWO):
        given_up.timed_out_on_the_last_rung(name)
        # Each rung told its BMC to boot from the network, and the host did try.
        once, persistent = ("network", "once"), ("network", "persistent")
        assert given_up.boots(name) == [once, once, persistent]
    assert asked_dhcp(site, TWO) > 3
    assert asked_dhcp(site, ONE) == 0
    told = is_told(site, ONE, "nothing_heard")
    assert {line["source"] for line in told["evidence"]} == {"bmc"}
    told = is_told(site, TWO, "dhcp_offer_not_taken")
    assert "dhcp" in {line["source"] for line in told["evidence"]}
    # Nobody gets the one out of its firmware but by its power; the other goes on by itself.
    assert site.lab.status_of(ONE).power == "on"
    said = spoken(site, ONE, given_up.before[ONE].said).split("\n")
    assert [line for line in said if line and "lab: boot" not in line] == []
    site.lab.clear(ONE)
    site.lab.power(ONE, "reset")
    for name in (ONE, TWO):
        says(site, name, OLD_SYSTEM, start=given_up.before[name].said)
        given_up.is_as_before(name)
        assert site.lab.boots(name)[-1].first == "disk" or name == TWO
        assert site.lab.status_of(name).next_boot in (None, "disk (persistent)")


def test_field_13_a_bmc_that_forgets_and_one_that_is_silent(given_up: Given) -> None:
    """Three rungs and then the end, or three tries; and the hosts run their old systems."""
    site, silent = given_up.site, given_up.ended[SILENT]
    assert silent["error"]["code"] == "bmc_unreachable"
    is_actionable(silent["error"], SILENT)
    assert given_up.boots(SILENT) == [], "it was left running"
    assert site.lab.status_of(SILENT).power == "on"

    given_up.timed_out_on_the_last_rung(FORGETS)
    taken = given_up.boots(FORGETS)
    assert len(taken) >= 3
    assert set(taken) == {("disk", None)}
    told = is_told(site, FORGETS, "nothing_heard")
    assert "forgot the network boot" in told["why"]
    assert not [line for line in given_up.news(FORGETS) if " dhcp: " in line]

    says(site, FORGETS, OLD_SYSTEM, start=given_up.before[FORGETS].said)
    for name in (FORGETS, SILENT):
        given_up.is_as_before(name)


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
    # Before that it may have booted, where its firmware missed the network on a busy machine.
    _, was_permitted, said = spoken(site, name, start).partition(PERMITTED)
    assert was_permitted
    assert OLD_SYSTEM not in said
    assert TINY_SYSTEM not in said
