"""What the guard asks of the fleet, in SQL: selections, loads, the queue, the breaker.

Each answer is one grouped query over what is in flight or within an index, never over all
operations that ever were.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, TextClause, bindparam, case, func, select, union

from ..core.fleet import Breaker, Failure, Load, Queued, Selection
from ..core.model import FINAL, HostId, HostState, Kind, OperationId, Phase
from ..errors import Conflict
from .rows import breaker_of, selection_of, selection_row
from .sql import Queries
from .tables import IN_FLIGHT, breaker, hosts, operations, requests

# An operation ends long before that: it may be queued for 30 days at most.
REQUESTS_KEPT: Final = timedelta(days=90)
FAILURES_MAX: Final = 1000
QUEUED_MAX: Final = 10_000
FLEET: Final = "fleet"
_IS_ACTIVE: Final = hosts.c.state == HostState.ACTIVE.value
_IS_SERVING: Final = _IS_ACTIVE & ~hosts.c.in_maintenance & hosts.c.quarantine_reason.is_(None)
_IN_FLIGHT_PHASES: Final = sorted(set(Phase) - FINAL - {Phase.QUEUED})


class FleetQueries(Queries):
    def add_selection(self, selection: Selection) -> None:
        old = requests.c.requested_at <= selection.requested_at - REQUESTS_KEPT
        self._change(requests.delete().where(old))
        taken = Conflict("this request is being carried out already", hint="ask again")
        self._add(requests, selection_row(selection), taken)

    def selection(self, request_id: str) -> Selection | None:
        row = self._one(select(requests).where(requests.c.id == request_id))
        return selection_of(row) if row is not None else None

    def loads(
        self, *, started_after: datetime, started_until: datetime, not_by: str
    ) -> Mapping[str | None, Load]:
        """Return the load of each group, and under None that of hosts without one."""
        values = {
            "started_after": started_after,
            "started_until": started_until,
            "not_by": not_by,
        }
        return {
            row["name"]: Load(row["in_flight"], row["started"], row["active_in_flight"])
            for row in self._all(_LOADS, values)
        }

    def group_sizes(self, groups: Iterable[str]) -> Mapping[str, tuple[int, int]]:
        wanted = sorted(set(groups))
        if not wanted:
            return {}
        query = (
            select(
                hosts.c.group_name.label("name"),
                func.count().label("all"),
                _how_many(_IS_SERVING).label("active"),
            )
            .where(hosts.c.group_name.in_(wanted), hosts.c.state != HostState.RETIRED.value)
            .group_by(hosts.c.group_name)
        )
        return {row["name"]: (row["all"], row["active"]) for row in self._all(query)}

    def queued(self, *, per_group_max: int) -> Sequence[Queued]:
        """Return the oldest of each group, so many with an active host and so many others: a
        group that waits hides no other one, nor do healthy hosts hide the repair of others."""
        rows = self._all(_QUEUED, {"per_group_max": per_group_max})
        return [
            Queued(
                OperationId(row["id"]),
                HostId(row["host_id"]),
                row["group_name"],
                row["state"] == HostState.ACTIVE.value,
            )
            for row in rows
        ]

    def failures(self, after: datetime, until: datetime | None = None) -> Sequence[Failure]:
        query = select(operations.c.host_id, operations.c.error).where(
            operations.c.phase == Phase.FAILED.value,
            operations.c.kind == Kind.DEPLOYMENT.value,
            operations.c.started_at.is_not(None),
            operations.c.ended_at > after,
        )
        if until is not None:
            query = query.where(operations.c.ended_at <= until)
        return [
            Failure(HostId(row["host_id"]), str((row["error"] or {}).get("code", "")))
            for row in self._all(query.limit(FAILURES_MAX))
        ]

    def breaker(self, *, lock: bool = False) -> Breaker:
        row = self._one(select(breaker).where(breaker.c.id == FLEET), lock=lock)
        return breaker_of(row) if row is not None else Breaker()

    def save_breaker(self, changed: Breaker) -> None:
        self._put(breaker, {"id": FLEET, **changed.__dict__})


def _ids(condition: ColumnElement[bool] | TextClause) -> Select[Any]:
    return select(operations.c.id).where(condition)


def _how_many(condition: ColumnElement[bool]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _loads() -> Select[Any]:
    is_in_flight = operations.c.phase.in_(_IN_FLIGHT_PHASES)
    started_at = operations.c.started_at
    is_recent = (started_at > bindparam("started_after")) & (
        started_at <= bindparam("started_until")
    )
    counts = operations.c.requested_by != bindparam("not_by")
    # Not the bare column: SQLite would then go through all hosts in the order of its
    # index, and not through what is in flight.
    group = hosts.c.group_name.concat("")
    return (
        select(
            group.label("name"),
            _how_many(is_in_flight & counts).label("in_flight"),
            _how_many(is_recent & counts).label("started"),
            _how_many(is_in_flight & _IS_SERVING).label("active_in_flight"),
        )
        .join_from(operations, hosts)
        # A union, since SQLite reads all operations for the two conditions in one.
        .where(operations.c.id.in_(union(_ids(IN_FLIGHT), _ids(is_recent))))
        .group_by(group)
    )


def _queued() -> Select[Any]:
    place = func.row_number().over(
        partition_by=(hosts.c.group_name, _IS_ACTIVE),
        order_by=(operations.c.requested_at, operations.c.id),
    )
    placed = (
        select(
            operations.c.id,
            operations.c.host_id,
            operations.c.requested_at,
            hosts.c.group_name,
            hosts.c.state,
            place.label("place"),
        )
        .join_from(operations, hosts)
        .where(operations.c.phase == Phase.QUEUED.value)
        .subquery()
    )
    first = select(placed).where(placed.c.place <= bindparam("per_group_max"))
    return first.order_by(placed.c.requested_at, placed.c.id).limit(QUEUED_MAX)


# Asked several times in every second, and built once: that takes longer than the answer.
_LOADS: Final = _loads()
_QUEUED: Final = _queued()
