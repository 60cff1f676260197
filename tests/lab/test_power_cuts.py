"""The power goes in the middle of the write: neither the old system nor a half-written new one
boots from then on, and the next attempt finishes what the last one began.

The soak has twenty moments. Every other run has six of them, and not always the same.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Final

import pytest

from provisioner.core.manifest import Manifest
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.conftest import Tell
from tests.lab.sites import (
    MIB,
    OLD_SYSTEM,
    TINY_SYSTEM,
    a_site,
    deploy,
    differing_chunks,
    disk_path,
    publish_tiny,
    put_old_system,
    reached,
    says,
    spoken,
    tiny_profile,
    until,
)

pytestmark = pytest.mark.lab

FAULT: Final = "power-cut-after-bytes"
CUTS_PER_HOST: Final = 10
# Early, in the middle and late in the write, by their order.
STRATA: Final = (slice(0, 3), slice(3, 7), slice(7, CUTS_PER_HOST))
IMAGE_MIB: Final = 96
DISK_MIB: Final = 160
SEED: Final = 20261125
NAMES: Final = ("lab-1", "lab-2")
# What a firmware says when no disk has anything to start.
NOTHING_TO_BOOT: Final = "No bootable device"
# A host whose firmware misses the network on a busy machine is started again.
LIMITS: Final[dict[str, object]] = {
    "netbooting_s": 90,
    "agent_silence_s": 12,
    "soft_shutdown_s": 0,
    "booting_s": 20,
}
OFF_LIMIT: Final = timedelta(minutes=5)


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Manifest]]:
    """Two BIOS hosts whose dead agents are noticed at once, and a release of 96 MiB."""
    directory = tmp_path_factory.mktemp("cuts")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)) for _ in NAMES]
    with a_site(directory, hosts, {"limits": LIMITS}) as site:
        tiny_profile(site, bus="virtio", size_min_bytes=DISK_MIB * MIB)
        for host in site.lab.hosts:
            site.enrol(host)
        yield site, publish_tiny(site, directory, "1", size_mib=IMAGE_MIB)


def moments(name: str) -> list[int]:
    """Return how many bytes are written when the lights go out: from the first write, which
    takes the old partition table away, to nearly all of the release's data."""
    chance = random.Random(f"{SEED} {name}")
    return sorted(chance.randrange(1, IMAGE_MIB * MIB * 9 // 20) for _ in range(CUTS_PER_HOST))


def one_of_each_stratum(name: str) -> list[int]:
    """Return three of them, left to real chance: in time every moment has its turn."""
    chance, known = random.SystemRandom(), moments(name)
    return [chance.choice(known[stratum]) for stratum in STRATA]


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(one_of_each_stratum, id="six"),
        pytest.param(moments, id="twenty", marks=pytest.mark.soak),
    ],
)
def test_the_power_is_cut_in_the_middle_of_the_write(
    rack: tuple[Site, Manifest], chosen: Callable[[str], list[int]], tell: Tell
) -> None:
    site, release = rack
    cuts = {name: chosen(name) for name in NAMES}
    tell(f"the power goes after so many bytes: {cuts}")
    with ThreadPoolExecutor(len(NAMES)) as pool:
        work = [pool.submit(cut_again_and_again, site, release, *cut) for cut in cuts.items()]
        for done in work:
            done.result()


def cut_again_and_again(site: Site, release: Manifest, name: str, at: Sequence[int]) -> None:
    # A system that boots, on a disk with data in several places.
    put_old_system(disk_path(site, name))
    for moment in at:
        site.lab.fault(name, FAULT, moment)
        with site.client() as client:
            operation = client.deploy([name], release.name, full=True)[0]["id"]
        until(f"{name} loses power after {moment} bytes", lambda: is_cut(site, name), OFF_LIMIT)
        ended = reached(site, operation, "failed")
        assert ended["evidence"]["disk"]["serial"] == f"LAB-{name}-0", "it was writing"
        start = len(site.lab.console(name))
        site.lab.power(name, "on")
        says(site, name, NOTHING_TO_BOOT, start=start)
        said = spoken(site, name, start)
        assert TINY_SYSTEM not in said, f"half a disk boots after {moment} bytes"
        assert OLD_SYSTEM not in said, f"what was to be replaced boots after {moment} bytes"
        site.lab.power(name, "off")
    start = len(site.lab.console(name))
    operation = deploy(site, [name], release.name)[name]
    reached(site, operation, "booting")
    says(site, name, TINY_SYSTEM, start=start)
    site.lab.power(name, "off")
    assert differing_chunks(disk_path(site, name), release, site.settings.data_dir) == []


def is_cut(site: Site, name: str) -> bool:
    """Say whether the fault has happened: it is used up, and the host is off."""
    status = site.lab.status_of(name)
    return status.power == "off" and FAULT not in status.faults
