"""A host with Secure Boot on is netbooted and reimaged by what is signed, and by nothing else."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import pytest

from provisioner.core.manifest import Manifest
from provisioner.lab import LabHost
from provisioner.lab.lab import Verb
from provisioner.lab.site import Site
from tests.lab.conftest import NEWER, OLDER
from tests.lab.sites import (
    BOOT_LIMIT,
    a_site,
    deploy,
    host_of,
    reached,
    says,
    spoken,
    ssh,
    timeline,
    until,
)

pytestmark = pytest.mark.lab

NAME: Final = "lab-1"
POWER_TWICE: Final[tuple[Verb, ...]] = ("off", "on", "off", "on")
KNOWN_LIMIT: Final = timedelta(seconds=20)
# The last byte of the variable that the firmware sets: 1 where it checks signatures.
SECURE_BOOT: Final = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service and a host with Secure Boot on, whose firmware tries the network first."""
    hosts = [LabHost("secure-boot", boot_order="network-first")]
    with a_site(tmp_path_factory.mktemp("secure"), hosts, {}) as made:
        made.enrol(made.lab.host(NAME))
        yield made


def deployed(site: Site, release: Manifest) -> str:
    """Deploy to the host and return the address of the system that proved itself."""
    operation = deploy(site, [NAME], release.name)[NAME]
    evidence = reached(site, operation, "succeeded")["evidence"]
    assert evidence["release_id"] == release.release_id
    address: str = evidence["address"]
    return address


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


def deployed_address(site: Site) -> str:
    """Return where the system that was deployed last answers."""
    with site.client() as client:
        address: str = client.operations(host=NAME)[0]["evidence"]["address"]
    return address


def test_a_host_with_secure_boot_is_reimaged_and_locked_down_before_and_after(
    site: Site,
) -> None:
    older = site.publish(OLDER)
    newer = site.publish(NEWER, parent=older)
    for release in (older, newer):
        is_locked_down(site, deployed(site, release))
        assert host_of(site, NAME)["release_name"] == release.name
    # For each ticket GRUB got the ramdisk, once, whose kernel itself had found Secure Boot on.
    assert host_of(site, NAME)["inventory"]["firmware"] == "secure-boot"
    assert ways_told(site).count("deploy ramdisk") == 2

    # Without a ticket it is sent to its disk, and gets there. (After a deployment it may go
    # there without asking: that depends on who is quicker, the BMC or the restart.)
    before = len(ways_told(site))
    site.lab.fault(NAME, "network-first")
    # The first start takes what a deployment may have left: disk first, once.
    for verb in POWER_TWICE:
        site.lab.power(NAME, verb)
    until("it asks the network", lambda: len(ways_told(site)) > before, BOOT_LIMIT)
    address = deployed_address(site)
    answers = ["timeout", "5", "bash", "-c", f"read -r line < /dev/tcp/{address}/22"]
    until("it is up", lambda: site.lab.run(answers).returncode == 0, BOOT_LIMIT)
    site.lab.clear(NAME)
    assert set(ways_told(site)[before:]) == {"auto"}
    assert {line.partition(":")[0] for line in told_by_the_network(site)} == {"grub.cfg"}
    assert host_of(site, NAME)["release_name"] == newer.name


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
