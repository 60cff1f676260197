"""Counts what has been done, for the heartbeat and for the final report."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Counters in bytes, safe to use from several threads, and seconds by name of a stage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = "preparing"
        self._total = 0
        self._done = 0
        self.fetched_bytes = 0
        self.written_bytes = 0
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str, total_bytes: int) -> None:
        """Begin a phase: preparing, writing or verifying."""
        with self._lock:
            self._phase, self._total, self._done = phase, total_bytes, 0

    def add(self, *, done: int = 0, fetched: int = 0, written: int = 0) -> None:
        """Count bytes."""
        with self._lock:
            self._done += done
            self.fetched_bytes += fetched
            self.written_bytes += written

    def as_dict(self) -> dict[str, Any]:
        """Return what a heartbeat reports."""
        with self._lock:
            return {
                "phase": self._phase,
                "done_bytes": self._done,
                "total_bytes": self._total,
                "fetched_bytes": self.fetched_bytes,
                "written_bytes": self.written_bytes,
            }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure how long a stage takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 3)
