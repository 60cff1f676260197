"""What runs for a site ends with it, however its end comes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from provisioner.lab import Lab, LabHost
from provisioner.lab.site import Site
from tests.parts.processes import until

pytestmark = pytest.mark.lab
LIMIT_S = 60.0


def running_for(directory: Path) -> list[str]:
    """Return the command line of every process that names this directory, or works in it.

    QEMU is told short names, and is started in its host's folder.
    """
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            folder = (file.parent / "cwd").readlink()
        except OSError:
            continue
        is_there = str(directory) in line or folder.is_relative_to(directory)
        if is_there and file.parent.name != str(os.getpid()):
            found.append(line)
    return found


def test_ctrl_c_ends_the_service_with_its_dnsmasq(tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process at once, the children included."""
    with Lab.up(tmp_path / "lab", [LabHost("bios")]) as lab:
        site = Site.create(tmp_path / "site", lab)
        ready = tmp_path / "ready"
        process = subprocess.Popen(
            [
                *lab.nsenter_argv(),
                # Whatever runs the tests in the background lets its children ignore SIGINT.
                *("env", "--default-signal=INT"),
                *(sys.executable, "-m", "provisioner", "serve", "--config", str(site.config)),
                *("--only", "boot,tftp,dhcp,worker", "--ready-file", str(ready)),
            ],
            start_new_session=True,
        )
        until(lambda: ready.exists() or process.poll() is not None, 2 * LIMIT_S)
        assert process.poll() is None
        # A child has no words of its own at first: between its fork and its exec, and after.
        until(lambda: any("dnsmasq" in line for line in running_for(site.directory)), LIMIT_S)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        until(lambda: running_for(site.directory) == [], LIMIT_S)
    until(lambda: running_for(tmp_path) == [], LIMIT_S)
