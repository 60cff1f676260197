"""Notices that this database is older than the world: by our own note of how far it had come,
and by hosts that come with a ticket, token or nonce of ours for an operation it never saw, or
has not come so far with."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from provisioner.core.contracts import Clock, Sighting, Store, Tx
from provisioner.core.model import Json, Phase
from provisioner.errors import NotFound
from provisioner.whole_files import replace_whole

from .chance import Derived, Issued, digest_of, drawn_at

log = structlog.get_logger(__name__)

WATCH: Final = "watch"
# Texts that were ours and harmless, such as those of a host that was deleted since.
HARMLESS_MAX: Final = 1000
MARK_BYTES_MAX: Final = 4096
# The phases in which nobody was given such a text yet. It leaves after the transaction that
# ends them, and whoever comes with it is looked at later still.
_NOT_GIVEN_YET: Final[Mapping[str, frozenset[Phase]]] = {
    "ticket": frozenset({Phase.QUEUED}),
    "token": frozenset({Phase.QUEUED, Phase.NETBOOTING}),
    "nonce": frozenset({Phase.QUEUED, Phase.NETBOOTING, Phase.PREPARING}),
}


class Sightings:
    """Looks at what was refused. Stores nothing for texts that are not ours, so nobody who has
    not held a permission of ours can make the service stop."""

    def __init__(self, store: Store, clock: Clock, derived: Derived) -> None:
        self._store = store
        self._clock = clock
        self._derived = derived
        self._harmless: OrderedDict[str, None] = OrderedDict()

    def look(self, texts: Iterable[str], macs: Iterable[str], source: str) -> None:
        """Look at the secrets that a refused request from `source` came with."""
        for text in texts:
            issued, digest = self._derived.issued(text), digest_of(text)
            if issued is None or digest in self._harmless:
                continue
            with self._store.read() as tx:
                is_known = _is_known(tx, issued)
            if is_known:
                self._harmless[digest] = None
                if len(self._harmless) > HARMLESS_MAX:
                    self._harmless.popitem(last=False)
                continue
            self._save(issued, digest, list(macs), source)

    def _save(self, issued: Issued, digest: str, macs: list[str], source: str) -> None:
        with self._store.begin() as tx:
            hosts = {host.id for mac in macs for host in tx.hosts_with_mac(mac)}
            if issued.host_id is not None:
                hosts.add(issued.host_id)
            with suppress(NotFound):
                hosts.add(tx.operation(issued.operation_id).host_id)
            sighting = Sighting(
                key=digest,
                kind=issued.kind,
                at=self._clock(),
                source=source,
                detail={"macs": macs},
                operation_id=issued.operation_id,
                generation=issued.generation,
                host_id=hosts.pop() if len(hosts) == 1 else None,
            )
            save(tx, sighting)


def save(tx: Tx, sighting: Sighting) -> None:
    """Save a sighting, and the moment from which on we only observe."""
    was_observing = tx.is_observing()
    if tx.add_sighting(sighting) and not was_observing:
        detail: Json = {"kind": sighting.kind, "source": sighting.source, **sighting.detail}
        detail |= {"operation": sighting.operation_id, "generation": sighting.generation}
        tx.audit(sighting.at, WATCH, "service.observes", "service", detail)
        log.critical("OBSERVE ONLY: the database is older than its hosts", kind=sighting.kind)


def _is_known(tx: Tx, issued: Issued) -> bool:
    """Say whether the database knows of this text, by its operation or by the audit log, or was
    reconciled since."""
    drawn, reconciled = drawn_at(issued.operation_id), tx.last_reconciled_at()
    if drawn is not None and reconciled is not None and drawn <= reconciled:
        return True
    try:
        operation = tx.operation(issued.operation_id)
    except NotFound:
        return tx.is_audited(issued.operation_id)
    is_ahead = operation.phase in _NOT_GIVEN_YET[issued.kind]
    return not (is_ahead and issued.generation == operation.generation)


@dataclass(frozen=True)
class Mark:
    """How far the audit log had come: the number and the hash of a row of it."""

    number: int
    row_hash: str

    @property
    def key(self) -> str:
        return f"mark {self.number} {self.row_hash}"


class MarkFile:
    """The mark, in a small file outside the database. Replaced whole, and only by a newer one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Mark | None:
        """Return the mark; None when there is none, or none that can be read."""
        try:
            with self._path.open("rb") as file:
                found: Any = json.loads(file.read(MARK_BYTES_MAX))
            return Mark(int(found["number"]), str(found["row_hash"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("the high-water mark cannot be read", file=str(self._path))
            return None

    def write(self, mark: Mark) -> None:
        replace_whole(self._path, json.dumps(mark.__dict__))


class HighWater:
    """Holds the database against the mark. One that lacks the row of the mark was restored."""

    def __init__(self, store: Store, clock: Clock, file: MarkFile) -> None:
        self._store = store
        self._clock = clock
        self._file = file

    def look(self) -> None:
        """Note an older database, or else how far this one has come."""
        mark = self._file.read()
        with self._store.read() as tx:
            is_ahead = mark is not None and not _has_row(tx, mark)
            known = tx.sighting(mark.key) if mark is not None else None
            newest = tx.newest_audit()
        if is_ahead and mark is not None and (known is None or known.reconciled_at is None):
            self._save(mark, newest.number if newest is not None else 0)
            return
        if newest is not None and (mark is None or mark.row_hash != newest.row_hash):
            self._write(Mark(newest.number, newest.row_hash))

    def _save(self, mark: Mark, found: int) -> None:
        with self._store.begin() as tx:
            detail: Json = {"audit_row": mark.number, "audit_rows_found": found}
            save(tx, Sighting(mark.key, "mark", self._clock(), "this service", detail))

    def _write(self, mark: Mark) -> None:
        try:
            self._file.write(mark)
        except OSError as error:  # a full disk: the older mark stays, and is true as well
            log.warning("the high-water mark was not written", why=error.strerror)


def _has_row(tx: Tx, mark: Mark) -> bool:
    rows = tx.audit_rows(after=mark.number - 1, limit=1)
    return bool(rows) and (rows[0].number, rows[0].row_hash) == (mark.number, mark.row_hash)
