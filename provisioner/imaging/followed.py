"""Run a long program and hear each line it prints while it works; keep what it said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import IO, Final

from provisioner.imaging.tools import SHOWN_LINES_MAX, ToolFailed, find_tool, tool_environment

LOG_BYTES_MAX: Final = 4 * 1024 * 1024
LINE_BYTES_MAX: Final = 64 * 1024
# Time to remove what it put into a temporary folder.
TIDYING_LIMIT: Final = timedelta(seconds=20)


class BuildLog:
    """The lines of a build, at most bytes_max of them: the first half and the last half."""

    def __init__(self, bytes_max: int = LOG_BYTES_MAX) -> None:
        self._half = bytes_max // 2
        self._first: list[str] = []
        self._first_left = self._half
        self._last: deque[str] = deque()
        self._last_bytes = 0
        self._dropped = 0

    def add(self, line: str) -> None:
        """Keep a line (without its end)."""
        size = len(line.encode()) + 1
        if not self._last and not self._dropped and size <= self._first_left:
            self._first.append(line)
            self._first_left -= size
            return
        self._last.append(line)
        self._last_bytes += size
        while self._last_bytes > self._half:
            self._last_bytes -= len(self._last.popleft().encode()) + 1
            self._dropped += 1

    def text(self) -> str:
        """Return all that was kept, and say in its middle how much was not."""
        gap = [f"... {self._dropped} lines are left out here ..."] if self._dropped else []
        return "".join(f"{line}\n" for line in (*self._first, *gap, *self._last))


def follow(
    command: Sequence[str],
    *,
    each_line: Callable[[str], None],
    limit: timedelta,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
) -> None:
    """Run a program to its end; each_line gets every line of its output and errors, in order.

    A line that is drawn anew by carriage returns counts as it stood last; one longer
    than LINE_BYTES_MAX comes in pieces. Raises ToolFailed with the last lines when the
    program fails or takes longer than limit; it is then dead, with everything it started.
    name is what errors call it, where that is not the command's first word.
    """
    name = name or command[0]
    last: deque[str] = deque(maxlen=SHOWN_LINES_MAX)
    with subprocess.Popen(
        [find_tool(command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=tool_environment(environment or {}),
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        late = threading.Event()
        stopping = threading.Timer(limit.total_seconds(), _stop, (process, late))
        stopping.start()
        try:
            for line in _lines(process.stdout):
                last.append(line)
                each_line(line)
            code = process.wait()
        finally:
            stopping.cancel()
            if process.poll() is None:
                _end(process)
    found = "\n".join(last)
    if late.is_set():
        raise ToolFailed(
            f"{name} took too long and was stopped", expected=f"at most {limit}", found=found
        )
    if code:
        raise ToolFailed(f"{name} ended with code {code}", found=found)


def _lines(pipe: IO[bytes]) -> Iterator[str]:
    while data := pipe.readline(LINE_BYTES_MAX):
        yield data.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]


def _stop(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started, which may tidy up for a moment, and then all of it.

    Not the program alone: mmdebstrap goes on until its child is done, and would be killed
    before it has removed its tree.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(TIDYING_LIMIT.total_seconds())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
