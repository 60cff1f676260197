"""Processes named so that a recycled pid is never mistaken for ours. Starts none."""

import os
import select
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

# Fields of /proc/PID/stat by their places after the command, which stands in parentheses
# and may itself hold spaces. Source: proc(5), where these are fields 3, 4 and 22.
STATE: Final = 0
PARENT: Final = 1
START_TIME: Final = 19


@dataclass(frozen=True)
class Process:
    """A pid together with its start time in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Return the process that has this pid now. Raises ProcessLookupError when none has."""
        return cls(pid, _start_time(pid))

    @classmethod
    def parent_of_this_one(cls) -> "Process":
        """Return our parent, and not what it is called inside our pid namespace."""
        return cls.of(int(_fields("self")[PARENT]))

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
    fields = _fields(str(pid))
    if fields[STATE] in ("Z", "X"):
        raise ProcessLookupError(pid)
    return int(fields[START_TIME])


def _fields(pid: str) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(pid) from error
    return text.rpartition(")")[2].split()
