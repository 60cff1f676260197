"""Keeps a few BMC workers warm and gives each exchange one that can be killed.

Knows processes and deadlines. Knows nothing of IPMI: see `child.py`, which the workers run.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.errors import BmcBusy, BmcUnreachable

PROGRAM: Final = Path(__file__).with_name("child.py")

# A start takes 0.1 s on an idle machine; a host full of lab machines has taken seconds.
START_LIMIT: Final = timedelta(seconds=30)
# A worker forks for each exchange, so age does it no harm that we know of. What we do not
# know of ends here.
EXCHANGES_MAX: Final = 500
WORKERS_MAX: Final = 8
# An idle worker costs about 9 MB that it does not share with others.
IDLE_WORKERS_MAX: Final = 2
ANSWER_BYTES_MAX: Final = 65536


class WorkerLost(Exception):
    """The worker died, was killed, or said something that is no answer."""


class Worker:
    """One running `child.py`. Used by one thread at a time; never shared across a fork."""

    def __init__(self, exchanges_max: int = EXCHANGES_MAX) -> None:
        # -I and an empty environment: what the service holds there is not for this program.
        # Its own process group, so that one kill also reaches the child that it forks.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            bufsize=0,
            start_new_session=True,
        )
        self._exchanges_left = exchanges_max
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        assert self._stdin is not None
        assert self._stdout is not None
        try:
            self._read_answer(START_LIMIT)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def may_serve_again(self) -> bool:
        return self._exchanges_left > 0 and self._process.poll() is None

    def exchange(self, request: dict[str, Any], limit: timedelta) -> dict[str, Any]:
        """Return the worker's answer to one request.

        Raises TimeoutError when none came within `limit` and WorkerLost when none will come;
        the worker is then good for nothing but `kill`.
        """
        assert self._stdin is not None
        self._exchanges_left -= 1
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise WorkerLost from error
        return self._read_answer(limit)

    def _read_answer(self, limit: timedelta) -> dict[str, Any]:
        assert self._stdout is not None
        deadline = time.monotonic() + limit.total_seconds()
        watch = select.poll()
        watch.register(self._stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not watch.poll(left_ms):
                raise TimeoutError
            piece = os.read(self._stdout.fileno(), ANSWER_BYTES_MAX)
            if not piece or len(line) > ANSWER_BYTES_MAX:
                raise WorkerLost
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End the worker and what it forked, at once and for certain; harmless twice."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._stdin, self._stdout):
            if pipe is not None:
                pipe.close()


def _started(exchanges_max: int) -> Worker:
    try:
        return Worker(exchanges_max)
    except (TimeoutError, WorkerLost) as error:
        raise BmcUnreachable(
            "a BMC worker did not start",
            expected=f"ready within {START_LIMIT.total_seconds():g} s",
            hint=f"run `{sys.executable} -I {PROGRAM}` to see why; is pyghmi installed?",
        ) from error
    except OSError as error:
        raise BmcUnreachable(
            "a BMC worker did not start",
            expected="memory and file handles for a process",
            found=error.strerror,
            hint="this machine lacks them; look at what else runs on it",
        ) from error


class Workers:
    """At most `workers_max` workers, started when needed, a few of them kept warm."""

    def __init__(
        self,
        *,
        workers_max: int = WORKERS_MAX,
        idle_workers_max: int = IDLE_WORKERS_MAX,
        exchanges_max: int = EXCHANGES_MAX,
    ) -> None:
        self._exchanges_max = exchanges_max
        self._free = threading.BoundedSemaphore(workers_max)
        self._idle_max = idle_workers_max
        self._guard = threading.Lock()
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def lent(self, wait: timedelta) -> Iterator[Worker]:
        """Lend a worker; one that raised is killed, not lent again.

        Raises BmcBusy when none became free within `wait`.
        """
        if not self._free.acquire(timeout=max(0.0, wait.total_seconds())):
            raise BmcBusy(
                "no BMC worker became free in time",
                hint="many BMCs are silent at once; look at their network first",
            )
        try:
            worker = self._take()
            is_sound = False
            try:
                yield worker
                is_sound = True
            finally:
                self._put_back(worker, is_sound=is_sound)
        finally:
            self._free.release()

    def _take(self) -> Worker:
        while True:
            with self._guard:
                if self._is_closed:
                    raise BmcUnreachable("the BMC workers were stopped")
                worker = self._idle.pop() if self._idle else None
            worker = worker or _started(self._exchanges_max)
            if not worker.may_serve_again:
                worker.kill()
                continue
            with self._guard:
                self._busy.add(worker)
            return worker

    def _put_back(self, worker: Worker, *, is_sound: bool) -> None:
        with self._guard:
            self._busy.discard(worker)
            room = not self._is_closed and len(self._idle) < self._idle_max
            if is_sound and room and worker.may_serve_again:
                self._idle.append(worker)
                return
        worker.kill()

    def pids(self) -> list[int]:
        """Return the process ids of the workers alive now, busy ones first."""
        with self._guard:
            return [worker.pid for worker in (*self._busy, *self._idle)]

    def close(self) -> None:
        """Kill every worker; an exchange under way ends with BmcUnreachable."""
        with self._guard:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                # Whoever waits for its answer reaps it, but only after taking it out of the
                # set: the process id is still its own here.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
        for worker in idle:
            worker.kill()
