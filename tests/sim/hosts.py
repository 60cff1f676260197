"""Simulated hosts: power, firmware with a boot order, and what it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from provisioner.core.bootplan import Ramdisk
from provisioner.core.model import BootDevice

from .bmcs import SimBmc
from .deployed_system import DeployedSystem
from .network import NoAnswer
from .observations import DiskBooted
from .scheduler import FOR_EVER_S, Group

if TYPE_CHECKING:
    from .disks import SimDisk
    from .world import World

DHCP_PATIENCE_S: Final = 30.0
FIRMWARE_TRIES_AGAIN_S: Final = 45.0
SHUTDOWN_S: Final = (5.0, 60.0)
RAMDISK_FETCHED_S: Final = (5.0, 25.0)


@dataclass
class Troubles:
    """What is about to go wrong with a host; see `faults`."""

    hangs: bool = False  # its agent, at its next step
    has_no_dhcp_until_s: float = 0.0
    is_apart_until_s: float = 0.0  # no packet passes between it and the service
    is_unhealthy_until_s: float = 0.0
    ignores_power_button: bool = False
    hangs_in_firmware: bool = False  # at its next start
    next_post_s: float = 0.0  # how long its next start takes, if not as long as usual
    # Which of its next messages something happens to, and what.
    messages: list[tuple[str, str]] = field(default_factory=list)


class SimHost:
    """A physical server. `machine` is all that runs since it was switched on."""

    def __init__(
        self,
        world: World,
        number: int,
        disks: list[SimDisk],
        *,
        post_s: float,
        chunk_s: float,
        is_network_first: bool,
        tries_again: bool,
    ) -> None:
        self.world = world
        self.name = f"r1n{number}"
        self.mac = f"52:54:00:77:00:{number:02x}"
        self.uuid = f"7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f00{number:02x}"
        self.serial = f"SN-{number}"
        self.address = f"10.77.0.{100 + number}"
        self.bmc_address = f"10.78.0.{number}"
        self.disks = disks
        self.troubles = Troubles()
        self.bmc = SimBmc(world, self)
        self.is_on = False
        self.stays_off = False  # also when its power comes back
        self.runs_from: SimDisk | None = None  # the disk of the system that is up
        # Until when its BMC or it itself is broken; 0 when it never was.
        self.troubled_until_s = 0.0
        self.writing: str | None = None  # the operation whose agent has begun to write
        self.chunk_s = chunk_s
        self._post_s = post_s
        self._is_network_first = is_network_first
        self._tries_again = tries_again
        self._machine = Group(self.name)
        self._starts = 0

    # Power.

    def switch_on(self) -> None:
        self.stays_off = False
        if self.is_on:
            return
        self.is_on = True
        self._starts += 1
        self._machine = Group(f"{self.name} start {self._starts}")
        self.world.scheduler.spawn(f"{self.name} firmware", self._start, self._machine)

    def lose_power(self, seconds: float | None) -> None:
        """What a power cut does: it comes back after so many seconds, or not at all. A host
        that is told meanwhile to be off stays off."""

        def back() -> None:
            if not self.stays_off:
                self.switch_on()

        self.switch_off()
        self.stays_off = False
        if seconds is not None:
            self.world.scheduler.after(seconds, back)

    def switch_off(self) -> None:
        self.stays_off = True
        if not self.is_on:
            return
        self.is_on, self.runs_from, self.writing = False, None, None
        self.world.scheduler.kill(self._machine)

    def restart(self, why: str) -> None:
        """Power off and on; nothing happens to a host that is off."""
        if self.is_on:
            self.world.note(f"{self.name}: restarts, {why}")
            self.switch_off()
            self.switch_on()

    def press_power_button(self) -> None:
        """Only a system that is up listens to it, and not every one."""
        if self.runs_from is None or self.troubles.ignores_power_button:
            return
        start = self._starts

        def down() -> None:
            if self._starts == start:
                self.world.note(f"{self.name}: has shut down")
                self.switch_off()

        self.world.scheduler.after(self.world.chance.uniform(*SHUTDOWN_S), down)

    def restart_soon(self, why: str) -> None:
        """What a system does that restarts its own host: its own task ends meanwhile."""
        start = self._starts

        def again() -> None:
            if self._starts == start:
                self.restart(why)

        self.world.scheduler.after(0.5, again)

    @property
    def machine(self) -> Group:
        return self._machine

    # Firmware.

    def _start(self) -> None:
        scheduler = self.world.scheduler
        post_s, self.troubles.next_post_s = self.troubles.next_post_s or self._post_s, 0.0
        scheduler.sleep(post_s * self.world.chance.uniform(0.9, 1.1))
        if self.troubles.hangs_in_firmware:
            self.troubles.hangs_in_firmware = False
            self.world.note(f"{self.name}: hangs in firmware")
            scheduler.sleep(FOR_EVER_S)
        device = self.bmc.take_flag()
        network_first = self._is_network_first if device is None else device is BootDevice.NETWORK
        while True:
            for from_network in (network_first, not network_first):
                if self._boots_from_network() if from_network else self._boots_from_disk():
                    return
            if not self._tries_again:
                self.world.note(f"{self.name}: no bootable device")
                return
            scheduler.sleep(FIRMWARE_TRIES_AGAIN_S)

    def _boots_from_network(self) -> bool:
        world = self.world
        if world.now_s < self.troubles.has_no_dhcp_until_s:
            world.scheduler.sleep(DHCP_PATIENCE_S)
            return False
        world.scheduler.sleep(world.chance.uniform(1.0, 4.0))
        try:
            plan = world.network.ask_how_to_boot(self)
        except NoAnswer:
            return False
        if not isinstance(plan, Ramdisk):
            return self._boots_from_disk()
        world.note(f"{self.name}: boots the ramdisk")
        world.scheduler.sleep(world.chance.uniform(*RAMDISK_FETCHED_S))
        world.parts.agent(self, plan.ticket.reveal()).run()
        return True

    def _boots_from_disk(self) -> bool:
        for disk in self.disks:
            if disk.is_bootable:
                self.world.note(f"{self.name}: boots {disk}")
                self.world.saw(DiskBooted(self, disk))
                DeployedSystem(self, disk).run()
                return True
        return False
