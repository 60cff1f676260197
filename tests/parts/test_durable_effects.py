"""What was saved to be done is done: in order, one at a time per BMC, whatever is killed.

Run as a program, this file is a worker process that the tests kill: see `work`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from provisioner.core.contracts import Outgoing
from provisioner.core.effects import PowerOff, PowerOn
from provisioner.core.model import OperationId
from provisioner.errors import ConfigError
from provisioner.store.durable import (
    STOP_LIMIT,
    DbosEffectQueue,
    DbosEffectWorker,
    prepare_effects,
)
from provisioner.store.engine import open_engine
from tests.parts.postgres import Postgres
from tests.parts.stores import opened

WAIT_LIMIT_S = 60.0
PROJECT = Path(__file__).parents[2]


def outgoing(key: str, partition: str = "127.0.1.1:623") -> Outgoing:
    return Outgoing(key, partition, OperationId("op_1"), 3, PowerOff(soft=True))


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_LIMIT_S
    while not holds():
        assert time.monotonic() < end, f"not within {WAIT_LIMIT_S} s: {what}"
        time.sleep(0.01)


class Journal:
    """A file with a line for each effect that a worker, in whatever process, began."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: str) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"{line}\n".encode())
        os.close(file)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def until_has(self, *lines: str) -> None:
        until(lambda: self.lines() == list(lines), f"{lines}, found {self.lines()}")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    prepare_effects(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def queue(engine: Engine) -> Iterator[DbosEffectQueue]:
    queue = DbosEffectQueue(engine)
    yield queue
    queue.close()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@contextmanager
def worker_process(engine: Engine, journal: Journal, how: str) -> Iterator[subprocess.Popen[str]]:
    url = engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.parts.test_durable_effects", url, str(journal.path), how],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT_LIMIT_S)


def work(url: str, path: str, how: str) -> None:
    """A worker that writes down each effect, and then returns, hangs or dies as told."""
    journal = Journal(Path(path))
    name = "peer" if how == "hang as peer" else "worker-1"
    worker = DbosEffectWorker(open_engine(url), name=name, deaths_max=1)

    def perform(asked: Outgoing) -> None:
        journal.write(asked.key)
        if how.startswith("hang"):
            threading.Event().wait()
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker.start(perform)
    if how == "tell":
        journal.write("started")
    stop.wait()
    worker.stop()
    sys.stdout.flush()
    os._exit(0)  # as the supervisor's children do: threads that still perform end with it


@contextmanager
def working(worker: DbosEffectWorker, perform: Callable[[Outgoing], None]) -> Iterator[None]:
    worker.start(perform)
    try:
        yield
    finally:
        worker.stop()


def save(engine: Engine, queue: DbosEffectQueue, *effects: Outgoing) -> None:
    with engine.begin() as connection:
        for effect in effects:
            queue.enqueue(connection, effect)


def outcomes(engine: Engine) -> dict[str, str]:
    schema = "" if engine.dialect.name == "sqlite" else "dbos."
    with engine.connect() as connection:
        rows = connection.execute(
            text(f"SELECT workflow_uuid, status FROM {schema}workflow_status")
        )
        return {row[0]: row[1] for row in rows}


def test_an_effect_is_saved_with_its_transaction_or_not_at_all(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    with engine.connect() as connection, connection.begin() as transaction:
        queue.enqueue(connection, outgoing("lost"))
        transaction.rollback()
    save(engine, queue, outgoing("saved"))
    performed: list[Outgoing] = []
    with working(DbosEffectWorker(engine), performed.append):
        until(lambda: bool(performed), "an effect performed")
    assert performed == [outgoing("saved")]
    assert outcomes(engine) == {"saved": "SUCCESS"}


def test_what_a_use_case_enqueues_through_the_store_is_performed(migrated_url: str) -> None:
    performed: list[Outgoing] = []
    engine = open_engine(migrated_url)
    with opened(engine) as store, working(DbosEffectWorker(engine), performed.append):
        with store.begin() as tx:
            tx.enqueue(outgoing("asked"))
        until(lambda: performed == [outgoing("asked")], "the effect")


def test_enqueuing_a_key_twice_does_it_once(engine: Engine, queue: DbosEffectQueue) -> None:
    performed: list[str] = []
    save(engine, queue, outgoing("again"), outgoing("again"))
    with working(DbosEffectWorker(engine), lambda asked: performed.append(asked.key)):
        until(lambda: bool(performed), "an effect performed")
        save(engine, queue, outgoing("again"), outgoing("end"))
        until(lambda: "end" in performed, "the last effect")
    assert performed == ["again", "end"]


def test_one_bmc_gets_one_effect_at_a_time_in_the_order_saved(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    """The keys sort the other way round, and a transaction's rows share one time."""
    expected = [f"key-{9 - number}" for number in range(10)]
    performed: list[str] = []
    inside = overlapping = 0

    def perform(asked: Outgoing) -> None:
        nonlocal inside, overlapping
        inside += 1
        overlapping = max(overlapping, inside)
        performed.append(asked.key)
        inside -= 1

    save(engine, queue, *(outgoing(key) for key in expected[:5]))
    save(engine, queue, *(outgoing(key) for key in expected[5:]))
    with working(DbosEffectWorker(engine), perform):
        until(lambda: len(performed) == 10, "ten effects")
    assert performed == expected
    assert overlapping == 1


def test_other_bmcs_do_not_wait_and_the_limit_of_the_worker_is_reached(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    go_on = threading.Event()
    inside: list[str] = []
    performed: list[str] = []

    def perform(asked: Outgoing) -> None:
        inside.append(asked.key)
        go_on.wait(WAIT_LIMIT_S)
        performed.append(asked.key)

    save(engine, queue, *(outgoing(f"key-{n}", f"127.0.1.{n}:623") for n in range(5)))
    with working(DbosEffectWorker(engine, at_once_max=2), perform):
        until(lambda: len(inside) == 2, "two effects at once")
        time.sleep(0.5)  # several looks at the queue, at which a third would begin
        assert len(inside) == 2
        go_on.set()
        until(lambda: len(performed) == 5, "all effects")


def test_an_effect_saved_while_no_worker_lives_is_performed_by_the_next(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    with worker_process(engine, journal, "tell") as process:
        journal.until_has("started")
        process.kill()
        process.wait(WAIT_LIMIT_S)
    save(engine, queue, outgoing("waiting"))
    with working(DbosEffectWorker(engine), lambda asked: journal.write(asked.key)):
        journal.until_has("started", "waiting")


def test_an_effect_interrupted_by_kill_9_is_performed_again(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    save(engine, queue, outgoing("first"), outgoing("second"))
    with worker_process(engine, journal, "hang") as process:
        journal.until_has("first")
        process.kill()
        process.wait(WAIT_LIMIT_S)
    with working(DbosEffectWorker(engine), lambda asked: journal.write(asked.key)):
        journal.until_has("first", "first", "second")


def test_an_effect_that_waits_for_ever_holds_up_no_stop_and_is_not_lost(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    """So one may wait for the database without a limit."""
    save(engine, queue, outgoing("waiting"))
    with worker_process(engine, journal, "hang") as process:
        journal.until_has("waiting")
        process.terminate()
        process.wait(STOP_LIMIT.total_seconds() + WAIT_LIMIT_S)
    assert outcomes(engine) == {"waiting": "PENDING"}
    with working(DbosEffectWorker(engine), lambda asked: journal.write(asked.key)):
        journal.until_has("waiting", "waiting")


def test_an_effect_that_kills_its_worker_is_given_up_at_the_limit(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    """The worker process allows one death; the second is the last."""
    save(engine, queue, outgoing("deadly"), outgoing("harmless"))
    for deaths in (1, 2):
        with worker_process(engine, journal, "die") as process:
            process.wait(WAIT_LIMIT_S)
        assert journal.lines() == ["deadly"] * deaths
    with worker_process(engine, journal, "return"):
        journal.until_has("deadly", "deadly", "harmless")
        until(lambda: outcomes(engine)["harmless"] == "SUCCESS", "an outcome")
    assert outcomes(engine)["deadly"] == "MAX_RECOVERY_ATTEMPTS_EXCEEDED"


def test_a_bug_in_performing_is_recorded_and_not_repeated(
    engine: Engine, queue: DbosEffectQueue, caplog: pytest.LogCaptureFixture
) -> None:
    performed: list[str] = []

    def perform(asked: Outgoing) -> None:
        performed.append(asked.key)
        if asked.key == "faulty":
            raise RuntimeError("a bug of ours")

    save(engine, queue, outgoing("faulty"), outgoing("next"))
    for _ in range(2):
        with working(DbosEffectWorker(engine), perform):
            until(lambda: "next" in performed, "the next effect")
            # Until then it would be performed once more, by the next worker.
            until(lambda: outcomes(engine)["next"] == "SUCCESS", "its outcome")
    assert performed == ["faulty", "next"]
    assert outcomes(engine)["faulty"] == "ERROR"
    assert "a bug of ours" in caplog.text


def test_finished_effects_are_forgotten_in_time_and_waiting_ones_are_not(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    go_on = threading.Event()
    performed: list[str] = []

    def perform(asked: Outgoing) -> None:
        performed.append(asked.key)
        if asked.key == "slow":
            go_on.wait(WAIT_LIMIT_S)

    soon = timedelta(milliseconds=100)
    save(engine, queue, outgoing("done"), outgoing("slow"), outgoing("waiting"))
    with working(DbosEffectWorker(engine, finished_kept=soon, gc_interval=soon), perform):
        until(lambda: "done" not in outcomes(engine), "a finished effect forgotten")
        until(lambda: "slow" in performed, "the second effect")
        assert outcomes(engine) == {"slow": "PENDING", "waiting": "ENQUEUED"}
        go_on.set()
        until(lambda: not outcomes(engine), "all forgotten")


def test_a_peer_takes_over_from_a_dead_worker_and_not_from_a_living_one(
    postgres: Postgres, journal: Journal
) -> None:
    engine = open_engine(postgres.new_database())
    prepare_effects(engine)
    queue = DbosEffectQueue(engine)
    save(engine, queue, outgoing("first"), outgoing("second"))
    soon = timedelta(milliseconds=100)
    with worker_process(engine, journal, "hang as peer") as process:
        journal.until_has("first")
        worker = DbosEffectWorker(engine, takeover_interval=soon)
        with working(worker, lambda asked: journal.write(asked.key)):
            time.sleep(0.5)  # several rounds, in which a living peer's work could be taken
            assert journal.lines() == ["first"]
            process.kill()
            journal.until_has("first", "first", "second")
    queue.close()
    engine.dispose()


def test_a_second_worker_of_one_name_is_refused(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    """It would take the first one's work for its own, left over from a crash."""
    save(engine, queue, outgoing("running"))
    with worker_process(engine, journal, "hang"):
        journal.until_has("running")
        with pytest.raises(ConfigError, match="another worker named worker-1"):
            DbosEffectWorker(engine).start(lambda asked: journal.write(asked.key))
    with working(DbosEffectWorker(engine), lambda asked: journal.write(asked.key)):
        journal.until_has("running", "running")


def test_an_effect_that_was_taken_without_the_taker_hearing_of_it_is_performed(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    """As after a commit whose outcome was lost: the database says that this worker has it."""
    performed: list[str] = []
    schema = "" if engine.dialect.name == "sqlite" else "dbos."
    taken = text(
        f"UPDATE {schema}workflow_status SET status = 'PENDING', executor_id = 'worker-1'"
        " WHERE workflow_uuid = 'taken'"
    )
    with working(DbosEffectWorker(engine), lambda asked: performed.append(asked.key)):
        with engine.begin() as connection:
            queue.enqueue(connection, outgoing("taken"))
            connection.execute(taken)
        until(lambda: performed == ["taken"], "the effect")
        until(lambda: outcomes(engine)["taken"] == "SUCCESS", "its outcome")


def test_a_worker_waits_a_moment_for_one_of_its_name_that_is_just_ending(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    """A service that is killed and started again at once must not stop over its own past."""
    save(engine, queue, outgoing("running"))
    with worker_process(engine, journal, "hang") as process:
        journal.until_has("running")
        threading.Timer(0.1, process.kill).start()
        with working(DbosEffectWorker(engine), lambda asked: journal.write(asked.key)):
            journal.until_has("running", "running")


def test_the_worker_says_nothing_calls_nobody_and_stops_on_demand(
    engine: Engine, queue: DbosEffectQueue, journal: Journal
) -> None:
    save(engine, queue, outgoing("one"))
    with worker_process(engine, journal, "tell") as process:
        until(lambda: sorted(journal.lines()) == ["one", "started"], "one effect")
        assert internet_sockets(process.pid) == set()
        process.terminate()
        said, _ = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 0
    assert said == ""


def internet_sockets(pid: int) -> set[str]:
    """The process's TCP and UDP sockets, listening or not."""
    links = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed a moment ago
            links.append(os.readlink(file))
    mine = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6", "udp", "udp6")]
    rows = [line.split() for file in tables if file.exists() for line in file.open()]
    return mine & {row[9] for row in rows if len(row) > 9}


def test_performing_may_save_the_next_effect_for_the_same_bmc(
    engine: Engine, queue: DbosEffectQueue
) -> None:
    performed: list[str] = []

    def perform(asked: Outgoing) -> None:
        performed.append(asked.key)
        if asked.key == "off":
            on = Outgoing("on", asked.partition, asked.operation_id, asked.generation, PowerOn())
            save(engine, queue, on)

    save(engine, queue, outgoing("off"))
    with working(DbosEffectWorker(engine), perform):
        until(lambda: performed == ["off", "on"], "the next effect")


if __name__ == "__main__":
    work(*sys.argv[1:])
