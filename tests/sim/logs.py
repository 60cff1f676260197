"""The service's log in a simulation: nothing is written, and a bug that was caught is told of.

What a worker catches at the top of a thread it only writes down, so that the others go on.
Here that is news.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, NoReturn

import structlog

# The log of a process is one for all; a world takes what it finds after each of its events.
_CAUGHT: Final[list[tuple[str, Exception]]] = []


def be_quiet() -> None:
    """Have the service log nothing: a fault is no news here, and the trace tells what happens."""
    structlog.configure(
        processors=[_note],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )


def caught() -> list[tuple[str, Exception]]:
    """Return the bugs that were logged since it was asked last, with what was said of each."""
    found = list(_CAUGHT)
    _CAUGHT.clear()
    return found


def _note(_logger: Any, _method: str, said: MutableMapping[str, Any]) -> NoReturn:
    error = sys.exc_info()[1]
    if said.get("exc_info") and isinstance(error, Exception):
        _CAUGHT.append((str(said.get("event")), error))
    raise structlog.DropEvent
