"""Deploys in the lab: a release to an empty disk, its small update to the host that runs it, and
the same image by hand."""

import subprocess
from dataclasses import dataclass, field
from typing import Final

from provisioner import wiring
from provisioner.core.manifest import Manifest
from provisioner.imaging.signing import load_signing_key
from provisioner.keys import RELEASE_KEY
from provisioner.lab.lab import Lab
from provisioner.lab.lending import lend
from provisioner.lab.model import LabHost
from provisioner.lab.site import Site
from script.bench_parts.figures import Options
from script.bench_parts.floor_image import CHECKED_SCRIPT, SCRIPT, FloorFiles
from script.bench_parts.reimage_runs import Run, prepare_host, run_floor, run_ours
from script.bench_parts.reimage_site import LOGIN, bench_profile, enrol, floor_files
from script.bench_parts.release_builds import Store

SSH_LIMIT_S: Final = 120
# What a host does while it runs: files come, the journal grows, apt's lists are fetched.
_USE: Final = """
sudo sh -c 'head -c 32M /dev/urandom > /var/tmp/used
mkdir -p /srv/data && cp -a /usr/share/zoneinfo /srv/data/
dd if=/dev/urandom of=/var/cache/apt/pkgcache.bin bs=1M count=8 status=none
journalctl --flush && sync'
"""


@dataclass
class LabRounds:
    """Runs of each kind; those at one place of the lists were made one after another.

    whole writes the release to an empty disk, delta its update to the host that then ran it.
    floor and checked are by hand, the second with its bytes read back and compared.
    """

    accel: str = ""
    image_mib: float = 0.0
    whole: list[Run] = field(default_factory=list)
    delta: list[Run] = field(default_factory=list)
    floor: list[Run] = field(default_factory=list)
    checked: list[Run] = field(default_factory=list)


def measure_lab(options: Options, store: Store) -> LabRounds:
    """Return the runs of all rounds."""
    old, new = store.successive[-2:]
    folder = options.folder / "lab-rounds"
    folder.mkdir(mode=0o755)
    with Lab.up(folder / "lab", [LabHost("bios")]) as lab:
        site = Site.create(folder / "site", lab, say=options.say)
        for manifest in (old, new):
            _publish(site, store, manifest)
        profile = bench_profile(site)
        files = floor_files(folder, site, old, profile)
        enrol(site, profile)
        rounds = LabRounds(lab.accel, files.image_mib)
        for number in range(1, options.runs + 1):
            _round(site, files, old, new, rounds)
            options.say(f"round {number}: {_totals(rounds)}")
        lab.power(lab.hosts[0].name, "off")
    return rounds


def _round(site: Site, files: FloorFiles, old: Manifest, new: Manifest, rounds: LabRounds) -> None:
    lab, host = site.lab, site.lab.hosts[0]
    with site.running():
        prepare_host(lab, host)
        rounds.whole.append(run_ours(site, host, old.name))
        _use(site, rounds.whole[-1].evidence["address"])
        rounds.delta.append(run_ours(site, host, new.name))
    for runs, script in ((rounds.floor, SCRIPT), (rounds.checked, CHECKED_SCRIPT)):
        prepare_host(lab, host)
        runs.append(run_floor(lab, host, files, script))


def _publish(site: Site, store: Store, manifest: Manifest) -> None:
    signer = load_signing_key(site.settings.keys.folder / RELEASE_KEY)
    service = wiring.build(site.settings)
    try:
        stored = lend(store.archive, manifest, service.archive, signers=[signer])
        wiring.registrar(service, actor="bench")(manifest, stored)
    finally:
        service.close()


def _use(site: Site, address: str) -> None:
    """Let the host have been in use."""
    *command, login = site.ssh_argv(address)
    login = f"{LOGIN}@{login.partition('@')[2]}"
    subprocess.run([*command, login, _USE], check=True, timeout=SSH_LIMIT_S)


def _totals(rounds: LabRounds) -> str:
    kinds = {"whole": rounds.whole, "delta": rounds.delta}
    kinds |= {"floor": rounds.floor, "checked floor": rounds.checked}
    return ", ".join(f"{name} {runs[-1].total_s:.1f} s" for name, runs in kinds.items())
