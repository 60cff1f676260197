"""Looks at processes of this machine: who has which children, and who is gone."""

import time
from collections.abc import Callable
from pathlib import Path


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return as soon as it holds; fail when it does not come to hold in time."""
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, "it did not come to hold in time"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        listed += [int(child) for child in task.read_text().split()]
    return listed


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; whether its parent has noticed does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
