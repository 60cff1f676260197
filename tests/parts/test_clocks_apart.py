"""Two services on one PostgreSQL, and the clock of one of them is wrong."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from provisioner.cli.doctor import FAIL, OK, clock_finding
from provisioner.core.contracts import Archive
from provisioner.core.fleet import CLOCKS_APART
from provisioner.core.lifecycle import AGENT_SILENCE_LIMIT
from provisioner.core.model import Phase
from provisioner.service.chance import utc_now
from provisioner.service.clock_watch import LOOK_EVERY, ClockWatch
from provisioner.service.worker import OUTAGE_GRACE, Worker
from tests.parts.postgres import Postgres
from tests.parts.recovery_site import with_releases
from tests.parts.service_site import Agent, Site, running_site
from tests.parts.stores import opened_at

A_SECOND = timedelta(seconds=1)


@dataclass
class ShiftedClock:
    ahead: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return utc_now() + self.ahead


@pytest.fixture
def shared(
    postgres: Postgres,
    postgres_template: str,
    archive_of_two: Archive,
    ramdisk_folder: Path,
    tmp_path: Path,
) -> Iterator[Site]:
    """A service on PostgreSQL whose clock is right, as long as it is set."""
    url = postgres.new_database(postgres_template)
    with running_site(url, archive_of_two, ramdisk_folder, mark=tmp_path / "mark") as site:
        site.clock.at = utc_now()
        yield with_releases(site, archive_of_two)


def look_for_a_while(worker: Worker, clock: ShiftedClock) -> None:
    """Have a worker look long enough to end what it takes for overdue."""
    worker.tick()
    clock.ahead += OUTAGE_GRACE / 3
    for _ in range(3):
        worker.tick()
        clock.ahead += OUTAGE_GRACE / 3
    worker.tick()


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_live_agent_is_not_ended_by_a_wrong_clock(shared: Site, is_watched: bool) -> None:
    """Without the watch it is: that is what the watch is for."""
    shared.add_host()
    operation = shared.deploy("r1n1")
    shared.perform()
    agent = Agent(shared).until(Phase.WRITING)
    shared.clock.at = utc_now()
    agent.progress()
    clock = ShiftedClock(AGENT_SILENCE_LIMIT + A_SECOND)
    watch = ClockWatch(shared.store, clock) if is_watched else None
    with capture_logs() as logs:
        look_for_a_while(shared.another_worker(clock=clock, clock_watch=watch), clock)
    assert shared.phase(operation) is (Phase.WRITING if is_watched else Phase.FAILED)
    told = [line for line in logs if line["event"].startswith("CLOCK IS WRONG")]
    assert bool(told) == is_watched
    assert all("ahead of the database's" in line["why"] for line in told)


def test_a_worker_goes_on_when_its_clock_is_right_again(shared: Site) -> None:
    clock = ShiftedClock(-timedelta(minutes=1))
    worker = shared.another_worker(clock=clock, clock_watch=ClockWatch(shared.store, clock))
    shared.add_host()
    (operation,) = shared.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor="a")
    worker.tick()
    assert shared.phase(operation) is Phase.QUEUED
    clock.ahead = timedelta()
    worker.tick()
    assert shared.phase(operation) is Phase.NETBOOTING


def test_a_clock_that_is_set_while_at_work_is_noticed(shared: Site) -> None:
    clock = ShiftedClock()
    watch = ClockWatch(shared.store, clock)
    for ahead, is_wrong in (
        (timedelta(), False),
        (timedelta(minutes=10), True),
        (timedelta(minutes=10) + LOOK_EVERY, True),
        (timedelta(), False),
        (-timedelta(minutes=10), True),
    ):
        clock.ahead = ahead
        assert watch.is_wrong() == is_wrong, ahead


def test_the_database_on_this_machine_has_no_clock_but_ours(
    sqlite_template: Path, tmp_path: Path
) -> None:
    path = tmp_path / "state.db"
    shutil.copy(sqlite_template, path)
    with opened_at(f"sqlite:///{path}") as store:
        assert ClockWatch(store, ShiftedClock(timedelta(hours=9))).ahead() == timedelta()


def test_doctor_says_how_far_the_clocks_are_apart() -> None:
    assert clock_finding(CLOCKS_APART).result == OK
    for ahead, found in ((31, "31.0 s ahead of"), (-31, "31.0 s behind")):
        told = clock_finding(timedelta(seconds=ahead))
        assert (told.result, found in told.found) == (FAIL, True)
