"""The store: transactions over SQLite or PostgreSQL. What they can do is in `sql_*.py`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy import Engine

from ..core.contracts import Tx
from .engine import for_reading
from .sealing import Sealing
from .serving import served
from .sql_fleet import FleetQueries
from .sql_hosts import HostQueries
from .sql_operations import OperationQueries
from .sql_permissions import PermissionQueries
from .sql_profiles import ProfileQueries
from .sql_records import EffectQueue, RecordQueries
from .sql_releases import ReleaseQueries
from .sql_services import ServiceQueries
from .sql_sightings import SightingQueries


class SqlTx(
    HostQueries,
    OperationQueries,
    PermissionQueries,
    FleetQueries,
    ReleaseQueries,
    ProfileQueries,
    RecordQueries,
    ServiceQueries,
    SightingQueries,
):
    """One transaction: see `core.contracts.Tx`."""


class SqlStore:
    """The one truth about state, in SQL."""

    def __init__(self, engine: Engine, effect_queue: EffectQueue, sealing: Sealing) -> None:
        self._engine = engine
        self._reading = for_reading(engine)
        self._queue = effect_queue
        self._sealing = sealing

    def begin(self) -> AbstractContextManager[Tx]:
        """Read and write; committed at the end of the block, or rolled back by an error.

        Raises Unavailable when the database does not serve in time: nothing was saved then
        (unless it was only the answer to the commit that got lost), and trying again later helps.
        """
        return self._transaction(self._engine, writes=True)

    def read(self) -> AbstractContextManager[Tx]:
        """Read one consistent state, without holding up those who write."""
        return self._transaction(self._reading, writes=False)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, engine: Engine, *, writes: bool) -> Iterator[Tx]:
        with served(), engine.connect() as connection, connection.begin() as transaction:
            tx = SqlTx(connection, self._sealing, self._queue, writes=writes)
            yield tx
            tx.write_records()
            if not writes:
                transaction.rollback()
