"""Starts real IPMI BMCs for tests: OpenIPMI's `ipmi_sim`, each in its own process on loopback.

They power nothing: the chassis program writes down what it was asked. The simulator reads its
console from a pipe that this process holds, and so ends with it.
"""

import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from provisioner.core.model import BmcAddress, Secret
from tests.parts.ports import free_ports

USER: Final = "admin"
PASSWORD: Final = "correct-horse-42"
START_SECONDS: Final = 60.0
PORT_ATTEMPTS_MAX: Final = 5

LAN: Final = """\
name "{name}"
startlan 1
  addr 127.0.0.1 {port}
  priv_limit admin
  allowed_auths_callback none md2 md5 straight
  allowed_auths_user none md2 md5 straight
  allowed_auths_operator none md2 md5 straight
  allowed_auths_admin none md2 md5 straight
  guid a123456789abcdefa123456789abcdef
endlan
chassis_control "{directory}/chassis"
user 1 false "" "" user 1 none
user 2 true "{user}" "{password}" admin 10 none md2 md5 straight
"""

# `debug msg` prints every message as it came in, which is the only way to see boot flags:
# the simulator remembers the device alone.
COMMANDS: Final = """\
debug msg
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02
mc_enable 0x20
"""

CHASSIS: Final = """\
#!/bin/sh
# Called as: get power|boot, or set power|reset|shutdown|boot VALUE.
cd "{directory}" || exit 1
case "$1 $2" in
"get power") read -r value < power; echo "power:$value"; exit ;;
"get boot") read -r value < boot; echo "boot:$value"; exit ;;
esac
echo "$*" >> calls
[ -e delay ] && sleep "$(cat delay)"
case "$1 $2" in
"set power") echo "$3" > power ;;
"set shutdown") echo 0 > power ;;
"set boot") echo "$3" > boot ;;
esac
"""

# "Get Channel Authentication Capabilities" outside any session, IPMI v2.0 §22.13.
PROBE: Final = bytes.fromhex("0600ff07000000000000000000092018c88100388e04b5")


@dataclass(frozen=True)
class Message:
    """One IPMI request as the BMC received it."""

    netfn: int
    command: int
    data: bytes


@dataclass
class IpmiSim:
    """A running BMC on 127.0.0.1 and what it has seen."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    def where(self, *, user: str = USER, password: str = PASSWORD, port: int = 0) -> BmcAddress:
        return BmcAddress("127.0.0.1", port or self.port, user, Secret(password))

    def log(self) -> str:
        return (self.directory / "log").read_bytes().decode(errors="replace").replace("\r", "")

    def messages(self) -> list[Message]:
        """Return the requests of all sessions, in order."""
        found = re.findall(
            r"Receive message:\n channel=1 netfn=0x(\w+) cmd=0x(\w+).*\n.*\n ?([0-9a-f ]*)\n",
            self.log(),
        )
        return [Message(int(n, 16), int(c, 16), bytes.fromhex(d)) for n, c, d in found]

    def chassis(self) -> list[bytes]:
        """Return command and data of each chassis request that would change something."""
        return [
            bytes([m.command]) + m.data for m in self.messages() if m.netfn == 0 and m.command != 1
        ]

    def calls(self) -> list[str]:
        """Return what the chassis program was told to set, in order."""
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def delay(self, seconds: float) -> None:
        """Let each set call take so long; the simulator answers nothing meanwhile."""
        (self.directory / "delay").write_text(f"{seconds}\n")

    def pause(self) -> None:
        """Fall silent, as a BMC that hangs does."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def ipmitool(self, *arguments: str) -> str:
        """Return what another IPMI client prints. Cipher suite 3: the simulator has no 17."""
        password_file = self.directory / "password"
        password_file.write_text(PASSWORD)
        command = ["ipmitool", "-I", "lanplus", "-C", "3", "-H", "127.0.0.1", "-p", str(self.port)]
        command += ["-U", USER, "-f", str(password_file), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        while time.monotonic() < deadline and process.poll() is None:
            client.sendto(PROBE, ("127.0.0.1", port))
            if select.select([client], [], [], 0.1)[0]:
                return True
    return False


def _start(directory: Path, port: int) -> IpmiSim:
    (directory / "lan.conf").write_text(
        LAN.format(
            name=directory.name, port=port, directory=directory, user=USER, password=PASSWORD
        )
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["ipmi_sim", "-d", "-c", "lan.conf", "-f", "commands", "-s", "state"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return IpmiSim(directory, port, process)


def _stop(sim: IpmiSim) -> None:
    sim.process.kill()
    sim.process.wait()
    assert sim.process.stdin is not None
    sim.process.stdin.close()


@contextmanager
def running_ipmi_sim(directory: Path) -> Iterator[IpmiSim]:
    """Run one BMC, whose host is off, on a port that is free."""
    (directory / "state").mkdir(parents=True)
    (directory / "commands").write_text(COMMANDS)
    (directory / "power").write_text("0\n")
    (directory / "boot").write_text("default\n")
    (directory / "chassis").write_text(CHASSIS.format(directory=directory))
    (directory / "chassis").chmod(0o755)
    for _ in range(PORT_ATTEMPTS_MAX):  # another process may take the port in between
        sim = _start(directory, *free_ports(1))
        if _answers(sim.port, sim.process):
            break
        _stop(sim)
    else:
        raise RuntimeError(f"ipmi_sim did not start:\n{sim.log()}")
    try:
        yield sim
    finally:
        _stop(sim)


class Relay:
    """A UDP relay before a BMC: counts what clients send and loses the packets named.

    `lost` are numbers of packets, counted from 1 over both directions; `seen` is the last.

    `counts` is by RMCP+ payload type: 0x10 is an open-session request, 0x12 a login attempt
    (RAKP 1), 0x14 its proof of the password (RAKP 3).
    """

    def __init__(self, port: int, *, lost: Collection[int] = ()) -> None:
        self.counts: Counter[int] = Counter()
        self._target = ("127.0.0.1", port)
        self._lost = lost
        self.seen = 0
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._front.getsockname()[1])

    def close(self) -> None:
        os.write(self._wake_write, b".")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._front.close()

    def _is_lost(self) -> bool:
        self.seen += 1
        return self.seen in self._lost

    def _run(self) -> None:
        backs: dict[socket.socket, tuple[str, int]] = {}
        by_client: dict[tuple[str, int], socket.socket] = {}
        while True:
            watched: list[int | socket.socket] = [self._front, self._wake_read, *backs]
            ready = select.select(watched, [], [])[0]
            if self._wake_read in ready:
                break
            for back in [b for b in ready if b in backs]:
                answer = back.recv(4096)
                if not self._is_lost():
                    self._front.sendto(answer, backs[back])
            if self._front not in ready:
                continue
            packet, client = self._front.recvfrom(4096)
            if packet[4] == 6:
                self.counts[packet[5] & 0x3F] += 1
            if client not in by_client:
                by_client[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                by_client[client].connect(self._target)
                backs[by_client[client]] = client
            if not self._is_lost():
                by_client[client].send(packet)
        for back in backs:
            back.close()


@contextmanager
def running_relay(port: int, *, lost: Collection[int] = ()) -> Iterator[Relay]:
    """Run a relay to the BMC on `port`."""
    relay = Relay(port, lost=lost)
    try:
        yield relay
    finally:
        relay.close()
