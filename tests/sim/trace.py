"""What happened in a run, line by line; two runs with one seed have the same hash."""

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Final

LINES_KEPT: Final = 60


class Trace:
    """Keeps the last lines and a hash over all. `echo` gets every line as it comes."""

    def __init__(self, echo: Callable[[str], None] | None = None) -> None:
        self._echo = echo
        self._hash = hashlib.sha256()
        self.last: deque[str] = deque(maxlen=LINES_KEPT)

    def add(self, now_s: float, text: str) -> None:
        line = f"{now_s:10.3f}  {text}"
        self._hash.update(line.encode())
        self.last.append(line)
        if self._echo is not None:
            self._echo(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
