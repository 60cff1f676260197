"""What runs from a host's disk: an old system, or one of our releases with its reporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .network import NoAnswer, Refused

if TYPE_CHECKING:
    from .disks import Seed, SimDisk
    from .hosts import SimHost

BOOT_S: Final = (15.0, 60.0)
# The reporter's own, in provisioner/reporter/reporter.py.
FIRST_PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
PATIENCE_S: Final = 24 * 3600.0


class DeployedSystem:
    """A system that boots, and reports its nonce until that is accepted."""

    def __init__(self, host: SimHost, disk: SimDisk) -> None:
        self._host = host
        self._disk = disk
        self._world = host.world

    def run(self) -> None:
        self._world.scheduler.sleep(self._world.chance.uniform(*BOOT_S))
        self._host.runs_from = self._disk
        self._world.note(f"{self._host.name}: runs {self._disk.table}")
        if self._disk.seed is not None and not self._disk.is_reported:
            self._report(self._disk.seed)

    def _report(self, seed: Seed) -> None:
        scheduler = self._world.scheduler
        ends_at_s = self._world.now_s + PATIENCE_S
        pause_s = FIRST_PAUSE_S
        while self._world.now_s + pause_s < ends_at_s:
            try:
                self._world.network.phone_home(self._host, self._body(seed))
                self._disk.is_reported = True
                return
            except (NoAnswer, Refused):
                scheduler.sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSE_MAX_S)

    def _body(self, seed: Seed) -> dict[str, Any]:
        return {
            "nonce": seed.nonce,
            "release_id": self._world.shelf.release_id(str(self._disk.table)),
            "root_disk": {"name": "sda", "serial": self._disk.serial, "wwn": None},
            "boot_id": "b",
            "machine_id_digest": "m",
            "ssh_host_keys": [],
            "kernel": "6.1",
            "os_release": {"ID": "debian"},
            "failed_units": [],
        }
