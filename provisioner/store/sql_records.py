"""The audit log, the timeline and the outbox in SQL.

Audit rows and events are numbered, and numbers must become visible in order. They are
kept back and written last in the transaction, so that the lock which PostgreSQL needs for
that is held for a moment only and always taken after every other.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from sqlalchemy import Column, Connection, Select, String, cast, select, text

from ..core.audit import FIRST_HASH, AuditRow, chained
from ..core.contracts import Outgoing
from ..core.model import Event, HostId, Json, OperationId
from .rows import Row, audit_of, event_of, event_row
from .sealing import Sealing
from .sql import Queries
from .tables import audit, events, hosts

# Lines of the timeline kept for one host, and as many for machines we do not know: some
# ten deployments.
EVENTS_PER_HOST_MAX: Final = 500
# Any number that nothing else in the database takes an advisory lock on.
RECORDS_LOCK: Final = 0x70726F76
_LOCK_RECORDS: Final = text("SELECT pg_advisory_xact_lock(:number)")


class EffectQueue(Protocol):
    """Where effects wait: saved in the transaction of the connection it is handed."""

    def enqueue(self, connection: Connection, outgoing: Outgoing) -> None: ...


class RecordQueries(Queries):
    def __init__(
        self, connection: Connection, sealing: Sealing, queue: EffectQueue, *, writes: bool
    ) -> None:
        super().__init__(connection, sealing, writes=writes)
        self._queue = queue
        self._audits: list[tuple[datetime, str, str, str, Json]] = []
        self._events: list[Event] = []

    def audit(self, at: datetime, actor: str, action: str, subject: str, detail: Json) -> None:
        self._check_writes()
        # What is hashed must be what is read back, whatever zone it came in.
        self._audits.append((at.astimezone(UTC), actor, action, subject, detail))

    def audit_rows(self, *, after: int | None = None, limit: int = 1000) -> Sequence[AuditRow]:
        self.write_records()
        return [audit_of(row) for row in self._page(select(audit), audit.c.number, after, limit)]

    def _page(
        self, query: Select[Any], number: Column[int], after: int | None, limit: int
    ) -> list[Row]:
        """Return rows in the order of their numbers: those after one, or the newest."""
        if after is None:
            return self._all(query.order_by(number.desc()).limit(limit))[::-1]
        return self._all(query.where(number > after).order_by(number).limit(limit))

    def newest_audit(self) -> AuditRow | None:
        self.write_records()
        row = self._one(select(audit).order_by(audit.c.number.desc()).limit(1))
        return audit_of(row) if row is not None else None

    def is_audited(self, operation_id: OperationId) -> bool:
        """Say whether the audit log speaks of the operation: it outlives every other row.
        Walks the whole log."""
        detail = cast(audit.c.detail, String)
        named = select(audit.c.number).where(detail.contains(operation_id, autoescape=True))
        return self._one(named.limit(1)) is not None

    def add_event(self, event: Event) -> None:
        self._check_writes()
        self._events.append(event)

    def events(
        self, *, host_id: HostId | None = None, after: int | None = None, limit: int = 200
    ) -> Sequence[tuple[int, Event]]:
        self.write_records()
        query = select(events)
        if host_id is not None:
            query = query.where(events.c.host_id == host_id)
        return [event_of(row) for row in self._page(query, events.c.number, after, limit)]

    def enqueue(self, outgoing: Outgoing) -> None:
        self._check_writes()
        self._queue.enqueue(self._connection, outgoing)

    def write_records(self) -> None:
        """Write what was kept back. The store calls it right before the commit."""
        if not self._audits and not self._events:
            return
        self._drop_events_of_deleted_hosts()
        if not self._is_sqlite:
            self._connection.execute(_LOCK_RECORDS, {"number": RECORDS_LOCK})
        self._write_audits()
        self._write_events()

    def _write_audits(self) -> None:
        if not self._audits:
            return
        newest = select(audit.c.number, audit.c.row_hash).order_by(audit.c.number.desc()).limit(1)
        last = self._one(newest)
        number, before = (last["number"], last["row_hash"]) if last else (0, FIRST_HASH)
        for at, actor, action, subject, detail in self._audits:
            number += 1
            row = chained(number, at, actor, action, subject, detail, before)
            self._add(audit, row.__dict__)
            before = row.row_hash
        self._audits.clear()

    def _write_events(self) -> None:
        for event in self._events:
            self._add(events, event_row(event))
        for host_id in {event.host_id for event in self._events}:
            self._prune_events(host_id)
        self._events.clear()

    def _drop_events_of_deleted_hosts(self) -> None:
        # It also locks, as far as a reference needs, the hosts that the events refer to:
        # waiting for one of them while holding the lock on the records could be a deadlock.
        referred = {event.host_id for event in self._events if event.host_id is not None}
        if not referred:
            return
        query = select(hosts.c.id).where(hosts.c.id.in_(sorted(referred))).order_by(hosts.c.id)
        if not self._is_sqlite:
            query = query.with_for_update(read=True, key_share=True)
        known = {None, *self._connection.execute(query).scalars()}
        self._events = [event for event in self._events if event.host_id in known]

    def _prune_events(self, host_id: HostId | None) -> None:
        of_host = events.c.host_id.is_(None) if host_id is None else events.c.host_id == host_id
        newest_to_go = (
            select(events.c.number)
            .where(of_host)
            .order_by(events.c.number.desc())
            .limit(1)
            .offset(EVENTS_PER_HOST_MAX)
        )
        old = events.c.number <= newest_to_go.scalar_subquery()
        self._change(events.delete().where(of_host, old))
