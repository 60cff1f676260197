"""How long somebody has waited, by a clock that may be set meanwhile. Pauses nobody."""

from datetime import datetime, timedelta

from provisioner.core.contracts import Clock


class Waited:
    """Adds up a wait of many rounds: a pause, and what is done beside it.

    A round counts by the clock, but for its pause at least and for `round_max` more at most: a
    clock that is set back prolongs no wait, and one that is set forward does not end it.
    """

    def __init__(self, clock: Clock, round_max: timedelta) -> None:
        self._clock = clock
        self._round_max = round_max
        self._counted_until: datetime = clock()
        self._total = timedelta()

    def add(self, paused_s: float) -> timedelta:
        """Count a round with such a pause; return how long has been waited in all."""
        now, paused = self._clock(), timedelta(seconds=paused_s)
        took, self._counted_until = now - self._counted_until, now
        self._total += min(max(took, paused), paused + self._round_max)
        return self._total
