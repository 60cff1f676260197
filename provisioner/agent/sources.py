"""Where chunks come from: the service, and the mirrors that it names.

Knows which place did not answer lately, for all threads together. Checks no bytes.
"""

import time
from typing import Final

from provisioner.agent.client import FILE_TIMEOUT_S
from provisioner.agent.http import Origin

# A place that does not answer costs each thread its timeout; where there is another, it is
# left alone for this long. Longer than the timeout: while a thread waits for the next place,
# this one must not become due again.
REST_S: Final = 2 * FILE_TIMEOUT_S


class Source:
    """One place, shared by all threads."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._rests_until = 0.0

    @property
    def is_resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def rest(self) -> None:
        """Leave this place alone for a while."""
        self._rests_until = time.monotonic() + REST_S


class Sources:
    """All places for the chunks of one release, the service first."""

    def __init__(self, release: str, service: Origin, mirrors: tuple[Origin, ...] = ()) -> None:
        self.release = release
        self.service = Source(service)
        self.mirrors = tuple(Source(origin) for origin in mirrors)

    def __str__(self) -> str:
        return ", ".join(str(source.origin) for source in self.everywhere)

    @property
    def everywhere(self) -> tuple[Source, ...]:
        return (self.service, *self.mirrors)

    def failed(self, source: Source) -> None:
        """Note that this place did not answer just now."""
        if self.mirrors:
            source.rest()
