"""What real firmware leaves in the timeline, and what `provisioner why` makes of it."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.model import Json
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.sites import (
    a_site,
    disk_path,
    put_old_system,
    reached,
    restart_with,
    timeline,
    until,
)

pytestmark = pytest.mark.lab

DISK_MIB: Final = 64
UEFI: Final = "lab-1"
CUT_OFF: Final = ("download_stalled", "download_cut")
FAILED_LIMIT: Final = timedelta(minutes=6)
# Longer than a UEFI takes to its kernel, and we to notice that no more of it is taken; and over
# when a service that was restarted then ends something.
LIMITS: Final[dict[str, object]] = {"netbooting_s": 105, "soft_shutdown_s": 1}
# What is seen by then is all that there will be to see.
HASTY: Final[dict[str, object]] = {"netbooting_s": 5}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A UEFI host with an old system."""
    hosts = [LabHost("uefi", disks_mib=(DISK_MIB,))]
    with a_site(tmp_path, hosts, {"limits": LIMITS}) as site:
        [host] = site.lab.hosts
        site.enrol(host)
        put_old_system(disk_path(site, host.name))
        yield site


def why(site: Site, name: str) -> Json:
    with site.client() as client:
        return client.why(name)


def test_firmware_that_netboots_and_one_that_is_cut_off_as_it_fetches(site: Site) -> None:
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
    restart_with(site, {"limits": HASTY})
    reached(site, cut_off, "failed", limit=FAILED_LIMIT)
    answer = why(site, UEFI)
    assert answer["cause"] in CUT_OFF, answer
    assert answer["evidence"][-1]["text"].startswith(("kernel: ", "ramdisk: ")), answer


def cut_off_as_it_fetches(site: Site) -> str:
    """Inspect the host once more, take its link away in the middle of a download, and return when
    that was noticed."""
    before = len(timeline(site, UEFI))
    with site.client() as client:
        inspection: str = client.inspect_host(UEFI)["id"]

    def is_told(*texts: str) -> bool:
        return any(text in line for line in timeline(site, UEFI)[before:] for text in texts)

    until("it asks for its kernel", lambda: is_told("http: kernel: asked for"), FAILED_LIMIT)
    site.lab.fault(UEFI, "link-down")
    stands = (": nothing taken for ", ": broke off after ")
    until("its download is told to stand still", lambda: is_told(*stands), FAILED_LIMIT)
    return inspection
