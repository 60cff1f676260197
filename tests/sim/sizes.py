"""How much there is of everything in a run, and how often what happens."""

from dataclasses import dataclass
from typing import Final

from provisioner.core.fleet import NO_LIMIT, Floor


@dataclass(frozen=True)
class Size:
    """How much there is of everything. `intensities` are faults planned for one reimage on
    average, taken in turn by the seeds; some find nothing to spoil. What is called a share is
    how likely it is: that a reimage is cancelled, that a host is restarted by hand right before
    one, that a release is revoked in a run, that a host is flagged in one for a while, that a
    host tries its network first, that failures are followed by attempts, that a quarantine is
    lifted before the next reimage is asked for, that a host is moved to another group in a run,
    that there are two services from the beginning, that a backup is put back in a run."""

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
    moved_share: float = 0.2
    two_services_share: float = 0.15
    restored_share: float = 0.1
    # Which group a host is in, and what is allowed in each; one of each is drawn.
    groups: tuple[str, ...] = ("web", "web", "db", "")
    group_in_flight: tuple[int, ...] = (NO_LIMIT, 1, 1, 2)
    group_starts: tuple[int, ...] = (NO_LIMIT, 1)
    group_floors: tuple[Floor, ...] = (Floor(), Floor(), Floor(hosts=1), Floor(percent=50))
    # How long an agent takes at most for each part of the image.
    chunks_s: tuple[float, ...] = (2.0, 2.0, 4.0, 20.0)
    # How likely it is for each intensity that whoever writes has to wait for a lock.
    lock_share: float = 0.001
    # Which faults there are, by the beginnings of their names: all.
    faults: tuple[str, ...] = ("",)


USUAL: Final = Size()
