"""What the worker does to BMCs, and what becomes of an operation when they misbehave."""

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from provisioner.core.contracts import Outgoing
from provisioner.core.effects import Effect, PowerOff, PowerOn, ReturnToDisk, SetNextBoot
from provisioner.core.guard import TicketPermit
from provisioner.core.lifecycle import AGENT_SILENCE_LIMIT, IN_RAMDISK_FOR, LIMIT, RUNG_LAST, E
from provisioner.core.model import BootDevice, HostState, Kind, Operation, Phase
from provisioner.service.performer import (
    ATTEMPTS_MAX,
    RETURN_PATIENCE,
    RETURN_PAUSE_S,
    Performer,
)
from provisioner.service.recovery import Recovery
from provisioner.service.transitions import Transitions
from provisioner.service.wishes import OFF_READS, POWER_LIMIT
from provisioner.service.worker import Worker
from provisioner.store.durable import DbosEffectQueue, DbosEffectWorker
from provisioner.store.engine import open_engine
from provisioner.store.sql_store import SqlStore
from tests.parts.fake_bmc import FakeBmc
from tests.parts.service_site import ACTOR, SOFT_SHUTDOWN, Agent, SetClock, Site, limits
from tests.parts.stores import sealing
from tests.parts.test_bmc_contract import check_bmc

NETBOOTING = LIMIT[Phase.NETBOOTING]


def test_the_fake_keeps_the_contract_of_a_bmc() -> None:
    check_bmc(FakeBmc())


@pytest.fixture
def operation(site: Site) -> Operation:
    """A deployment that was started, and whose effects were not performed yet."""
    site.add_host()
    return site.deploy("r1n1")


def error_of(site: Site, operation: Operation) -> dict[str, object]:
    return site.at(operation).error or {}


# --- a BMC that obeys ---------------------------------------------------------------------


def test_a_running_host_is_asked_to_shut_down_and_then_netbooted(
    site: Site, operation: Operation
) -> None:
    site.perform()
    bmc = site.bmc()
    assert bmc.changes() == ["soft_off", "next_boot network once", "power_on"]
    assert bmc.booted == [BootDevice.NETWORK]
    assert site.phase(operation) is Phase.NETBOOTING


def test_off_is_believed_only_when_it_is_read_again(site: Site, operation: Operation) -> None:
    site.perform(at_most=1)
    exchanges = site.bmc().exchanges
    after = exchanges[exchanges.index("soft_off") + 1 :]
    assert after == ["power"] * OFF_READS
    assert site.phase(operation) is Phase.NETBOOTING


def test_a_host_that_is_off_is_not_asked_to_shut_down(site: Site) -> None:
    site.add_host()
    site.bmc().is_on = False
    site.deploy("r1n1")
    site.perform()
    assert site.bmc().changes() == ["next_boot network once", "power_on"]


def test_a_system_that_ignores_the_power_button_is_switched_off(
    site: Site, operation: Operation
) -> None:
    site.bmc().ignores_soft_off = True
    began_at = site.clock()
    site.perform()
    assert site.bmc().changes()[:2] == ["soft_off", "power_off"]
    waited = site.clock() - began_at
    assert SOFT_SHUTDOWN <= waited <= SOFT_SHUTDOWN + timedelta(seconds=5)
    assert site.phase(operation) is Phase.NETBOOTING


def test_a_request_may_do_without_a_soft_shutdown(site: Site) -> None:
    site.add_host()
    options = {"soft_shutdown": False}
    site.operations.request_deployment(["r1n1"], "tiny@1", options=options, actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    assert site.bmc().changes()[0] == "power_off"


# --- a BMC that does not ------------------------------------------------------------------


def test_field_14_a_wrong_password_is_used_once(site: Site, operation: Operation) -> None:
    site.bmc().refuses_login = True
    site.perform()
    assert site.bmc().exchanges == ["power"]
    assert site.phase(operation) is Phase.FAILED
    error = error_of(site, operation)
    assert (error["code"], error["host"]) == ("bmc_auth_failed", "r1n1")
    assert "host change r1n1" in str(error["hint"])
    site.pass_(timedelta(days=1))
    assert site.bmc().exchanges == ["power"]


def test_a_silent_bmc_is_tried_a_few_times_and_fails_the_operation(
    site: Site, operation: Operation
) -> None:
    site.bmc().is_silent = True
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    error = error_of(site, operation)
    assert error["code"] == "bmc_unreachable"
    assert "127.0.1.1" in str(error["hint"])
    assert site.bmc().exchanges[:ATTEMPTS_MAX] == ["power"] * ATTEMPTS_MAX
    # The host may be off for our sake, so the wish to leave it on its disk lasts longer; each
    # attempt at it tells the host to be on, too.
    left = site.bmc().exchanges[ATTEMPTS_MAX:]
    attempts = RETURN_PATIENCE.total_seconds() / RETURN_PAUSE_S
    assert attempts <= left.count("power_on") <= attempts + ATTEMPTS_MAX
    assert left == ["next_boot disk once", "power_on"] * left.count("power_on")
    assert site.hosts.show("r1n1").state is HostState.ENROLLED


def test_a_bmc_that_answers_late_is_enough(site: Site, operation: Operation) -> None:
    bmc = site.bmc()
    bmc.is_silent = True

    def recover(_: str) -> None:
        bmc.is_silent = len(bmc.exchanges) < ATTEMPTS_MAX

    bmc.on_exchange = recover
    site.perform()
    assert site.phase(operation) is Phase.NETBOOTING
    assert bmc.booted == [BootDevice.NETWORK]


def test_a_bmc_that_says_no_to_a_boot_device_gives_the_host_back(
    site: Site, operation: Operation
) -> None:
    site.bmc().rejects = "next_boot network"
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    assert error_of(site, operation)["code"] == "bmc_rejected"
    assert site.bmc().is_on
    assert site.bmc().booted == [BootDevice.DISK]


def test_a_bmc_that_lies_about_power_off_is_found_out(site: Site, operation: Operation) -> None:
    site.bmc().lies_about_off = True
    began_at = site.clock()
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    error = error_of(site, operation)
    assert "did not switch off" in str(error["message"])
    assert "reports it on" in str(error["found"])
    limit = (2 + ATTEMPTS_MAX) * SOFT_SHUTDOWN + ATTEMPTS_MAX * POWER_LIMIT
    assert site.clock() - began_at < limit
    assert BootDevice.NETWORK not in site.bmc().booted


def test_field_13_a_bmc_that_forgets_the_boot_device_climbs_the_ladder(
    site: Site, operation: Operation
) -> None:
    """It agrees each time, and the host boots its old system each time, which stays whole."""
    bmc = site.bmc()
    bmc.forgets_boot = True
    site.perform()
    told = [bmc.changes()]
    for rung in range(1, RUNG_LAST + 1):
        before = len(bmc.changes())
        site.pass_(NETBOOTING)
        assert (site.phase(operation), site.at(operation).rung) == (Phase.NETBOOTING, rung)
        told.append(bmc.changes()[before:])
    assert told == [
        ["soft_off", "next_boot network once", "power_on"],
        ["power_off", "next_boot network held", "power_on"],
        ["power_off", "next_boot network persistent", "power_on"],
    ]
    before = len(bmc.changes())
    site.pass_(NETBOOTING)
    assert site.phase(operation) is Phase.FAILED
    assert error_of(site, operation)["code"] == "netbooting_timed_out"
    # The persistent override is cleared; the old system runs, and is not restarted again. It
    # is told to be on, which it is.
    assert bmc.changes()[before:] == ["next_boot disk persistent", "power_on"]
    assert set(bmc.booted) == {BootDevice.DISK}
    assert bmc.is_on
    assert site.hosts.show("r1n1").state is HostState.ENROLLED


def test_a_persistent_network_boot_that_helped_is_cleared_after_the_write(
    site: Site, operation: Operation
) -> None:
    site.perform()
    for _ in range(RUNG_LAST):
        site.pass_(NETBOOTING)
    Agent(site).until(Phase.BOOTING)
    assert site.bmc().changes()[-1] == "next_boot disk persistent"
    assert site.bmc().next_boot is BootDevice.DISK
    assert site.phase(operation) is Phase.BOOTING


def test_a_bmc_that_fails_after_the_write_does_not_stop_the_deployment(
    site: Site, operation: Operation
) -> None:
    site.perform()
    agent = Agent(site).until(Phase.VERIFYING)
    site.bmc().is_silent = True
    agent.done()
    site.perform()
    assert site.phase(operation) is Phase.BOOTING
    assert agent.phone_home() == {"accepted": True, "ask_again": True}


# --- late, twice, overtaken ---------------------------------------------------------------


def outgoing(operation: Operation, effect: Effect) -> Outgoing:
    return Outgoing("again", "127.0.1.1:623", operation.id, operation.generation, effect)


@pytest.mark.parametrize(
    "reached", [Phase.PREPARING, Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING]
)
@pytest.mark.parametrize(
    "effect", [PowerOff(True), PowerOff(False), SetNextBoot(BootDevice.NETWORK), PowerOn()], ids=str
)
def test_a_wish_that_comes_late_or_twice_touches_no_host_past_netbooting(
    site: Site, operation: Operation, effect: Effect, reached: Phase
) -> None:
    site.perform()
    Agent(site).until(reached)
    before = list(site.bmc().exchanges)
    site.performer.perform(outgoing(operation, effect))
    assert site.bmc().exchanges == before
    assert site.phase(operation) is reached


def test_field_15_every_wish_may_be_performed_twice(site: Site, operation: Operation) -> None:
    """As after a kill between doing and saving: each effect comes a second time."""
    while site.outbox.waiting:
        again = site.outbox.waiting.pop(0)
        site.performer.perform(again)
        site.performer.perform(again)
        if len(site.bmc().exchanges) > 200:
            pytest.fail("it keeps going round")
        if site.bmc().booted:
            break
    site.perform()
    assert site.bmc().is_on
    assert site.phase(operation) is Phase.NETBOOTING
    Agent(site).until(Phase.PREPARING)
    assert site.phase(operation) is Phase.PREPARING


def test_a_wish_of_an_older_generation_is_dropped(site: Site, operation: Operation) -> None:
    old = site.outbox.waiting.pop(0)
    site.operations.cancel(operation.id, actor=ACTOR)
    site.perform()
    site.deploy("r1n1")
    before = list(site.bmc().exchanges)
    site.performer.perform(old)
    assert site.bmc().exchanges == before


def test_a_wish_for_a_host_that_was_deleted_is_dropped(site: Site, operation: Operation) -> None:
    site.operations.cancel(operation.id, actor=ACTOR)
    site.hosts.delete("r1n1", actor=ACTOR)
    site.perform()
    assert site.bmc().exchanges == []


def test_a_result_that_comes_after_the_end_changes_nothing(
    site: Site, operation: Operation
) -> None:
    """The host was cancelled while the BMC was busy switching it off."""
    bmc = site.bmc()

    def cancel(verb: str) -> None:
        if verb == "soft_off":
            site.operations.cancel(operation.id, actor=ACTOR)

    bmc.on_exchange = cancel
    site.perform()
    assert site.phase(operation) is Phase.CANCELLED
    assert bmc.is_on
    assert bmc.booted == [BootDevice.DISK]


def test_a_host_held_in_the_ramdisk_is_restarted_from_its_disk(
    site: Site, operation: Operation
) -> None:
    site.perform()
    Agent(site).until(Phase.PREPARING)
    site.operations.cancel(operation.id, actor=ACTOR)
    site.perform()
    assert site.bmc().changes()[-2:] == ["next_boot disk once", "reset"]
    assert site.bmc().booted == [BootDevice.NETWORK, BootDevice.DISK]


def test_a_host_whose_agent_fell_silent_is_not_restarted(site: Site, operation: Operation) -> None:
    """What it said last may have been lost, and it restarted: its own system is at work."""
    site.perform()
    Agent(site).until(Phase.PREPARING)
    site.pass_(AGENT_SILENCE_LIMIT)
    assert site.phase(operation) is Phase.FAILED
    assert error_of(site, operation)["code"] == "preparing_timed_out"
    assert site.bmc().changes()[-2:] == ["next_boot disk once", "power_on"]
    assert site.bmc().booted == [BootDevice.NETWORK]


def test_a_host_whose_agent_says_that_it_gives_up_is_restarted(
    site: Site, operation: Operation
) -> None:
    """Should it hang then. A word of it a little earlier is enough, a minute later is not."""
    site.perform()
    agent = Agent(site).until(Phase.PREPARING)
    site.clock.pass_(AGENT_SILENCE_LIMIT.total_seconds() - 1)
    agent.failed()
    site.clock.pass_(IN_RAMDISK_FOR.total_seconds())
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    assert site.bmc().changes()[-2:] == ["next_boot disk once", "reset"]
    site.clock.pass_(1)
    site.performer.perform(outgoing(site.at(operation), ReturnToDisk()))
    assert site.bmc().changes()[-3:] == ["reset", "next_boot disk once", "power_on"]


def test_a_host_that_was_never_reached_is_not_restarted(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.operations.cancel(operation.id, actor=ACTOR)
    site.outbox.waiting.pop(0)  # the PowerOff, which a worker had no time for
    site.perform()
    assert site.bmc().changes() == ["next_boot disk once", "power_on"]
    assert site.bmc().booted == []


def test_an_inspection_wishes_its_host_back_to_its_disk(site: Site) -> None:
    site.add_host()
    inspection = site.operations.request_inspection("r1n1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    told = Agent(site).boots().hello()
    assert (told["kind"], told["release"], told["disk_rule"]) == (Kind.INSPECTION, None, None)
    site.perform()
    assert site.phase(inspection) is Phase.SUCCEEDED
    assert site.bmc().changes()[-1] == "next_boot disk once"
    host = site.hosts.show("r1n1")
    assert host.inventory is not None
    assert host.state is HostState.DIRTY


# --- the same on the durable queue, with real time ----------------------------------------


def until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    ends_at = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends_at, "nothing happened in time"
        time.sleep(0.05)


class LookedAt:
    """The clock of a worker. Time passes no faster than it looks: what it has not seen for long
    enough it takes for an outage."""

    def __init__(self, clock: SetClock) -> None:
        self._clock = clock
        self._is_looked_at = threading.Event()

    def __call__(self) -> datetime:
        self._is_looked_at.set()
        return self._clock()

    def goes_on(self) -> None:
        if self._is_looked_at.is_set():
            self._is_looked_at.clear()
            self._clock.pass_(3)


def test_the_worker_carries_a_deployment_on_the_durable_queue(site: Site) -> None:
    """The same use cases with DBOS, threads and the reconciler running, up to PREPARING."""
    url = site.store._engine.url.render_as_string(hide_password=False)
    site.store.close()
    engine, clock = open_engine(url), site.clock
    queue = DbosEffectQueue(engine)
    store = SqlStore(engine, queue, sealing())
    transitions = Transitions(clock, site.derived, limits(), timedelta(hours=1))
    performer = Performer(
        store, transitions, site.pool, clock, soft_shutdown_limit=SOFT_SHUTDOWN, pause=clock.pass_
    )
    effects = DbosEffectWorker(engine)
    recovery = Recovery(store, transitions, site.archive, clock)
    looked_at = LookedAt(clock)
    worker = Worker(store, transitions, performer, effects, looked_at, recovery)

    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)

    def has_failed_later() -> bool:
        looked_at.goes_on()
        return site.phase(operation) is Phase.FAILED

    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        until(lambda: site.bmc().booted == [BootDevice.NETWORK])
        Agent(site).boots().hello()
        assert site.phase(operation) is Phase.PREPARING
        site.clock.pass_(LIMIT[Phase.PREPARING].total_seconds())
        # A jump of the clock is taken for an outage, so the rest of it passes in steps.
        until(has_failed_later)
        until(lambda: site.bmc().changes()[-2:] == ["next_boot disk once", "power_on"])
        assert site.bmc().booted == [BootDevice.NETWORK], "its agent was silent: it may be home"
    finally:
        stop.set()
        thread.join(60)
        queue.close()
        store.close()
    assert not thread.is_alive()
    assert site.audit.verify() > 3


def test_what_was_not_done_is_wished_for_only_when_its_transaction_was_saved(site: Site) -> None:
    """The double of the queue keeps the promise of the real one."""
    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)

    def start_and_fail() -> None:
        with site.store.begin() as tx:
            permit = TicketPermit(operation.id, 1)
            site.transitions.apply(
                tx, operation.id, E.START, generation=1, actor=ACTOR, permit=permit
            )
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        start_and_fail()
    assert site.outbox.waiting == []
    site.worker.start_queued()
    assert [waiting.effect for waiting in site.outbox.waiting] == [PowerOff(soft=True)]


def test_returning_to_the_disk_is_fine_when_it_is_there_already(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.operations.cancel(operation.id, actor=ACTOR)
    site.perform()
    booted = list(site.bmc().booted)
    site.performer.perform(outgoing(site.at(operation), ReturnToDisk()))
    assert site.bmc().booted == booted
    assert Path(str(site.store._engine.url.database)).exists()
