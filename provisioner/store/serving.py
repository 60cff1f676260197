"""Tells a database that cannot serve now from a bug of ours, and says what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ..errors import Unavailable

# PostgreSQL: the transaction lost a race or a deadlock, and would succeed when tried again.
_LOST_RACES: Final = ("40001", "40P01", "55P03")
# PostgreSQL takes no writes: it stands by, and is perhaps to be the first one soon. The other
# state is what a standby says to BEGIN READ WRITE, which the driver asks for after reading.
_READ_ONLY: Final = ("25006", "0A000")
# SQLite: IOERR, FULL and CANTOPEN (https://sqlite.org/rescode.html). On a full disk it is any
# of them: the files beside the database cannot be made (IOERR, CANTOPEN) or grow (FULL).
_SQLITE_DISK: Final = frozenset({10, 13, 14})
_SQLITE_PRIMARY: Final = 0xFF


@contextmanager
def served() -> Iterator[None]:
    """Raise Unavailable where the block found that the database does not serve in time."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable("all database connections are in use") from error
    except DBAPIError as error:
        if _sqlite_code(error) in _SQLITE_DISK:
            raise Unavailable(
                "the database cannot serve now: a file of it cannot be read, made or extended",
                hint="is its disk full? free a few MiB there by hand, such as the cache of builds "
                "(~/.cache/provisioner) or old logs; then `provisioner image gc` frees more",
            ) from error
        if not _is_passing(error):
            raise
        # Not the error's text: it may show parameters, and hosts of the database.
        raise Unavailable("the database cannot serve now", hint="try again later") from error


def _sqlite_code(error: DBAPIError) -> int | None:
    code = getattr(error.orig, "sqlite_errorcode", None)
    return None if code is None else code & _SQLITE_PRIMARY


def _is_passing(error: DBAPIError) -> bool:
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return True
    return getattr(error.orig, "sqlstate", None) in (*_LOST_RACES, *_READ_ONLY)
