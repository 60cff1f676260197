"""What came in between: found by the simulation, and held here."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from provisioner.core.contracts import Store, Tx
from provisioner.core.model import BootDevice, Json, Operation, Phase
from provisioner.core.profile import Check
from provisioner.errors import Unavailable
from provisioner.service.health import Finding
from provisioner.service.performer import ATTEMPTS_MAX, Performer
from provisioner.service.worker import LOOK_LIMIT
from tests.parts.service_site import ACTOR, SOFT_SHUTDOWN, Agent, Site

SOAK = timedelta(seconds=11)  # and a little more than the profile's 10 s


def found(checks: Sequence[Check], *, is_healthy: bool) -> list[Finding]:
    return [Finding(check, is_healthy, "as the test says") for check in checks]


@pytest.fixture
def proving(site: Site) -> Operation:
    """A deployment whose system was found healthy once, with its soak time over by now."""
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.PROVING)
    operation = agent.operation()
    site.another_worker(examine=lambda checks, _a, _e: found(checks, is_healthy=True)).check(
        operation.id
    )
    site.clock.pass_(SOAK.total_seconds())
    agent.phone_home()
    return operation


def test_a_whole_soak_time_of_health_is_success(site: Site, proving: Operation) -> None:
    site.another_worker(examine=lambda checks, _a, _e: found(checks, is_healthy=True)).check(
        proving.id
    )
    assert site.phase(proving) is Phase.SUCCEEDED


def test_a_look_is_judged_by_what_others_saved_meanwhile(site: Site, proving: Operation) -> None:
    """Of two workers one finds the host ill while the other, which found it well, waits for
    the database: its soak time begins anew."""
    other = site.another_worker(examine=lambda checks, _a, _e: found(checks, is_healthy=False))

    def examine(checks: Sequence[Check], _address: str, _evidence: Json) -> list[Finding]:
        other.check(proving.id)
        return found(checks, is_healthy=True)

    site.another_worker(examine=examine).check(proving.id)
    assert site.phase(proving) is Phase.PROVING
    assert site.at(proving).evidence["healthy_since"] == site.clock().isoformat()


def test_a_look_that_raises_what_nobody_expects_is_logged_and_the_next_one_judges(
    site: Site, proving: Operation
) -> None:
    def examine(_c: Sequence[Check], _a: str, _e: Json) -> list[Finding]:
        raise ZeroDivisionError

    broken = site.another_worker(examine=examine)
    with capture_logs() as logs:
        broken.prove_booted()
        broken._checkers.shutdown()  # which waits for the round
    assert [one["event"] for one in logs if one["log_level"] == "error"] == ["health check raised"]
    assert site.phase(proving) is Phase.PROVING
    site.another_worker(examine=lambda checks, _a, _e: found(checks, is_healthy=True)).check(
        proving.id
    )
    assert site.phase(proving) is Phase.SUCCEEDED


def test_a_look_of_a_worker_that_stood_still_proves_nothing(site: Site, proving: Operation) -> None:
    before = site.at(proving)

    def examine(checks: Sequence[Check], _address: str, _evidence: Json) -> list[Finding]:
        site.clock.pass_(LOOK_LIMIT.total_seconds() + 60)
        return found(checks, is_healthy=True)

    site.another_worker(examine=examine).check(proving.id)
    assert site.at(proving) == before


class _Beforehand:
    """A store; something happens before a transaction begins, once."""

    def __init__(self, store: Store, happens: Callable[[], object]) -> None:
        self._store, self._happens = store, [happens]
        self.read, self.close = store.read, store.close

    def begin(self) -> AbstractContextManager[Tx]:
        while self._happens:
            self._happens.pop()()
        return self._store.begin()


def test_an_operation_that_another_worker_has_started_meanwhile_is_not_refused(site: Site) -> None:
    """Two services on one database look at one queue, and the slower one finds it started."""
    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    store = _Beforehand(site.store, site.worker.start_queued)
    site.another_worker(store=store).start_queued()
    assert site.phase(operation) is Phase.NETBOOTING
    site.perform()
    assert site.bmc().changes()[-2:] == ["next_boot network once", "power_on"]


def test_an_operation_that_was_cancelled_before_its_start_stays_so(site: Site) -> None:
    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    store = _Beforehand(site.store, lambda: site.operations.cancel(operation.id, actor=ACTOR))
    site.another_worker(store=store).start_queued()
    assert site.phase(operation) is Phase.CANCELLED


def test_a_slow_bmc_does_not_switch_off_an_agent_at_work(site: Site) -> None:
    """While its BMC takes its time to say whether the host is on, the host comes by itself."""
    site.add_host()
    operation = site.deploy("r1n1")
    agent = Agent(site)

    def comes(verb: str) -> None:
        if verb == "power" and site.phase(operation) is Phase.NETBOOTING:
            agent.boots().hello()
            agent.authorise()

    site.bmc().on_exchange = comes
    site.perform()
    assert site.bmc().changes() == []
    assert site.phase(operation) is Phase.WRITING


def test_a_host_that_still_shuts_down_when_it_is_given_back_is_switched_on(site: Site) -> None:
    """The power button was pressed, the worker died over it, and the deployment was cancelled.
    The host is on for another while, and then it is not."""
    site.add_host()
    operation = site.deploy("r1n1")
    site.operations.cancel(operation.id, actor=ACTOR)
    goes_off_at = site.clock() + SOFT_SHUTDOWN / 2

    def shuts_down(_verb: str) -> None:
        if site.clock() >= goes_off_at and not site.bmc().booted:
            site.bmc().is_on = False

    site.bmc().on_exchange = shuts_down
    site.perform()
    # It is told to be on at once, whatever is read, and again when it has gone off.
    assert site.bmc().changes() == ["next_boot disk once", "power_on", "power_on"]
    assert site.bmc().is_on


class _AwayFor:
    """A store whose reads find no database for a number of times, once it is told so."""

    def __init__(self, store: Store) -> None:
        self.times = 0
        self._store = store

    def read(self) -> AbstractContextManager[Tx]:
        if self.times > 0:
            self.times -= 1
            raise Unavailable("the database is away")
        return self._store.read()

    def begin(self) -> AbstractContextManager[Tx]:
        return self._store.begin()

    def close(self) -> None:
        self._store.close()


def test_a_database_away_in_a_soft_shutdown_is_no_fault_of_the_bmc(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.bmc().ignores_soft_off = True
    store = _AwayFor(site.store)

    def goes_away(verb: str) -> None:
        if verb == "soft_off":
            store.times = 20

    site.bmc().on_exchange = goes_away
    performer = Performer(
        store,
        site.transitions,
        site.pool,
        site.clock,
        soft_shutdown_limit=SOFT_SHUTDOWN,
        pause=site.clock.pass_,
    )
    performer.perform(site.outbox.waiting.pop(0))
    assert site.bmc().changes() == ["soft_off", "power_off"]
    assert site.phase(operation) is Phase.NETBOOTING


def test_a_host_is_given_back_however_long_the_database_was_away(site: Site) -> None:
    """Nothing stands behind that effect: were it ended with an error, the host would stay off."""
    site.add_host()
    operation = site.deploy("r1n1")
    site.bmc().is_on = False
    site.operations.cancel(operation.id, actor=ACTOR)
    store = _AwayFor(site.store)
    performer = Performer(
        store,
        site.transitions,
        site.pool,
        site.clock,
        soft_shutdown_limit=SOFT_SHUTDOWN,
        pause=site.clock.pass_,
    )
    begun = site.clock()
    store.times = 3600
    for effect in site.outbox.waiting:
        performer.perform(effect)
    assert site.clock() - begun > timedelta(minutes=59)
    assert site.bmc().is_on
    assert site.bmc().next_boot is BootDevice.DISK


def test_a_bug_in_an_exchange_ends_the_operation_and_the_host_is_given_back(site: Site) -> None:
    """Each exchange of the first wish, and the first of the way back."""
    site.add_host()
    operation = site.deploy("r1n1")

    def breaks(_verb: str) -> None:
        if len(site.bmc().exchanges) <= ATTEMPTS_MAX + 1:
            raise RuntimeError("with a secret in it")

    site.bmc().is_on = False
    site.bmc().on_exchange = breaks
    site.perform()
    error = site.at(operation).error or {}
    assert (site.phase(operation), error["code"]) == (Phase.FAILED, "device")
    assert (error["host"], error["found"]) == ("r1n1", "RuntimeError")
    assert "secret" not in site.texts()
    assert site.bmc().is_on
    assert not site.outbox.waiting
