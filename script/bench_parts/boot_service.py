"""The boot listener alone, as `provisioner serve` runs it, with hosts that wait to netboot.

The hosts get there by the service's own decisions; nobody performs the effects, so that they
stay there for as long as they are measured.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import provisioner
from provisioner import wiring
from provisioner.core.model import BmcAddress, Firmware, Phase, Secret
from provisioner.errors import Unavailable
from provisioner.lab.lab import Lab
from provisioner.lab.site import PROFILE, Site, lab_profile
from provisioner.service.hosts import HostSpec
from script.bench_parts import servers
from script.bench_parts.figures import Say

ACTOR: Final = "bench"
START_LIMIT: Final = timedelta(seconds=60)
HOSTS: Final = 100
IN_FLIGHT_MAX: Final = 2 * HOSTS
DECISIONS_MAX: Final = 4


def make_site(folder: Path, lab: Lab, say: Say) -> Site:
    """Return a site for many hosts at a time, with no release yet."""
    changes = {"limits": {"deployments_in_flight_max": IN_FLIGHT_MAX, "starts_per_minute_max": 0}}
    return Site.create(folder, lab, changes=changes, say=say)


def mac_of(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


def queue_hosts(site: Site, release: str) -> None:
    """Enrol the hosts and bring each to where a live boot ticket waits for it.

    Raises Unavailable when one is not: then its answers would be another thing's.
    """
    service = wiring.build(site.settings)
    try:
        service.profiles.save(PROFILE, lab_profile(site.ssh_key), actor=ACTOR)
        service.hosts.add_many([_spec(number) for number in range(HOSTS)], actor=ACTOR)
        names = [f"bench-{number}" for number in range(HOSTS)]
        asked = service.operations.request_deployment(names, release, options={}, actor=ACTOR)
        # Decisions of the worker, some 50 hosts each, and none of the performer's work.
        worker = wiring.worker(site.settings, service)
        for _ in range(DECISIONS_MAX):
            worker.start_queued()
        phases = {service.operations.show(one.id).phase for one in asked}
        if phases != {Phase.NETBOOTING}:
            raise Unavailable("not every host has a ticket", found=sorted(phases))
    finally:
        service.close()


def _spec(number: int) -> HostSpec:
    bmc = BmcAddress(f"127.0.2.{number + 1}", 623, "admin", Secret("not-a-bmc-of-anyone"))
    return HostSpec(
        f"bench-{number}", (mac_of(number),), bmc=bmc, firmware=Firmware.BIOS, profile=PROFILE
    )


@contextlib.contextmanager
def boot_listener(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """Run the boot part alone in the lab's network."""
    ready = site.directory / "bench-ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "provisioner", "serve", "--config", str(site.config)]
    command += ["--only", "boot", "--ready-file", str(ready)]
    root = str(Path(provisioner.__file__).parents[1])
    with (site.directory / "bench-serve.log").open("ab") as log:
        process = subprocess.Popen(
            [*site.lab.nsenter_argv(), *command],
            cwd=site.directory,
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + START_LIMIT.total_seconds()
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable("the boot listener did not start", found=process.returncode)
            time.sleep(0.05)
        yield process
    finally:
        servers.stop(process)
