"""Keeps child processes running, each for one part of the service, until told to stop.

A child that dies is started again, later each time; one that says the configuration is
wrong ends everything. Children die with this process. Knows nothing of what they do.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

import structlog

from provisioner.errors import ConfigError, ProvisionerError, Unavailable

READY_LIMIT_S: Final = 60.0
RESTARTS_MAX: Final = 8  # in a row; a child that lived for STABLE_S starts the count anew
STABLE_S: Final = 60.0
RESTART_PAUSE_S: Final = 0.5  # doubled with each death in a row
RESTART_PAUSE_MAX_S: Final = 30.0
STOP_LIMIT_S: Final = 20.0  # then they are killed
LOOK_S: Final = 1.0

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_BUG: Final = 70

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """One child. `run` is called in it with `ready`, to be called once it serves, and
    returns when the process was sent SIGTERM.

    `death_signal` is what the child gets when this process dies: SIGKILL, unless it has
    children of its own that it must end first. A part that is not vital is started again
    for ever: a broken dnsmasq must not take the API and the boot rule with it.
    """

    name: str
    run: Callable[[Callable[[], None]], None]
    death_signal: signal.Signals = signal.SIGKILL
    is_vital: bool = True


@dataclass
class _Child:
    part: Part
    pid: int = 0
    handle: int = -1  # a pidfd: readable when the child has ended
    ready: int = -1  # a pipe's end: one byte when the child serves
    started_at: float = 0.0
    deaths: int = 0
    start_at: float | None = None  # when to start it again
    is_ready: bool = False


@dataclass
class Supervisor:
    """Runs the parts until SIGTERM or SIGINT. `on_ready` is called once, when all serve."""

    parts: Sequence[Part]
    on_ready: Callable[[], None]
    _children: list[_Child] = field(default_factory=list)
    _stopping: bool = False
    _told_ready: bool = False

    def run(self) -> None:
        """Raises ConfigError when a child says so, Unavailable when one keeps dying or does
        not come up in time. All children have ended when this returns or raises."""
        wake, wake_end = socket.socketpair()
        for end in (wake, wake_end):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_on)
        self._children = [_Child(part) for part in self.parts]
        begun_at = time.monotonic()
        try:
            for child in self._children:
                self._start(child)
            while not self._stopping:
                self._wait(wake)
                self._look(begun_at)
        finally:
            self._end_all()
            signal.set_wakeup_fd(-1)
            wake.close()
            wake_end.close()

    def _stop_on(self, number: int, _frame: object) -> None:
        self._stopping = True
        log.info("stopping", signal=signal.Signals(number).name)

    def _wait(self, wake: socket.socket) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for child in self._children:
            for end in (child.handle, child.ready):
                if end >= 0:
                    poll.register(end, select.POLLIN)
        starts = [child.start_at for child in self._children if child.start_at is not None]
        patience = min([LOOK_S, *(max(at - time.monotonic(), 0) for at in starts)])
        for end, _ in poll.poll(patience * 1000):
            if end == wake.fileno():
                wake.recv(64)

    def _look(self, begun_at: float) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.ready >= 0 and _is_readable(child.ready):
                child.is_ready = os.read(child.ready, 1) == b"r" or child.is_ready
                os.close(child.ready)
                child.ready = -1
            if child.handle >= 0 and _is_readable(child.handle):
                self._bury(child, now)
            if child.start_at is not None and now >= child.start_at and not self._stopping:
                self._start(child)
        if not self._told_ready and all(child.is_ready for child in self._children):
            self._told_ready = True
            self.on_ready()
        if not self._told_ready and now - begun_at > READY_LIMIT_S:
            late = [child.part.name for child in self._children if not child.is_ready]
            raise Unavailable(
                f"not ready after {READY_LIMIT_S:.0f} s: {', '.join(late)}",
                hint="the log above says what they were doing",
            )

    def _start(self, child: _Child) -> None:
        ready, ready_end = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            _be_child(child.part, parent, ready_end)
        os.close(ready_end)
        child.pid, child.handle, child.ready = pid, os.pidfd_open(pid), ready
        child.started_at, child.start_at = time.monotonic(), None

    def _bury(self, child: _Child, now: float) -> None:
        code = _reap(child)
        if self._stopping:
            return
        if code == ConfigError.exit_code:
            raise ConfigError(
                f"{child.part.name} cannot run as configured",
                hint="its message is in the log above",
            )
        child.deaths = 1 if now - child.started_at > STABLE_S else child.deaths + 1
        if child.deaths > RESTARTS_MAX and child.part.is_vital:
            raise Unavailable(
                f"{child.part.name} ended {child.deaths} times in a row",
                found=f"exit code {code}",
                hint="the log above says why",
            )
        pause = min(RESTART_PAUSE_S * 2 ** min(child.deaths - 1, RESTARTS_MAX), RESTART_PAUSE_MAX_S)
        child.start_at = now + pause
        log.error("ended, starting it again", child=child.part.name, code=code, pause_s=pause)

    def _end_all(self) -> None:
        living = [child for child in self._children if child.handle >= 0]
        for child in living:
            signal.pidfd_send_signal(child.handle, signal.SIGTERM)
        ends_at = time.monotonic() + STOP_LIMIT_S
        for child in living:
            if not _is_readable(child.handle, max(ends_at - time.monotonic(), 0)):
                log.error("did not stop in time and is killed", child=child.part.name)
                signal.pidfd_send_signal(child.handle, signal.SIGKILL)
            _reap(child)


def run_once(part: Part, limit_s: float) -> int:
    """Run a part to its end in a child and return its exit code; it is killed at the limit."""
    ready, ready_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        _be_child(part, parent, ready_end)
    os.close(ready_end)
    child = _Child(part, pid, os.pidfd_open(pid), ready)
    if not _is_readable(child.handle, limit_s):
        log.error("takes too long and is killed", child=part.name, limit_s=limit_s)
        signal.pidfd_send_signal(child.handle, signal.SIGKILL)
    return _reap(child)


def _reap(child: _Child) -> int:
    """Collect an ended child; return its exit code, negative for a signal."""
    _, status = os.waitpid(child.pid, 0)
    os.close(child.handle)
    if child.ready >= 0:
        os.close(child.ready)
    child.handle = child.ready = -1
    return os.waitstatus_to_exitcode(status)


def _is_readable(end: int, patience_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))


def _be_child(part: Part, parent: int, ready_end: int) -> NoReturn:
    """Be the part until it ends, and leave with an exit code that says who must act."""
    code = _BUG
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Ctrl-C reaches every process of the terminal at once. A part that died of it would
        # not end its own children; the supervisor's SIGTERM ends it in order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent(parent, part.death_signal)
        name_process(f"prov-{part.name}")

        def ready() -> None:
            with contextlib.suppress(BrokenPipeError):  # it was told before, and heard
                os.write(ready_end, b"r")

        structlog.contextvars.bind_contextvars(part=part.name)
        part.run(ready)
        code = 0
    except ProvisionerError as error:
        told = {key: value for key, value in error.as_dict().items() if key != "message"}
        log.error(error.message, **told)
        code = error.exit_code
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else _BUG
    except KeyboardInterrupt:
        code = 0
    except BaseException:
        # The top of the process: our own bug. The supervisor starts it again.
        log.exception("bug")
    finally:
        os._exit(code)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when `parent`, its maker, dies."""
    _prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(0)


def name_process(name: str) -> None:
    """Show `name` in process lists; the kernel keeps 15 characters."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def _prctl(option: int, value: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
