"""An attacker's machines on a lab's bridge: QEMU guests that the lab, and the service, know
nothing of.

One is the attacker's own, with a program that does what a test tells it. The other is a twin
of a host of the lab, with its MAC, UUID and serial, which netboots as that host would.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.imaging import cpio
from provisioner.imaging.ramdisk import ramdisks_in
from provisioner.imaging.ramdisk_tree import PYTHON_FOLDER
from provisioner.lab import qemu
from provisioner.lab.model import BRIDGE, Bmc, Disk, Host
from provisioner.lab.site import Site
from tests.lab.sites import until

GUEST: Final = Path(__file__).with_name("attack_guest.py")
AGENT_MAIN: Final = f"{PYTHON_FOLDER}/provisioner/agent/main.py"
MAC, ADDRESS, NETMASK = "52:54:00:66:66:66", "10.77.0.66", "255.255.255.0"
BOOT_LIMIT_S: Final = 120
ORDER_LIMIT_S: Final = 90
MEMORY_MIB: Final = 512
# Far from the lab's own numbers, so that taps and BMC addresses are nobody else's.
TWIN_NUMBER: Final = 199


class Attacker:
    """The attacker's own machine, booted and waiting for orders."""

    def __init__(self, site: Site, directory: Path) -> None:
        directory.mkdir()
        self.console = directory / "console.log"
        self.capture = directory / "attacker.pcap"
        self._initrd = directory / "initrd"
        self._make_initrd(site, directory)
        add_port(site, "attacker")
        self._orders, theirs = socket.socketpair()
        with theirs:
            command = [*site.lab.nsenter_argv(), *self._command(site, theirs.fileno())]
            with (directory / "qemu.log").open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        self._pending = b""
        try:
            assert self._answer(BOOT_LIMIT_S) == {"ready": True}
        except BaseException:
            self.end()
            raise

    def does(self, action: str, **order: Any) -> Any:
        """Let it do something, and return what came of it; fail when it could not."""
        self.begins(action, **order)
        return self.result()

    def begins(self, action: str, **order: Any) -> None:
        """Let it do something that `result` is to tell of."""
        self._orders.sendall(json.dumps({"do": action, **order}).encode() + b"\n")

    def result(self) -> Any:
        answer = self._answer(ORDER_LIMIT_S)
        assert "result" in answer, f"{answer}\n{self.console.read_text(errors='replace')[-2000:]}"
        return answer["result"]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._orders.close()

    def _answer(self, limit_s: float) -> Any:
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._orders], [], [], left)[0]
            fresh = self._orders.recv(65536) if ready else b""
            assert fresh, f"the attacker is silent: {self.console.read_text(errors='replace')}"
            self._pending += fresh
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _make_initrd(self, site: Site, directory: Path) -> None:
        """Write our own ramdisk, which anybody may fetch, with another program in it."""
        with tempfile.TemporaryDirectory(dir=directory) as name:
            extra = Path(name)
            program = extra / AGENT_MAIN
            program.parent.mkdir(parents=True)
            shutil.copyfile(GUEST, program)
            (extra / "etc").mkdir()
            (extra / "etc/attack.pem").write_bytes(_a_key_of_ones_own())
            self._ramdisk = ramdisks_in(site.settings.data_dir / "ramdisks")[0]
            whole = (self._ramdisk / "initrd").read_bytes()
            padding = bytes(-len(whole) % 4)
            self._initrd.write_bytes(whole + padding + cpio.archive(extra))

    def _command(self, site: Site, orders: int) -> list[str]:
        net = f"provisioner.net={MAC},{ADDRESS},{NETMASK},"
        return [
            *(qemu.QEMU, "-name", "attacker", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-machine", "q35"),
            *("-accel", "kvm" if site.lab.accel == "kvm" else "tcg,thread=multi"),
            *("-cpu", "host" if site.lab.accel == "kvm" else "max", "-m", str(MEMORY_MIB)),
            *("-kernel", str(self._ramdisk / "vmlinuz"), "-initrd", str(self._initrd)),
            *("-append", f"console=ttyS0,115200 quiet no_timer_check panic=-1 {net}"),
            *("-serial", f"file:{self.console}"),
            *("-chardev", f"socket,id=orders,fd={orders}", "-serial", "chardev:orders"),
            *("-netdev", "tap,id=net0,ifname=attacker,script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net0,mac={MAC},romfile="),
            *("-object", f"filter-dump,id=dump0,netdev=net0,file={self.capture}"),
            *("-device", "virtio-rng-pci"),
        ]


class Twin:
    """A machine that says of itself all that a host of the lab does, and has a disk like its."""

    def __init__(self, site: Site, victim: Host, directory: Path) -> None:
        directory.mkdir()
        self.disk = Disk(
            victim.disk_serial, victim.disks[0].size_bytes, str(directory / "disk.raw")
        )
        with open(self.disk.path, "wb") as file:
            file.truncate(self.disk.size_bytes)
        self.host = replace(
            victim,
            name="twin",
            number=TWIN_NUMBER,
            bmc=Bmc(f"127.0.1.{TWIN_NUMBER}", victim.bmc.port, "", ""),  # nobody is there
            disks=(self.disk,),
            directory=str(directory),
            console=str(directory / "console.log"),
        )
        add_port(site, self.host.tap)
        self._site, self._directory = site, directory
        self.capture = directory / "twin.pcap"
        self._process: subprocess.Popen[bytes] | None = None

    def power_on(self) -> None:
        """Start it: its firmware asks the network first."""
        self._qmp, theirs = socket.socketpair()
        with theirs:
            command = qemu.command(
                self.host,
                first="network",
                accel=self._site.lab.accel,
                qmp_handle=theirs.fileno(),
                tap_handle=0,
                disks=self.host.disks,
            )
            # The lab hands its hosts their ports open; this one opens its own, in the lab's
            # network.
            port = f"tap,id=net0,ifname={self.host.tap},script=no,downscript=no"
            command[command.index("tap,id=net0,fd=0")] = port
            command += ["-object", f"filter-dump,id=dump0,netdev=net0,file={self.capture}"]
            with (self._directory / "qemu.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._site.lab.nsenter_argv(), *command],
                    cwd=self._directory,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def said(self) -> str:
        """Return its console so far."""
        console = Path(self.host.console)
        return console.read_text(errors="replace") if console.exists() else ""

    def says(self, text: str, limit: timedelta) -> None:
        """Return when its console has said so; fail with what it said instead."""
        try:
            until(f"the twin says {text!r}", lambda: text in self.said(), limit)
        except AssertionError as error:
            error.add_note(self.said()[-2000:])
            raise

    def stands_still(self) -> None:
        """Stop its processor until `goes_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def goes_on(self) -> str:
        """Let it go on, and return what it had said until then."""
        assert self._process is not None
        said = self.said()
        self._process.send_signal(signal.SIGCONT)
        return said

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._qmp.close()
            self._process = None


def add_port(site: Site, tap: str) -> None:
    """Make a port on the lab's bridge, for a machine that is not the lab's."""
    for line in (f"tuntap add dev {tap} mode tap", f"link set {tap} master {BRIDGE} up"):
        done = site.lab.run(["ip", *line.split()])
        assert done.returncode == 0, done.stderr


def be_a_hub(site: Site, *, hub: bool) -> None:
    """Let the bridge forget at once who is where, as a flooded switch does: then everybody
    hears what is sent to anybody."""
    ageing = "0" if hub else "30000"
    done = site.lab.run(["ip", "link", "set", BRIDGE, "type", "bridge", "ageing_time", ageing])
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def standing_still(host: Host) -> Iterator[None]:
    """The host's processor stands still in the block, as that of one that is slow to start."""
    process = _process_of(host)
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def _process_of(host: Host) -> int:
    """Return the QEMU of a host of the lab, which runs in the host's own directory."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().startswith("qemu") and os.readlink(
                folder / "cwd"
            ) == host.directory:
                return int(folder.name)
    raise AssertionError(f"{host.name} is off")


def _a_key_of_ones_own() -> bytes:
    """Return a key with a certificate for it that nobody signed, as PEM."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=10.77.0.1"),
                *("-keyout", "key.pem", "-out", "cert.pem"),
            ],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        return b"".join((Path(folder) / name).read_bytes() for name in ("key.pem", "cert.pem"))
