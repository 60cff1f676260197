"""Publishes an image of 1.5 GB, and lets the agent's code write it to a file: time and memory."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner import wiring
from provisioner.imaging.gpt import LINUX_FILESYSTEM
from provisioner.lab.lab import Lab
from provisioner.lab.model import LabHost
from provisioner.lab.site import Site
from script.bench_parts.boot_service import boot_listener, mac_of, make_site, queue_hosts
from script.bench_parts.figures import Options

IMAGE_MIB: Final = 1431
"""1.5 GB."""
DISK_MIB: Final = 4096
"""A sparse file. The lab's profile asks for 3 GiB."""
IMAGE: Final = "bench-large"
VERSION: Final = "1"
LIMIT: Final = timedelta(minutes=10)
MIB: Final = 1024 * 1024
ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LargeImage:
    """Seconds and memory of the publisher, and of the agent that then wrote the image."""

    data_mib: float
    publish_s: list[float]
    publisher_peak_mib: float
    agent_peak_mib: float
    agent_s: dict[str, float]


def measure_large_image(options: Options) -> LargeImage:
    """Publish the image `runs` times, each time anew, and write the last one to a file."""
    options.say("an image of 1.5 GB: published, and written to a file")
    folder = Path(tempfile.mkdtemp(prefix="large-", dir=options.folder))
    raw = folder / "large.raw"
    data_mib = make_large_image(raw)
    published: list[dict[str, Any]] = []
    with Lab.up(folder / "lab", [LabHost("bios")]) as lab:
        for number in range(options.runs):
            site = make_site(folder / f"site-{number}", lab, options.say)
            published.append(_publish(site, raw))
            options.say(f"published: {published[-1]}")
        agent = _write(site, folder)
    raw.unlink()
    return LargeImage(
        data_mib,
        [one["seconds"] for one in published],
        max(one["peak_mib"] for one in published),
        agent["peak_mib"],
        agent["seconds"],
    )


def make_large_image(raw: Path) -> float:
    """Make a disk with one partition, full of this machine's own files; return its MiB of data.

    They are programs, libraries and texts, as in an image, and compress as such.
    """
    with raw.open("xb") as disk:
        disk.truncate(IMAGE_MIB * MIB)
    sectors = (IMAGE_MIB - 2) * 2048
    table = f"label: gpt\nstart=2048, size={sectors}, type={LINUX_FILESYSTEM}, name=root\n"
    subprocess.run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(raw)],
        input=table.encode(),
        check=True,
    )
    left = (IMAGE_MIB - 2) * MIB
    pack = ["tar", "--create", "--one-file-system", "--directory=/", "usr"]
    # It complains of files that change meanwhile, and of us for going away.
    with (
        subprocess.Popen(pack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar,
        raw.open("r+b") as disk,
    ):
        assert tar.stdout is not None
        disk.seek(MIB)
        while left and (data := tar.stdout.read(min(left, MIB))):
            disk.write(data)
            left -= len(data)
    return IMAGE_MIB - 2 - left / MIB


def _publish(site: Site, raw: Path) -> dict[str, Any]:
    wish = {"config": str(site.config), "raw": str(raw), "image": IMAGE, "version": VERSION}
    return _child("release_publisher", wish)


def _write(site: Site, folder: Path) -> dict[str, Any]:
    """Have a host's deployment begin, and the agent's code do the rest of it, on a file."""
    disk = folder / "disks" / "vda"
    disk.parent.mkdir()
    with disk.open("xb") as file:
        file.truncate(DISK_MIB * MIB)
    (folder / "trust.json").write_bytes(wiring.trust_policy(site.settings).to_bytes())
    queue_hosts(site, f"{IMAGE}@{VERSION}")
    mac = mac_of(0)
    query = f"mac={mac.replace(':', '-')}&platform=pcbios"
    wish = {
        "script_url": f"{site.settings.boot.url}/boot/ipxe?{query}",
        "mac": mac,
        "disk": str(disk),
        "ca": str(site.settings.keys.agent_tls_pem),
        "trust": str(folder / "trust.json"),
    }
    with boot_listener(site):
        return _child("release_agent", wish, enter=site.lab.nsenter_argv())


def _child(name: str, wish: dict[str, Any], enter: list[str] | None = None) -> dict[str, Any]:
    """Run one of the bench's programs, and return what it printed."""
    done = subprocess.run(
        [*(enter or []), sys.executable, "-m", f"script.bench_parts.{name}"],
        input=json.dumps(wish).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=LIMIT.total_seconds(),
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
