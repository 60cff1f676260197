"""What the simulation knows of a run beside the service: the truth that it is judged by.

The database is read behind the service's back, right after each commit.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Final

from provisioner.core.model import FINAL, Phase

from .database import Database
from .scheduler import Scheduler

_HOSTS: Final = """
SELECT id, name, state, generation, release, is_protected, in_maintenance, quarantine_reason
FROM hosts"""
_OPERATIONS: Final = """
SELECT id, host_id, kind, phase, generation, release, deadline_at, rung,
       json_extract(evidence, '$.healthy_since')
FROM operations"""
_FINAL: Final = frozenset(phase.value for phase in FINAL)


@dataclass(frozen=True)
class HostFacts:
    """A row of a host, as far as an invariant asks for it."""

    id: str
    name: str
    state: str
    generation: int
    release: str | None
    is_protected: int
    in_maintenance: int
    quarantine_reason: str | None

    @property
    def is_flagged(self) -> bool:
        return bool(self.is_protected or self.in_maintenance or self.quarantine_reason)


@dataclass(frozen=True)
class OperationFacts:
    """A row of an operation, as far as an invariant asks for it."""

    id: str
    host_id: str
    kind: str
    phase: str
    generation: int
    release: str | None
    deadline_at: str | None
    rung: int
    healthy_since: str | None

    @property
    def is_open(self) -> bool:
        return self.phase not in _FINAL


@dataclass(frozen=True)
class Snapshot:
    """The rows of one moment, by id."""

    hosts: dict[str, HostFacts] = field(default_factory=dict)
    operations: dict[str, OperationFacts] = field(default_factory=dict)

    @cached_property
    def open_operations(self) -> tuple[OperationFacts, ...]:
        return tuple(one for one in self.operations.values() if one.is_open)

    def host_of(self, operation: OperationFacts) -> HostFacts:
        return self.hosts[operation.host_id]

    def open_on(self, host_name: str) -> OperationFacts | None:
        found = [one for one in self.open_operations if self.host_of(one).name == host_name]
        return found[0] if found else None


@dataclass(frozen=True)
class Grant:
    """A permission to write as the service gave it."""

    host: str
    operation_id: str
    generation: int
    release: str
    serial: str
    granted_s: float


class Ledger:
    """Remembers what left the service, and what people asked for."""

    def __init__(self, database: Database, scheduler: Scheduler) -> None:
        self._database = database
        self._scheduler = scheduler
        self._newest: Snapshot | None = None
        self.before = Snapshot()
        self.grants: list[Grant] = []
        self.selected: set[str] = set()
        self.seeds_out: Counter[str] = Counter()
        self.secrets: set[str] = set()
        self.effects_begun: set[str] = set()
        self.written: set[str] = set()  # operations that wrote at least once
        # By operation: which disk carried the system that reported its nonce.
        self.reported_from: dict[str, str] = {}
        # By operation: when its new system was heard last.
        self.heard_s: dict[str, float] = {}
        # By address: when the service looked last at the system there.
        self.looked_s: dict[str, float] = {}
        # By operation: when it was saved last that its system is not healthy.
        self.ill_s: dict[str, float] = {}
        # Since when there is a service that runs, and a database that serves it.
        self.well_since_s = 0.0
        self.stuck_at_s: float | None = None

    @property
    def now(self) -> Snapshot:
        """The rows of the last commit."""
        if self._newest is None:
            self._newest = Snapshot(
                {row[0]: HostFacts(*row) for row in self._database.rows(_HOSTS)},
                {row[0]: OperationFacts(*row) for row in self._database.rows(_OPERATIONS)},
            )
        return self._newest

    def committed(self) -> None:
        """Note that the rows have changed; what they were stays in `before`."""
        if self._newest is not None:
            self.before = self._newest
        self._newest, self.stuck_at_s = None, None

    @property
    def is_proving(self) -> bool:
        return any(one.phase == Phase.PROVING for one in self.now.open_operations)

    @property
    def first_deadline_s(self) -> float:
        """When the first deadline of an open operation passes; infinity without one."""
        dues = (self.deadline_s(one) for one in self.now.open_operations)
        return min((due for due in dues if due is not None), default=float("inf"))

    def deadline_s(self, operation: OperationFacts) -> float | None:
        if operation.deadline_at is None:
            return None
        return self._scheduler.seconds_of(datetime.fromisoformat(operation.deadline_at))

    def revoked(self, digest: str) -> bool:
        query = "SELECT 1 FROM releases WHERE digest = ? AND revoked_at IS NOT NULL"
        return bool(self._database.rows(query, digest))

    def live_ticket(self, digest: str) -> tuple[str, str, int, str] | None:
        """Return operation, host, generation and expiry of a ticket nobody has consumed."""
        query = """SELECT operation_id, host_id, generation, expires_at FROM tickets
                   WHERE digest = ? AND consumed_at IS NULL"""
        found = self._database.rows(query, digest)
        return found[0] if found else None

    def owner_of(self, mac: str) -> str | None:
        found = self._database.rows("SELECT host_id FROM nics WHERE mac = ?", mac)
        return found[0][0] if found else None

    def operation_of_token(self, digest: str) -> str | None:
        """Return the operation that an agent's token or a ticket is of."""
        query = """SELECT operation_id FROM agent_tokens WHERE digest = ?1
                   UNION SELECT operation_id FROM tickets WHERE digest = ?1"""
        found = self._database.rows(query, digest)
        return found[0][0] if found else None

    def waiting_effects(self) -> list[str]:
        query = "SELECT key FROM sim_effects WHERE state IN ('waiting', 'running')"
        return [row[0] for row in self._database.rows(query)]

    def effects_saved(self) -> list[str]:
        return [row[0] for row in self._database.rows("SELECT key FROM sim_effects")]

    def unfinished_before(self, key: str, partition: str) -> list[str]:
        query = """SELECT key FROM sim_effects WHERE partition = ?2 AND key <> ?1
                   AND state IN ('waiting', 'running')
                   AND place < (SELECT place FROM sim_effects WHERE key = ?1)"""
        return [row[0] for row in self._database.rows(query, key, partition)]

    def written_texts(self) -> str:
        """Return all that people can read: audit log, timeline and operations."""
        queries = (
            "SELECT action, subject, detail FROM audit",
            "SELECT text, detail FROM events",
            "SELECT pins, options, progress, error, evidence FROM operations",
            "SELECT inventory, labels FROM hosts",
        )
        return "\n".join(repr(row) for query in queries for row in self._database.rows(query))
