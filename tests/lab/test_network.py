"""Machines that nobody knows are discovered, confirmed, and then inspected beside another
site's DHCP server."""

import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from provisioner.core.model import Json
from provisioner.errors import Conflict
from provisioner.lab import LabHost
from provisioner.lab.site import PROFILE, Site, host_document
from tests.lab.sites import (
    BOOT_LIMIT,
    MIB,
    OLD_SYSTEM,
    a_site,
    disk_digest,
    disk_path,
    host_of,
    publish_tiny,
    put_old_system,
    reached,
    restart_with,
    says,
    spoken,
    timeline,
    until,
)
from tests.parts.netboot_network import Namespace

pytestmark = pytest.mark.lab

FOUND_LIMIT = timedelta(minutes=5)
START_LIMIT_S = 60
OTHER_DHCP = """\
port=0
interface=eth0
bind-interfaces
dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h
no-ping
leasefile-ro
user=root
log-dhcp
log-facility={directory}/other.log
pid-file={directory}/other.pid
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A BIOS and a UEFI machine that nobody knows, and a service that discovers."""
    directory = tmp_path_factory.mktemp("network")
    hosts = [
        LabHost("bios", boot_order="network-first", disks_mib=(64, 32)),
        LabHost("uefi", boot_order="network-first", disks_mib=(64,)),
    ]
    with a_site(directory, hosts, {"discovery": {"enabled": True}}) as site:
        put_old_system(disk_path(site, "lab-1"))
        publish_tiny(site, directory, "1")
        yield site


@pytest.fixture
def other_dhcp_server(site: Site, tmp_path: Path) -> Iterator[Path]:
    """Another DHCP server, a machine of its own on the lab's bridge; its log."""
    place = Namespace()
    lines = [
        f"link add other type veth peer name eth0 netns {place.pid}",
        "link set other master br0 up",
    ]
    for line in lines:
        done = site.lab.run(["ip", *line.split()])
        assert done.returncode == 0, done.stderr
    place.ip("address", "add", "10.77.0.2/24", "dev", "eth0")
    place.ip("link", "set", "eth0", "up")
    config = tmp_path / "other.conf"
    config.write_text(OTHER_DHCP.format(directory=tmp_path))
    log = tmp_path / "other.log"
    command = ["dnsmasq", "--keep-in-foreground", f"--conf-file={config}"]
    server = subprocess.Popen(place.command(*command))
    deadline = time.monotonic() + START_LIMIT_S
    while not log.exists() or "started" not in log.read_text():
        assert server.poll() is None, "the other DHCP server ended"
        assert time.monotonic() < deadline, "the other DHCP server does not start"
        time.sleep(0.05)
    yield log
    server.kill()
    server.wait()
    place.close()


def discovered(site: Site, name: str) -> Json | None:
    """Return the host that a machine of the lab became, once it has an inventory."""
    mac = site.lab.host(name).mac
    with site.client() as client:
        for row in client.hosts():
            if row["macs"] == [mac]:
                host = client.host(row["name"])
                return host if host["inventory"] else None
    return None


def _is_discovered(site: Site, name: str) -> bool:
    return discovered(site, name) is not None


def test_unknown_machines_appear_with_their_inventory_and_wait_to_be_confirmed(site: Site) -> None:
    before = disk_digest(disk_path(site, "lab-1"))
    for name in ("lab-1", "lab-2"):
        site.lab.power(name, "on")
    for name in ("lab-1", "lab-2"):
        until(f"{name} is discovered", partial(_is_discovered, site, name), FOUND_LIMIT)
    start = len(site.lab.console("lab-1"))

    for name, firmware in (("lab-1", "bios"), ("lab-2", "uefi")):
        machine, host = site.lab.host(name), discovered(site, name)
        assert host is not None
        assert (host["is_confirmed"], host["bmc"], host["profile"]) == (False, None, None)
        assert host["name"] == f"new-{machine.mac.replace(':', '')}"
        assert (host["uuid"], host["serial"]) == (machine.uuid, machine.serial)
        inventory = host["inventory"]
        assert inventory["firmware"] == host["firmware"] == firmware
        assert inventory["cpu"]["count"] == 2
        assert 700 * MIB < inventory["memory_bytes"] <= 1024 * MIB
        disks = {disk["serial"]: disk["size_bytes"] for disk in inventory["disks"]}
        assert disks == {disk.serial: disk.size_bytes for disk in machine.disks}
        assert [nic["mac"] for nic in inventory["nics"]] == [machine.mac]
        assert "bmc_address" in inventory
        with site.client() as client, pytest.raises(Conflict, match="confirm"):
            client.deploy([host["name"]], "tiny@1")

    # It was looked at, and that was all: now its own system runs, though it asked again.
    until("lab-1 runs its own system", lambda: OLD_SYSTEM in spoken(site, "lab-1"), BOOT_LIMIT)
    assert "vmlinuz" not in site.lab.console("lab-1")[start:]
    assert disk_digest(disk_path(site, "lab-1")) == before


def test_field_17_a_confirmed_host_is_inspected_beside_another_dhcp_server(
    site: Site, other_dhcp_server: Path
) -> None:
    name, machine = "found-1", site.lab.host("lab-1")
    found = discovered(site, "lab-1")
    assert found is not None
    site.lab.power("lab-1", "off")
    with site.client() as client:
        bmc = host_document(machine)["bmc"]
        changes = {"new_name": name, "bmc": bmc, "profile": PROFILE}
        client.confirm_host(found["name"], changes)
    assert host_of(site, name)["is_confirmed"]
    restart_with(site, {"dhcp": {"mode": "proxy", "range_start": "", "range_end": ""}})

    start = len(site.lab.console("lab-1"))
    with site.client() as client:
        operation = client.inspect_host(name)["id"]
    ended = reached(site, operation, "succeeded")
    address = ended["evidence"]["agent_address"]
    assert address in [f"10.77.0.{last}" for last in range(50, 61)], "the other server's"
    assert "/boot/ipxe" in site.lab.console("lab-1")[start:]
    assert machine.mac in other_dhcp_server.read_text()
    assert any("deploy ramdisk" in line for line in timeline(site, name))
    # And back to its disk.
    says(site, "lab-1", OLD_SYSTEM, start=start)
