"""Operations in SQL. The index decides that a host has one unfinished operation at most."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, func, select

from ..core.model import FINAL, HostId, Operation, OperationId, Phase
from ..errors import Conflict, NotFound
from .rows import operation_of, operation_row
from .sql import Queries
from .tables import UNFINISHED, hosts, operations

# Finished operations kept for one host; the audit log keeps the fact of every one.
OPERATIONS_PER_HOST_MAX: Final = 100
_FINISHED: Final = sorted(phase.value for phase in FINAL)


class OperationQueries(Queries):
    def operation(self, operation_id: OperationId) -> Operation:
        query = select(operations).where(operations.c.id == operation_id)
        owner = select(operations.c.host_id).where(operations.c.id == operation_id)
        self._lock_host(hosts.c.id == owner.scalar_subquery())
        row = self._one(query, lock=True)
        if row is None:
            raise NotFound(
                f"there is no operation {operation_id}",
                expected="an operation's id",
                hint="provisioner operation list",
            )
        return operation_of(row)

    def open_operation(self, host_id: HostId) -> Operation | None:
        query = select(operations).where(operations.c.host_id == host_id, UNFINISHED)
        self._lock_host(hosts.c.id == host_id)
        row = self._one(query, lock=True)
        return operation_of(row) if row is not None else None

    def _lock_host(self, which: ColumnElement[bool]) -> None:
        # Some come from a host to its operation and some the other way. All of them lock
        # the host first, or they would meet in a deadlock.
        if self._writes and not self._is_sqlite:
            host = select(hosts.c.id).where(which)
            self._connection.execute(host.with_for_update(key_share=True))

    def operations(
        self,
        *,
        host_id: HostId | None = None,
        phases: Iterable[Phase] | None = None,
        release: str | None = None,
        overdue_at: datetime | None = None,
        newest_first: bool = True,
        limit: int = 100,
    ) -> Sequence[Operation]:
        table = operations.c
        query = select(operations)
        if host_id is not None:
            query = query.where(table.host_id == host_id)
        if phases is not None:
            query = query.where(table.phase.in_([phase.value for phase in phases]))
        if release is not None:
            query = query.where(table.release == release)
        if overdue_at is not None:
            query = query.where(table.deadline_at <= overdue_at)
        # Two of one host may begin within a tick of the clock; its generations tell them apart.
        order = (table.requested_at, table.generation, table.id)
        if newest_first:
            query = query.order_by(*(column.desc() for column in order))
        else:
            query = query.order_by(*order)
        return [operation_of(row) for row in self._all(query.limit(limit))]

    def due_follow_ups(self, at: datetime, *, limit: int = 100) -> Sequence[Operation]:
        """Return the ended operations whose follow-up is due, the longest due first."""
        due = select(operations).where(operations.c.follow_up_at <= at)
        order = due.order_by(operations.c.follow_up_at, operations.c.id)
        return [operation_of(row) for row in self._all(order.limit(limit))]

    def waiting_follow_ups(self, host_id: HostId) -> Sequence[Operation]:
        """Return the host's ended operations with a follow-up to come, the newest first."""
        table = operations.c
        waiting = select(operations).where(
            table.host_id == host_id, table.follow_up_at.is_not(None)
        )
        newest = waiting.order_by(table.requested_at.desc(), table.id.desc())
        return [operation_of(row) for row in self._all(newest)]

    def count_operations(self, phases: Iterable[Phase], *, not_by: str = "") -> int:
        """Return how many are in one of these phases and were not requested by `not_by`."""
        wanted = [phase.value for phase in phases]
        query = select(func.count()).select_from(operations)
        query = query.where(operations.c.requested_by != not_by)
        return self._number(query.where(operations.c.phase.in_(wanted)))

    def add_operation(self, operation: Operation) -> None:
        busy = Conflict(f"host {operation.host_id} has an unfinished operation already")
        self._forget_old(operation.host_id)
        try:
            self._add(operations, operation_row(operation), busy)
        except Conflict as error:
            other = self.open_operation(operation.host_id)
            if other is not None:
                error.found = {"operation": other.id, "phase": other.phase.value}
                error.hint = f"wait for it, or cancel it: provisioner operation cancel {other.id}"
            raise

    def save_operation(self, operation: Operation) -> None:
        if self._save(operations, operation_row(operation)) < 1:
            raise NotFound(f"there is no operation {operation.id}")

    def is_seed_taken(self, operation_id: OperationId) -> bool:
        taken_at = select(operations.c.seed_taken_at).where(operations.c.id == operation_id)
        row = self._one(taken_at)
        return row is not None and row["seed_taken_at"] is not None

    def take_seed(self, operation_id: OperationId, at: datetime) -> bool:
        seed = operations.c.seed_taken_at
        take = operations.update().where(operations.c.id == operation_id, seed.is_(None))
        return self._change(take.values(seed_taken_at=at)) == 1

    def _forget_old(self, host_id: HostId) -> None:
        too_many = (
            select(operations.c.id)
            .where(operations.c.host_id == host_id, operations.c.phase.in_(_FINISHED))
            .order_by(operations.c.requested_at.desc(), operations.c.id.desc())
            .limit(OPERATIONS_PER_HOST_MAX)  # SQLite takes no OFFSET without it
            .offset(OPERATIONS_PER_HOST_MAX - 1)
        )
        old = operations.c.id.in_(too_many) & operations.c.follow_up_at.is_(None)
        self._change(operations.delete().where(old))
