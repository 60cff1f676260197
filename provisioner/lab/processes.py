"""Processes named so that a recycled pid is never mistaken for ours. Starts none."""

import os
import select
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# In /proc/PID/stat the start time is field 22; after the command's closing
# parenthesis (the command may itself hold spaces) it is the 20th. Source: proc(5).
START_TIME_FIELD = 19


@dataclass(frozen=True)
class Process:
    """A pid together with its start time in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Return the process that has this pid now. Raises ProcessLookupError when none has."""
        return cls(pid, _start_time(pid))

    @property
    def is_alive(self) -> bool:
        """Say whether this very process still runs; a zombie does not."""
        try:
            return _start_time(self.pid) == self.started
        except ProcessLookupError:
            return False

    def kill(self, *, limit: timedelta) -> bool:
        """Kill it, wait until it is gone, and say whether it went in time.

        The pidfd is opened before the start time is compared, so that the signal
        cannot reach a process that took over the pid in between.
        """
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.is_alive:
                return True
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return _ends(handle, limit)
        except ProcessLookupError:
            return True
        finally:
            os.close(handle)

    def wait(self, *, limit: timedelta) -> bool:
        """Wait for its end and say whether it came in time."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.is_alive or _ends(handle, limit)
        finally:
            os.close(handle)


def _ends(handle: int, limit: timedelta) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(limit.total_seconds() * 1000))


def _start_time(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(pid) from error
    state, *rest = text.rpartition(")")[2].split()
    if state in ("Z", "X"):
        raise ProcessLookupError(pid)
    return int(rest[START_TIME_FIELD - 1])
