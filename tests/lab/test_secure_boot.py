"""A host with Secure Boot on is netbooted and reimaged by what is signed, and by nothing else."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import pytest

from provisioner.core.manifest import Manifest
from provisioner.lab import LabHost
from provisioner.lab.lab import Verb
from provisioner.lab.site import Site
from provisioner.netboot.grub import ANSWERS
from tests.lab.conftest import NEWER, OLDER
from tests.lab.sites import (
    a_site,
    deploy,
    host_of,
    reached,
    says,
    spoken,
    ssh,
    timeline,
    until,
    written_and_off,
)

pytestmark = pytest.mark.lab

NAME: Final = "lab-1"
POWER_TWICE: Final[tuple[Verb, ...]] = ("off", "on", "off", "on")
LIMITS: Final[dict[str, object]] = {"soft_shutdown_s": 1}
KNOWN_LIMIT: Final = timedelta(minutes=1)
# The last byte of the variable that the firmware sets: 1 where it checks signatures.
SECURE_BOOT: Final = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service and a host with Secure Boot on, whose firmware tries the network first."""
    hosts = [LabHost("secure-boot", boot_order="network-first")]
    with a_site(tmp_path_factory.mktemp("secure"), hosts, {"limits": LIMITS}) as made:
        made.enrol(made.lab.host(NAME))
        yield made


def is_proven(site: Site, operation: str, release: Manifest) -> None:
    """Wait for the deployment's success, and check what runs then."""
    evidence = reached(site, operation, "succeeded")["evidence"]
    assert evidence["release_id"] == release.release_id
    assert host_of(site, NAME)["release_name"] == release.name
    is_locked_down(site, evidence["address"])


def is_locked_down(site: Site, address: str) -> None:
    """Check what firmware and kernel of the deployed system say."""
    assert ssh(site, address, f"od -An -tu1 -j4 {SECURE_BOOT}").strip() == "1"
    assert "[integrity]" in ssh(site, address, "cat /sys/kernel/security/lockdown")


def told_by_the_network(site: Site) -> list[str]:
    """Return what the host was answered when it asked how to boot, oldest first."""
    return [line.partition(" http: ")[2] for line in timeline(site, NAME) if " http: " in line]


def ways_told(site: Site) -> list[str]:
    """Return which way each of these answers sent it."""
    return [line.partition(": ")[2].partition(",")[0] for line in told_by_the_network(site)]


def next_boots_set(site: Site) -> int:
    """Return how often its BMC was told what to boot."""
    return sum(" bmc: next boot set" in line for line in timeline(site, NAME))


def boots_by_way_of_the_network(site: Site, operation: str, told: int) -> None:
    """Let the written disk be booted by way of the network, for which there is no ticket any
    more. (By itself it may get there without asking: that depends on who is quicker, the BMC
    that is told "disk, once", or the restart.)"""
    written_and_off(site, NAME, operation)
    # Network for the ramdisk, and then disk.
    until("the BMC is told to boot the disk", lambda: next_boots_set(site) == told + 2, KNOWN_LIMIT)
    # The first start takes what the BMC was told.
    site.lab.power(NAME, "on")
    site.lab.power(NAME, "off")
    assert site.lab.status_of(NAME).next_boot is None
    site.lab.power(NAME, "on")


def test_a_host_with_secure_boot_is_reimaged_and_locked_down_before_and_after(
    site: Site,
) -> None:
    older = site.publish(OLDER)
    newer = site.publish(NEWER, parent=older)
    is_proven(site, deploy(site, [NAME], older.name)[NAME], older)
    told = next_boots_set(site)
    operation = deploy(site, [NAME], newer.name)[NAME]
    boots_by_way_of_the_network(site, operation, told)
    is_proven(site, operation, newer)
    # For each ticket GRUB got the ramdisk, once, whose kernel itself had found Secure Boot on.
    assert host_of(site, NAME)["inventory"]["firmware"] == "secure-boot"
    ways = ways_told(site)
    assert ways.count("deploy ramdisk") == 2
    # Without one it was sent to its disk, and got there, since it has phoned home.
    assert ways[-1] == "auto"
    assert site.lab.boots(NAME)[-1].first == "network"
    assert {line.partition(":")[0] for line in told_by_the_network(site)} == {"grub.cfg"}
    # And so it is when nothing is being done to it.
    asks_as_its_grub(site)
    until("that is told", lambda: len(ways_told(site)) > len(ways), KNOWN_LIMIT)
    assert ways_told(site)[len(ways) :] == ["auto"]


def asks_as_its_grub(site: Site) -> None:
    host = site.lab.host(NAME)
    url = f"{site.settings.boot.url}{ANSWERS}?mac={host.mac}&uuid={host.uuid}"
    done = site.lab.run(["curl", "-sSf", "-g", url])
    assert done.returncode == 0, done.stderr


def test_what_is_not_signed_does_not_start(site: Site) -> None:
    """So the host of the test above really checks what it starts; and a host that is enrolled
    as any other UEFI, and has Secure Boot on, is not netbooted: nothing can be written."""
    with site.client() as client:
        client.change_host(NAME, {"firmware": "uefi"})
    until("DHCP has forgotten it", lambda: not shim_hosts(site), KNOWN_LIMIT)
    start = len(spoken(site, NAME))
    # The first start takes what a deployment may have left: disk first, once.
    for verb in POWER_TWICE:
        site.lab.power(NAME, verb)
    said = says(site, NAME, "Access Denied", start=start)
    assert "NBP filename is snponly.efi" in said
    site.lab.power(NAME, "off")
    with site.client() as client:
        client.change_host(NAME, {"firmware": "secure-boot"})
    until("DHCP knows it", lambda: site.lab.host(NAME).mac in shim_hosts(site), KNOWN_LIMIT)


def shim_hosts(site: Site) -> str:
    """Return what our DHCP server reads of hosts with Secure Boot on."""
    return (site.settings.data_dir / "dhcp" / "dnsmasq.hosts").read_text()
