"""A lock on a name that dies with its holder: one worker of one name on one database.

A locked file beside an SQLite database, an advisory lock on PostgreSQL. The latter is a lease:
a holder that is frozen, or cut off, loses it, since another one waits for its work.
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

from ..boot_time import boot_time

# PostgreSQL needs a moment to notice that a killed holder's connection is gone, and a killed
# process a moment to be gone.
HOLDER_GONE_LIMIT: Final = timedelta(seconds=2)
ASK_AGAIN: Final = timedelta(milliseconds=50)

# A holder that says nothing for so long has lost the lock: PostgreSQL ends its session.
# Longer than an exchange with a BMC may take, so that each ends within it.
LEASE: Final = timedelta(seconds=25)
RENEWAL_INTERVAL: Final = timedelta(seconds=2)

_LEASE: Final = text(f"SET idle_session_timeout = {int(LEASE.total_seconds() * 1000)}")
_STILL_THERE: Final = text("SELECT 1")
_LOCK: Final = text("SELECT pg_try_advisory_lock(:number)")
_UNLOCK: Final = text("SELECT pg_advisory_unlock(:number)")


class NameLock:
    """Held from `acquire` to `release`, or until the process or its connection dies."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._file: int | None = None
        self._connection: Connection | None = None
        self._renewed_at = 0.0

    def acquire(self, *, wait: timedelta | None = None) -> bool:
        """Take the lock; False when somebody else holds it, and still does after `wait`: without
        one, when a holder that is gone would have lost it."""
        if self._engine.dialect.name == "sqlite":
            return self._lock_file(HOLDER_GONE_LIMIT if wait is None else wait)
        # A link that was down leaves the server a session of which only the client's end is
        # gone. It keeps the lock until its lease is over.
        return self._lock_in_database(LEASE + HOLDER_GONE_LIMIT if wait is None else wait)

    def renew(self) -> bool:
        """Keep the lease; False when it was lost. A file's lock needs no keeping."""
        if self._connection is None:
            return self._file is not None
        # Before asking: when the server heard of it is not known more exactly.
        asked_at = boot_time()
        try:
            self._connection.execute(_STILL_THERE)
        except DBAPIError:
            return False
        self._renewed_at = asked_at
        return True

    def left(self) -> timedelta:
        """Return for how long the lock is held for certain; nothing or less when it may be
        another's already."""
        if self._file is not None:
            return timedelta.max
        if self._connection is None:
            return timedelta()
        return LEASE - timedelta(seconds=boot_time() - self._renewed_at)

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
        asked_at = boot_time()
        connection.execute(_LEASE)
        end = time.monotonic() + wait.total_seconds()
        while not connection.execute(_LOCK, {"number": self._number()}).scalar():
            if time.monotonic() >= end:
                connection.invalidate()  # not back into the pool, with its short patience
                connection.close()
                return False
            time.sleep(ASK_AGAIN.total_seconds())
            asked_at = boot_time()
        self._connection, self._renewed_at = connection, asked_at
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
