"""Many simulated hosts with BMCs on UDP, and when anything happened to each of them.

They are the hosts of tests/parts: real HTTP and HTTPS, the agent's calls in their order. As real
agents do, they ask again after growing pauses when nobody answers.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from provisioner import wiring
from provisioner.agent.patience import FIRST_PAUSE_S, PAUSE_MAX_S
from provisioner.service.hosts import HostSpec
from provisioner.settings import Settings
from tests.faulty_bmc.faults import Faults, Traits
from tests.faulty_bmc.server import FaultyBmc, running_rack
from tests.faulty_bmc.simulated_host import Source
from tests.parts.service_site import mac
from tests.parts.simulated_host import SimulatedHost
from tests.parts.test_imaging_archive import FACTS

ACTOR: Final = "bench"
POST_S: Final = 1.0
LOOK_S: Final = 0.1


@dataclass
class RackHost(SimulatedHost):
    """A simulated host whose power is a BMC's of ours. `answered_at` is when its calls were."""

    bmc: FaultyBmc | None = None
    answered_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.on_answer = lambda _name: self.answered_at.append(time.monotonic())
        self.look_s, self.ask_again_s, self.pause_max_s = LOOK_S, FIRST_PAUSE_S, PAUSE_MAX_S

    @property
    def name(self) -> str:
        return f"r1n{self.number}"

    def boots(self) -> list[bool]:
        assert self.bmc is not None
        return [source is Source.NETWORK for source in self.bmc.host.boots()]

    def is_on(self) -> bool:
        assert self.bmc is not None
        return self.bmc.host.is_on

    def exchanged_at(self) -> list[float]:
        """Return when each exchange with its BMC began."""
        assert self.bmc is not None
        return list(self.bmc.exchanged_at)


@contextlib.contextmanager
def running_hosts(
    installed: Settings, count: int, *, listeners: Settings | None = None, answer_s: float = 0.0
) -> Iterator[list[RackHost]]:
    """Enrol so many hosts, which are on, and let them live; no service runs yet.

    They speak to the listeners of another installation where one is given. `answer_s` is how
    long a BMC takes to answer a command that it has done.
    """
    with running_rack() as rack:
        hosts = []
        for number in range(1, count + 1):
            faults = Faults(real_command_delay=answer_s)
            bmc = rack.add(faults, Traits(post_seconds=POST_S, is_on=True))
            folder = installed.data_dir
            hosts.append(
                RackHost(
                    listeners or installed, folder, number, release_id=FACTS.release_id, bmc=bmc
                )
            )
        _enrol(installed, hosts)
        for host in hosts:
            host.start()
        try:
            yield hosts
        finally:
            for host in hosts:
                host.end()
            for host in hosts:
                host.stop()


def _enrol(settings: Settings, hosts: list[RackHost]) -> None:
    service = wiring.build(settings)
    try:
        specs = [
            HostSpec(name=host.name, macs=(mac(host.number),), bmc=host.bmc.where(), profile="web")
            for host in hosts
            if host.bmc is not None
        ]
        service.hosts.add_many(specs, actor=ACTOR)
    finally:
        service.close()
