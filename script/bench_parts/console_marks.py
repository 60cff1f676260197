"""Notes when a host's serial console says something: the host's own words as a stopwatch."""

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from provisioner.errors import Unavailable

LOOK_EVERY_S: Final = 0.02
STOP_LIMIT_S: Final = 5.0
TAIL_CHARACTERS: Final = 600


@dataclass(frozen=True)
class Mark:
    """When a pattern was first seen (seconds since the epoch), and its first group."""

    at: float
    said: str


class ConsoleMarks:
    """Watches the console from now on while the block runs."""

    def __init__(self, console: Path, patterns: Mapping[str, str]) -> None:
        self._console = console
        self._begin = console.stat().st_size
        self._patterns = {name: re.compile(text.encode()) for name, text in patterns.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.marks: dict[str, Mark] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(STOP_LIMIT_S)

    def wait_for(self, name: str, *, limit: timedelta, unless: str | None = None) -> Mark:
        """Return the mark once it is there.

        Raises Unavailable with the console's end when the limit has passed, or when the
        mark `unless` came first.
        """
        deadline = time.monotonic() + limit.total_seconds()
        while name not in self.marks:
            if time.monotonic() > deadline or (unless and unless in self.marks):
                found = self._console.read_text(errors="replace")[-TAIL_CHARACTERS:]
                raise Unavailable(f"the console did not come to “{name}”", found=found)
            time.sleep(LOOK_EVERY_S)
        return self.marks[name]

    def _run(self) -> None:
        with self._console.open("rb") as file:
            file.seek(self._begin)
            seen = b""
            while not self._stop.wait(LOOK_EVERY_S):
                fresh = file.read()
                if not fresh:
                    continue
                now = time.time()
                seen += fresh
                for name, pattern in self._patterns.items():
                    if name not in self.marks and (found := pattern.search(seen)):
                        said = found[1].decode() if pattern.groups else ""
                        self.marks[name] = Mark(now, said)
