"""A lock on a name that dies with its holder: one worker of one name on one database.

A locked file beside an SQLite database, an advisory lock on PostgreSQL.
"""

import fcntl
import hashlib
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

# PostgreSQL needs a moment to notice that a killed holder's connection is gone, and a killed
# process a moment to be gone.
HOLDER_GONE_LIMIT: Final = timedelta(seconds=2)
ASK_AGAIN: Final = timedelta(milliseconds=50)

_LOCK: Final = text("SELECT pg_try_advisory_lock(:number)")
_UNLOCK: Final = text("SELECT pg_advisory_unlock(:number)")


class NameLock:
    """Held from `acquire` to `release`, or until the process or its connection dies."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._file: int | None = None
        self._connection: Connection | None = None

    def acquire(self, *, wait: timedelta = HOLDER_GONE_LIMIT) -> bool:
        """Take the lock; False when somebody else holds it, and still does after `wait`."""
        if self._engine.dialect.name == "sqlite":
            return self._lock_file(wait)
        return self._lock_in_database(wait)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._connection is not None:
            # Where the session is gone the lock went with it.
            with suppress(DBAPIError):
                self._connection.execute(_UNLOCK, {"number": self._number()})
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _lock_file(self, wait: timedelta) -> bool:
        path = Path(f"{self._engine.url.database}.{self._name.replace(' ', '-')}.lock")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + wait.total_seconds()
        while not _took(file):
            if time.monotonic() >= end:
                os.close(file)
                return False
            time.sleep(ASK_AGAIN.total_seconds())
        self._file = file
        return True

    def _lock_in_database(self, wait: timedelta) -> bool:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        end = time.monotonic() + wait.total_seconds()
        while not connection.execute(_LOCK, {"number": self._number()}).scalar():
            if time.monotonic() >= end:
                connection.close()
                return False
            time.sleep(ASK_AGAIN.total_seconds())
        self._connection = connection
        return True

    def _number(self) -> int:
        digest = hashlib.sha256(f"provisioner {self._name}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


def _took(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
