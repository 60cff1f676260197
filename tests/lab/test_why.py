"""What real firmware leaves in the timeline, and what `provisioner why` makes of it."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import pytest

from provisioner.core.model import Json
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.sites import (
    MIB,
    a_site,
    deploy,
    disk_path,
    publish_tiny,
    put_old_system,
    reached,
    timeline,
    tiny_profile,
    until,
)

pytestmark = pytest.mark.lab

DISK_MIB: Final = 64
BIOS, UEFI = "lab-1", "lab-2"
FAILED_LIMIT: Final = timedelta(minutes=6)
LIMITS: Final[dict[str, object]] = {"netbooting_s": 90, "soft_shutdown_s": 1}
ONCE: Final[dict[str, object]] = {"automatic": False}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A BIOS and a UEFI host with an old system each."""
    directory = tmp_path_factory.mktemp("why")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)), LabHost("uefi", disks_mib=(DISK_MIB,))]
    with a_site(directory, hosts, {"limits": LIMITS, "recovery": ONCE}) as site:
        tiny_profile(site, bus="virtio", size_min_bytes=DISK_MIB * MIB)
        publish_tiny(site, directory, "1")
        for host in site.lab.hosts:
            site.enrol(host)
            put_old_system(disk_path(site, host.name))
        yield site


def why(site: Site, name: str) -> Json:
    with site.client() as client:
        return client.why(name)


def test_firmware_that_netboots_and_one_that_starts_its_own_disk(site: Site) -> None:
    site.lab.fault(BIOS, "bmc-forgets-boot")
    forgotten = deploy(site, [BIOS], "tiny@1")[BIOS]
    with site.client() as client:
        inspection = client.inspect_host(UEFI)["id"]

    reached(site, inspection, "succeeded", limit=FAILED_LIMIT)
    answer = why(site, UEFI)
    assert answer["cause"] == "idle", answer
    lines = [line.split(" ", 1)[1] for line in timeline(site, UEFI)]
    wanted = (
        "dhcp: the firmware asks for an address",
        "dhcp: 10.77.0.",
        "tftp: snponly.efi: served",
        "dhcp: the iPXE asks for an address",
        "http: boot script: deploy ramdisk",
        "http: kernel: asked for",
        "http: ramdisk: asked for",
        "agent: agent says hello",
    )
    # The end of the ramdisk may be left unacknowledged: iPXE starts it at once.
    ends = (
        "http: kernel: taken whole",
        ("http: ramdisk: taken whole", "http: ramdisk: sent whole"),
    )
    for end in ends:
        assert [line for line in lines if line.startswith(end)], "\n".join(lines)
    missing = [text for text in wanted if not [one for one in lines if one.startswith(text)]]
    assert not missing, "\n".join(lines)
    places = [next(n for n, one in enumerate(lines) if one.startswith(text)) for text in wanted]
    assert places == sorted(places), "\n".join(lines)

    cut_off = cut_off_as_it_fetches(site)
    reached(site, forgotten, "failed", limit=FAILED_LIMIT)
    answer = why(site, BIOS)
    assert answer["cause"] == "nothing_heard", answer
    assert not [line for line in timeline(site, BIOS) if " dhcp: " in line]
    assert "forgot the network boot" in answer["why"]

    reached(site, cut_off, "failed", limit=FAILED_LIMIT)
    answer = why(site, UEFI)
    assert answer["cause"] in ("download_stalled", "download_cut"), answer
    assert answer["evidence"][-1]["text"].startswith(("kernel: ", "ramdisk: ")), answer


def cut_off_as_it_fetches(site: Site) -> str:
    """Inspect the UEFI host once more, and take its link away in the middle of a download."""
    before = len(timeline(site, UEFI))
    with site.client() as client:
        inspection: str = client.inspect_host(UEFI)["id"]

    def is_fetching() -> bool:
        return any("http: kernel: asked for" in line for line in timeline(site, UEFI)[before:])

    until("it asks for its kernel", is_fetching, FAILED_LIMIT)
    site.lab.fault(UEFI, "link-down")
    return inspection
