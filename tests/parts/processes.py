"""Looks at processes of this machine: who has which children, and who is gone."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

LIMIT_S: Final = 60.0


def until(holds: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    """Return as soon as it holds; fail when it does not come to hold in time."""
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, "it did not come to hold in time"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed: list[int] = []
    with suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # one of its threads has
                listed += [int(child) for child in (task / "children").read_text().split()]
    return listed


def below(pid: int) -> dict[int, str]:
    """Return every process below `pid`, with its name."""
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in children(waiting.pop()):
            with suppress(OSError):
                found[child] = Path(f"/proc/{child}/comm").read_text().strip()
                waiting.append(child)
    return found


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; whether its parent has noticed does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
