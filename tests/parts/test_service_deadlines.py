"""Nothing is stuck: every phase ends by its deadline or by a person, and says why."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from provisioner.core.contracts import AgentToken, Clock
from provisioner.core.lifecycle import AGENT_SILENCE_LIMIT, LIMIT, RUNG_LAST, NotAllowed
from provisioner.core.model import BootDevice, HostState, Operation, Phase
from provisioner.errors import Conflict, TrustError
from provisioner.service.chance import digest_of
from provisioner.service.worker import OUTAGE
from tests.parts.service_site import ACTOR, Agent, Site

A_SECOND = timedelta(seconds=1)
BEFORE_THE_WRITE = (Phase.QUEUED, Phase.NETBOOTING, Phase.PREPARING)
AFTER_IT = (Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING)


def deployed_to(site: Site, phase: Phase) -> Operation:
    """Return a deployment of a new host that has just entered `phase`."""
    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    if phase is not Phase.QUEUED:
        site.worker.start_queued()
        site.perform()
    if phase not in (Phase.QUEUED, Phase.NETBOOTING):
        Agent(site).until(phase)
    assert site.phase(operation) is phase
    return site.at(operation)


# --- cancelling ---------------------------------------------------------------------------


@pytest.mark.parametrize("phase", BEFORE_THE_WRITE)
def test_an_operation_is_cancelled_and_its_host_given_back(site: Site, phase: Phase) -> None:
    operation = deployed_to(site, phase)
    site.operations.cancel(operation.id, actor=ACTOR)
    site.perform()
    assert site.phase(operation) is Phase.CANCELLED
    bmc = site.bmc()
    assert bmc.is_on
    assert bmc.next_boot is BootDevice.DISK
    assert bmc.booted[-1:] in ([], [BootDevice.DISK], [BootDevice.NETWORK])
    if phase is Phase.PREPARING:
        assert bmc.booted[-1] is BootDevice.DISK
    # What came of it is free for the next one.
    assert site.deploy("r1n1").generation == 2


@pytest.mark.parametrize("phase", AFTER_IT)
def test_nothing_is_cancelled_after_the_first_write(site: Site, phase: Phase) -> None:
    operation = deployed_to(site, phase)
    before = site.at(operation)
    with pytest.raises(NotAllowed) as caught:
        site.operations.cancel(operation.id, actor=ACTOR)
    assert f"provisioner operation show {operation.id}" in (caught.value.hint or "")
    assert site.at(operation) == before


def test_what_has_ended_is_not_cancelled(site: Site) -> None:
    operation = deployed_to(site, Phase.QUEUED)
    site.operations.cancel(operation.id, actor=ACTOR)
    with pytest.raises(Conflict, match="already ended"):
        site.operations.cancel(operation.id, actor=ACTOR)


# --- deadlines ----------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [phase for phase in LIMIT if phase is not Phase.NETBOOTING])
def test_a_phase_ends_at_its_deadline_and_not_before(site: Site, phase: Phase) -> None:
    operation = deployed_to(site, phase)
    agent_works = phase in (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING)
    limit = AGENT_SILENCE_LIMIT if agent_works else LIMIT[phase]
    site.pass_(limit - A_SECOND)
    assert site.phase(operation) is phase
    site.pass_(A_SECOND)
    ended = site.at(operation)
    assert ended.phase is Phase.FAILED
    assert ended.deadline_at is None
    error = ended.error or {}
    assert error["code"] == f"{phase}_timed_out"
    assert error["host"] == "r1n1"
    assert error["expected"]
    assert f"{int(limit.total_seconds())} s" in error["found"] or phase is Phase.PROVING
    assert "r1n1" in error["hint"]


def test_netbooting_gets_three_rungs_and_then_ends(site: Site) -> None:
    operation = deployed_to(site, Phase.NETBOOTING)
    for rung in range(RUNG_LAST + 1):
        assert site.at(operation).rung == rung
        deadline = site.at(operation).deadline_at
        assert deadline is not None
        site.pass_(deadline - site.clock() - A_SECOND)
        assert site.at(operation).rung == rung
        site.pass_(A_SECOND)
    assert site.phase(operation) is Phase.FAILED


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.WRITING, Phase.VERIFYING])
def test_an_agent_that_talks_lives_until_the_phase_is_over(site: Site, phase: Phase) -> None:
    operation = deployed_to(site, phase)
    agent = agent_of(site, operation)
    spoken = "verifying" if phase is Phase.VERIFYING else "writing"
    rounds = 0
    while site.clock() + 2 * A_SECOND * 60 < operation.phase_at + LIMIT[phase]:
        site.pass_(timedelta(minutes=2))
        agent.progress(spoken)
        rounds += 1
    assert rounds > 3
    site.pass_(timedelta(minutes=2))
    assert site.phase(operation) is Phase.FAILED
    with pytest.raises(TrustError):
        agent.progress(spoken)


def agent_of(site: Site, operation: Operation) -> Agent:
    """Return an agent with a token of its own for an operation that is under way."""
    token = AgentToken(
        digest_of("at_second"),
        operation.id,
        operation.host_id,
        operation.generation,
        site.clock() + timedelta(hours=6),
    )
    with site.store.begin() as tx:
        tx.add_agent_token(token)
    return Agent(site, token="at_second", generation=1, release=operation.release or "")


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        (Phase.QUEUED, HostState.ENROLLED),
        (Phase.NETBOOTING, HostState.ENROLLED),
        (Phase.PREPARING, HostState.DIRTY),
        (Phase.WRITING, HostState.DIRTY),
        (Phase.BOOTING, HostState.DIRTY),
        (Phase.PROVING, HostState.DIRTY),
    ],
)
def test_a_host_whose_operation_ran_out_of_time_is_in_a_true_state(
    site: Site, phase: Phase, state: HostState
) -> None:
    operation = deployed_to(site, phase)
    for _ in range(RUNG_LAST + 1):
        site.pass_(LIMIT[phase])
    assert site.phase(operation) is Phase.FAILED
    host = site.hosts.show("r1n1")
    assert (host.state, host.release) == (state, None)
    assert site.deploy("r1n1").generation == 2


def test_an_expired_agent_token_is_refused(site: Site) -> None:
    operation = deployed_to(site, Phase.WRITING)
    agent = agent_of(site, operation)
    site.clock.pass_(timedelta(hours=6).total_seconds())
    with pytest.raises(TrustError, match="not valid"):
        agent.progress()


# --- places in flight ---------------------------------------------------------------------


def test_no_more_than_the_limit_is_in_flight_and_the_oldest_goes_first(site: Site) -> None:
    operations = []
    for number in (1, 2, 3):
        site.add_host(number)
        (made,) = site.operations.request_deployment(
            [f"r1n{number}"], "tiny@1", options={}, actor=ACTOR
        )
        operations.append(made)
        site.clock.pass_(1)
    site.worker.start_queued()
    phases = [site.phase(operation) for operation in operations]
    assert phases == [Phase.NETBOOTING, Phase.NETBOOTING, Phase.QUEUED]
    site.operations.cancel(operations[0].id, actor=ACTOR)
    site.worker.start_queued()
    assert site.phase(operations[2]) is Phase.NETBOOTING


def test_a_tick_that_meets_nothing_does_nothing(site: Site) -> None:
    ticks: list[Callable[[], None]] = [
        site.worker.start_queued,
        site.worker.end_overdue,
        site.worker.prove_booted,
    ]
    for tick in ticks:
        tick()
    assert site.outbox.waiting == []


# --- what happens while deadlines are looked at ---------------------------------------------------


class Interrupting:
    """A clock; what happens after it was read so often happens between two lines."""

    def __init__(self, clock: Clock, reads: int, happens: Callable[[], object]) -> None:
        self._clock, self.left, self._happens = clock, reads, happens

    def __call__(self) -> datetime:
        self.left -= 1
        if self.left == 0:
            self._happens()
        return self._clock()


def ends_overdue(site: Site, happens: Callable[[], object]) -> None:
    """Have a worker end what is overdue, and something happen after it has looked."""
    clock = Interrupting(site.clock, 10**6, happens)
    worker = site.another_worker(clock=clock)
    clock.left = 2
    worker.end_overdue()
    assert clock.left <= 0, "it has happened"


def test_a_rung_that_another_worker_has_taken_is_not_skipped(site: Site) -> None:
    operation = deployed_to(site, Phase.NETBOOTING)
    site.clock.pass_(LIMIT[Phase.NETBOOTING].total_seconds())
    ends_overdue(site, site.worker.end_overdue)
    assert site.at(operation).rung == 1


def test_a_system_that_phones_home_at_the_last_moment_is_heard(site: Site) -> None:
    operation = deployed_to(site, Phase.BOOTING)
    site.clock.pass_(LIMIT[Phase.BOOTING].total_seconds())
    ends_overdue(site, Agent(site).phone_home)
    assert site.phase(operation) is Phase.PROVING


def test_a_worker_that_stood_still_since_its_look_ends_nothing(site: Site) -> None:
    operation = deployed_to(site, Phase.BOOTING)
    site.clock.pass_(LIMIT[Phase.BOOTING].total_seconds())
    ends_overdue(site, lambda: site.clock.pass_(OUTAGE.total_seconds() + 1))
    assert site.phase(operation) is Phase.BOOTING
