"""What the simulation knows of a run beside the service: the truth that it is judged by.

The database is read behind the service's back, right after each commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Final

from provisioner.core.model import FINAL, Kind, Phase

from .database import Database
from .scheduler import Scheduler

_HOSTS: Final = """
SELECT id, name, state, generation, release, is_protected, in_maintenance, quarantine_reason,
       json_extract(labels, '$.group')
FROM hosts"""
_OPERATIONS: Final = """
SELECT id, host_id, kind, phase, generation, release, deadline_at, rung,
       json_extract(evidence, '$.healthy_since'),
       json_extract(evidence, '$.bmc_login_refused_at'), json_extract(error, '$.code'),
       json_extract(pins, '$.cause'), json_extract(pins, '$.after'),
       json_extract(follow_up, '$.what'), follow_up_at, requested_at, started_at
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
    group: str | None  # as people have labelled it

    @property
    def is_quarantined(self) -> bool:
        return bool(self.quarantine_reason)

    @property
    def is_flagged_by_hand(self) -> bool:
        return bool(self.is_protected or self.in_maintenance)

    @property
    def is_flagged(self) -> bool:
        return self.is_flagged_by_hand or bool(self.quarantine_reason)


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
    login_refused_at: str | None
    error_code: str | None
    cause: str | None
    after: str | None  # the operation that this one follows by itself
    follow_up: str | None  # what comes after this one: retry, rollback or quarantine
    follow_up_at: str | None
    requested_at: str
    started_at: str | None

    @property
    def is_open(self) -> bool:
        return self.phase not in _FINAL

    @property
    def is_started(self) -> bool:
        return self.is_open and self.phase != Phase.QUEUED

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and nothing is to come after it."""
        return not self.is_open and self.follow_up_at is None


@dataclass(frozen=True)
class Snapshot:
    """The rows of one moment, by id."""

    hosts: dict[str, HostFacts] = field(default_factory=dict)
    operations: dict[str, OperationFacts] = field(default_factory=dict)

    @cached_property
    def open_operations(self) -> tuple[OperationFacts, ...]:
        return tuple(one for one in self.operations.values() if one.is_open)

    @cached_property
    def in_flight(self) -> dict[str, OperationFacts]:
        """What has started and not ended, by the host that it is on."""
        return {one.host_id: one for one in self.open_operations if one.is_started}

    @cached_property
    def to_follow(self) -> tuple[OperationFacts, ...]:
        """Those that have ended, with something to come by itself."""
        return tuple(one for one in self.operations.values() if one.follow_up_at is not None)

    def host_of(self, operation: OperationFacts) -> HostFacts:
        return self.hosts[operation.host_id]

    def host_named(self, name: str) -> HostFacts:
        return next(host for host in self.hosts.values() if host.name == name)

    def open_on(self, host_name: str) -> OperationFacts | None:
        return self._of(self.open_operations, host_name)

    def to_follow_on(self, host_name: str) -> OperationFacts | None:
        return self._of(self.to_follow, host_name)

    def _of(self, among: tuple[OperationFacts, ...], host_name: str) -> OperationFacts | None:
        return next((one for one in among if self.host_of(one).name == host_name), None)


# An operation as it was before a commit, None for one that is new, and as it is.
Change = tuple[OperationFacts | None, OperationFacts]


@dataclass(frozen=True)
class Start:
    """An operation that has left the queue. `was_healthy`: it took a healthy host away."""

    at_s: float
    host_id: str
    was_healthy: bool


@dataclass(frozen=True)
class Grant:
    """A permission to write as the service gave it."""

    host: str
    operation_id: str
    generation: int
    release: str
    serial: str
    granted_s: float


@dataclass(frozen=True)
class Memory:
    """What the ledger knows that a database can know as well, and that goes back with it."""

    unproven: frozenset[str]
    permitted: frozenset[str]
    proven: frozenset[str]
    begun: frozenset[str]


class Ledger:
    """Remembers what left the service, and what people asked for."""

    def __init__(self, database: Database, scheduler: Scheduler) -> None:
        self._database = database
        self._scheduler = scheduler
        self._newest: Snapshot | None = None
        self._changed: list[Change] | None = None
        self.before = Snapshot()
        self.grants: list[Grant] = []
        self.selected: set[str] = set()
        self.seeds_out: Counter[str] = Counter()
        self.secrets: set[str] = set()
        self.effects_begun: set[str] = set()
        self.written: set[str] = set()  # operations that wrote at least once
        # Hosts, by id, that were written since their last success.
        self.unproven: set[str] = set()
        # Hosts, by name, whose quarantine a person has asked to lift.
        self.released: set[str] = set()
        self.permitted: set[str] = set()  # hosts, by id, that may have been written
        self.begun: set[str] = set()  # operations that were permitted to write
        self.superseding: set[str] = set()  # operations whose request ended what was to follow
        self.ever_quarantined: set[str] = set()  # by name
        self.starts: list[Start] = []
        # Hosts, by id, whose newest system was proven and not touched since.
        self.proven: set[str] = set()
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
        self.committed_s = 0.0
        # When a backup was put back, and whether nobody has reconciled since.
        self.restored_s = float("-inf")
        self.is_behind = False
        self.is_reconciling = False  # the last commit did it
        self.may_reconcile = False  # a person has asked for it
        self.lost: dict[str, OperationFacts] = {}  # as they were when it was put back
        self.open_then: frozenset[str] = frozenset()  # what is unfinished in the backup
        self.quarantined_then: set[str] = set()  # by id, for as long as they are
        self._audited_then = 0
        # By operation and generation: the start of the ramdisk that has written for it.
        self.written_by: dict[tuple[str, int], str] = {}
        self.stuck_at_s: float | None = None
        self.overdue_at_s: float | None = None

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
        self._newest, self._changed = None, None
        self.stuck_at_s, self.overdue_at_s = None, None
        self.committed_s = self._scheduler.now_s
        self._note_reconciliation()
        ended = {one.host_id for was, one in self.changed if was and was.follow_up_at}
        for before, one in self.changed:
            if before is None and one.after is None and one.host_id in ended:
                self.superseding.add(one.id)
            if before is not None and before.phase == Phase.QUEUED and one.is_started:
                was_healthy = self.is_healthy(one.host_id, self.before)
                self.starts.append(Start(self.committed_s, one.host_id, was_healthy))
            if one.phase == Phase.WRITING:
                self.permitted.add(one.host_id)
                self.begun.add(one.id)
                self.proven.discard(one.host_id)
            if one.phase == Phase.SUCCEEDED and one.kind == Kind.DEPLOYMENT:
                self.unproven.discard(one.host_id)
                self.permitted.discard(one.host_id)
                self.proven.add(one.host_id)
        hosts = self.now.hosts
        self.quarantined_then = {one for one in self.quarantined_then if hosts[one].is_quarantined}
        self.ever_quarantined |= {
            host.name for host in self.now.hosts.values() if host.quarantine_reason
        }

    @property
    def changed(self) -> list[Change]:
        """The operations that the last commit has changed or made, as they were and are."""
        if self._changed is None:
            known = self.before.operations
            pairs = ((known.get(key), one) for key, one in self.now.operations.items())
            self._changed = [(before, one) for before, one in pairs if before != one]
        return self._changed

    @property
    def newest_starts(self) -> list[Start]:
        """What the last commit has started, while no time has passed since."""
        return [one for one in self.starts if one.at_s == self._scheduler.now_s]

    def is_healthy(self, host_id: str, among: Snapshot) -> bool:
        """Return whether a host serves: its system is proven, nothing is done to it, and nobody
        has put it aside."""
        host = among.hosts[host_id]
        is_aside = host.in_maintenance or host.quarantine_reason
        return host_id in self.proven and not is_aside and host_id not in among.in_flight

    def chain_of(self, operation: OperationFacts) -> list[OperationFacts]:
        """Return an operation and those that it follows, the newest first."""
        chain = [operation]
        while chain[-1].after is not None:
            chain.append(self.now.operations[chain[-1].after])
        return chain

    def note_write(self, operation_id: str, grant: Grant | None) -> None:
        self.written.add(operation_id)
        if not self.is_lost(grant):
            self.unproven.add(self.now.operations[operation_id].host_id)

    # What a restored database does not know of.

    def is_lost(self, grant: Grant | None) -> bool:
        """Return whether a permission was given in a time that the database knows nothing of:
        it lasts for a while, and its agent goes on until it is refused."""
        return grant is not None and grant.granted_s < self.restored_s

    def operation(self, operation_id: str) -> OperationFacts:
        """Return an operation, also one that was lost with a database."""
        return self.now.operations.get(operation_id) or self.lost[operation_id]

    def audit_rows(self) -> int:
        found: int | None = self._database.rows("SELECT MAX(number) FROM audit")[0][0]
        return found or 0

    def observes(self) -> bool:
        """Return whether the service only observes, as its database says."""
        query = "SELECT 1 FROM sightings WHERE reconciled_at IS NULL"
        return bool(self._database.rows(query))

    def memory(self) -> Memory:
        sets = (self.unproven, self.permitted, self.proven, self.begun)
        return Memory(*(frozenset(one) for one in sets))

    def put_back(self, memory: Memory) -> None:
        """Note that the database is an older one from here on."""
        self.lost |= self.now.operations
        self._newest, self._changed = None, None
        self.before = self.now
        self.unproven, self.permitted = set(memory.unproven), set(memory.permitted)
        self.proven, self.begun = set(memory.proven), set(memory.begun)
        self.restored_s, self.is_behind = self._scheduler.now_s, True
        self._audited_then = self.audit_rows()
        self.open_then = frozenset(one.id for one in self.now.open_operations)
        self.quarantined_then = {key for key, one in self.now.hosts.items() if one.is_quarantined}

    def _note_reconciliation(self) -> None:
        self.is_reconciling = self.is_behind and self.may_reconcile and self._is_reconciled()
        if not self.is_reconciling:
            return
        self.is_behind = False
        for key, host in self.now.hosts.items():
            # Something newer than the backup may have been written to it, and nobody vouches
            # for that.
            if host.state != self.before.hosts[key].state:
                self.proven.discard(key)
                self.permitted.add(key)

    def _is_reconciled(self) -> bool:
        query = "SELECT 1 FROM audit WHERE action = 'service.reconciled' AND number > ?"
        return bool(self._database.rows(query, self._audited_then))

    def waits_s(self, operation: OperationFacts) -> float:
        """How long ago an operation was asked for."""
        return self._scheduler.now_s - self._seconds_of(operation.requested_at)

    @property
    def is_proving(self) -> bool:
        return any(one.phase == Phase.PROVING for one in self.now.open_operations)

    @property
    def first_deadline_s(self) -> float:
        """When the first deadline of an open operation passes; infinity without one."""
        return self._first_s(one.deadline_at for one in self.now.open_operations)

    @property
    def first_follow_up_s(self) -> float:
        """When the first of what follows by itself is due, where no operation is in its way."""
        busy = {one.host_id for one in self.now.open_operations}
        return self._first_s(
            one.follow_up_at for one in self.now.to_follow if one.host_id not in busy
        )

    def _first_s(self, moments: Iterable[str | None]) -> float:
        dues = (self._seconds_of(moment) for moment in moments if moment is not None)
        return min(dues, default=float("inf"))

    def deadline_s(self, operation: OperationFacts) -> float | None:
        return None if operation.deadline_at is None else self._seconds_of(operation.deadline_at)

    def _seconds_of(self, moment: str) -> float:
        return self._scheduler.seconds_of(datetime.fromisoformat(moment))

    def has_failed_on(self, host_id: str, release: str | None) -> bool:
        """Return whether it is remembered that this release has failed on this host."""
        query = "SELECT 1 FROM release_failures WHERE host_id = ? AND release = ?"
        return bool(self._database.rows(query, host_id, release))

    def did_nothing(self, operation: OperationFacts) -> bool:
        """Return whether an operation left its host as it was before somebody asked for it: it
        has not started, follows none, and took the place of nothing that was to follow."""
        is_alone = operation.after is None and operation.id not in self.superseding
        return is_alone and operation.started_at is None

    def blames(self, operation_id: str) -> bool:
        """Return whether a release is remembered as failed because of this operation."""
        query = "SELECT 1 FROM release_failures WHERE operation_id = ?"
        return bool(self._database.rows(query, operation_id))

    def breaker_is_open(self) -> bool:
        query = """SELECT 1 FROM breaker WHERE opened_at IS NOT NULL
                   AND (closed_at IS NULL OR closed_at < opened_at)"""
        return bool(self._database.rows(query))

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
            "SELECT source, detail FROM sightings",
        )
        return "\n".join(repr(row) for query in queries for row in self._database.rows(query))
