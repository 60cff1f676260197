"""The lock of whoever changes the release archive. It dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.errors import Unavailable

# How long to wait for another publisher, or for image gc. Most are done by then.
LOCK_WAIT: Final = timedelta(seconds=60)
_LOOK_S: Final = 0.2


@contextlib.contextmanager
def lock_held(file: Path, wait: timedelta) -> Iterator[None]:
    """Hold the lock. Raises Unavailable when somebody else does so for longer than `wait`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise Unavailable(
            f"the archive's lock {file} cannot be opened",
            found=error.strerror,
            hint="is that disk well and mounted for writing, and may this user write there?",
        ) from error
    until = time.monotonic() + wait.total_seconds()
    with lock:
        while not _is_taken(lock.fileno()):
            if time.monotonic() >= until:
                raise Unavailable(
                    "another publisher is at work on this archive",
                    hint="try again when it is done",
                )
            time.sleep(_LOOK_S)
        yield


def _is_taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
