"""One reimage by us and one by hand, each split into the same stages by what was observed.

A stage ends with something seen from outside: a power-on, a request, a line on the serial
console. The stages of one run add up to its total.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.client import Client
from provisioner.errors import DeviceError, Unavailable
from provisioner.lab.lab import Lab
from provisioner.lab.model import Host
from provisioner.lab.site import Site
from script.bench_parts import floor_image, servers
from script.bench_parts.console_marks import ConsoleMarks, Mark
from script.bench_parts.floor_image import FloorFiles
from script.bench_parts.machine import MemoryWatch

RUN_LIMIT: Final = timedelta(minutes=15)
IPMITOOL_LIMIT_S: Final = 30
POLL_S: Final = 1.0
EVENTS_MAX: Final = 1000
SETTLE_LIMIT: Final = timedelta(seconds=30)

# In the order in which they end.
STAGES: Final = (
    "request to power on",
    "power on to boot script",
    "boot script to kernel",
    "kernel to first write",
    "write to restart",
    "restart to new kernel",
    "kernel to cloud-init finished",
    "cloud-init finished to active",
)

# An unrelated system that is up: it halts, and its disk holds nothing else.
_BOOT_SECTOR: Final = b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"
_NEW_SYSTEM: Final = {
    "system": r"\[ *(\d+\.\d+)\] cloud-init\[\d+\]: Cloud-init v",
    "finished": r"\[ *(\d+\.\d+)\] cloud-init\[\d+\]: Cloud-init v\S* \S+ finished at|"
    r"Cloud-init v\. \S+ finished at",
}
_OURS: Final = {
    "init": r"\[ *(\d+\.\d+)\] provisioner: op_",
    "write": r"provisioner: permission to write",
    **_NEW_SYSTEM,
}
_FLOOR: Final = {
    "init": r"\[ *(\d+\.\d+)\] floor: begin",
    "write": r"floor: begin",
    "written": r"floor: written",
    "synced": r"floor: synced",
    "checked": r"floor: checked",
    "failed": r"floor: FAILED",
    **_NEW_SYSTEM,
}


@dataclass(frozen=True)
class Run:
    """Seconds of each stage in order, of what happened within stages, and in all.

    evidence is what the service keeps of an operation of ours.
    """

    stages: dict[str, float]
    inner: dict[str, float]
    total_s: float
    service_peak_mib: float = 0.0
    service_by_name: Mapping[str, float] | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


def prepare_host(lab: Lab, host: Host) -> None:
    """Leave the host on, running something unrelated from an otherwise empty disk."""
    lab.power(host.name, "off")
    disk = host.disks[0]
    with Path(disk.path).open("r+b") as file:
        file.truncate(0)
        file.write(_BOOT_SECTOR)
        file.truncate(disk.size_bytes)
    start = len(lab.console(host.name))
    lab.power(host.name, "on")
    lab.wait_for_console(host.name, "Booting from Hard Disk", limit=SETTLE_LIMIT, start=start)


def run_ours(site: Site, host: Host, release: str) -> Run:
    """Reimage the host by the service, which runs, and return what took how long."""
    lab = site.lab
    boots_before = len(lab.boots(host.name))
    watch = MemoryWatch([process.pid for process in site.processes])
    with watch, ConsoleMarks(lab.console_path(host.name), _OURS) as console:
        began = time.time()
        with site.client() as client:
            (asked,) = client.deploy([host.name], release, soft_shutdown=False)
            operation = _wait(client, asked["id"])
        if operation["phase"] != "succeeded":
            raise DeviceError("the reimage failed", host=host.name, found=operation["error"])
        console.wait_for("finished", limit=timedelta(seconds=5))
    with site.client() as client:
        events = [
            e for e in client.host_events(host.name, limit=EVENTS_MAX) if _epoch(e["at"]) >= began
        ]
    (_keep(lab, host) / "operation.json").write_text(json.dumps([operation, events], indent=1))
    script = next(_epoch(e["at"]) for e in events if "deploy ramdisk" in e["text"])
    stages = _stages(
        began, _boots(lab, host, boots_before), script, console.marks, _epoch(operation["ended_at"])
    )
    inner = {
        f"agent {name}": float(s) for name, s in operation["evidence"]["agent_seconds"].items()
    }
    inner |= {f"phase {name}": float(s) for name, s in operation["phase_seconds"].items()}
    return Run(
        stages,
        inner,
        sum(stages.values()),
        watch.peak_mib,
        watch.peak_by_name,
        operation["evidence"],
    )


def _wait(client: Client, operation_id: str) -> dict[str, Any]:
    """Return the operation when it has ended. It says itself when that was, so that looking
    rarely costs nothing."""
    deadline = time.monotonic() + RUN_LIMIT.total_seconds()
    while time.monotonic() < deadline:
        operation: dict[str, Any] = client.operation(operation_id)
        if operation["is_final"]:
            return operation
        time.sleep(POLL_S)
    raise Unavailable(f"operation {operation_id} took longer than {RUN_LIMIT}")


def run_floor(lab: Lab, host: Host, files: FloorFiles, script: str) -> Run:
    """Do the same by hand and return what took how long. Nothing of ours runs meanwhile.

    script is the name of the iPXE script, which says how the disk is written.
    """
    boots_before = len(lab.boots(host.name))
    folder = _keep(lab, host)
    log = folder / "floor-access.log"
    log.unlink(missing_ok=True)
    boot_file = f"{floor_image.URL}/{script}"
    with (
        servers.nginx(lab, folder, files.folder, floor_image.PORT, log=log),
        servers.dnsmasq(lab, folder, boot_file),
        ConsoleMarks(lab.console_path(host.name), _FLOOR) as console,
    ):
        began = time.time()
        _power_cycle_to_network(lab, host)
        console.wait_for("finished", limit=RUN_LIMIT, unless="failed")
    marks = console.marks
    stages = _stages(began, _boots(lab, host, boots_before), _asked_at(log, script), marks, None)
    inner = {
        "floor dd": marks["written"].at - marks["write"].at,
        "floor sync": marks["synced"].at - marks["written"].at,
    }
    if "checked" in marks:
        inner["floor check"] = marks["checked"].at - marks["synced"].at
    return Run(stages, inner, sum(stages.values()))


def _stages(
    began: float,
    boots: Sequence[float],
    script: float,
    marks: Mapping[str, Mark],
    active: float | None,
) -> dict[str, float]:
    """Return the seconds of each stage. A kernel's start is told by its own clock's age."""
    ends = [
        boots[0],
        script,
        _kernel_start(marks["init"]),
        marks["write"].at,
        boots[1],
        _kernel_start(marks["system"]),
        marks["finished"].at,
    ]
    if active is not None:
        ends.append(active)
    starts = [began, *ends]
    return {
        name: round(end - start, 3) for name, start, end in zip(STAGES, starts, ends, strict=False)
    }


def _kernel_start(mark: Mark) -> float:
    return mark.at - float(mark.said)


def _boots(lab: Lab, host: Host, before: int) -> list[float]:
    boots = lab.boots(host.name)[before:]
    if len(boots) != 2:
        raise Unavailable("the host did not start twice", found=[boot.cause for boot in boots])
    return [datetime.fromisoformat(boot.at).timestamp() for boot in boots]


def _asked_at(log: Path, name: str) -> float:
    """Return when nginx had answered the first request for that file."""
    for line in log.read_text().splitlines():
        if line.endswith(f"/{name}"):
            return float(line.split()[0])
    raise Unavailable("the floor's boot script was not asked for", found=log.read_text()[-500:])


def _power_cycle_to_network(lab: Lab, host: Host) -> None:
    """Hard off, next boot from the network, on: as an operator would type it."""
    secret = Path(host.directory) / "ipmi-password"
    secret.touch(mode=0o600)
    secret.write_text(host.bmc.password)
    # Cipher 3 is named, because ipmitool else asks for a list that ipmi_sim does not have.
    login = ["-I", "lanplus", "-C", "3", "-H", host.bmc.address, "-U", host.bmc.user]
    for command in (("power", "off"), ("bootdev", "pxe"), ("power", "on")):
        subprocess.run(
            [*lab.nsenter_argv(), "ipmitool", "-f", str(secret), *login, "chassis", *command],
            check=True,
            capture_output=True,
            timeout=IPMITOOL_LIMIT_S,
        )


def _keep(lab: Lab, host: Host) -> Path:
    folder = lab.directory.parent / f"kept-{host.name}"
    folder.mkdir(exist_ok=True)
    return folder


def _epoch(text: Any) -> float:
    return datetime.fromisoformat(str(text)).timestamp()
