"""A running BIOS and a running UEFI host are reimaged: the disk, the identity, the evidence."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import pytest

from provisioner.core.manifest import Manifest
from provisioner.lab.site import Site
from tests.lab.conftest import Fleet
from tests.lab.sites import (
    deploy,
    differing_chunks,
    disk_path,
    host_of,
    partition_digest,
    reached,
    ssh,
    timeline,
    until,
    written_and_off,
)

pytestmark = pytest.mark.lab

MARKER = "/var/lib/left-by-the-old-system"
# A reporter that nobody answers waits for 30 s at most.
NEXT_REPORT = timedelta(minutes=2)


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


def written_disk_is_the_release(fleet: Fleet, name: str, operation: str, release: Manifest) -> None:
    """Cut the power between writing and the first boot, compare the disk, switch it on."""
    site = fleet.site
    written_and_off(site, name, operation)
    path = disk_path(site, name)
    assert differing_chunks(path, release, site.settings.data_dir) == []
    assert partition_digest(path, release, "root") == release.root_digest
    site.lab.power(name, "on")


def test_running_hosts_are_reimaged_and_nothing_of_the_old_system_is_left(fleet: Fleet) -> None:
    site = fleet.site
    old = {name: fleet.running_on(name) for name in fleet.names}
    new = {name: fleet.newer if old[name] == fleet.older else fleet.older for name in old}
    with ThreadPoolExecutor(2) as pool:
        addresses = list(pool.map(fleet.bring_up, fleet.names))
    before = {}
    for name, address in zip(fleet.names, addresses, strict=True):
        before[name] = Identity.of(fleet, address)
        assert f"IMAGE_VERSION={old[name].version}\n" in before[name].os_release + "\n"
        ssh(site, address, f"sudo touch {MARKER} && sync")
    permitted = {name: _permissions(fleet, name) for name in fleet.names}
    operations = {name: deploy(site, [name], new[name].name)[name] for name in fleet.names}

    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(written_disk_is_the_release, fleet, name, operation, new[name])
            for name, operation in operations.items()
        ]
        for one in work:
            one.result()

    for name, operation in operations.items():
        release, ended = new[name], reached(site, operation, "succeeded")
        evidence = ended["evidence"]
        assert evidence["release_id"] == release.release_id
        assert evidence["root_disk"]["serial"] == f"LAB-{name}-0"
        assert all(check["healthy"] for check in evidence["checks"].values())
        assert evidence["failed_units"] == []
        after = Identity.of(fleet, evidence["address"])
        assert f"IMAGE_VERSION={release.version}\n" in after.os_release + "\n"
        assert after.nonce.startswith(f"{operation}.")
        assert evidence["nonce"] == "the deployment's own"
        assert after.nonce != before[name].nonce
        assert after.machine_id != before[name].machine_id
        assert after.host_key != before[name].host_key
        assert after.host_key.split()[1] in " ".join(evidence["ssh_host_keys"])
        assert ssh(site, evidence["address"], f"test -e {MARKER} || echo gone") == "gone"
        # The reporter hears of the success with its next report.
        until(
            f"{name} forgets its nonce",
            partial(has_forgotten, site, evidence["address"]),
            NEXT_REPORT,
        )
        host = host_of(site, name)
        assert (host["state"], host["release_name"]) == ("active", release.name)
        assert host["last_good"] == release.digest
        assert _permissions(fleet, name) == permitted[name] + 1
        # A running system was asked to shut down before its power was cut.
        assert site.lab.status_of(name).soft_offs > 0
    with site.client() as client:
        assert client.verify_audit() > 0


def has_forgotten(site: Site, address: str) -> bool:
    is_there = "sudo test -e /etc/provisioner/reporter.json && echo there || echo gone"
    return ssh(site, address, is_there) == "gone"


def _permissions(fleet: Fleet, name: str) -> int:
    return sum("may write" in line for line in timeline(fleet.site, name))
