"""What the guard asks of the database: true on both kinds of it, and quick in a large fleet."""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from provisioner.core.contracts import Store, Tx
from provisioner.core.fleet import Breaker, Failure, Load, Queued, Selection
from provisioner.core.model import HostId, HostState, Kind, OperationId, Phase
from provisioner.service.facts import GuardFacts
from provisioner.store.engine import open_engine
from provisioner.store.sql_fleet import REQUESTS_KEPT
from tests.parts.stores import NOW, a_host, an_operation, opened

SECOND = timedelta(seconds=1)
A_MINUTE = {"started_after": NOW - 60 * SECOND, "started_until": NOW}
HOSTS, IN_FLIGHT, GROUPS = 10_000, 500, 20
# Measured 20 times quicker; the test machine may be busy with others, for a while.
LOOK_LIMIT_S = 1.0
LOOKS_MAX = 20


def add(
    tx: Tx,
    number: int,
    phase: Phase,
    *,
    group: str | None = None,
    state: HostState = HostState.DIRTY,
    **changes: Any,
) -> None:
    labels = {"group": group} if group else {}
    name = f"r1n{number}"
    inventory = {"disks": ["of the size that inventories have"] * 200}
    tx.add_host(a_host(name, state=state, labels=labels, bmc=None, inventory=inventory))
    made = an_operation(f"op_{number}", f"host_{name}", phase=phase)
    tx.add_operation(replace(made, **changes))


def test_a_selection_is_read_as_it_was_saved_and_kept_for_a_while(store: Store) -> None:
    first = Selection("rq_1", (HostId("host_1"), HostId("host_2")), "anna", NOW)
    later = replace(first, request_id="rq_2", requested_at=NOW + REQUESTS_KEPT)
    with store.begin() as tx:
        tx.add_selection(first)
        assert tx.selection("rq_1") == first
        tx.add_selection(later)
        assert tx.selection("rq_1") is None
        assert tx.selection("rq_2") == later
        assert tx.selection("rq_3") is None


def test_loads_are_counted_by_group(store: Store) -> None:
    started: dict[str, Any] = {"started_at": NOW}
    with store.begin() as tx:
        add(tx, 1, Phase.NETBOOTING, group="web", state=HostState.ACTIVE, **started)
        add(tx, 2, Phase.WRITING, group="web", started_at=NOW - 60 * SECOND)
        add(tx, 3, Phase.FAILED, group="web", **started)
        add(tx, 4, Phase.QUEUED, group="web", state=HostState.ACTIVE)
        add(tx, 5, Phase.PROVING, **started)
        add(tx, 6, Phase.NETBOOTING, requested_by="discovery", **started)
        add(tx, 7, Phase.SUCCEEDED, group="db", started_at=NOW - 60 * SECOND)
        add(tx, 9, Phase.SUCCEEDED, started_at=NOW + SECOND)  # by a clock that was set back
        tx.add_host(a_host("r1n8", state=HostState.RETIRED, labels={"group": "web"}))
    with store.read() as tx:
        loads = tx.loads(**A_MINUTE, not_by="discovery")
        assert loads == {"web": Load(2, 2, 1), None: Load(1, 1, 0)}
        assert tx.group_sizes(["web", "db", "none"]) == {"web": (4, 2), "db": (1, 0)}
        assert tx.group_sizes([]) == {}


@pytest.mark.parametrize("out", [{"in_maintenance": True}, {"quarantine_reason": "it failed"}])
def test_who_is_out_of_the_pool_is_not_counted_as_serving(store: Store, out: Any) -> None:
    with store.begin() as tx:
        add(tx, 1, Phase.NETBOOTING, group="web", state=HostState.ACTIVE, started_at=NOW)
        add(tx, 2, Phase.SUCCEEDED, group="web", state=HostState.ACTIVE)
        assert tx.group_sizes(["web"]) == {"web": (2, 2)}
        for name in ("r1n1", "r1n2"):
            host = tx.host_named(name)
            assert host is not None
            tx.save_host(replace(host, **out))
        assert tx.group_sizes(["web"]) == {"web": (2, 0)}
        loads = tx.loads(**A_MINUTE, not_by="discovery")
        assert loads == {"web": Load(1, 1, 0)}, "it takes nothing away from those that serve"


def test_a_host_that_changes_its_group_is_counted_there(store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host(labels={"group": "web"}))
        tx.save_host(a_host(labels={"group": "db"}))
        assert tx.group_sizes(["web", "db"]) == {"db": (1, 0)}
        tx.save_host(a_host(labels={"group": ""}))
        assert tx.group_sizes(["", "db"]) == {}


def test_the_queue_shows_the_oldest_of_each_group(store: Store) -> None:
    with store.begin() as tx:
        for number in range(1, 7):
            group, state = (
                (None, "web")[number % 2],
                (HostState.ACTIVE, HostState.DIRTY)[number % 2],
            )
            requested: dict[str, Any] = {"requested_at": NOW - number * SECOND}
            add(tx, number, Phase.QUEUED, group=group, state=state, **requested)
        add(tx, 7, Phase.NETBOOTING)
    with store.read() as tx:
        found = tx.queued(per_group_max=2)
    assert [one.operation_id for one in found] == ["op_6", "op_5", "op_4", "op_3"]
    assert found[1] == Queued(OperationId("op_5"), HostId("host_r1n5"), "web", is_active=False)
    assert found[0] == Queued(OperationId("op_6"), HostId("host_r1n6"), None, is_active=True)


def test_active_hosts_that_wait_hide_no_other_of_their_group(store: Store) -> None:
    with store.begin() as tx:
        for number in range(1, 6):
            state = HostState.DIRTY if number == 5 else HostState.ACTIVE
            asked: dict[str, Any] = {"requested_at": NOW + number * SECOND}
            add(tx, number, Phase.QUEUED, group="web", state=state, **asked)
    with store.read() as tx:
        found = [(one.operation_id, one.is_active) for one in tx.queued(per_group_max=2)]
    assert found == [("op_1", True), ("op_2", True), ("op_5", False)]


def test_failures_are_those_of_deployments_that_disturbed_a_host(store: Store) -> None:
    ended: dict[str, Any] = {"started_at": NOW, "ended_at": NOW}
    with store.begin() as tx:
        add(tx, 1, Phase.FAILED, error={"code": "wrong_system"}, **ended)
        add(tx, 2, Phase.FAILED, **ended)
        add(tx, 3, Phase.FAILED, ended_at=NOW)
        add(tx, 4, Phase.SUCCEEDED, **ended)
        add(tx, 5, Phase.FAILED, kind=Kind.INSPECTION, **ended)
        add(tx, 6, Phase.FAILED, started_at=NOW, ended_at=NOW - SECOND)
    with store.read() as tx:
        found = sorted(tx.failures(NOW - SECOND), key=lambda one: one.host_id)
        assert tx.failures(NOW - SECOND, NOW - SECOND / 2) == []
        assert len(tx.failures(NOW - 2 * SECOND, NOW - SECOND)) == 1
    assert found == [
        Failure(HostId("host_r1n1"), "wrong_system"),
        Failure(HostId("host_r1n2"), ""),
    ]


def test_the_breaker_is_one_row_that_is_always_there(store: Store) -> None:
    with store.begin() as tx:
        assert tx.breaker(lock=True) == Breaker()
        opened_now = Breaker(opened_at=NOW, reason="x")
        tx.save_breaker(opened_now)
    with store.read() as tx:
        assert tx.breaker() == opened_now
        assert tx.breaker().is_open


# --- a large fleet --------------------------------------------------------------------------


@pytest.fixture
def large(migrated_url: str) -> Iterator[Engine]:
    """Ten thousand hosts in twenty groups, 500 of them in flight, and the others queued."""
    engine = open_engine(migrated_url)
    with opened(engine) as store:
        with store.begin() as tx:
            add(tx, 0, Phase.NETBOOTING, group="g0", started_at=NOW)
        with engine.begin() as connection:
            fill(connection.exec_driver_sql, engine.dialect.name)
        yield engine


def fill(execute: object, dialect: str) -> None:
    """Multiply the one host and its one operation, by the database itself."""
    assert callable(execute)
    series = (
        f"WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {HOSTS - 1})"
    )
    for table, changed in (
        (
            "hosts",
            {
                "id": "'host_' || n",
                "name": "'h' || n",
                "group_name": f"'g' || (n - n / {GROUPS} * {GROUPS})",
                "state": "CASE WHEN n / 3 * 3 = n THEN 'dirty' ELSE 'active' END",
            },
        ),
        (
            "operations",
            {
                "id": "'op_' || n",
                "host_id": "'host_' || n",
                "phase": f"CASE WHEN n < {IN_FLIGHT} THEN 'writing' ELSE 'queued' END",
                "started_at": f"CASE WHEN n < {IN_FLIGHT} THEN t.started_at END",
            },
        ),
    ):
        names = column_names(execute, table, dialect)
        values = ", ".join(changed.get(name, f"t.{name}") for name in names)
        columns = ", ".join(names)
        execute(f"INSERT INTO {table} ({columns}) {series} SELECT {values} FROM s, {table} t")
    execute("ANALYZE")


def column_names(execute: object, table: str, dialect: str) -> list[str]:
    assert callable(execute)
    if dialect == "sqlite":
        return [row[1] for row in execute(f"PRAGMA table_info({table})")]
    query = f"SELECT column_name FROM information_schema.columns WHERE table_name = '{table}'"
    return [row[0] for row in execute(query)]


def test_the_guards_questions_are_quick_in_a_large_fleet(large: Engine) -> None:
    """Each at its best of many looks, which end as soon as all were quick."""
    best: dict[str, float] = {}
    with opened(large) as store:
        for _ in range(LOOKS_MAX):
            for what, seconds in asked_by_the_guard(store).items():
                best[what] = min(seconds, best.get(what, seconds))
            if max(best.values()) < LOOK_LIMIT_S:
                break
    print({what: f"{seconds * 1000:.1f} ms" for what, seconds in best.items()})  # noqa: T201 # shown with -s
    assert max(best.values()) < LOOK_LIMIT_S, best


def asked_by_the_guard(store: Store) -> dict[str, float]:
    """Ask everything once, see that the answers are true, and return how long each took."""
    guard = GuardFacts()
    with store.read() as tx:
        began = time.monotonic()
        queue = tx.queued(per_group_max=50)
        looked = time.monotonic()
        view = guard.view(tx, {one.group for one in queue}, NOW)
        viewed = time.monotonic()
    assert len(queue) == 2 * 50 * GROUPS
    assert view.fleet("g1").load.in_flight == IN_FLIGHT
    assert view.fleet("g1").group.hosts == HOSTS // GROUPS
    with store.begin() as tx:
        started = time.monotonic()
        operation = tx.operation(queue[0].operation_id)
        host = tx.host(operation.host_id)
        guard.of(tx, operation, host)
        guard.fleet(tx, host, NOW)
        judged = time.monotonic()
    return {"queue": looked - began, "view": viewed - looked, "one": judged - started}


def test_no_question_reads_a_whole_table(large: Engine) -> None:
    """By the database's own plan: everything is found by an index."""
    if large.dialect.name != "sqlite":
        pytest.skip("SQLite says so in one word")
    asked: list[str] = []
    with opened(large) as store, store.read() as tx:
        connection = tx._connection  # type: ignore[attr-defined] # to see what is asked
        raw = connection.connection.driver_connection
        raw.set_trace_callback(asked.append)
        tx.loads(**A_MINUTE, not_by="discovery")
        tx.group_sizes(["g1"])
        tx.queued(per_group_max=50)
        tx.failures(NOW)
        raw.set_trace_callback(None)
        assert len(asked) == 4
        for query in asked:
            plan = connection.execute(text("EXPLAIN QUERY PLAN " + query.replace(":", r"\:")))
            steps = [row[3] for row in plan]
            whole = [one for one in steps if one.startswith(("SCAN hosts", "SCAN operations"))]
            assert not whole, (query, steps)
