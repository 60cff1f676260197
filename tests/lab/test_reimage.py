"""A running BIOS and a running UEFI host are reimaged: the disk, the identity, the evidence."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from provisioner.core.manifest import Manifest
from tests.lab.conftest import Fleet
from tests.lab.sites import (
    BOOT_LIMIT,
    Json,
    deploy,
    differing_chunks,
    disk_path,
    host_of,
    partition_digest,
    reached,
    spoken,
    ssh,
    timeline,
    until,
)

pytestmark = pytest.mark.lab

MARKER = "/var/lib/left-by-the-old-system"


@dataclass(frozen=True)
class Identity:
    """What tells one installation from the next."""

    os_release: str
    nonce: str
    machine_id: str
    host_key: str

    @classmethod
    def of(cls, fleet: Fleet, address: str) -> "Identity":
        commands = (
            "cat /etc/os-release",
            "sudo cat /var/lib/cloud/instance/vendor-data.txt",
            "cat /etc/machine-id",
            "cat /etc/ssh/ssh_host_ed25519_key.pub",
        )
        joined = "; echo ----; ".join(commands)
        parts = [part.strip() for part in ssh(fleet.site, address, joined).split("\n----\n")]
        return cls(parts[0], nonce_in(parts[1]), parts[2], parts[3])


def nonce_in(vendor_data: str) -> str:
    """Return the nonce that a host was seeded with."""
    packed = vendor_data.partition("reporter.json 0600 << 'END'\n")[2].partition("\nEND")[0]
    nonce: str = json.loads(base64.b64decode(packed))["nonce"]
    return nonce


def last_deployment(fleet: Fleet, name: str) -> Json:
    with fleet.site.client() as client:
        rows = [row for row in client.operations(host=name) if row["kind"] == "deployment"]
        return client.operation(rows[0]["id"])


def bring_up(fleet: Fleet, name: str) -> str:
    """Return the address of a deployed host that answers ssh, switching it on if it is off."""
    site = fleet.site
    address: str = last_deployment(fleet, name)["evidence"]["address"]
    site.lab.power(name, "on")
    answers = ["timeout", "5", "bash", "-c", f"read -r line < /dev/tcp/{address}/22"]
    until(f"{name} answers ssh", lambda: site.lab.run(answers).returncode == 0, BOOT_LIMIT)
    return address


def written_disk_is_the_release(fleet: Fleet, name: str, operation: str, release: Manifest) -> None:
    """Cut the power between writing and the first boot, compare the disk, switch it on."""
    site = fleet.site
    reached(site, operation, "booting")
    site.lab.power(name, "off")
    since = spoken(site, name).rpartition("--- lab: boot ")[2]
    assert "Booting `" not in since, "GRUB has started already, so the disk proves nothing"
    path = disk_path(site, name)
    assert differing_chunks(path, release, site.settings.data_dir) == []
    assert partition_digest(path, release, "root") == release.root_digest
    site.lab.power(name, "on")


def test_running_hosts_are_reimaged_and_nothing_of_the_old_system_is_left(fleet: Fleet) -> None:
    site, release = fleet.site, fleet.newer
    with ThreadPoolExecutor(2) as pool:
        addresses = list(pool.map(lambda name: bring_up(fleet, name), fleet.names))
    before = {}
    for name, address in zip(fleet.names, addresses, strict=True):
        before[name] = Identity.of(fleet, address)
        assert "IMAGE_VERSION=2026.11.1" in before[name].os_release
        ssh(site, address, f"sudo touch {MARKER} && sync")
    operations = deploy(site, fleet.names, release.name)

    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(written_disk_is_the_release, fleet, name, operation, release)
            for name, operation in operations.items()
        ]
        for one in work:
            one.result()

    for name, operation in operations.items():
        ended = reached(site, operation, "succeeded")
        evidence = ended["evidence"]
        assert evidence["release_id"] == release.release_id
        assert evidence["root_disk"]["serial"] == f"LAB-{name}-0"
        assert all(check["healthy"] for check in evidence["checks"].values())
        assert evidence["failed_units"] == []
        after = Identity.of(fleet, evidence["address"])
        assert "IMAGE_VERSION=2026.11.2" in after.os_release
        assert after.nonce.startswith(f"{operation}.")
        assert evidence["nonce"] == "the deployment's own"
        assert after.nonce != before[name].nonce
        assert after.machine_id != before[name].machine_id
        assert after.host_key != before[name].host_key
        assert after.host_key.split()[1] in " ".join(evidence["ssh_host_keys"])
        gone = f"test -e {MARKER} || sudo test -e /etc/provisioner/reporter.json || echo gone"
        assert ssh(site, evidence["address"], gone) == "gone"
        host = host_of(site, name)
        assert (host["state"], host["release_name"]) == ("active", release.name)
        assert host["last_good"] == release.digest
        assert sum("may write" in line for line in timeline(site, name)) == 2
        # A running system was asked to shut down before its power was cut.
        assert site.lab.status_of(name).soft_offs > 0
    with site.client() as client:
        assert client.verify_audit() > 0
