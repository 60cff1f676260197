"""Reading the audit log and checking its chain."""

from collections.abc import Iterator, Sequence
from typing import Final

from provisioner.core.audit import AuditRow, verify
from provisioner.core.contracts import Store

PAGE: Final = 1000


class Audit:
    def __init__(self, store: Store) -> None:
        self._store = store

    def rows(self, after: int | None = None, limit: int = PAGE) -> Sequence[AuditRow]:
        """Return the rows after a number, or the newest; oldest first."""
        with self._store.read() as tx:
            return tx.audit_rows(after=after, limit=min(limit, PAGE))

    def verify(self) -> int:
        """Return how many rows hold together. Raises TrustError naming the first that does not."""
        return verify(self._all())

    def _all(self) -> Iterator[AuditRow]:
        after = 0
        while page := self.rows(after):
            yield from page
            after = page[-1].number
