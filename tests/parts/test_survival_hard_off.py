"""A worker that is frozen right before it cuts a host's power, at a later rung of the ladder, does
not cut it when it wakes past its lease: the host is another worker's by then.

Its look at the database may still say that the host is to be switched off, so nothing but the
lease keeps it from that; or the agent that the other has fetched is writing the disk.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.service.worker import OUTAGE_GRACE
from provisioner.store.durable import LEASE_LOST
from provisioner.store.engine import open_engine
from provisioner.store.tables import operations
from tests.parts.ipmi import running_ipmi_sim
from tests.parts.postgres import Postgres
from tests.parts.rack import Rack, patiently, request
from tests.parts.served_lives import enrol, install, lives, sibling_of, until
from tests.parts.simulated_host import SimulatedHost
from tests.parts.test_imaging_archive import FACTS
from tests.parts.test_survival_two_services import Pair

HURRIED, PATIENT = 3, 600
HOLD_LIMIT_S: Final = 900.0
END_LIMIT_S: Final = 180.0
# The first was for rung 0: a deployment without a soft shutdown cuts the power there as well.
AT_RUNG_ONE: Final = "stop worker bmc.power_off.before 2"


@pytest.fixture
def pair(tmp_path: Path, postgres: Postgres) -> Iterator[Pair]:
    """The first gives a host few seconds to come into the network, the second its time."""
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        limit = f"\n[limits]\nnetbooting_s = {HURRIED}\n"
        one = install(tmp_path / "one", database=postgres.new_database(), more=limit)
        enrol(one, sim.where())
        two = sibling_of(one, tmp_path / "two", "two")
        config = two.path
        config.write_text(config.read_text().replace(limit, limit.replace("= 3", f"= {PATIENT}")))
        host = SimulatedHost(two, tmp_path / "bmc", release_id=FACTS.release_id)
        host.install()
        with lives(one) as first, lives(two) as second:
            host.start()
            try:
                yield Pair(first, second, host)
            finally:
                host.stop()


@contextmanager
def held_at(host: SimulatedHost, name: str) -> Iterator[threading.Event]:
    """Let the host stand still before its first call of that name while the block runs; the
    event is set when it does."""
    arrived, goes_on = threading.Event(), threading.Event()

    def stand_still(called: str) -> None:
        if called == name:
            arrived.set()
            goes_on.wait(HOLD_LIMIT_S)

    host.on_call = stand_still
    try:
        yield arrived
    finally:
        goes_on.set()


@pytest.mark.parametrize(
    ("call", "phase"),
    [
        ("script", "netbooting"),  # on its way into the network, where the other has sent it
        # Its agent is at work.
        pytest.param("seed", "writing", marks=pytest.mark.soak),
    ],
)
def test_a_worker_that_wakes_does_not_cut_the_power_of_anothers_host(
    pair: Pair, call: str, phase: str
) -> None:
    with held_at(pair.host, call) as arrived:
        operation, frozen = frozen_at_rung_one(pair)
        before = len(pair.host.happened())
        pair.second.begin()
        with pair.second.client() as client:
            assert patiently(lambda: client.operation(operation))["rung"] == 1

            def is_served() -> bool:
                sent_again = "on pxe" in pair.host.happened()[before:]
                return arrived.is_set() and (sent_again or call == "seed")

            until(is_served, "the host in the hands of the second", END_LIMIT_S)
            # The lease is over then: the second has taken what the first had in its hands.
            until(lambda: Rack(pair.second, pair.host).in_queue() == 0, "all effects", END_LIMIT_S)
            assert client.operation(operation)["phase"] == phase
            done = pair.host.happened()
            os.kill(frozen, signal.SIGCONT)
            lost = f'"code": {LEASE_LOST}'
            until(lambda: lost in pair.first.log.read_text(), "the end of the first", END_LIMIT_S)
            time.sleep(1.0)
            assert pair.host.happened() == done
            assert pair.host.is_on()
            assert client.operation(operation)["phase"] == phase
    with pair.second.client() as client:
        until(lambda: client.operation(operation)["is_final"], "the end", END_LIMIT_S)
        assert client.operation(operation)["phase"] == "succeeded"
    assert pair.host.happened() == done


def frozen_at_rung_one(pair: Pair) -> tuple[str, int]:
    """Let the first service's worker freeze right before it cuts the power; return the operation
    and that process. Nobody answers the host in the network before the second is there."""
    pair.first.begin()
    pair.first.arm(AT_RUNG_ONE)
    with pair.first.client() as client:
        operation = request(Rack(pair.first, pair.host), client)
    # A worker that has just begun gives everybody OUTAGE_GRACE before it ends anything.
    frozen_within_s = OUTAGE_GRACE.total_seconds() + END_LIMIT_S
    until(pair.first.has_fired, "the first worker frozen", frozen_within_s)
    give_time(pair, operation)
    return operation, pair.first.pid_of("prov-worker")


def give_time(pair: Pair, operation: str) -> None:
    """Let the host have as long as the second gives it: the deadline was set by the first, and
    the second would end it when it has been there for OUTAGE_GRACE."""
    engine = open_engine(pair.second.settings.database.url)
    change = operations.update().where(operations.c.id == operation)
    with engine.begin() as connection:
        at = datetime.now(UTC) + timedelta(seconds=PATIENT)
        connection.execute(change.values(deadline_at=at))
    engine.dispose()
