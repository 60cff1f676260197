"""One deployment over a BMC that lies, with everything real but the host and its agent.

Store, service, performer, worker processes and RMCP+ are real; time is the site's clock, which
passes when the performer pauses. The host does what its boot flags make it do, its agent says
what a ramdisk says, and only a system that was really written can phone home as new.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.bootplan import Ramdisk
from provisioner.core.model import BmcAddress, Operation, Phase
from provisioner.errors import BmcBusy, BmcUnreachable, ProvisionerError
from provisioner.service.performer import Performer
from provisioner.service.proof import REPORT_EVERY
from tests.faulty_bmc.faults import Faults, Traits
from tests.faulty_bmc.server import FaultyBmc, Rack, running_rack
from tests.faulty_bmc.simulated_host import Source
from tests.parts.service_site import ACTOR, Agent, Site, profile_document

# Real time: an exchange takes some 15 ms here. One that fails lasts a site's 20 s by the clock
# that is handed in, and in truth all of its limit where the BMC leaves something unanswered:
# so that is short for such a BMC, and long for one that answers, however busy this machine is.
SHORT_EXCHANGE_LIMIT: Final = timedelta(seconds=1.5)
EXCHANGE_LIMIT: Final = timedelta(seconds=60)
FAILED_EXCHANGE_S: Final = 20.0
# Less than a site's five minutes; each exchange of it is waited for in real time.
RETURN_PATIENCE: Final = timedelta(minutes=3)
# Less than elsewhere: each second of it is looked at over the network.
SOFT_SHUTDOWN: Final = timedelta(seconds=30)
STEP_S: Final = 15.0
TRIAL_LIMIT: Final = timedelta(hours=3)
# What the agent does takes a while each: 20 reports of writing, 5 s apart.
AGENT_STEP_S: Final = 5.0
WRITING_STEPS: Final = 20
FIRST_BOOT_S: Final = 30.0
OLD, NEW, HALF = "old system", "new system", "half a system"


class TimedPool(IpmiPool):
    """A pool whose failed exchanges take their time by the clock that is handed in."""

    def __init__(
        self, folder: Path, pass_: Callable[[float], None], exchange_limit: timedelta
    ) -> None:
        super().__init__(folder, exchange_limit=exchange_limit)
        self._pass = pass_

    def exchange(self, where: BmcAddress, verb: str, **arguments: object) -> object:
        try:
            return super().exchange(where, verb, **arguments)
        except BmcBusy:
            raise
        except BmcUnreachable:
            self._pass(FAILED_EXCHANGE_S)
            raise


class Trial:
    """A site with one host, whose BMC has the faults that it is given."""

    def __init__(self, site: Site, rack: Rack, pool: IpmiPool, bmc: FaultyBmc) -> None:
        self.bmc = bmc
        self.pool = pool
        self.rack = rack
        performer = Performer(
            site.store,
            site.transitions,
            pool,
            site.clock,
            soft_shutdown_limit=SOFT_SHUTDOWN,
            return_patience=RETURN_PATIENCE,
            pause=self.pass_,
        )
        self.site = replace(site, performer=performer)  # which makes a worker of its own
        self.disk, self.running = OLD, OLD
        self.netboots_without_ticket = 0
        self.meanwhile: Callable[[], None] = lambda: None  # is called whenever time has passed
        self._boots_seen = 0
        self._doing: Iterator[float] = iter(())
        self._next_at = 0.0
        document = profile_document()
        document["health"] = {"soak_s": 10, "checks": [{"type": "systemd"}]}
        site.profiles.save("web", document, actor=ACTOR)
        self.site.add_host(bmc=bmc.where())

    @property
    def host_name(self) -> str:
        return "r1n1"

    def request(self, **options: Any) -> Operation:
        """Request the one attempt whose end is looked at."""
        (operation,) = self.site.operations.request_deployment(
            [self.host_name], "tiny@1", options={"attempts": 1, **options}, actor=ACTOR
        )
        return operation

    def deploy(self, **options: Any) -> Operation:
        """Request a deployment and return it once it is over, its effects too."""
        operation = self.request(**options)
        self.go_on(operation)
        return self.site.at(operation)

    def go_on(self, operation: Operation) -> None:
        """Let time pass until the operation is over and nothing is left to do for it."""
        ends_at = self.site.clock() + TRIAL_LIMIT
        while not self.site.at(operation).is_final:
            assert self.site.clock() < ends_at, f"stuck: {self.site.at(operation)}"
            self.site.worker.tick()
            self.site.perform()
            self.pass_(STEP_S)
            if self.site.phase(operation) is Phase.PROVING:
                self.site.worker.check(operation.id)
        self.site.perform()
        for _ in range(20):  # whatever comes late, comes
            self.pass_(STEP_S)

    def pass_(self, seconds: float) -> None:
        """Let time pass, and the host do something with it."""
        self.site.clock.pass_(seconds)
        self._host_acts()
        self.meanwhile()

    def _host_acts(self) -> None:
        now = self.site.clock().timestamp()
        if not self.bmc.host.is_on:
            self.running, self._doing = "", iter(())
            return
        boots = self.bmc.host.boots()
        if len(boots) > self._boots_seen:
            self._boots_seen, self._next_at = len(boots), now
            self._doing = self._run_from(boots[-1])
        if now >= self._next_at:
            self._next_at = now + next(self._doing, 0.0)

    def _run_from(self, source: Source) -> Iterator[float]:
        """Do what the host does after one start; yield the seconds until it goes on."""
        if source is Source.NETWORK:
            plan = self.site.ask()
            if isinstance(plan, Ramdisk):
                self.running = "ramdisk"
                agent = Agent(self.site, ticket=plan.ticket.reveal())
                try:
                    yield from self._agent_works(agent)
                except ProvisionerError:
                    yield AGENT_STEP_S  # it was told to stop, and gives up
                self.bmc.host.restart()
                return
            self.netboots_without_ticket += 1
        self.running = self.disk
        if self.disk == NEW:
            yield FIRST_BOOT_S
            try:
                while Agent(self.site).phone_home()["ask_again"]:
                    yield REPORT_EVERY.total_seconds()
            except ProvisionerError:
                return  # too late: nobody waits for it

    def _agent_works(self, agent: Agent) -> Iterator[float]:
        agent.hello()
        yield AGENT_STEP_S
        agent.authorise()
        self.disk = HALF
        for step in range(WRITING_STEPS):
            yield AGENT_STEP_S
            agent.progress(written_bytes=step)
        agent.seed()
        agent.progress("verifying")
        yield AGENT_STEP_S
        self.disk = NEW
        agent.done()


@contextmanager
def running_trial(
    site: Site, folder: Path, faults: Faults, traits: Traits | None = None
) -> Iterator[Trial]:
    """Put a host with such a BMC on the site."""
    with running_rack(lambda: site.clock().timestamp()) as rack:
        limit = EXCHANGE_LIMIT if faults.always_answers else SHORT_EXCHANGE_LIMIT
        pool = TimedPool(folder / "bmc-locks", site.clock.pass_, limit)
        try:
            yield Trial(site, rack, pool, rack.add(faults, traits))
        finally:
            pool.close()
