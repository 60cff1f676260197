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
REPORT_EVERY_S: Final = 10.0
PATIENCE_S: Final = 24 * 3600.0


class DeployedSystem:
    """A system that boots, and reports its nonce until it is proven."""

    def __init__(self, host: SimHost, disk: SimDisk) -> None:
        self._host = host
        self._disk = disk
        self._world = host.world
        self._boot_id = f"{host.name} {self._world.now_s}"

    def run(self) -> None:
        self._world.scheduler.sleep(self._world.chance.uniform(*BOOT_S))
        self._host.runs_from = self._disk
        self._world.note(f"{self._host.name}: runs {self._disk.table}")
        if self._disk.seed is not None and not self._disk.is_reported:
            self._report(self._disk.seed)

    def _report(self, seed: Seed) -> None:
        scheduler = self._world.scheduler
        ends_at_s = self._world.now_s + PATIENCE_S
        pause_s, pause_max_s = FIRST_PAUSE_S, PAUSE_MAX_S
        while self._world.now_s + pause_s < ends_at_s:
            try:
                told = self._world.network.phone_home(self._host, self._body(seed))
            except NoAnswer:
                pass
            except Refused as refusal:
                if refusal.is_spent:  # it forgets its nonce, which is good no more
                    self._disk.is_reported = True
                    return
            else:
                if not told["ask_again"]:
                    self._disk.is_reported = True
                    return
                ends_at_s = self._world.now_s + PATIENCE_S
                if pause_max_s != REPORT_EVERY_S:
                    pause_s, pause_max_s = FIRST_PAUSE_S, REPORT_EVERY_S
            scheduler.sleep(pause_s)
            pause_s = min(pause_s * 2, pause_max_s)

    def _body(self, seed: Seed) -> dict[str, Any]:
        return {
            "nonce": seed.nonce,
            "release_id": self._world.shelf.release_id(str(self._disk.table)),
            "root_disk": {"name": "sda", "serial": self._disk.serial, "wwn": None},
            "boot_id": self._boot_id,
            "machine_id_digest": "m",
            "ssh_host_keys": [],
            "kernel": "6.1",
            "os_release": {"ID": "debian"},
            "failed_units": [],
        }
