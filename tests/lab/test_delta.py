"""A release moves onto disks in every state: what differs is fetched, and the disk is then the
release, byte for byte. The shipped images stand on each other, and keep their doors shut."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.manifest import Manifest
from provisioner.core.model import Json
from provisioner.lab import LabHost
from provisioner.lab.shelf import lab_recipe
from provisioner.lab.site import Site
from script.bench_parts.release_history import small_update, updates_of
from tests.lab.conftest import Tell
from tests.lab.sites import (
    MIB,
    a_site,
    differing_chunks,
    disk_path,
    host_of,
    partition_digest,
    reached,
    ssh,
    timeline,
    until,
)

pytestmark = [pytest.mark.lab, pytest.mark.soak]

NAME: Final = "lab-1"
OLDER, NEWER, WEB = "2026.11.1", "2026.11.2", "2026.11.1"
# Fetched at most, as a share of what the whole release takes: a host that ran the older
# release has written to its disk since, and what it wrote has to be put right as well.
SHARE_MAX: Final = 0.2
USED: Final = (
    "sudo mkdir -p /srv/used /var/cache/apt/archives; "
    "sudo dd if=/dev/urandom of=/srv/used/data bs=1M count=40 status=none; "
    "sudo cp -r /usr/lib/python3 /srv/used/; sudo rm -rf /srv/used/python3; "
    "echo cached | sudo tee /var/cache/apt/archives/some.deb /var/lib/dpkg/status-old >/dev/null; "
    "sudo journalctl --rotate --quiet; sync"
)
OPEN_LIMIT: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class Rack:
    """A site with one host, two releases of `debian-12`, and one of another image.

    The newer is built on the older one's file system and upgrades one package.
    """

    site: Site
    older: Manifest
    newer: Manifest
    web: Manifest
    upgraded: str

    @property
    def disk(self) -> Path:
        return disk_path(self.site, NAME)


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    recipe = lab_recipe()
    with a_site(tmp_path_factory.mktemp("delta"), [LabHost("bios")], {}) as site:
        web = site.publish(WEB, recipe=lab_recipe("debian-12-web"))
        (package,) = small_update(updates_of(recipe, web.packages)).packages
        held_back = recipe.with_packages(f"{package}/{recipe.mirrors[0].suite}")
        older = site.publish(OLDER, recipe=held_back)
        newer = site.publish(NEWER, parent=older)
        site.enrol(site.lab.host(NAME))
        yield Rack(site, older, newer, web, package)


def test_the_newer_release_upgrades_one_package_on_the_older_ones_blocks(
    rack: Rack, tell: Tell
) -> None:
    changed = {
        name
        for name, version in rack.newer.packages.items()
        if rack.older.packages.get(name) != version
    }
    assert changed == {rack.upgraded}
    assert rack.newer.packages.keys() == rack.older.packages.keys()
    assert rack.newer.parent == rack.older.digest
    moved = sum(a != b for a, b in zip(rack.older.chunks, rack.newer.chunks, strict=True))
    tell(f"{rack.upgraded}: {moved} of {len(rack.newer.distinct_chunks)} chunks differ")
    assert moved < len(rack.newer.distinct_chunks) * 0.05


def moved(rack: Rack, release: Manifest, from_what: str, tell: Tell, **options: bool) -> Json:
    """Deploy, and return the finished operation; in between the power is cut, before the new
    system starts, and the disk compared."""
    site = rack.site
    with site.client() as client:
        operation = client.deploy([NAME], release.name, **options)[0]["id"]
    reached(site, operation, "booting")
    site.lab.power(NAME, "off")
    assert differing_chunks(rack.disk, release, site.settings.data_dir) == []
    assert partition_digest(rack.disk, release, "root") == release.root_digest
    site.lab.power(NAME, "on")
    ended = reached(site, operation, "succeeded")
    evidence = ended["evidence"]
    tell(
        f"{release.name} onto {from_what}: {evidence['fetched_bytes']:,} bytes fetched, "
        f"{evidence['written_bytes']:,} written, of {release.used_bytes:,}; "
        f"seconds {evidence['agent_seconds']}"
    )
    assert host_of(site, NAME)["release"] == release.digest
    return ended


def stored_bytes(rack: Rack, release: Manifest) -> int:
    with rack.site.client() as client:
        size: int = client.release(release.digest)["stored_bytes"]
    return size


def test_a_disk_of_any_content_becomes_the_release(rack: Rack, tell: Tell) -> None:
    """Empty; used by the older release; of random bytes; of another image."""
    site = rack.site
    first = moved(rack, rack.older, "an empty disk", tell)
    ssh(site, first["evidence"]["address"], USED)

    second = moved(rack, rack.newer, "a disk that ran the release before", tell)
    fetched = second["evidence"]["fetched_bytes"]
    assert 0 < fetched < stored_bytes(rack, rack.newer) * SHARE_MAX
    ssh(site, second["evidence"]["address"], "test ! -e /srv/used")

    site.lab.power(NAME, "off")
    fill_with_random_bytes(rack.disk, rack.newer.size_bytes + 64 * MIB)
    third = moved(rack, rack.newer, "random bytes, all written", tell, full=True)
    assert third["evidence"]["written_bytes"] >= rack.newer.used_bytes

    fourth = moved(rack, rack.web, "a disk of another image", tell)
    the_web_image_serves_pages_and_nothing_else(site, fourth["evidence"]["address"])

    # A host that is compared is left as it is.
    permitted = sum("may write" in line for line in timeline(site, NAME))
    with site.client() as client:
        (asked,) = client.verify([NAME], rack.web.name)
    found = reached(site, asked["id"], "succeeded")["evidence"]
    tell(f"compared: {found}")
    assert 0 < found["differing_chunks"] < found["compared_chunks"] * SHARE_MAX
    assert sum("may write" in line for line in timeline(site, NAME)) == permitted
    assert host_of(site, NAME)["release"] == rack.web.digest

    moved(rack, rack.newer, "a disk that ran another image", tell)


def the_web_image_serves_pages_and_nothing_else(site: Site, address: str) -> None:
    until(
        "the page is served",
        lambda: site.lab.run(["curl", "-fsS", "-m", "5", f"http://{address}/"]).returncode == 0,
        OPEN_LIMIT,
    )
    rules = ssh(site, address, "sudo nft list ruleset")
    assert "hook input" in rules
    assert "policy drop" in rules
    # A listener that nobody opened a port for.
    ssh(site, address, "sudo systemd-run --quiet python3 -m http.server 8000")
    refused = ["curl", "-sS", "-m", "3", f"http://{address}:8000/"]
    assert site.lab.run(refused).returncode == 28, "it timed out: the packet was dropped"
    assert (
        ssh(
            site,
            address,
            "sudo sshd -T | grep -qx 'passwordauthentication no' && "
            "! sudo grep -qE '^[^:]+:[^!*:]' /etc/shadow && echo nobody is asked for a password",
        )
        == "nobody is asked for a password"
    )


def fill_with_random_bytes(disk: Path, length: int) -> None:
    """Overwrite the first `length` bytes, and the last, with bytes that do not repeat."""
    size = disk.stat().st_size
    with disk.open("r+b") as file:
        for offset in range(0, length, MIB):
            file.seek(offset)
            file.write(hashlib.shake_128(offset.to_bytes(8)).digest(MIB))
        file.seek(size - MIB)
        file.write(hashlib.shake_128(b"end").digest(MIB))
