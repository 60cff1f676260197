"""The database of a simulation: SQLite in memory, below the real store, with faults.

One connection, since tasks take turns and none of them waits inside a transaction. What dies
is a process and never this: a killed process's transaction is rolled back, as SQLite does
with its journal. Faults are raised where the driver would raise them, so that SQLAlchemy
and the store translate them as they do in life.
"""

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from provisioner.store.engine import open_engine
from provisioner.store.migrate import upgrade

_EFFECTS: Final = """
CREATE TABLE sim_effects (
    key TEXT PRIMARY KEY, place INTEGER NOT NULL, partition TEXT NOT NULL,
    saved TEXT NOT NULL, state TEXT NOT NULL, owner TEXT, deaths INTEGER NOT NULL
)"""


class Fate(Enum):
    """What comes of a commit."""

    GOOD = "good"
    FAILS = "fails"  # nothing is saved, and an error says so
    UNKNOWN = "unknown"  # all is saved, and an error says otherwise
    DIES_BEFORE = "dies before"  # the process is killed, and nothing is saved
    DIES_AFTER = "dies after"  # all is saved, and nobody is left to know


class _Driver(sqlite3.Connection):
    """SQLite's own connection, asked for its opinion at each BEGIN and COMMIT."""

    database: "Database"

    def commit(self) -> None:
        if not self.in_transaction:
            return
        fate = self.database.fate_of_commit()
        if fate is Fate.DIES_BEFORE:
            self.database.die()
        if fate is Fate.FAILS:
            raise sqlite3.OperationalError("disk I/O error")
        super().commit()
        self.database.committed()
        if fate is Fate.DIES_AFTER:
            self.database.die()
        if fate is Fate.UNKNOWN:
            raise sqlite3.OperationalError("disk I/O error")

    def close(self) -> None:
        """Only end what is open: the content lives in this connection."""
        if self.in_transaction:
            self.rollback()

    def really_close(self) -> None:
        super().close()


class Database:
    """An engine over a copy of a migrated database. The functions are set by the world."""

    def __init__(self) -> None:
        self.is_down = False
        self.fate_of_commit: Callable[[], Fate] = lambda: Fate.GOOD
        self.committed: Callable[[], None] = lambda: None
        self.die: Callable[[], None] = lambda: None
        self._driver = sqlite3.connect(":memory:", factory=_Driver, isolation_level=None)
        self._driver.database = self
        self._driver.deserialize(template())
        self._driver.execute("PRAGMA foreign_keys = ON")
        self.engine: Engine = create_engine(
            "sqlite://", creator=lambda: self._driver, poolclass=StaticPool, hide_parameters=True
        )
        event.listen(self.engine, "begin", self._begin)

    @property
    def in_transaction(self) -> bool:
        return self._driver.in_transaction

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Read behind the service's back, also while the database is away for it."""
        assert not self._driver.in_transaction, "nobody looks into a transaction"
        return self._driver.execute(query, values).fetchall()

    def tamper(self, statement: str, *values: object) -> None:
        """Change something behind the service's back."""
        self._driver.execute(statement, values)

    def copy(self) -> bytes:
        """Return a backup."""
        assert not self._driver.in_transaction, "nobody waits in a transaction"
        return self._driver.serialize()

    def put_back(self, backup: bytes) -> None:
        """Replace all there is by a backup."""
        assert not self._driver.in_transaction, "nobody waits in a transaction"
        # Page by page: deserialising into a connection that has used json_each makes SQLite
        # crash at the next use, since the table of that function is one of the old schema.
        with closing(sqlite3.connect(":memory:")) as source:
            source.deserialize(backup)
            source.backup(self._driver)

    def close(self) -> None:
        self.engine.dispose()
        self._driver.really_close()

    def _begin(self, connection: Connection) -> None:
        begin = connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE")
        if self.is_down:
            # There can be no such file: it fails in the driver, as that of a database away does.
            connection.exec_driver_sql("ATTACH '/dev/null/away' AS away")
        self._driver.execute(begin)


@cache
def template() -> bytes:
    """Return an empty database with all tables, made by the real migrations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.db"
        engine = open_engine(f"sqlite:///{path}")
        upgrade(engine)
        engine.dispose()
        connection = sqlite3.connect(path)
        # Memory knows no write-ahead log, and a database says in its head that it has one.
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute(_EFFECTS)
        connection.commit()
        content = connection.serialize()
        connection.close()
    return content
