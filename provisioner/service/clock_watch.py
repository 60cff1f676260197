"""Holds this service's clock against that of its database, which all services on it share: they
judge each other's moments, so one whose clock is wrong would end what goes well elsewhere."""

from datetime import datetime, timedelta
from typing import Final

import structlog

from provisioner.core.contracts import Clock, Store
from provisioner.core.fleet import CLOCKS_APART

log = structlog.get_logger(__name__)

LOOK_EVERY: Final = timedelta(seconds=10)
HINT: Final = "set both by NTP (`timedatectl`): until then this service's worker does nothing"


class ClockWatch:
    """Looks now and then. SQLite has no clock but ours."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._next_look: datetime | None = None
        self._is_wrong = False

    def is_wrong(self) -> bool:
        """Say whether nothing may be judged by our clock, as of the last look."""
        now = self._clock()
        # Not by the interval alone: a clock that was set back would not be looked at for long.
        if self._next_look is None or not now < self._next_look <= now + LOOK_EVERY:
            ahead = self.ahead()
            self._is_wrong = abs(ahead) > CLOCKS_APART
            if self._is_wrong:
                log.error("CLOCK IS WRONG: the worker does nothing", why=told(ahead), hint=HINT)
            self._next_look = self._clock() + LOOK_EVERY
        return self._is_wrong

    def ahead(self) -> timedelta:
        """Return how far our clock is ahead of the database's, at the least: its answer takes
        time. Less than nothing when ours is behind."""
        with self._store.read() as tx:
            before, theirs, after = self._clock(), tx.clock(), self._clock()
        if theirs is None or before <= theirs <= after:
            return timedelta()
        return before - theirs if theirs < before else after - theirs


def told(ahead: timedelta) -> str:
    """Return in words how far the two clocks are apart."""
    seconds = ahead.total_seconds()
    side = "ahead of" if seconds > 0 else "behind"
    return f"the clock here is {abs(seconds):.1f} s {side} the database's"
