"""Two at once, too many, too long: the store stays true, and says when it cannot serve."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from provisioner.core.audit import verify
from provisioner.core.contracts import Store, Tx
from provisioner.core.model import (
    Event,
    HostId,
    OperationId,
    Phase,
    ReleaseFailure,
    ReleaseRow,
    ReleaseTest,
    Ticket,
)
from provisioner.errors import BmcAuthFailed, Conflict, Unavailable
from provisioner.store.engine import open_engine
from provisioner.store.sql_operations import OPERATIONS_PER_HOST_MAX
from provisioner.store.sql_records import EVENTS_PER_HOST_MAX
from provisioner.store.sql_releases import FAILURES_PER_HOST_MAX, TESTS_PER_RELEASE_MAX
from tests.parts.stores import NOW, a_host, an_operation, opened

HOST, OP = HostId("host_r1n1"), OperationId("op_1")
WAIT_LIMIT_S = 60.0


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    engine = open_engine(migrated_url, lock_wait=timedelta(seconds=0.5))
    yield engine
    engine.dispose()


@pytest.fixture
def impatient(engine: Engine) -> Iterator[Store]:
    with opened(engine) as store:
        yield store


@pytest.fixture
def with_operation(store: Store) -> Store:
    with store.begin() as tx:
        tx.add_host(a_host())
        tx.add_operation(an_operation())
    return store


def at_once(number: int, call: Callable[[int], object]) -> list[object]:
    """Call it from `number` threads that begin together; return results or errors."""
    together = threading.Barrier(number)

    def begin(index: int) -> object:
        together.wait(WAIT_LIMIT_S)
        try:
            return call(index)
        except (Conflict, Unavailable) as error:
            return type(error)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(begin, range(number)))


def test_one_of_many_consumes_a_ticket(with_operation: Store) -> None:
    with with_operation.begin() as tx:
        tx.add_ticket(Ticket("t", OP, HOST, 1, NOW))

    def consume(_: int) -> bool:
        with with_operation.begin() as tx:
            return tx.consume_ticket("t", NOW)

    assert sorted(map(str, at_once(8, consume))) == ["False"] * 7 + ["True"]


def test_one_of_many_begins_an_operation(store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())

    def begin(index: int) -> str:
        with store.begin() as tx:
            tx.add_operation(an_operation(f"op_{index}"))
            return "begun"

    found = at_once(8, begin)
    assert found.count("begun") == 1
    assert found.count(Conflict) == 7


def test_the_audit_chain_holds_when_many_write_it(with_operation: Store) -> None:
    def change(index: int) -> None:
        for number in range(10):
            with with_operation.begin() as tx:
                tx.audit(NOW, f"actor-{index}", "host.saved", "r1n1", {"n": number})
                tx.add_event(Event(NOW, "service", "saved", host_id=HOST))

    assert at_once(8, change) == [None] * 8
    with with_operation.read() as tx:
        assert verify(tx.audit_rows()) == 80
        assert len(tx.events()) == 80


def test_no_change_is_lost_and_nobody_meets_in_a_deadlock(with_operation: Store) -> None:
    """Half of them come from the operation and half from the host, as the use cases do."""

    def from_operation(tx: Tx) -> None:
        operation = tx.operation(OP)
        host = tx.host(operation.host_id)
        tx.save_host(replace(host, generation=host.generation + 1))
        tx.save_operation(replace(operation, rung=operation.rung + 1))

    def from_host(tx: Tx) -> None:
        host = tx.host(HOST)
        operation = tx.open_operation(host.id)
        assert operation is not None
        tx.save_operation(replace(operation, rung=operation.rung + 1))
        tx.save_host(replace(host, generation=host.generation + 1))

    def change(index: int) -> None:
        for _ in range(10):
            with with_operation.begin() as tx:
                (from_operation if index % 2 else from_host)(tx)
                tx.add_event(Event(NOW, "service", "changed", host_id=HOST))

    assert at_once(8, change) == [None] * 8
    with with_operation.read() as tx:
        assert tx.host(HOST).generation == 80
        assert tx.operation(OP).rung == 80


def test_who_waits_too_long_for_a_lock_is_told_and_readers_are_not_held_up(
    impatient: Store,
) -> None:
    with impatient.begin() as tx:
        tx.add_host(a_host())

    def save() -> None:
        with impatient.begin() as tx:
            tx.save_host(replace(tx.host(HOST), generation=9))

    with impatient.begin() as tx:
        tx.host(HOST)
        with ThreadPoolExecutor(1) as pool:
            assert isinstance(pool.submit(save).exception(WAIT_LIMIT_S), Unavailable)
        with impatient.read() as other:
            assert other.host(HOST) == a_host()
    save()


def test_a_reader_sees_one_state(store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
    with store.read() as reader:
        assert reader.host(HOST).generation == 0
        with store.begin() as tx:
            tx.save_host(replace(tx.host(HOST), generation=9))
        assert reader.host(HOST).generation == 0


def test_a_database_that_is_gone_is_unavailable(engine: Engine) -> None:
    url = engine.url.set(query={"host": "/nonexistent"})
    if engine.dialect.name == "sqlite":
        url = engine.url.set(database="/nonexistent/state.db")
    with opened(open_engine(url.render_as_string())) as store, pytest.raises(Unavailable):
        store.begin().__enter__()


def test_the_timeline_of_a_host_is_bounded(with_operation: Store) -> None:
    def add(count: int, host_id: HostId | None) -> None:
        with with_operation.begin() as tx:
            for number in range(count):
                tx.add_event(Event(NOW, "service", f"line {number}", host_id=host_id))

    add(5, None)
    add(EVENTS_PER_HOST_MAX - 1, HOST)
    add(2, HOST)
    with with_operation.read() as tx:
        lines = tx.events(host_id=HOST, limit=EVENTS_PER_HOST_MAX * 2)
        assert len(lines) == EVENTS_PER_HOST_MAX
        assert lines[0][1].text == "line 1"
        assert len(tx.events(limit=EVENTS_PER_HOST_MAX * 2)) == EVENTS_PER_HOST_MAX + 5
    add(EVENTS_PER_HOST_MAX + 3, None)
    with with_operation.read() as tx:
        assert len(tx.events(limit=EVENTS_PER_HOST_MAX * 3)) == EVENTS_PER_HOST_MAX * 2


def test_finished_operations_of_a_host_are_bounded(store: Store) -> None:
    with store.begin() as tx:
        for name in ("r1n1", "r1n2"):
            tx.add_host(a_host(name))
        tx.add_operation(an_operation("op_other", "host_r1n2", phase=Phase.FAILED))
        for number in range(OPERATIONS_PER_HOST_MAX + 2):
            at = NOW + timedelta(seconds=number)
            done = an_operation(f"op_{number}", phase=Phase.SUCCEEDED, requested_at=at)
            tx.add_operation(done)
        kept = tx.operations(host_id=HOST, limit=1000)
        assert len(kept) == OPERATIONS_PER_HOST_MAX
        assert kept[-1].id == "op_2"
        assert tx.operation(OperationId("op_other"))


def test_another_key_opens_no_password_and_changes_none(migrated_url: str, store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
        mine = tx.host(HOST)
        tx.save_host(replace(mine, labels={}))
        assert tx.host(HOST).bmc == mine.bmc == a_host().bmc
    with opened(open_engine(migrated_url), key=bytes(32)) as other, other.begin() as tx:
        host = tx.host(HOST)
        assert host.bmc is not None
        with pytest.raises(BmcAuthFailed, match="host r1n1 does not open"):
            host.bmc.password.reveal()
        tx.save_host(replace(host, labels={"rack": "r2"}))
    with store.read() as tx:
        assert tx.host(HOST).bmc == mine.bmc, "with the right key it opens still"


def test_so_many_tests_of_a_release_are_kept(store: Store) -> None:
    one, other = (
        ReleaseRow(digest * 32, "web", digest, 1, 2, 3, ("bios",), "cd" * 16, NOW)
        for digest in ("ab", "cd")
    )
    with store.begin() as tx:
        for row in (one, other):
            tx.add_release(row)
        tx.add_release_test(ReleaseTest(other.digest, NOW, "web", ("bios",), True, {}, "anna"))
        for number in range(TESTS_PER_RELEASE_MAX + 5):
            detail = {"number": number}
            tx.add_release_test(
                ReleaseTest(one.digest, NOW, "web", ("bios",), True, detail, "anna")
            )
        kept = [test.detail["number"] for test in tx.release_tests(one.digest)]
        assert kept == list(range(TESTS_PER_RELEASE_MAX + 4, 4, -1))
        assert len(tx.release_tests(other.digest)) == 1


def test_the_oldest_failed_releases_of_a_host_are_forgotten(store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
        tx.add_host(a_host("r1n2"))
        for number in range(FAILURES_PER_HOST_MAX + 3):
            at = NOW + timedelta(seconds=number)
            tx.remember_failure(ReleaseFailure(HOST, f"{number:064}", OP, at, "x", "a\0b\ud800"))
        other = ReleaseFailure(HostId("host_r1n2"), "0" * 64, OP, NOW, "x", "it failed")
        tx.remember_failure(other)
        kept = [int(one.release) for one in tx.failures_on(HOST)]
        assert kept == list(range(FAILURES_PER_HOST_MAX + 2, 2, -1))
        assert tx.failures_on(other.host_id) == [other]
        # The same again takes the place of what was known.
        tx.remember_failure(replace(other, code="y"))
        assert [one.code for one in tx.failures_on(other.host_id)] == ["y"]
        tx.forget_failure(other.host_id, other.release)
        assert tx.failures_on(other.host_id) == []
        tx.delete_host(HOST)
        assert tx.failures_on(HOST) == []


def test_what_is_to_come_keeps_its_operation_from_being_forgotten(store: Store) -> None:
    """However often somebody looks at the host meanwhile."""
    with store.begin() as tx:
        tx.add_host(a_host())
        failed = an_operation(
            "op_waits", phase=Phase.FAILED, follow_up={"what": "retry"}, follow_up_at=NOW
        )
        tx.add_operation(failed)
        for number in range(OPERATIONS_PER_HOST_MAX + 5):
            at = NOW + timedelta(seconds=number + 1)
            tx.add_operation(an_operation(f"op_{number}", phase=Phase.CANCELLED, requested_at=at))
        assert tx.waiting_follow_ups(HOST) == [failed]
        assert tx.due_follow_ups(NOW) == [failed]
        assert tx.due_follow_ups(NOW - timedelta(seconds=1)) == []
        assert failed.release in tx.used_releases()
