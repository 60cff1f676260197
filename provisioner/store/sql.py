"""What every group of queries shares: one connection, its dialect, and the guard that
keeps a reading transaction from writing."""

from contextlib import nullcontext
from typing import Any

from sqlalchemy import (
    Connection,
    Delete,
    Insert,
    Select,
    Table,
    Update,
    bindparam,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from ..errors import Conflict
from .rows import Row
from .sealing import Sealing


class Queries:
    """One transaction's way to the database."""

    def __init__(self, connection: Connection, sealing: Sealing, *, writes: bool) -> None:
        self._connection = connection
        self._sealing = sealing
        self._writes = writes

    @property
    def _is_sqlite(self) -> bool:
        return self._connection.dialect.name == "sqlite"

    def _one(self, query: Select[Any], *, lock: bool = False, hold: bool = False) -> Row | None:
        """Return the row, or None. `lock` keeps it from other writers until the end, `hold`
        only from those who lock it; SQLite has one writer at a time in any case."""
        if (lock or hold) and self._writes and not self._is_sqlite:
            # NO KEY UPDATE: rows that refer to this one may still be added.
            query = query.with_for_update(key_share=not hold, read=hold)
        row = self._connection.execute(query).one_or_none()
        return row._asdict() if row is not None else None

    def _all(self, query: Select[Any], values: Row | None = None) -> list[Row]:
        return [row._asdict() for row in self._connection.execute(query, values)]

    def _number(self, query: Select[Any]) -> int:
        return int(self._connection.execute(query).scalar() or 0)

    def _change(
        self,
        change: Insert | Update | Delete,
        values: Row | None = None,
        *,
        conflict: Conflict | None = None,
    ) -> int:
        """Make a change and return how many rows it touched. Raises `conflict` when it is
        given and the change breaks a constraint; the transaction can go on then."""
        self._check_writes()
        try:
            with self._connection.begin_nested() if conflict else nullcontext():
                # Values handed over here, and not built into the statement, let SQLAlchemy
                # use what it compiled before: half the time of a wide row.
                return self._connection.execute(change, values).rowcount
        except IntegrityError as error:
            if conflict is None:
                raise
            raise conflict from error

    def _add(self, table: Table, row: Row, conflict: Conflict | None = None) -> None:
        self._change(table.insert(), row, conflict=conflict)

    def _save(self, table: Table, row: Row, conflict: Conflict | None = None) -> int:
        """Write `row` over the one with the same id; return 0 when there is none."""
        same = table.c.id == bindparam("same_id")
        values = {**row, "same_id": row["id"]}
        return self._change(table.update().where(same), values, conflict=conflict)

    def _put(self, table: Table, row: Row, *, keep: bool = False) -> None:
        """Insert a row, or replace the one with the same primary key; `keep` leaves that one."""
        insert = sqlite.insert if self._is_sqlite else postgresql.insert
        key = [column.name for column in table.primary_key]
        statement = insert(table).values(row)
        if keep:
            self._change(statement.on_conflict_do_nothing(index_elements=key))
            return
        rest = {name: value for name, value in row.items() if name not in key}
        self._change(statement.on_conflict_do_update(index_elements=key, set_=rest))

    def _check_writes(self) -> None:
        if not self._writes:
            raise RuntimeError("a reading transaction cannot write: use begin()")
