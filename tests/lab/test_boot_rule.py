"""Nobody without a boot ticket gets anything but their own disk, however often they ask."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.lab.conftest import Fleet
from tests.lab.sites import OLD_SYSTEM, disk_digest, disk_path, says, ssh, timeline

pytestmark = pytest.mark.lab

TIMES = 10
GRUB_STARTS = "Booting `debian-12"


def boots_its_disk(fleet: Fleet, name: str, proof: str, times: int) -> None:
    """Reset the host again and again; each time the network sends it to its disk."""
    lab = fleet.site.lab
    lab.power(name, "on")
    if lab.status_of(name).next_boot is not None:
        # Its deployment told the BMC "disk, once", and the host had restarted already.
        lab.power(name, "off")
        lab.power(name, "on")
    for _ in range(times):
        start = len(lab.console(name))
        lab.power(name, "reset")
        said = says(fleet.site, name, proof, start=start)
        assert "/boot/ipxe" in said, "it never asked the network"
        assert "vmlinuz" not in said
        assert "initrd" not in said
        assert "provisioner.ticket" not in said
        boot = lab.boots(name)[-1]
        assert (boot.first, boot.flag) == ("network", None)


def test_field_01_after_success_every_host_boots_its_own_disk_ten_times_of_ten(
    fleet: Fleet,
) -> None:
    site = fleet.site
    asked = {name: _scripts(fleet, name) for name in fleet.names}
    stranger_before = disk_digest(disk_path(site, fleet.stranger))
    proofs = {**dict.fromkeys(fleet.names, GRUB_STARTS), fleet.stranger: OLD_SYSTEM}
    with ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(boots_its_disk, fleet, name, proof, TIMES) for name, proof in proofs.items()
        ]
        for one in work:
            one.result()
    for name in fleet.names:
        scripts = _scripts(fleet, name)[len(asked[name]) :]
        assert len(scripts) >= TIMES
        assert all("no boot ticket" in script for script in scripts)
        # Ten power cuts, the first one right after success, and it is whole.
        running = ssh(site, fleet.bring_up(name), "systemctl is-active ssh; cat /etc/os-release")
        assert running.startswith("active\n")
        assert f"IMAGE_VERSION={fleet.running_on(name).version}\n" in running + "\n"
    assert disk_digest(disk_path(site, fleet.stranger)) == stranger_before
    with site.client() as client:
        assert [host["name"] for host in client.hosts()] == list(fleet.names)
        assert client.operations(only_open=True) == []


def _scripts(fleet: Fleet, name: str) -> list[str]:
    return [line for line in timeline(fleet.site, name) if "boot script" in line]
