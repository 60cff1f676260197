"""What every queue of effects must do: the one on DBOS, and the one of the simulation.

`Rig` is for whoever writes another one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Protocol

import pytest
from sqlalchemy import Connection, Engine

from provisioner.core.contracts import Outgoing
from provisioner.store.durable import DbosEffectQueue, DbosEffectWorker, prepare_effects
from provisioner.store.engine import open_engine
from tests.parts.stores import NOW
from tests.parts.test_durable_effects import (
    Journal,
    outcomes,
    outgoing,
    until,
    worker_process,
    working,
)
from tests.sim.database import Database
from tests.sim.effect_queue import SimEffectQueue, SimEffectWorker
from tests.sim.scheduler import FOR_EVER_S, Group, Scheduler

# How often a worker may die over one effect, here and in `worker_process`.
DEATHS_MAX = 1


class Queue(Protocol):
    def enqueue(self, connection: Connection, outgoing: Outgoing) -> None: ...


class Rig(Protocol):
    """A queue with its database, and the means to let something happen."""

    @property
    def engine(self) -> Engine: ...

    @property
    def queue(self) -> Queue: ...

    def serving(self, perform: Callable[[Outgoing], None]) -> AbstractContextManager[None]:
        """A worker that performs effects until the block ends."""

    def until(self, holds: Callable[[], bool], what: str) -> None: ...

    def until_saved(self, key: str) -> None:
        """Return when it is saved that an effect was performed."""

    def pause(self) -> None:
        """Let others go on; for use while an effect is performed."""

    def dies_during(self, key: str) -> None:
        """A worker begins that effect, and is killed over it."""


class DbosRig:
    def __init__(self, url: str, folder: Path) -> None:
        self.engine = open_engine(url)
        prepare_effects(self.engine)
        self.queue = DbosEffectQueue(self.engine)
        self._folder = folder
        self._deaths = 0

    def serving(self, perform: Callable[[Outgoing], None]) -> AbstractContextManager[None]:
        return working(DbosEffectWorker(self.engine, deaths_max=DEATHS_MAX), perform)

    def until(self, holds: Callable[[], bool], what: str) -> None:
        until(holds, what)

    def until_saved(self, key: str) -> None:
        until(lambda: outcomes(self.engine)[key] == "SUCCESS", f"the outcome of {key}")

    def pause(self) -> None:
        time.sleep(0.01)

    def dies_during(self, key: str) -> None:
        self._deaths += 1
        journal = Journal(self._folder / f"journal-{self._deaths}")
        with worker_process(self.engine, journal, "hang") as process:
            journal.until_has(key)
            process.kill()

    def close(self) -> None:
        self.queue.close()
        self.engine.dispose()


class SimRig:
    def __init__(self) -> None:
        self._database = Database()
        self._scheduler = Scheduler(Random(1), NOW)
        self.engine = self._database.engine
        self.queue = SimEffectQueue()
        self._worker: SimEffectWorker | None = None
        self._database.committed = lambda: self._worker.poke() if self._worker else None

    @contextmanager
    def serving(self, perform: Callable[[Outgoing], None]) -> Iterator[None]:
        group = self._start(perform)
        yield
        self._scheduler.kill(group)
        self.until(lambda: group.is_dead, "its end")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        assert self._scheduler.run(holds, self._scheduler.now_s + 60.0), what

    def until_saved(self, key: str) -> None:
        """It is, as soon as it was performed: nobody else has a turn in between."""

    def pause(self) -> None:
        self._scheduler.sleep(0.01)

    def dies_during(self, key: str) -> None:
        begun: list[str] = []

        def hang(effect: Outgoing) -> None:
            begun.append(effect.key)
            self._scheduler.sleep(FOR_EVER_S)

        with self.serving(hang):
            self.until(lambda: begun == [key], key)

    def close(self) -> None:
        self._scheduler.close()
        self._database.close()

    def _start(self, perform: Callable[[Outgoing], None]) -> Group:
        group = Group("worker")
        self._worker = SimEffectWorker(
            self._database, self._scheduler, group, "worker-1", deaths_max=DEATHS_MAX
        )
        self._scheduler.spawn("start", lambda: self._started(perform), group)
        return group

    def _started(self, perform: Callable[[Outgoing], None]) -> None:
        assert self._worker is not None
        self._worker.start(perform)


@pytest.fixture(params=["dbos", "simulated"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made: DbosRig | SimRig = (
        SimRig()
        if request.param == "simulated"
        else DbosRig(f"sqlite:///{tmp_path / 'state.db'}", tmp_path)
    )
    yield made
    made.close()


def save(rig: Rig, *effects: Outgoing) -> None:
    with rig.engine.begin() as connection:
        for effect in effects:
            rig.queue.enqueue(connection, effect)


def test_an_effect_is_saved_with_its_transaction_or_not_at_all(rig: Rig) -> None:
    with rig.engine.connect() as connection, connection.begin() as transaction:
        rig.queue.enqueue(connection, outgoing("lost"))
        transaction.rollback()
    save(rig, outgoing("saved"))
    performed: list[Outgoing] = []
    with rig.serving(performed.append):
        rig.until(lambda: bool(performed), "an effect performed")
    assert performed == [outgoing("saved")]


def test_a_key_is_performed_once_however_often_it_is_saved(rig: Rig) -> None:
    performed: list[str] = []
    save(rig, outgoing("again"), outgoing("again"))
    with rig.serving(lambda effect: performed.append(effect.key)):
        rig.until(lambda: bool(performed), "an effect performed")
        save(rig, outgoing("again"), outgoing("end"))
        rig.until(lambda: "end" in performed, "the last effect")
    assert performed == ["again", "end"]


def test_one_bmc_gets_one_effect_at_a_time_in_the_order_saved(rig: Rig) -> None:
    expected = [f"key-{9 - number}" for number in range(8)]
    performed: list[str] = []
    inside: set[str] = set()

    def perform(effect: Outgoing) -> None:
        assert not inside
        inside.add(effect.key)
        rig.pause()
        inside.remove(effect.key)
        performed.append(effect.key)

    save(rig, *(outgoing(key) for key in expected[:4]))
    save(rig, *(outgoing(key) for key in expected[4:]))
    with rig.serving(perform):
        rig.until(lambda: len(performed) == 8, "eight effects")
    assert performed == expected


def test_another_bmc_does_not_wait(rig: Rig) -> None:
    performed: list[str] = []

    def perform(effect: Outgoing) -> None:
        while effect.key == "slow" and "quick" not in performed:
            rig.pause()
        performed.append(effect.key)

    save(rig, outgoing("slow"), outgoing("quick", "127.0.1.2:623"))
    with rig.serving(perform):
        rig.until(lambda: performed == ["quick", "slow"], "both")


def test_an_effect_that_its_worker_died_over_comes_again_before_the_next(rig: Rig) -> None:
    save(rig, outgoing("first"), outgoing("second"))
    rig.dies_during("first")
    performed: list[str] = []
    with rig.serving(lambda effect: performed.append(effect.key)):
        rig.until(lambda: len(performed) == 2, "two effects")
    assert performed == ["first", "second"]


def test_an_effect_that_kills_its_workers_is_given_up(rig: Rig) -> None:
    save(rig, outgoing("deadly"), outgoing("harmless"))
    for _ in range(DEATHS_MAX + 1):
        rig.dies_during("deadly")
    performed: list[str] = []
    with rig.serving(lambda effect: performed.append(effect.key)):
        rig.until(lambda: bool(performed), "an effect")
    assert performed == ["harmless"]


def test_a_bug_in_performing_is_not_repeated(rig: Rig) -> None:
    performed: list[str] = []

    def perform(effect: Outgoing) -> None:
        performed.append(effect.key)
        if effect.key == "faulty":
            raise RuntimeError("a bug of ours")

    save(rig, outgoing("faulty"), outgoing("next"))
    for end in ("next", "last"):
        save(rig, outgoing(end))
        with rig.serving(perform):
            rig.until(partial(performed.__contains__, end), end)
            rig.until_saved(end)
    assert performed == ["faulty", "next", "last"]


def test_performing_may_save_the_next_effect_for_the_same_bmc(rig: Rig) -> None:
    performed: list[str] = []

    def perform(effect: Outgoing) -> None:
        performed.append(effect.key)
        if effect.key == "off":
            save(rig, outgoing("on"))

    save(rig, outgoing("off"))
    with rig.serving(perform):
        rig.until(lambda: performed == ["off", "on"], "the next effect")
