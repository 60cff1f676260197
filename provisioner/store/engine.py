"""Opens the database: SQLite for one machine, PostgreSQL for more than one.

Sets what every connection needs; knows no tables.
"""

import sqlite3
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ..errors import ConfigError

# How long to wait for a lock that another holds, or for a free connection of the pool.
LOCK_WAIT_MAX: Final = timedelta(seconds=15)
CONNECTIONS_MAX: Final = 24
CONNECT_LIMIT: Final = timedelta(seconds=10)
# A transaction of ours takes milliseconds. One that sits there longer is ended by
# PostgreSQL, so that a frozen process gives its locks back.
IDLE_LIMIT: Final = timedelta(seconds=10)
# A server, or a network, that takes what we send and acknowledges nothing.
SILENCE_LIMIT: Final = timedelta(seconds=10)


def open_engine(url: str, *, lock_wait: timedelta = LOCK_WAIT_MAX) -> Engine:
    """Return an engine for `sqlite:////path/to/file` or `postgresql://user@host/name`.

    Nothing is connected yet. Raises ConfigError for any other kind of URL; an in-memory
    SQLite is refused because the worker needs connections of its own.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the database URL cannot be read") from error
    limits: dict[str, Any] = {
        "pool_size": CONNECTIONS_MAX,
        "max_overflow": 0,
        "pool_timeout": lock_wait.total_seconds(),
        # The parameters of a statement may hold secrets; they must not reach a traceback.
        "hide_parameters": True,
    }
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        engine = create_engine(parsed, **limits)
        event.listen(engine, "connect", partial(_prepare_sqlite, lock_wait))
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if backend == "postgresql":
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            connect_args={
                "connect_timeout": int(CONNECT_LIMIT.total_seconds()),
                "tcp_user_timeout": _milliseconds(SILENCE_LIMIT),
                "keepalives_idle": int(SILENCE_LIMIT.total_seconds()),
                "keepalives_interval": 2,
                "keepalives_count": 3,
                "options": (
                    f"-c lock_timeout={_milliseconds(lock_wait)}"
                    f" -c idle_in_transaction_session_timeout={_milliseconds(IDLE_LIMIT)}"
                ),
            },
            pool_pre_ping=True,
            **limits,
        )
    raise ConfigError(
        "the database must be an SQLite file or PostgreSQL",
        expected="sqlite:////var/lib/provisioner/state.db or postgresql://user@host/database",
        found=parsed.render_as_string(hide_password=True),
    )


def for_reading(engine: Engine) -> Engine:
    """Return the same engine, whose transactions see one state and take no write lock."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(sqlite_begin="BEGIN")
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _prepare_sqlite(lock_wait: timedelta, connection: sqlite3.Connection, _record: object) -> None:
    # The driver would begin transactions by its own rules; `_begin_sqlite` does it instead.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {_milliseconds(lock_wait)}",
        "journal_mode = WAL",
        # FULL, not NORMAL: a host is saved as dirty before its first write is permitted,
        # and a power cut of this machine must not take that back.
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins by reading and then writes can fail at the upgrade of its
    # lock, however long it would wait. IMMEDIATE takes the write lock at once.
    begin = connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE")
    connection.exec_driver_sql(begin)


def _milliseconds(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)
