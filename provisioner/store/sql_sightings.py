"""Proofs that this database is older than what it looks after, in SQL."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import func, select

from ..core.contracts import Sighting
from .sql import Queries
from .tables import sightings

# Open at a time; one is enough to stop everything, the others tell a person where to look.
SIGHTINGS_MAX: Final = 10_000
_OPEN: Final = sightings.c.reconciled_at.is_(None)
_ANY_OPEN: Final = select(sightings.c.key).where(_OPEN).limit(1)


class SightingQueries(Queries):
    def add_sighting(self, sighting: Sighting) -> bool:
        """Save it; False when it is known, or when too many are open."""
        if self.sighting(sighting.key) is not None:
            return False
        still_open = select(func.count()).select_from(sightings).where(_OPEN)
        if self._number(still_open) >= SIGHTINGS_MAX:
            return False
        self._put(sightings, sighting.__dict__, keep=True)
        return True

    def sighting(self, key: str) -> Sighting | None:
        row = self._one(select(sightings).where(sightings.c.key == key))
        return Sighting(**row) if row is not None else None

    def sightings(self) -> Sequence[Sighting]:
        found = select(sightings).where(_OPEN).order_by(sightings.c.at, sightings.c.key)
        return [Sighting(**row) for row in self._all(found)]

    def is_observing(self) -> bool:
        return self._one(_ANY_OPEN) is not None

    def reconcile_sightings(self, at: datetime) -> None:
        self._change(sightings.update().where(_OPEN).values(reconciled_at=at))

    def last_reconciled_at(self) -> datetime | None:
        newest = select(sightings.c.reconciled_at).where(~_OPEN)
        row = self._one(newest.order_by(sightings.c.reconciled_at.desc()).limit(1))
        return row["reconciled_at"] if row is not None else None
