"""The clock of the service is set, back or forward, while it works."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from provisioner.core.lifecycle import AGENT_SILENCE_LIMIT
from provisioner.core.model import Operation, Phase
from provisioner.errors import BmcBusy
from provisioner.service.performer import BUSY_PATIENCE, BUSY_PAUSE_S, Performer
from provisioner.service.wishes import POWER_LIMIT
from provisioner.service.worker import MARK_EVERY, OUTAGE_GRACE, Worker
from tests.parts.recovery_site import fail, request, with_a_profile_that_proves
from tests.parts.service_site import ACTOR, SOFT_SHUTDOWN, Agent, Site

AN_HOUR_S = 3600


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def set_back(site: Site) -> Worker:
    """Return a worker that has been at work when the clock was set back by an hour."""
    worker = site.another_worker(recoverer=AtOnce(), high_water=site.high_water)
    for _ in range(5):
        worker.tick()
        site.clock.pass_(1)
    site.clock.pass_(-AN_HOUR_S)
    return worker


def work(site: Site, worker: Worker, duration: timedelta) -> None:
    ends_at = site.clock() + duration
    while site.clock() < ends_at:
        site.clock.pass_(1)
        worker.tick()


def mark_of(site: Site) -> str:
    return Path(f"{site.store._engine.url.database}.mark").read_text()


# --- the worker -------------------------------------------------------------------------------


def test_what_is_queued_starts_and_the_mark_goes_on(site: Site) -> None:
    worker = set_back(site)
    mark = mark_of(site)
    site.add_host()
    operation = request(site, "tiny@1")
    work(site, worker, 2 * MARK_EVERY)
    assert site.phase(operation) is Phase.NETBOOTING
    assert mark_of(site) != mark


def test_who_is_silent_is_ended(site: Site) -> None:
    worker = set_back(site)
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    Agent(site).until(Phase.PREPARING)
    work(site, worker, max(AGENT_SILENCE_LIMIT, OUTAGE_GRACE) + timedelta(seconds=2))
    assert site.phase(operation) is Phase.FAILED


def test_what_follows_a_failure_is_taken(site: Site) -> None:
    with_a_profile_that_proves(site)
    worker = set_back(site)
    site.add_host()
    failed = fail(site, request(site, "tiny@1"))
    follow_up_at = site.at(failed).follow_up_at
    assert follow_up_at is not None
    work(site, worker, follow_up_at - site.clock() + timedelta(seconds=2))
    assert site.operations.list("r1n1")[0].id != failed.id


@pytest.mark.rules(in_flight_max=50, group_starts_per_minute_max=1, starts_per_minute_max=1)
def test_starts_from_before_it_do_not_count_for_an_hour(site: Site) -> None:
    for number in (1, 2):
        site.add_host(number, labels={"group": "web"})
    worker = set_back(site)
    site.clock.pass_(AN_HOUR_S)
    site.deploy("r1n1")
    site.clock.pass_(-AN_HOUR_S)
    (second,) = site.operations.request_deployment(["r1n2"], "tiny@1", options={}, actor=ACTOR)
    work(site, worker, timedelta(seconds=61))
    assert site.phase(second) is Phase.NETBOOTING


# --- an effect under way ----------------------------------------------------------------------


class Pauses:
    """Lets time pass, and sets the clock after so many pauses."""

    def __init__(self, site: Site, step_s: float, after: int = 3) -> None:
        self._site, self._step_s, self._after = site, step_s, after
        self.number, self.total_s = 0, 0.0

    def __call__(self, seconds: float) -> None:
        self.number += 1
        self.total_s += seconds
        self._site.clock.pass_(seconds)
        if self.number == self._after:
            self._site.clock.pass_(self._step_s)


def perform_first(site: Site, pause: Pauses) -> None:
    performer = Performer(
        site.store,
        site.transitions,
        site.pool,
        site.clock,
        soft_shutdown_limit=SOFT_SHUTDOWN,
        pause=pause,
    )
    performer.perform(site.outbox.waiting.pop(0))


@pytest.fixture
def operation(site: Site) -> Operation:
    site.add_host()
    return site.deploy("r1n1")


def test_a_host_that_stays_on_is_not_watched_for_an_hour(site: Site, operation: Operation) -> None:
    site.bmc().ignores_soft_off = site.bmc().lies_about_off = True
    pause = Pauses(site, -AN_HOUR_S)
    perform_first(site, pause)
    assert (site.at(operation).error or {})["code"] == "bmc_disobeyed"
    once = (SOFT_SHUTDOWN + POWER_LIMIT).total_seconds()
    assert pause.total_s < 3 * once + 10


def test_a_host_that_shuts_down_is_given_its_time(site: Site, operation: Operation) -> None:
    bmc = site.bmc()
    bmc.ignores_soft_off = True
    pause = Pauses(site, AN_HOUR_S)

    def shut_down(_: str) -> None:
        bmc.is_on = bmc.is_on and pause.number < 10

    bmc.on_exchange = shut_down
    perform_first(site, pause)
    assert bmc.changes() == ["soft_off"]
    assert site.phase(operation) is Phase.NETBOOTING


@pytest.mark.parametrize("step_s", [-AN_HOUR_S, AN_HOUR_S])
def test_a_busy_bmc_is_waited_for_as_long_as_ever(
    site: Site, operation: Operation, step_s: float
) -> None:
    pause = Pauses(site, step_s)

    def be_busy(_: str) -> None:
        raise BmcBusy("no session is free")

    site.bmc().on_exchange = be_busy
    perform_first(site, pause)
    assert (site.at(operation).error or {})["code"] == "bmc_busy"
    patience_s = BUSY_PATIENCE.total_seconds()
    assert pause.total_s < patience_s + 3 * BUSY_PAUSE_S
    assert pause.total_s >= (patience_s if step_s < 0 else BUSY_PAUSE_S * 10)
