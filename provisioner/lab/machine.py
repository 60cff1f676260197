"""One host's power: starts and stops its QEMU, and decides what the firmware tries first.

QEMU never restarts by itself. It stops and says why, and is started anew here, so that each
boot, also one the guest asked for, follows the boot flags of that moment.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.errors import DeviceError, RequestError
from provisioner.lab import faults, network, qemu
from provisioner.lab.bmc import BootFlags, SimulatedBmc
from provisioner.lab.model import MIB, Accel, BootRecord, Disk, Host, HostStatus
from provisioner.lab.qmp import Qmp

# ipmi_sim has run one reset command twice. The second must not start the host again: the
# first start has consumed the one-time boot flag.
SAME_RESET_WINDOW: Final = timedelta(seconds=2)
LOG_TAIL_BYTES: Final = 500
# How often QEMU is asked how much a host has written. A fast host writes 2 MiB meanwhile.
WRITTEN_POLL_S: Final = 0.02


@dataclass(frozen=True)
class NextBoot:
    """A boot flag that waits: for one boot, or for all."""

    first: qemu.First
    persistent: bool

    def __str__(self) -> str:
        return f"{self.first} ({'persistent' if self.persistent else 'once'})"


# IPMI's boot devices as ipmi_sim names them. Others (cdrom, BIOS setup) are no override here.
DEVICES: Final[dict[str, qemu.First]] = {"pxe": "network", "default": "disk"}


class Machine:
    """A host with its BMC. Every change of power happens under one lock."""

    def __init__(self, host: Host, accel: Accel) -> None:
        self.host = host
        self.bmc = SimulatedBmc(host, self._chassis)
        self._accel = accel
        self._directory = Path(host.directory)
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._qmp: Qmp | None = None
        self._port: int | None = None
        self._next_boot: NextBoot | None = None
        self._reset_at: float | None = None
        self._boots = 0
        self._soft_offs = 0
        self._faults: dict[str, faults.Value] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Make the host's files and start its BMC; the host itself stays off."""
        self._directory.mkdir(parents=True)
        Path(self.host.console).touch()
        (self._directory / "boots.jsonl").touch()
        if variables := qemu.VARS.get(self.host.firmware):
            shutil.copyfile(variables, self._directory / qemu.VARS_FILE)
        for disk in self.host.disks:
            _make_disk(disk)
        await self.bmc.start()

    async def stop(self) -> None:
        """Cut the power and end the BMC."""
        await self.power_off()
        await self.bmc.stop()

    @property
    def status(self) -> HostStatus:
        """Return what is true of it now."""
        return HostStatus(
            name=self.host.name,
            power="on" if self._process else "off",
            boots=self._boots,
            soft_offs=self._soft_offs,
            next_boot=str(self._next_boot) if self._next_boot else None,
            faults=dict(self._faults),
        )

    # Power. Each of these may be asked for twice.

    async def power_on(self) -> None:
        """Start it, unless it runs."""
        async with self._lock:
            if not self._process:
                await self._start("power-on")

    async def power_off(self) -> None:
        """Cut its power: nothing in it gets to say goodbye."""
        async with self._lock:
            await self._kill()

    async def reset(self) -> bool:
        """Start it anew, and say whether that could be: a host that is off has no reset."""
        async with self._lock:
            if not self._process:
                return False
            now = asyncio.get_running_loop().time()
            window = SAME_RESET_WINDOW.total_seconds()
            if self._reset_at is None or now - self._reset_at > window:
                self._reset_at = now
                await self._kill()
                await self._start("reset")
            return True

    async def soft_off(self) -> None:
        """Press the power button: the guest's ACPI does the rest, if it listens."""
        if self._qmp and faults.SOFT_OFF_IGNORED not in self._faults:
            await self._qmp.ask("system_powerdown")

    async def settled(self) -> None:
        """Return when QEMU is up. Raises DeviceError with its last words when it is not."""
        if self._qmp and not await self._qmp.ready():
            said = (self._directory / "qemu.log").read_text(errors="replace")[-LOG_TAIL_BYTES:]
            raise DeviceError("QEMU did not start", host=self.host.name, found=said.strip())

    async def _start(self, cause: str) -> None:
        first, flag = self._take_boot_order()
        disks = self._disks()
        self._record(cause, first, flag, disks)
        self._forget()
        self._port = port = network.open_port(self.host.tap)
        if faults.DHCP_SILENT in self._faults:
            network.silence_dhcp(port, is_silent=True)
        ours, theirs = socket.socketpair()
        command = qemu.command(
            self.host,
            first=first,
            accel=self._accel,
            qmp_handle=theirs.fileno(),
            tap_handle=port,
            disks=disks,
            trouble=qemu.Trouble(
                bad_write=self._number(faults.DISK_ERROR_AT_BYTE),
                bad_read=self._number(faults.DISK_ERROR_AT_READ),
                other_first=faults.SECOND_DISK_FIRST in self._faults,
                hangs=faults.HANGS_IN_FIRMWARE in self._faults,
            ),
        )
        with theirs, (self._directory / "qemu.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self._directory,
                pass_fds=(theirs.fileno(), port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._process = process
        self._qmp = qmp = Qmp(ours, lambda event, data: self._on_event(process, event, data))
        self._later(qmp.run())
        self._later(self._reap(process))
        self._later(self._arm_power_cut(qmp))
        self._later(self._cut_power_after_bytes(process, qmp))

    async def _kill(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._forget()

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        async with self._lock:
            if self._process is process:
                self._forget()

    def _forget(self) -> None:
        self._process = self._qmp = None
        if self._port is not None:
            os.close(self._port)
            self._port = None

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_event(
        self, process: asyncio.subprocess.Process, event: str, data: dict[str, Any]
    ) -> None:
        if event == "SHUTDOWN":
            self._later(self._ended(process, restart=data["reason"] == "guest-reset"))
        elif event == "POWERDOWN":
            self._soft_offs += 1
        elif event == "BLOCK_WRITE_THRESHOLD":
            self._faults.pop(faults.POWER_CUT_AT_BYTE, None)
            self._later(self._ended(process, restart=False))

    async def _ended(self, process: asyncio.subprocess.Process, *, restart: bool) -> None:
        async with self._lock:
            # A power command may have come first; then this is old news.
            if self._process is process:
                await self._kill()
                if restart:
                    await self._start("guest-reset")

    # What the firmware tries first.

    def _take_boot_order(self) -> tuple[qemu.First, str | None]:
        """Return the device to try first and the flag that said so, consuming a one-time flag."""
        flag = self._next_boot
        if flag is None:
            network_first = (
                self.host.boot_order == "network-first" or faults.NETWORK_FIRST in self._faults
            )
            return ("network" if network_first else "disk"), None
        if flag.persistent:
            return flag.first, "persistent"
        self._next_boot = None
        return flag.first, "once"

    def _record(
        self, cause: str, first: qemu.First, flag: str | None, disks: Sequence[Disk]
    ) -> None:
        self._boots += 1
        now = datetime.now(UTC).isoformat()
        sizes = {disk.serial: disk.size_bytes for disk in disks}
        record = BootRecord(now, cause, first, flag, sizes)
        with (self._directory / "boots.jsonl").open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        with Path(self.host.console).open("a") as console:
            console.write(f"\n--- lab: boot {self._boots}, {cause}, {first} first ---\n")

    def _set_next_boot(self, device: str, flags: BootFlags) -> None:
        forgets = self._faults.get(faults.BMC_FORGETS_BOOT)
        if forgets == "all" or (forgets == "once" and not flags.persistent):
            return
        if faults.BMC_NEEDS_EFI_BIT in self._faults and not flags.efi:
            return
        first = DEVICES.get(device)
        self._next_boot = NextBoot(first, flags.persistent) if first else None

    # What the BMC asks for.

    async def _chassis(self, verb: str, subject: str, value: str, flags: BootFlags) -> str | None:
        await asyncio.sleep(float(self._faults.get(faults.BMC_SLOW) or 0))
        match verb, subject:
            case "get", "power":
                said = self._faults.get(faults.BMC_LIES_POWER) or self.status.power
                return "1" if said == "on" else "0"
            case "get", "boot":
                names = {first: name for name, first in DEVICES.items()}
                return names[self._next_boot.first] if self._next_boot else "none"
            case "set", "boot":
                self._set_next_boot(value, flags)
                return ""
            case "set", _:
                return await self._power_command(subject, value)
        return None

    async def _power_command(self, subject: str, value: str) -> str | None:
        if faults.BMC_IGNORES_POWER in self._faults:
            return ""
        match subject, value:
            case "power", "1":
                await self.power_on()
            case "power", "0":
                await self.power_off()
            case "reset", _:
                return "" if await self.reset() else None
            case "shutdown", _:
                # QEMU may not take commands yet; the BMC does not wait for that.
                self._later(self._soft_off_quietly())
            case _:
                return None
        return ""

    async def _soft_off_quietly(self) -> None:
        with contextlib.suppress(DeviceError):
            await self.soft_off()

    # Faults.

    async def add_fault(self, name: str, given: faults.Value) -> None:
        """Let the fault happen from now on. Raises RequestError for one that is not known."""
        value = faults.fault_named(name).value_from(given)
        self._faults[name] = value
        if name == faults.BMC_SILENT:
            self.bmc.freeze()
        elif name == faults.LINK_DOWN:
            network.set_port(self.host.tap, up=False)
        elif name == faults.DHCP_SILENT and self._port is not None:
            network.silence_dhcp(self._port, is_silent=True)
        elif name == faults.POWER_CUT_AT_BYTE and self._qmp:
            await self._arm_power_cut(self._qmp)
        elif name == faults.POWER_CUT_AFTER_BYTES and self._process and self._qmp:
            self._later(self._cut_power_after_bytes(self._process, self._qmp))

    async def clear_fault(self, name: str) -> None:
        """End the fault, if it is there."""
        faults.fault_named(name)
        if name not in self._faults:
            return
        del self._faults[name]
        if name == faults.BMC_SILENT:
            await self.bmc.restart()
        elif name == faults.LINK_DOWN:
            network.set_port(self.host.tap, up=True)
        elif name == faults.DHCP_SILENT and self._port is not None:
            network.silence_dhcp(self._port, is_silent=False)

    async def clear_faults(self) -> None:
        """End all faults."""
        for name in list(self._faults):
            await self.clear_fault(name)

    async def _arm_power_cut(self, qmp: Qmp) -> None:
        threshold = self._faults.get(faults.POWER_CUT_AT_BYTE)
        if threshold is not None:
            with contextlib.suppress(DeviceError):
                await qmp.ask(
                    "block-set-write-threshold",
                    **{"node-name": qemu.FIRST_BLOCKS, "write-threshold": threshold},
                )

    async def _cut_power_after_bytes(self, process: asyncio.subprocess.Process, qmp: Qmp) -> None:
        """Watch what this start of the host writes, for as long as the fault is wanted."""
        with contextlib.suppress(DeviceError):
            while (limit := self._faults.get(faults.POWER_CUT_AFTER_BYTES)) is not None:
                drives = {one["device"]: one for one in await qmp.ask("query-blockstats")}
                first = drives.get(qemu.FIRST_DISK)
                if first and first["stats"]["wr_bytes"] >= int(limit):
                    self._faults.pop(faults.POWER_CUT_AFTER_BYTES, None)
                    await self._ended(process, restart=False)
                    return
                await asyncio.sleep(WRITTEN_POLL_S)

    def _number(self, fault: str) -> int | None:
        value = self._faults.get(fault)
        return None if value is None else int(value)

    def _disks(self) -> list[Disk]:
        """Return the disks that are there at this start, faults included."""
        disks = [] if faults.NO_DISK in self._faults else list(self.host.disks)
        if disks and (small := self._faults.get(faults.SMALL_DISK)):
            disks[0] = self._extra_disk("small", disks[0].serial, int(small))
        if second := self._faults.get(faults.SECOND_DISK):
            serial = f"LAB-{self.host.name}-{len(disks)}"
            disks.append(self._extra_disk("second", serial, int(second)))
        return disks

    def _extra_disk(self, kind: str, serial: str, size_mib: int) -> Disk:
        path = self._directory / f"disk-{kind}.raw"
        disk = Disk(serial, size_mib * MIB, str(path))
        if not path.exists() or path.stat().st_size != disk.size_bytes:
            _make_disk(disk)
        return disk


def _make_disk(disk: Disk) -> None:
    """Make an empty, sparse disk. Raises RequestError when the file system does not take it."""
    try:
        with open(disk.path, "wb") as file:
            file.truncate(disk.size_bytes)
    except OSError as error:
        raise RequestError(
            f"a disk of {disk.size_bytes} bytes cannot be made at {disk.path}"
        ) from error
