"""Racks of real virtual hosts for the tests of this folder."""

import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from provisioner.core.manifest import Manifest
from provisioner.lab import Lab, LabHost
from provisioner.lab.site import Site
from tests.lab.sites import (
    BOOT_LIMIT,
    a_site,
    account_of,
    deploy,
    disk_path,
    host_of,
    put_old_system,
    reached,
    until,
)

OLDER, NEWER = "2026.11.1", "2026.11.2"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Fleet:
    """A running service whose hosts lab-1 (BIOS) and lab-2 (UEFI) run the older release.

    All firmware here tries the network first, always. lab-3 is known to nobody, and has a
    system of its own on its disk.
    """

    site: Site
    older: Manifest
    newer: Manifest
    names: tuple[str, str] = ("lab-1", "lab-2")
    stranger: str = "lab-3"

    def running_on(self, name: str) -> Manifest:
        """Return the release that a known host runs."""
        digest = host_of(self.site, name)["release"]
        return next(one for one in (self.older, self.newer) if one.digest == digest)

    def bring_up(self, name: str) -> str:
        """Return the address of a known host that answers ssh, switching it on if it is off."""
        with self.site.client() as client:
            rows = [row for row in client.operations(host=name) if row["kind"] == "deployment"]
        address: str = rows[0]["evidence"]["address"]
        self.site.lab.power(name, "on")
        answers = ["timeout", "5", "bash", "-c", f"read -r line < /dev/tcp/{address}/22"]
        until(
            f"{name} answers ssh at {address}",
            lambda: self.site.lab.run(answers).returncode == 0,
            BOOT_LIMIT,
        )
        return address


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of the fleet come last, in a row: its hosts go on running from one to the
    next, and no other rack has to share the machine with them."""
    items.sort(key=lambda item: "fleet" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what is known of its hosts then."""
    report = yield
    if report.failed:
        for site in _sites_of(item):
            for host in site.lab.hosts:
                account = account_of(site, {"host": host.name})
                report.sections.append((f"{host.name}, as it was found", account))
    return report


def _sites_of(item: pytest.Item) -> list[Site]:
    """Return the running sites among a test's fixtures, or in one of them."""
    found: list[Site] = []
    for value in getattr(item, "funcargs", {}).values():
        for part in value if isinstance(value, tuple) else (value,):
            site = getattr(part, "site", part)
            if isinstance(site, Site) and site not in found:
                found.append(site)
    return [site for site in found if site.processes]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Say something that is read also when the test passes."""

    def say(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return say


@pytest.fixture
def lab_directory(tmp_path: Path) -> Iterator[Path]:
    """A place for a lab, which is taken down afterwards whatever became of it."""
    directory = tmp_path / "lab"
    yield directory
    if (directory / "lab.json").exists():
        Lab.open(directory).down()


@pytest.fixture(scope="module")
def lab_rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A BIOS host lab-1 and a UEFI host lab-2, both off, shared by the tests of a module."""
    directory = tmp_path_factory.mktemp("rack") / "lab"
    with Lab.up(directory, [LabHost("bios"), LabHost("uefi")]) as rack:
        yield rack
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The fleet, after its first deployment. Deploying takes minutes, so it is shared: a test
    may reimage the known hosts, and leaves them proven, and running if they can."""
    hosts = [
        LabHost("bios", boot_order="network-first"),
        LabHost("uefi", boot_order="network-first"),
        LabHost("bios", boot_order="network-first", disks_mib=(64,)),
    ]
    directory = tmp_path_factory.mktemp("fleet")
    # A host that misses the network, on a busy machine, is netbooted anew by the next rung.
    with a_site(directory, hosts, {"limits": {"netbooting_s": 180}}) as site:
        older, newer = site.publish(OLDER), site.publish(NEWER)
        fleet = Fleet(site, older, newer)
        put_old_system(disk_path(site, fleet.stranger))
        for host in site.lab.hosts[:2]:
            site.enrol(host)
        for operation in deploy(site, fleet.names, older.name).values():
            reached(site, operation, "succeeded")
        yield fleet
