"""The ports: what the use cases need from the outside, as Protocols.

`store`, `bmc` and `imaging` are reached only through these; `wiring.py` alone knows the
concrete classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from .audit import AuditRow
from .effects import Effect
from .fleet import Breaker, Failure, Load, Queued, Selection
from .manifest import Manifest
from .model import (
    BmcAddress,
    BootDevice,
    Channel,
    Event,
    Firmware,
    Host,
    HostId,
    Json,
    Operation,
    OperationId,
    Phase,
    PowerState,
    Profile,
    ReleaseFailure,
    ReleaseRow,
    ReleaseTest,
    Ticket,
)
from .own_host import ServiceHost

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class AgentToken:
    """The ramdisk's short-lived secret, kept only as a hash."""

    digest: str
    operation_id: OperationId
    host_id: HostId
    generation: int
    expires_at: datetime


@dataclass(frozen=True)
class ApiToken:
    """A bearer token of a person or a program, kept only as a hash. `role` is viewer,
    operator, publisher or admin."""

    digest: str
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None = None


@dataclass(frozen=True)
class Sighting:
    """A proof that the world is ahead of this database, which therefore is an older one.

    `kind` is `mark` (our own note of how far the audit log had come), or what a host came
    with: a `ticket`, `token` or `nonce` that is ours, of an operation that is not known.
    `key` tells it from others; it is no secret. Until it is reconciled, we only observe.
    """

    key: str
    kind: str
    at: datetime
    source: str
    detail: Json
    operation_id: OperationId | None = None
    generation: int | None = None
    host_id: HostId | None = None
    reconciled_at: datetime | None = None


@dataclass(frozen=True)
class Outgoing:
    """An effect to perform after commit. `partition` is what at most one effect at a time
    may touch (a BMC address); `key` makes enqueuing it twice do nothing."""

    key: str
    partition: str
    operation_id: OperationId
    generation: int
    effect: Effect


@dataclass(frozen=True)
class SchemaCheck:
    """What cloud-init's own schema says of a cloud-config, in cloud-init's words.

    `checked_by` names the cloud-init that looked, and is None where none did: `note` says why.
    `errors` is None for what it would take, and `note` then says what it calls deprecated.
    """

    checked_by: str | None = None
    errors: str | None = None
    note: str | None = None


class Tx(Protocol):
    """One transaction. Reads of one host or operation by id lock it until the end."""

    # hosts
    def host(self, host_id: HostId) -> Host: ...  # NotFound when there is none
    def host_named(self, name: str) -> Host | None: ...  # also by id
    def hosts_with_mac(self, mac: str) -> Sequence[Host]: ...
    def hosts_with_uuid(self, uuid: str) -> Sequence[Host]: ...
    def hosts(self, *, after: str = "", limit: int = 1000) -> Sequence[Host]: ...  # by name
    def macs_of_firmware(self, firmware: Firmware) -> Sequence[str]: ...  # sorted
    def macs(self) -> Mapping[str, HostId]: ...  # of every host
    def count_unconfirmed_hosts(self) -> int: ...
    def add_host(self, host: Host) -> None: ...  # Conflict on a used name or MAC
    def save_host(self, host: Host) -> None: ...
    def delete_host(self, host_id: HostId) -> None: ...  # with its nics, events and tickets

    # operations
    def operation(self, operation_id: OperationId) -> Operation: ...  # NotFound
    def open_operation(self, host_id: HostId) -> Operation | None: ...
    def operations(
        self,
        *,
        host_id: HostId | None = None,
        phases: Iterable[Phase] | None = None,
        release: str | None = None,
        overdue_at: datetime | None = None,  # deadline_at <= this
        newest_first: bool = True,
        limit: int = 100,
    ) -> Sequence[Operation]: ...
    def due_follow_ups(
        self, at: datetime, *, limit: int = 100
    ) -> Sequence[Operation]: ...  # follow_up_at <= this, the longest due first
    def waiting_follow_ups(self, host_id: HostId) -> Sequence[Operation]: ...  # newest first
    def count_operations(self, phases: Iterable[Phase], *, not_by: str = "") -> int: ...
    def add_operation(self, operation: Operation) -> None: ...  # Conflict when one is open
    def save_operation(self, operation: Operation) -> None: ...

    # what the guard asks. Whoever starts an operation or moves the breaker locks it after
    # the host, so that no two starts overlook each other
    def add_selection(self, selection: Selection) -> None: ...  # Conflict on a used id
    def selection(self, request_id: str) -> Selection | None: ...
    def loads(
        self, *, started_after: datetime, started_until: datetime, not_by: str
    ) -> Mapping[str | None, Load]: ...  # by group; operations of `not_by` take no place
    def group_sizes(
        self, groups: Iterable[str]
    ) -> Mapping[str, tuple[int, int]]: ...  # hosts, active ones
    # The oldest of each group, so many with an active host and so many without.
    def queued(self, *, per_group_max: int) -> Sequence[Queued]: ...
    def failures(
        self, after: datetime, until: datetime | None = None
    ) -> Sequence[Failure]: ...  # of started deployments
    def breaker(self, *, lock: bool = False) -> Breaker: ...
    def save_breaker(self, breaker: Breaker) -> None: ...

    # permissions: only hashes are kept
    def add_ticket(self, ticket: Ticket) -> None: ...
    def ticket(self, digest: str) -> Ticket | None: ...
    def open_ticket(self, host_id: HostId) -> Ticket | None: ...  # newest unconsumed one
    def consume_ticket(self, digest: str, at: datetime) -> bool: ...  # False: already was
    def add_agent_token(self, token: AgentToken) -> None: ...
    def agent_token(self, digest: str) -> AgentToken | None: ...
    def renew_agent_token(self, digest: str, until: datetime) -> None: ...
    def revoke_operation(self, operation_id: OperationId, at: datetime) -> None: ...  # its
    # tickets are consumed and its agent tokens deleted
    def is_seed_taken(self, operation_id: OperationId) -> bool: ...
    def take_seed(self, operation_id: OperationId, at: datetime) -> bool: ...  # False: taken
    def add_api_token(self, token: ApiToken) -> None: ...
    def api_token(self, digest: str) -> ApiToken | None: ...
    def api_tokens(self) -> Sequence[ApiToken]: ...
    def revoke_api_token(self, name: str, at: datetime) -> bool: ...
    def recall(self, key: str) -> Json | None: ...  # the saved reply to an Idempotency-Key
    def remember(self, key: str, reply: Json, at: datetime) -> None: ...

    # releases: whoever begins to refer to one holds it, whoever changes one locks it, so
    # that of two such transactions one sees what the other did
    def add_release(self, release: ReleaseRow) -> None: ...  # Conflict: other content
    def save_release(self, release: ReleaseRow) -> None: ...
    def release(self, digest: str) -> ReleaseRow | None: ...
    def hold_release(self, digest: str) -> ReleaseRow: ...  # NotFound; unchanged until the end
    def lock_release(self, digest: str) -> ReleaseRow: ...  # NotFound; nobody holds it, too
    def release_named(self, image: str, version: str) -> ReleaseRow | None: ...
    def releases(self, image: str | None = None) -> Sequence[ReleaseRow]: ...
    def used_releases(self) -> set[str]: ...  # by hosts, channels and operations to finish
    def channel(self, image: str, name: str) -> Channel | None: ...
    def channels(self, image: str | None = None) -> Sequence[Channel]: ...
    def save_channel(self, channel: Channel) -> None: ...
    def add_release_test(self, test: ReleaseTest) -> None: ...
    def release_tests(self, digest: str) -> Sequence[ReleaseTest]: ...  # newest first

    # what failed on a host, for as often as it was tried
    def remember_failure(self, failure: ReleaseFailure) -> None: ...  # in place of an older one
    def failures_on(self, host_id: HostId) -> Sequence[ReleaseFailure]: ...  # newest first
    def forget_failure(self, host_id: HostId, release: str) -> None: ...

    # profiles
    def save_profile(self, profile: Profile) -> None: ...  # a new revision, or the same again
    def profile(self, name: str) -> Profile | None: ...  # its newest revision
    def profile_revision(self, digest: str) -> Profile | None: ...
    def profiles(self) -> Sequence[Profile]: ...  # newest revision of each
    def seal_profiles(self) -> int: ...  # those that an earlier version kept in clear
    def delete_profile(self, name: str) -> bool: ...  # hides it; revisions stay

    # records and wishes
    def audit(self, at: datetime, actor: str, action: str, subject: str, detail: Json) -> None: ...
    # Oldest first: those that follow `after`, a row's number; without it the newest.
    def audit_rows(self, *, after: int | None = None, limit: int = 1000) -> Sequence[AuditRow]: ...
    def newest_audit(self) -> AuditRow | None: ...
    def is_audited(self, operation_id: OperationId) -> bool: ...  # it was known once; slow
    def add_event(self, event: Event) -> None: ...
    def events(
        self, *, host_id: HostId | None = None, after: int | None = None, limit: int = 200
    ) -> Sequence[tuple[int, Event]]: ...  # (number, event), as audit_rows
    def enqueue(self, outgoing: Outgoing) -> None: ...

    # the services on this database, and what they have in common
    def clock(self) -> datetime | None: ...  # its own, as it answers; None: it has none
    def save_service(self, service: ServiceHost) -> None: ...  # in place of what it said before
    def services(self) -> Sequence[ServiceHost]: ...  # by name
    def delete_service(self, name: str) -> bool: ...  # False: there is none

    # what shows that this database was restored
    def add_sighting(self, sighting: Sighting) -> bool: ...  # False: known, or too many
    def sighting(self, key: str) -> Sighting | None: ...
    def sightings(self) -> Sequence[Sighting]: ...  # those not reconciled, oldest first
    def is_observing(self) -> bool: ...  # whether there is one
    def reconcile_sightings(self, at: datetime) -> None: ...
    def last_reconciled_at(self) -> datetime | None: ...


class Store(Protocol):
    """The one truth about state. Unavailable is raised when the database cannot serve."""

    def begin(self) -> AbstractContextManager[Tx]: ...  # commits at the end, or rolls back
    def read(self) -> AbstractContextManager[Tx]: ...  # read only: takes no write lock
    def close(self) -> None: ...


class EffectWorker(Protocol):
    """Performs what was enqueued, at least once each, one at a time per partition."""

    def start(self, perform: Callable[[Outgoing], None]) -> None: ...
    def stop(self) -> None: ...


class Bmc(Protocol):
    """One management controller. Each call is one exchange and may raise BmcAuthFailed,
    BmcUnreachable (BmcBusy when waiting helps) or BmcRejected. An acknowledgement is not
    evidence."""

    def power(self) -> PowerState: ...
    def power_on(self) -> None: ...
    def power_off(self, *, soft: bool) -> None: ...
    def reset(self) -> None: ...
    def set_next_boot(
        self, device: BootDevice, *, persistent: bool, uefi: bool, hold_timer: bool
    ) -> None: ...


class BmcPool(Protocol):
    def bmc(self, where: BmcAddress) -> Bmc: ...
    def close(self) -> None: ...


class Archive(Protocol):
    """The release archive: signed manifests over immutable chunks."""

    def load(self, digest: str) -> Manifest: ...  # NotFound; TrustError on a bad signature
    def signed_by(self, digest: str) -> set[str]: ...  # ids of trusted keys; raises as load
    def check(self, digest: str, *, channel: str | None, now: datetime) -> Manifest: ...

    # raises as load, and TrustError for what must not be deployed now
    def check_signed(self, digest: str) -> Manifest: ...  # raises as load; for comparisons
    def attachment(self, manifest: Manifest, name: str) -> bytes: ...  # NotFound, TrustError
    def record(self, digest: str) -> Json: ...  # what the builder noted, unsigned; NotFound
    def log(self, digest: str) -> str: ...  # of the build; NotFound
