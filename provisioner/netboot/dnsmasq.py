"""Runs one dnsmasq of our own in the foreground, and turns its log into events.

It restarts a dnsmasq that died, ends one that a killed service left behind, and never
touches any other.
"""

import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from provisioner.errors import ConfigError, Unavailable

RESTARTS_MAX: Final = 5  # in a row; a child that lived for STABLE_S starts the count anew
STABLE_S: Final = 60.0
RESTART_PAUSE: Final = timedelta(seconds=1)  # times the number of failures in a row
STOP_LIMIT_S: Final = 5.0
LINE_BYTES_MAX: Final = 64 * 1024
LAST_LINES_MAX: Final = 5  # kept for the error message

_EXIT_BAD_CONFIGURATION: Final = 1  # dnsmasq(8), EXIT CODES

# 3117 DHCPOFFER(br0) 10.77.0.101 52:54:00:77:00:01  | PXE(br0) 52:54:00:77:00:01 proxy
_PACKET = re.compile(
    r"dnsmasq-dhcp\[\d+\]: (?:(?P<xid>\d+) )?(?P<kind>DHCP[A-Z]+|PXE)\([^)]*\)"
    r"(?: (?P<address>\d+\.\d+\.\d+\.\d+))? (?P<mac>[0-9a-f]{2}(?::[0-9a-f]{2}){5})(?P<rest>.*)"
)
_BOOT_FILE = re.compile(r"dnsmasq-dhcp\[\d+\]: (?P<xid>\d+) bootfile name: (?P<name>.*)")
# 3117 vendor class: PXEClient:Arch:00000:UNDI:002001  | 3117 user class: iPXE
_CLASS = re.compile(r"dnsmasq-dhcp\[\d+\]: (?P<xid>\d+) (?P<of>vendor|user) class: (?P<name>.*)")
_FIRMWARES: Final = ("PXEClient", "HTTPClient")

log = structlog.get_logger(__name__)


class DhcpClient(StrEnum):
    """Who on a host asks. Firmware and iPXE mean to netboot; a ramdisk is a system as well."""

    FIRMWARE = "firmware"
    IPXE = "iPXE"
    SYSTEM = "system"


@dataclass(frozen=True)
class DhcpEvent:
    """A DHCP packet that came or went. `kind` is DISCOVER, OFFER, REQUEST, ACK, NAK, PXE or
    another message type; BOOTFILE says which file name went into the packet before."""

    kind: str
    mac: str
    address: str | None
    text: str
    client: DhcpClient = DhcpClient.SYSTEM


OnEvent = Callable[[DhcpEvent], None]


class LogReader:
    """Turns the lines of `log-dhcp` into events, one packet at a time."""

    def __init__(self) -> None:
        self._last: tuple[str | None, str] = (None, "")  # transaction and MAC
        self._client: tuple[str | None, DhcpClient] = (None, DhcpClient.SYSTEM)

    def read(self, line: str) -> DhcpEvent | None:
        """Return the event in a line, or None when it tells of no packet."""
        if found := _PACKET.search(line):
            self._last = (found["xid"], found["mac"])
            kind, rest = found["kind"].removeprefix("DHCP"), found["rest"].strip()
            client = self._client_of(found["xid"])
            return DhcpEvent(kind, found["mac"], found["address"], rest, client)
        if (found := _BOOT_FILE.search(line)) and found["xid"] == self._last[0]:
            client = self._client_of(found["xid"])
            return DhcpEvent("BOOTFILE", self._last[1], None, found["name"], client)
        if found := _CLASS.search(line):
            self._take_class(found["xid"], found["of"], found["name"])
        return None

    def _client_of(self, xid: str | None) -> DhcpClient:
        known, client = self._client
        return client if xid is not None and xid == known else DhcpClient.SYSTEM

    def _take_class(self, xid: str, of: str, name: str) -> None:
        """Learn who asks, which is logged before each packet that came. iPXE says both: it is
        a firmware that calls itself iPXE."""
        if of == "vendor" and name.startswith(_FIRMWARES):
            self._client = (xid, DhcpClient.FIRMWARE)
        elif of == "user" and "iPXE" in name:
            self._client = (xid, DhcpClient.IPXE)


class Dnsmasq:
    """A dnsmasq with one configuration file, kept running until `stop`."""

    def __init__(
        self,
        config_path: Path,
        *,
        on_event: OnEvent,
        restart_pause: timedelta = RESTART_PAUSE,
    ) -> None:
        self._restart_pause_s = restart_pause.total_seconds()
        self._command = ["dnsmasq", "--keep-in-foreground", f"--conf-file={config_path.resolve()}"]
        self._on_event = on_event
        self._reader = LogReader()
        self._last_lines: list[str] = []
        self._lock = threading.Lock()  # of these two
        self._child: subprocess.Popen[bytes] | None = None
        self._is_wanted_again = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def restart(self) -> None:
        """Start the child anew, so that it reads its files again. Takes some 50 ms, in which
        a packet may be lost. Fit for any thread.
        """
        with self._lock:
            if self._child is not None:
                self._is_wanted_again = True
                self._child.terminate()

    def stop(self) -> None:
        """Make `run` end its child and return. Fit for any thread and signal handler, and
        may come again, or when `run` has returned."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def run(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Run until `stop`. `on_start` is called whenever a child has been started.

        Raises ConfigError when dnsmasq is missing or refuses its configuration, and
        Unavailable when it died again and again.
        """
        end_leftovers(self._command)
        failures = 0
        try:
            while True:
                started_at = time.monotonic()
                code = self._run_child(on_start)
                if code is None:
                    return
                if self._is_wanted_again:
                    continue
                failures = 1 if time.monotonic() - started_at > STABLE_S else failures + 1
                self._give_up_or_log(code, failures)
                if select.select([self._wake], [], [], self._restart_pause_s * failures)[0]:
                    return
        finally:
            wake, self._wake = self._wake, -1
            os.close(wake)

    def _give_up_or_log(self, code: int, failures: int) -> None:
        said = "; ".join(self._last_lines)
        if code == _EXIT_BAD_CONFIGURATION:
            raise ConfigError("dnsmasq refuses its configuration", found=said)
        if failures > RESTARTS_MAX:
            raise Unavailable(
                f"dnsmasq ended {failures} times in a row",
                found=said,
                hint="is another DHCP server on this host bound to the same interface?",
            )
        log.warning("dnsmasq ended, starting it again", code=code, said=said)

    def _run_child(self, on_start: Callable[[], None]) -> int | None:
        """Return the exit code of one child, or None when it was ended by `stop`."""
        child = self._begin_child()
        try:
            on_start()
            if self._follow(child):
                return child.wait(STOP_LIMIT_S)
            return None
        finally:
            with self._lock:
                self._child = None
            _end(child)

    def _begin_child(self) -> subprocess.Popen[bytes]:
        try:
            with self._lock:
                self._is_wanted_again = False
                self._child = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                return self._child
        except FileNotFoundError as error:
            raise ConfigError(
                "dnsmasq is not installed", hint="apt-get install dnsmasq-base"
            ) from error

    def _follow(self, child: subprocess.Popen[bytes]) -> bool:
        """Read the child's log; return whether it ended by itself."""
        assert child.stderr is not None
        pipe = child.stderr.fileno()
        pending = b""
        while True:
            ready, _, _ = select.select([pipe, self._wake], [], [])
            if self._wake in ready:
                return False
            received = os.read(pipe, LINE_BYTES_MAX)
            if not received:
                return True
            *lines, pending = (pending + received).split(b"\n")
            pending = pending[-LINE_BYTES_MAX:]
            for line in lines:
                self._take(line.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        self._last_lines = [*self._last_lines, line][-LAST_LINES_MAX:]
        event = self._reader.read(line)
        if event is not None:
            self._on_event(event)
        else:
            log.debug("dnsmasq", line=line)


def run_dnsmasq(config_path: Path, *, on_event: OnEvent) -> None:
    """Run dnsmasq until SIGTERM or SIGINT. In a thread, use Dnsmasq and its `stop`."""
    dnsmasq = Dnsmasq(config_path, on_event=on_event)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: dnsmasq.stop())
    dnsmasq.run()


def end_leftovers(command: list[str]) -> None:
    """End dnsmasqs that an earlier, killed service left behind.

    They are known by their exact arguments: nothing else runs with our configuration file.
    (The kernel's parent-death signal would not do: it is forgotten when dnsmasq gives up
    root.)
    """
    wanted = "\0".join(command[1:])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_text().rstrip("\0").split("\0")
            is_ours = Path(arguments[0]).name == "dnsmasq" and "\0".join(arguments[1:]) == wanted
            if is_ours:
                _end_stranger(int(folder.name))
        except OSError:
            continue  # it ended meanwhile


def _end_stranger(pid: int) -> None:
    """Terminate a process that is not our child, and wait until it is gone."""
    handle = os.pidfd_open(pid)
    try:
        log.warning("ending a dnsmasq that an earlier service left behind", pid=pid)
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], STOP_LIMIT_S)[0]:
                return
    finally:
        os.close(handle)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and reap it. Fine for one that has ended."""
    if child.stderr is not None:
        child.stderr.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(STOP_LIMIT_S)
