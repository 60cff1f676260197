"""A database that is put back, as an operator does it: what is kept, and the mark beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from provisioner.service.sightings import Mark, MarkFile

from .ledger import Memory


class SimMarkFile(MarkFile):
    """The high-water mark, in a file that is not restored with the database."""

    def __init__(self) -> None:
        super().__init__(Path("high-water.json"))
        self._mark: Mark | None = None

    def read(self) -> Mark | None:
        return self._mark

    def write(self, mark: Mark) -> None:
        self._mark = mark


@dataclass(frozen=True)
class Backup:
    """A database as it was, and what one could know by it. `audit_rows` is how far its audit
    log had come."""

    content: bytes
    memory: Memory
    audit_rows: int
    made_s: float

    def is_behind(self, mark: Mark | None) -> bool:
        return mark is not None and mark.number > self.audit_rows
