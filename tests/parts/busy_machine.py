"""What tests of deadlines do about a machine that stands still for a second, now and then."""

from collections.abc import Callable
from typing import Final

import pytest

from provisioner.errors import DeviceError

TRIES: Final = 4


def in_one_of(attempt: Callable[[], None], tries: int = TRIES) -> None:
    """Hold what `attempt` asserts, begun anew when it does not: a stall spoils one of several
    attempts, and a defect all of them."""
    for _ in range(tries - 1):
        try:
            return attempt()
        except (AssertionError, DeviceError, pytest.fail.Exception):
            continue
    return attempt()
