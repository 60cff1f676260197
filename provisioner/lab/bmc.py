"""One BMC: an `ipmi_sim` of its own, and the pipes by which it asks the rack to act.

Does not decide what a chassis command means; the machine does.
"""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.errors import DeviceError
from provisioner.lab.model import INBAND_PORT, Host

IPMI_SIM: Final = "ipmi_sim"
START_LIMIT: Final = timedelta(seconds=10)
START_POLL: Final = timedelta(milliseconds=10)
READ_BYTES: Final = 65536

CONFIGURATION: Final = """\
name "{name}"
set_working_mc 0x20
  startlan 1
    addr {address} {port}
    priv_limit admin
    allowed_auths_callback none
    allowed_auths_user md5
    allowed_auths_operator md5
    allowed_auths_admin md5
    guid {guid}
    lan_config_program "./lan"
  endlan
  serial kcs {address} {inband_port} codec VM
  chassis_control "./chassis 0x20"
  user 1 false "" "" callback 1 none
  user 2 true "{user}" "{password}" admin 16 md5
"""

# `debug msg` makes ipmi_sim tell each message it receives. It hands its program only the
# boot device, so this is where one-time and persistent are told apart.
EMULATION: Final = """\
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02
sel_enable 0x20 1000 0x0a
mc_enable 0x20
debug msg
"""

# Run by ipmi_sim for each chassis command, which answers nobody meanwhile. Plain sh, two
# pipes and no other process: about 3 ms. `<>` opens a pipe without waiting for its other end.
CHASSIS: Final = """\
#!/bin/sh
exec 4<>answer
echo "$$ $2 $3 $4" >request
while read -r id verdict value <&4; do [ "$id" = "$$" ] && break; done
[ "$verdict" = ok ] || exit 1
[ -z "$value" ] || echo "$3:$value"
"""

# Run by ipmi_sim when the host, or somebody by the network, asks for the LAN configuration.
# ipmi_sim takes no address from its own `addr`.
LAN: Final = """\
#!/bin/sh
[ "$1" = get ] && shift || exit 0
for name; do
  case $name in
    ip_addr) echo "$name:{address}" ;;
    ip_addr_src) echo "$name:static" ;;
    subnet_mask) echo "$name:255.0.0.0" ;;
    *mac_addr) echo "$name:00:00:00:00:00:00" ;;
    *) echo "$name:0.0.0.0" ;;
  esac
done
"""

SET_BOOT_OPTIONS: Final = re.compile(rb"netfn=0x0 cmd=0x8 ")
BOOT_FLAGS_PARAMETER: Final = 5


@dataclass(frozen=True)
class BootFlags:
    """The options that came with a set-boot command. Source: IPMI 2.0, table 28-14."""

    persistent: bool = False
    efi: bool = False


# What the BMC passes on: verb (`get` or `set`), subject, value, and the last boot flags it
# was sent. The answer is the value asked for, or "" for done, or None to have it refused.
Chassis = Callable[[str, str, str, BootFlags], Awaitable[str | None]]


class SimulatedBmc:
    """An ipmi_sim process with its files in `<host>/bmc`."""

    def __init__(self, host: Host, chassis: Chassis) -> None:
        self._host = host
        self._chassis = chassis
        self._directory = Path(host.directory) / "bmc"
        self._process: asyncio.subprocess.Process | None = None
        self._flags = BootFlags()
        self._lines: list[bytes] = []
        self._tail = b""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start it and return when it listens. Raises DeviceError when it does not."""
        self._write_files()
        self._request = os.open(self._directory / "request", os.O_RDWR | os.O_NONBLOCK)
        self._answer = os.open(self._directory / "answer", os.O_RDWR | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._request, self._on_request)
        await self._spawn()

    async def restart(self) -> None:
        """Kill it and start it anew; what it had not yet read is lost, as with a real one."""
        await self.stop()
        await self._spawn()

    def freeze(self) -> None:
        """Let it answer nothing, not even "port unreachable"."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)

    async def stop(self) -> None:
        """End the process."""
        if self._process:
            asyncio.get_running_loop().remove_reader(self._output)
            self._process.kill()
            await self._process.wait()
            os.close(self._output)
            self._process = None

    def _write_files(self) -> None:
        (self._directory / "state").mkdir(parents=True)
        bmc = self._host.bmc
        configuration = CONFIGURATION.format(
            name=self._host.name,
            address=bmc.address,
            port=bmc.port,
            user=bmc.user,
            password=bmc.password,
            guid=self._host.uuid.replace("-", ""),
            inband_port=INBAND_PORT,
        )
        (self._directory / "lan.conf").touch(mode=0o600)
        (self._directory / "lan.conf").write_text(configuration)
        (self._directory / "sim.emu").write_text(EMULATION)
        for name, text in (("chassis", CHASSIS), ("lan", LAN.format(address=bmc.address))):
            (self._directory / name).write_text(text)
            (self._directory / name).chmod(0o700)
        os.mkfifo(self._directory / "request", 0o600)
        os.mkfifo(self._directory / "answer", 0o600)

    async def _spawn(self) -> None:
        self._output, theirs = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                IPMI_SIM,
                *("-c", "lan.conf", "-f", "sim.emu", "-s", "state"),
                cwd=self._directory,
                # It reads commands from its input, and its end would be a command, too.
                stdin=asyncio.subprocess.PIPE,
                stdout=theirs,
                stderr=asyncio.subprocess.STDOUT,
            )
        finally:
            os.close(theirs)
        asyncio.get_running_loop().add_reader(self._output, self._read_output)
        deadline = asyncio.get_running_loop().time() + START_LIMIT.total_seconds()
        while not _listens(self._host.bmc.address, self._host.bmc.port):
            if self._process.returncode is not None or deadline < asyncio.get_running_loop().time():
                raise DeviceError(
                    "ipmi_sim does not listen", host=self._host.name, found=self._said()
                )
            await asyncio.sleep(START_POLL.total_seconds())

    def _said(self) -> str:
        log = self._directory / "bmc.log"
        return log.read_text(errors="replace")[-500:] if log.exists() else ""

    def _read_output(self) -> None:
        """Take in what ipmi_sim has written so far, keep it, and note the boot flags in it."""
        try:
            fresh = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return
        if not fresh:
            asyncio.get_running_loop().remove_reader(self._output)
            return
        fresh = fresh.replace(b"\0", b"").replace(b"\r", b"")
        with (self._directory / "bmc.log").open("ab") as log:
            log.write(fresh)
        *lines, self._tail = (self._tail + fresh).split(b"\n")
        # A message is three lines: addresses, more addresses, its bytes in hexadecimal.
        self._lines = (self._lines + lines)[-len(lines) - 2 :]
        for start, _, message in zip(self._lines, self._lines[1:], self._lines[2:], strict=False):
            if SET_BOOT_OPTIONS.search(start):
                self._note_flags(message)

    def _note_flags(self, message: bytes) -> None:
        data = bytes.fromhex(message.decode("ascii", "replace"))
        if len(data) > 1 and data[0] & 0x3F == BOOT_FLAGS_PARAMETER:
            self._flags = BootFlags(persistent=bool(data[1] & 0x40), efi=bool(data[1] & 0x20))

    def _on_request(self) -> None:
        # ipmi_sim wrote the message out before it ran the program that now asks.
        self._read_output()
        for line in os.read(self._request, READ_BYTES).decode().splitlines():
            task = asyncio.get_running_loop().create_task(self._serve(line, self._flags))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, line: str, flags: BootFlags) -> None:
        asked_by, verb, subject, value = (*line.split(), "")[:4]
        verdict = await self._chassis(verb, subject, value.strip('"'), flags)
        answer = f"{asked_by} no\n" if verdict is None else f"{asked_by} ok {verdict}\n"
        os.write(self._answer, answer.encode())


def _listens(address: str, port: int) -> bool:
    """Say whether a UDP socket of this network namespace is bound there. Source: proc(5)."""
    first, second, third, fourth = (int(part) for part in address.split("."))
    wanted = f" {fourth:02X}{third:02X}{second:02X}{first:02X}:{port:04X} "
    return wanted in Path("/proc/self/net/udp").read_text()
