"""Waiting and trying again, with a limit."""

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

FIRST_PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 5.0


def pause(seconds: float) -> None:
    """Wait that long."""
    time.sleep(seconds)


class OutOfPatience(Exception):
    """The last failure, when the time for trying again is over. `__cause__` says what it was."""


def keep_trying(
    attempt: Callable[[], T], *, patience_s: float, stop: threading.Event | None = None
) -> T:
    """Call attempt until it does not raise OSError, with growing pauses.

    Raises OutOfPatience when patience_s seconds have passed, or when stop is set.
    """
    event = stop or threading.Event()
    ends_at = time.monotonic() + patience_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except OSError as error:
            if time.monotonic() + pause_s > ends_at or event.wait(pause_s):
                raise OutOfPatience(str(error) or type(error).__name__) from error
            pause_s = min(pause_s * 2, PAUSE_MAX_S)
