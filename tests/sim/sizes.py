"""How much there is of everything in a run, and how often what happens."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Size:
    """How much there is of everything. `intensities` are faults planned for one reimage on
    average, taken in turn by the seeds; some find nothing to spoil. What is called a share is
    how likely it is: that a reimage is cancelled, that a host is restarted by hand right before
    one, that a release is revoked in a run, that a host is flagged in one for a while, that a
    host tries its network first, that failures are followed by attempts, that a quarantine is
    lifted before the next reimage is asked for."""

    hosts_min: int = 1
    hosts_max: int = 4
    rounds: int = 2
    intensities: tuple[float, ...] = (2.0, 7.0, 11.0, 16.0)
    cancelled_share: float = 0.2
    restarted_share: float = 0.1
    revoked_share: float = 0.25
    flagged_share: float = 0.3
    network_first_share: float = 0.3
    automatic_share: float = 0.8
    released_share: float = 0.7
    # How long an agent takes at most for each part of the image.
    chunks_s: tuple[float, ...] = (2.0, 2.0, 4.0, 20.0)
    # Which faults there are, by the beginnings of their names: all.
    faults: tuple[str, ...] = ("",)


USUAL: Final = Size()
