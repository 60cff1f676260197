"""A host tells where its BMC is: asked within the host, by the drivers of the full kernel."""

from pathlib import Path

import pytest

from provisioner import wiring
from provisioner.imaging.ramdisk import DEFAULT_KERNEL, Pins, build_base, build_ramdisk
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.sites import a_site, host_of, reached

pytestmark = pytest.mark.lab


def use_full_kernel(site: Site) -> None:
    """Build a ramdisk with the kernel for hardware; being the newest, it is what hosts boot."""
    trust = wiring.trust_policy(site.settings).to_bytes()
    pins = Pins(trust, site.settings.keys.agent_tls_pem.read_bytes())
    base = build_base(DEFAULT_KERNEL, site.cache / "ramdisk")
    build_ramdisk(base, pins, site.settings.data_dir / "ramdisks")


def test_an_inspection_learns_the_address_of_the_bmc(tmp_path: Path) -> None:
    with a_site(tmp_path, [LabHost("bios", disks_mib=(64,))], {}) as site:
        use_full_kernel(site)
        [host] = site.lab.hosts
        site.enrol(host)
        with site.client() as client:
            operation = client.inspect_host(host.name)
        reached(site, operation["id"], "succeeded")
        assert host_of(site, host.name)["inventory"]["bmc_address"] == host.bmc.address
