"""The agent's own code, deploying to a file in this process: a program of its own, so that the
memory it takes is the agent's alone.

Reads a wish as JSON on standard input, writes what it took as JSON. Everything that it talks to
is the service's own.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final

from provisioner.agent.boot_args import parse_boot_args
from provisioner.agent.client import ServiceClient
from provisioner.agent.deploy import deploy
from provisioner.agent.inventory import inventory
from provisioner.agent.progress import Progress
from provisioner.agent.session import parse_session, say_hello
from provisioner.agent.target import Machine
from provisioner.core.disks import Disk

PATIENCE_S: Final = 30.0
SCRIPT_BYTES_MAX: Final = 65536


def main() -> None:
    wish: dict[str, Any] = json.load(sys.stdin)
    with urllib.request.urlopen(wish["script_url"], timeout=PATIENCE_S) as answer:
        script = answer.read(SCRIPT_BYTES_MAX).decode()
    (kernel,) = (line for line in script.splitlines() if line.startswith("kernel "))
    args = parse_boot_args(kernel)
    path = Path(wish["disk"])
    disk = Disk(path.name, "bench", None, path.stat().st_size, False, "virtio")
    # The host is the one that the service waits for, and not this machine.
    nic = {"name": "eth0", "mac": wish["mac"], "link": True}
    own = {"disks": [disk.as_dict()], "nics": [nic], "uuid": None, "serial": None}
    found = inventory() | own
    client = ServiceClient(args.agent, wish["ca"])
    session = parse_session(say_hello(client, args.ticket, found, patience_s=PATIENCE_S))
    progress = Progress()
    deploy(session, Machine((disk,), "bios", wish["trust"], str(path.parent)), client, progress)
    figures = {
        "peak_mib": peak_mib(),
        "seconds": progress.seconds,
        "fetched_bytes": progress.fetched_bytes,
    }
    print(json.dumps(figures))


def peak_mib() -> float:
    """Return the most memory that this process has had at once (proc(5), VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise AssertionError("Linux names no VmHWM")


if __name__ == "__main__":
    main()
