"""What ours and the floor share: one profile, one release, hosts that are known to the service."""

from pathlib import Path
from typing import Any, Final

from provisioner.core.manifest import Manifest
from provisioner.imaging.ramdisk import build_base
from provisioner.lab.site import LAB_KERNEL, Site, cache_directory, lab_profile
from script.bench_parts.floor_image import FloorFiles, make_floor

LOGIN: Final = "bench"


def bench_profile(site: Site) -> dict[str, Any]:
    """Return the lab's profile, with nothing to wait for once the checks have passed."""
    profile = lab_profile(site.ssh_key, soak_s=0)
    profile["cloud_config"]["users"][0]["name"] = LOGIN
    return profile


def floor_files(
    folder: Path, site: Site, manifest: Manifest, profile: dict[str, Any]
) -> FloorFiles:
    """Make what the floor is served, of a release of the site, for the lab's first host."""
    site.say("the floor's image and initramfs")
    base = build_base(LAB_KERNEL, cache_directory() / "ramdisk")
    disk = folder / "release.raw"
    site.write_image(manifest, disk)
    files = make_floor(folder / "floor", base, disk, site.lab.hosts[0], profile["cloud_config"])
    disk.unlink()
    return files


def enrol(site: Site, profile: dict[str, Any]) -> None:
    """Save the profile, and add every host of the lab."""
    with site.running():
        site.save_profile(**profile)
        for host in site.lab.hosts:
            site.enrol(host)
