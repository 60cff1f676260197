"""A lab from outside: bring it up, ask it, break it, take it down.

Holds no state but `lab.json`: any process may open a lab that another one brought up.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import provisioner
from provisioner import errors
from provisioner.errors import Conflict, DeviceError, NotFound, ProvisionerError
from provisioner.lab import faults
from provisioner.lab.kvm import choose_accel
from provisioner.lab.model import (
    DESCRIPTION,
    SOCKET,
    BootRecord,
    Description,
    Host,
    HostStatus,
    LabHost,
    describe,
    read_description,
    same_wish,
    write_description,
)
from provisioner.lab.tools import require_tools

Verb = Literal["on", "off", "soft", "reset"]

HOLDER: Final = "provisioner.lab.holder"
UP_LIMIT: Final = timedelta(seconds=30)
ANSWER_LIMIT: Final = timedelta(seconds=40)
DOWN_LIMIT: Final = timedelta(seconds=10)
KILL_LIMIT: Final = timedelta(seconds=10)
CONSOLE_POLL: Final = timedelta(milliseconds=50)
LOG_TAIL_BYTES: Final = 500
# What `down` removes; consoles and logs stay, they are what one reads afterwards.
REMOVED: Final = ("hosts/*/disk-*.raw", "hosts/*/vars.fd", "hosts/*/bmc/lan.conf", SOCKET)


class Lab:
    """A rack of QEMU hosts that is up, or whose holder has died and that awaits `down`."""

    def __init__(self, directory: Path, description: Description) -> None:
        self.directory = directory
        self.hosts = description.hosts
        self.accel = description.accel
        self._holder = description.holder
        self._keeper = description.keeper

    @classmethod
    def up(
        cls,
        directory: Path,
        hosts: Sequence[LabHost],
        *,
        accel: Literal["auto", "kvm", "tcg"] = "auto",
        kernel: Path | None = None,
    ) -> Self:
        """Bring up a rack in this directory; every host is off, and every BMC listens.

        accel `auto` takes KVM only where it was seen to boot a Linux kernel: `kernel`, or
        one in /boot. Raises Conflict when a lab is up there, ConfigError when the machine
        lacks a program, DeviceError when the rack does not start.
        """
        require_tools({host.firmware for host in hosts})
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = directory.resolve()
        with _locked(directory):
            _clear_away_a_dead_lab(directory)
            chosen = choose_accel(kernel) if accel == "auto" else accel
            shutil.rmtree(directory / "hosts", ignore_errors=True)
            write_description(directory, describe(directory, hosts, chosen))
            try:
                _start_holder(directory)
            except BaseException:
                _remove_files(directory)
                raise
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Return the lab of this directory, alive or not. Raises NotFound when there is none."""
        directory = directory.resolve()
        return cls(directory, read_description(directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def is_up(self) -> bool:
        """Say whether its holder lives, and so everything else in it."""
        return self._holder is not None and self._holder.is_alive

    def is_as(self, wanted: Sequence[LabHost]) -> bool:
        """Say whether its hosts are what is asked for here."""
        return same_wish(self.hosts, wanted)

    def down(self) -> None:
        """End everything in it and remove its disks and secrets; consoles and logs stay.

        May be called twice, and for a lab whose holder has died.
        """
        with _locked(self.directory):
            if self._holder and self._holder.is_alive:
                with contextlib.suppress(ProvisionerError):
                    self._ask("down")
                    self._holder.wait(limit=DOWN_LIMIT)
                if not self._holder.kill(limit=KILL_LIMIT):
                    raise DeviceError("the lab's holder does not die", found=self._holder.pid)
            if self._keeper:
                self._keeper.wait(limit=KILL_LIMIT)
            _remove_files(self.directory)

    def host(self, name: str) -> Host:
        """Return the host of that name. Raises NotFound."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = [host.name for host in self.hosts]
        raise NotFound("the lab has no such host", host=name, expected=names)

    def status(self) -> list[HostStatus]:
        """Return what is true of each host, as QEMU tells and not as its BMC claims."""
        return [HostStatus(**values) for values in self._ask("status")]

    def status_of(self, name: str) -> HostStatus:
        """Return what is true of one host."""
        self.host(name)
        return next(status for status in self.status() if status.name == name)

    def power(self, name: str, verb: Verb) -> HostStatus:
        """Press a button on the host itself, past its BMC and the BMC's faults."""
        return HostStatus(**self._ask("power", host=name, verb=verb))

    def fault(self, name: str, fault: str, value: faults.Value = None) -> HostStatus:
        """Let a fault of `faults.FAULTS` happen to this host from now on."""
        return HostStatus(**self._ask("fault", host=name, name=fault, value=value))

    def clear(self, name: str, fault: str | None = None) -> HostStatus:
        """End one fault of this host, or all."""
        return HostStatus(**self._ask("clear", host=name, name=fault))

    def boots(self, name: str) -> list[BootRecord]:
        """Return how the host was started each time, oldest first."""
        text = (Path(self.host(name).directory) / "boots.jsonl").read_text()
        return [BootRecord(**json.loads(line)) for line in text.splitlines()]

    def console_path(self, name: str) -> Path:
        """Return the file that its serial console is written to."""
        return Path(self.host(name).console)

    def console(self, name: str) -> str:
        """Return all that its serial console has said since the lab came up."""
        return self.console_path(name).read_text(errors="replace")

    def wait_for_console(self, name: str, text: str, *, limit: timedelta, start: int = 0) -> str:
        """Return the console from `start` (characters) on, once `text` stands in it.

        Raises DeviceError with the console's end when that takes longer than the limit.
        """
        deadline = time.monotonic() + limit.total_seconds()
        while text not in (said := self.console(name)[start:]):
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"the console did not say so within {limit.total_seconds():g} s",
                    host=name,
                    expected=text,
                    found=said[-LOG_TAIL_BYTES:],
                )
            time.sleep(CONSOLE_POLL.total_seconds())
        return said

    def nsenter_argv(self) -> list[str]:
        """Return what to put before a command to run it in the lab's network.

        Raises NotFound when the holder is gone, and the network with it.
        """
        if not self._holder or not self._holder.is_alive:
            raise self._is_gone()
        as_root = os.geteuid() == 0
        user = [] if as_root else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self._holder.pid}", *user, "--net", "--"]

    def run(
        self, command: Sequence[str], *, limit: timedelta = ANSWER_LIMIT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the lab's network to its end and return what it wrote."""
        return subprocess.run(
            [*self.nsenter_argv(), *command],
            capture_output=True,
            text=True,
            timeout=limit.total_seconds(),
            check=False,
        )

    def _is_gone(self) -> NotFound:
        return NotFound(
            f"the lab in {self.directory} has died",
            hint=f"clear it away with: provisioner lab down --dir {self.directory}",
        )

    def _ask(self, ask: str, **what: object) -> Any:
        handle = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        try:
            # By way of the directory's handle: a socket's path has 108 bytes at most.
            with socket.socket(socket.AF_UNIX) as talk, talk.makefile("rw") as lines:
                talk.settimeout(ANSWER_LIMIT.total_seconds())
                talk.connect(f"/proc/self/fd/{handle}/{SOCKET}")
                lines.write(json.dumps({"ask": ask, **what}) + "\n")
                lines.flush()
                line = lines.readline()
        except TimeoutError as error:
            raise DeviceError("the lab's holder does not answer") from error
        except OSError as error:
            raise self._is_gone() from error
        finally:
            os.close(handle)
        if not line:
            raise self._is_gone()
        reply = json.loads(line)
        if "error" in reply:
            raise _error_from(reply["error"])
        return reply["answer"]


def _start_holder(directory: Path) -> None:
    """Start the holder in namespaces of its own and return when the rack is up."""
    as_root = os.geteuid() == 0
    package_root = str(Path(provisioner.__file__).parents[1])
    with (directory / "holder.log").open("wb") as log:
        # Ends at once: the holder is nobody's child, and outlives us.
        started = subprocess.Popen(
            [
                *("setsid", "--fork", "unshare", "--net", "--pid", "--fork", "--kill-child"),
                *([] if as_root else ["--user", "--map-root-user"]),
                *(sys.executable, "-m", HOLDER, str(directory)),
            ],
            cwd="/",
            env={**os.environ, "PYTHONPATH": package_root},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        with started:
            line = _read_line(started)
    said = (directory / "holder.log").read_text(errors="replace")[-LOG_TAIL_BYTES:]
    if not line:
        raise DeviceError("the lab did not come up", found=said.strip() or "no word in time")
    outcome = json.loads(line)
    if "error" in outcome:
        raise _error_from(outcome["error"])


def _read_line(started: subprocess.Popen[bytes]) -> bytes:
    assert started.stdout is not None
    os.set_blocking(started.stdout.fileno(), False)
    deadline = time.monotonic() + UP_LIMIT.total_seconds()
    poll = select.poll()
    poll.register(started.stdout, select.POLLIN)
    text = b""
    while b"\n" not in text:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return b""
        fresh = os.read(started.stdout.fileno(), 65536)
        if not fresh:
            return b""
        text += fresh
    return text.partition(b"\n")[0]


def _clear_away_a_dead_lab(directory: Path) -> None:
    """Raise Conflict when a lab is up in this directory; else remove what one left there."""
    with contextlib.suppress(NotFound):
        if Lab.open(directory).is_up:
            raise Conflict(
                f"a lab is already up in {directory}",
                hint=f"take it down with: provisioner lab down --dir {directory}",
            )
    _remove_files(directory)


def _remove_files(directory: Path) -> None:
    for pattern in REMOVED:
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    # Last: as long as it stands, an interrupted `down` can be called again.
    (directory / DESCRIPTION).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time bring the lab of this directory up or down."""
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _error_from(values: dict[str, Any]) -> ProvisionerError:
    """Raise anew, here, an error that the holder raised."""
    kind = getattr(errors, values.get("kind", ""), ProvisionerError)
    known = {key: values.get(key) for key in ("host", "expected", "found", "hint")}
    error: ProvisionerError = kind(values["message"], **known)
    return error
