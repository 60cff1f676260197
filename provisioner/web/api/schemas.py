"""The shapes of the operator API: what comes in, strictly, and what goes out. No secret has
a field in anything that goes out, but for a new token, once."""

from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from provisioner.core.model import Firmware, LocalBoot
from provisioner.core.recovery import ATTEMPTS_LIMIT

PAGE_MAX = 1000
TEXT_MAX = 256

Text = Annotated[str, Field(min_length=1, max_length=TEXT_MAX)]
Labels = Annotated[dict[Text, Annotated[str, Field(max_length=TEXT_MAX)]], Field(max_length=64)]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Query(BaseModel):
    # Each value of a query is a text, so this one is lax about types, not about names.
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class BmcIn(_In):
    """Where the host's BMC answers IPMI, and how to log in. The password is never sent back."""

    address: IPv4Address | IPv6Address
    port: int = Field(623, ge=1, le=65535)
    user: Text
    password: SecretStr = Field(min_length=1, max_length=128)


class HostIn(_In):
    name: Text
    macs: list[Text] = Field(min_length=1, max_length=16)
    bmc: BmcIn | None = None
    firmware: Firmware | None = None
    uuid: Text | None = None
    serial: Text | None = None
    profile: Text | None = None
    local_boot: LocalBoot = LocalBoot.AUTO
    labels: Labels = Field(default_factory=dict)


class ImportIn(_In):
    """Enrols all of the hosts, or none."""

    hosts: list[HostIn] = Field(max_length=10_000)


class HostChangeIn(_In):
    """What is left out stays as it is."""

    profile: Text | None = None
    firmware: Firmware | None = None
    local_boot: LocalBoot | None = None
    bmc: BmcIn | None = None
    labels: Labels | None = None


class FlagsIn(_In):
    """What is left out stays as it is."""

    is_protected: bool | None = None
    in_maintenance: bool | None = None
    release_quarantine: bool = False


class ConfirmIn(_In):
    """Takes a discovered host into management."""

    new_name: Text | None = None
    bmc: BmcIn | None = None
    profile: Text | None = None


class PowerIn(_In):
    action: Literal["status", "on", "off", "soft-off", "reset"]


class DeploymentOptionsIn(_In):
    soft_shutdown: bool = True
    full: bool = Field(
        default=False, description="write everything, also what is on the disk already"
    )
    attempts: int | None = Field(
        default=None,
        ge=1,
        le=ATTEMPTS_LIMIT,
        description="at most in all; null: as the settings say",
    )


class DeploymentIn(_In):
    """Hosts have no default: an empty selection selects nothing."""

    hosts: list[Text] = Field(max_length=1000)
    release: Text
    options: DeploymentOptionsIn = Field(default_factory=DeploymentOptionsIn)


class VerificationIn(_In):
    """Compares disks with a release, and writes nothing. No release: what each host runs."""

    hosts: list[Text] = Field(max_length=1000)
    release: Text | None = None


class ChannelIn(_In):
    release: Text


class RevocationIn(_In):
    reason: str = Field(min_length=1, max_length=500)


class BreakerCloseIn(_In):
    reason: str = Field(min_length=1, max_length=500)


class ProfileIn(_In):
    """With `check_schema`, a `cloud_config` that cloud-init's own schema refuses is not saved."""

    document: dict[str, Any]
    check_schema: bool = True


class TokenIn(_In):
    name: Text
    role: Literal["viewer", "operator", "publisher", "admin"]
    expires_in_s: int | None = Field(None, ge=60, le=10 * 365 * 24 * 3600)


class PageQuery(_Query):
    after: str = Field("", max_length=TEXT_MAX)
    limit: int = Field(PAGE_MAX, ge=1, le=PAGE_MAX)


class NumberedPageQuery(_Query):
    after: int | None = Field(None, ge=0, description="without it, the newest")
    limit: int = Field(200, ge=1, le=PAGE_MAX)


class ReleasesQuery(_Query):
    removed: bool = Field(default=False, description="those whose bytes are gone, too")


class OperationsQuery(_Query):
    host: str | None = Field(None, max_length=TEXT_MAX)
    open: bool = False
    limit: int = Field(100, ge=1, le=PAGE_MAX)
    ids: str = Field("", max_length=64 * PAGE_MAX, description="comma-separated operation ids")


class BmcOut(BaseModel):
    address: str
    port: int
    user: str


class OpenOperationOut(BaseModel):
    id: str
    kind: str
    phase: str


class ReleaseFailureOut(BaseModel):
    """A release that failed on the host, for as often as it was tried."""

    release: str
    release_name: str | None
    operation: str
    at: datetime
    code: str
    message: str


class HostOut(BaseModel):
    id: str
    name: str
    state: str
    macs: list[str]
    firmware: str | None
    local_boot: str
    uuid: str | None
    serial: str | None
    profile: str | None
    bmc: BmcOut | None
    generation: int
    release: str | None
    release_name: str | None
    last_good: str | None
    is_confirmed: bool
    is_protected: bool
    in_maintenance: bool
    quarantine_reason: str | None
    labels: dict[str, str]
    root_disk: dict[str, Any] | None
    inventory: dict[str, Any] | None = Field(description="left out of lists")
    operation: OpenOperationOut | None
    recovery: str | None = Field(
        description="what follows a failure, or that the host went back; left out of lists"
    )
    failed_releases: list[ReleaseFailureOut] = Field(description="left out of lists")
    created_at: datetime


class HostsOut(BaseModel):
    hosts: list[HostOut]
    next: str | None = Field(description="give it as `after` for the next page")


class EventOut(BaseModel):
    number: int
    at: datetime
    source: str
    text: str
    operation: str | None
    mac: str | None
    detail: dict[str, Any]


class EventsOut(BaseModel):
    events: list[EventOut]
    next: int | None


class EvidenceOut(BaseModel):
    at: datetime
    source: str
    text: str


class WhyOut(BaseModel):
    """Where a host's boot stands, why, and what to do."""

    host: str
    operation: str | None = Field(description="the one it is about; null when there was none")
    kind: str | None
    phase: str | None
    since: datetime | None
    deadline_at: datetime | None = Field(description="when its phase has lasted too long")
    cause: str = Field(description="stable, for programs: see docs/why.md")
    stands: str
    why: str
    evidence: list[EvidenceOut] = Field(description="lines of its timeline, oldest first")
    next: list[str] = Field(description="commands, and things to look at")


class PowerOut(BaseModel):
    power: str | None = Field(description="on or off for `status`, otherwise null")


class BmcFindingOut(BaseModel):
    code: str = Field(description="cipher_zero or anonymous_login")
    message: str
    hint: str


class BmcCheckOut(BaseModel):
    findings: list[BmcFindingOut] = Field(description="empty when nothing was found")


class OperationOut(BaseModel):
    id: str
    host: str
    kind: str
    phase: str
    is_final: bool
    generation: int
    rung: int
    release: str | None
    release_name: str | None
    requested_by: str
    requested_at: datetime
    phase_at: datetime
    deadline_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    waits: str | None = Field(description="while queued: what keeps it from starting")
    phase_seconds: dict[str, float]
    progress: dict[str, Any]
    error: dict[str, Any] | None
    evidence: dict[str, Any]
    pins: dict[str, Any]
    options: dict[str, Any]
    follow_up: dict[str, Any] | None = Field(
        description="what comes after its failure: what, why, state, release, attempt"
    )
    follow_up_at: datetime | None = Field(description="when; null unless it is still to come")


class OperationsOut(BaseModel):
    operations: list[OperationOut]


class _Revision(BaseModel):
    name: str
    digest: str
    created_at: datetime


class ProfileOut(_Revision):
    document: dict[str, Any]


class SchemaCheckOut(BaseModel):
    """`checked_by` names the cloud-init that looked, and is null where none did: `note` says
    why. Otherwise `note` is what it calls deprecated."""

    checked_by: str | None
    note: str | None


class SavedProfileOut(ProfileOut):
    schema_check: SchemaCheckOut


class ListedProfileOut(_Revision):
    """`document` is null for one that does not open; asked for by itself, it is refused."""

    document: dict[str, Any] | None


class ProfilesOut(BaseModel):
    profiles: list[ListedProfileOut]


class BreakerOut(BaseModel):
    """Nothing starts while it is open; it was opened last for `reason`."""

    is_open: bool
    opened_at: datetime | None
    reason: str | None
    closed_at: datetime | None
    closed_by: str | None
    closed_reason: str | None


class AuditRowOut(BaseModel):
    number: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    before_hash: str
    row_hash: str


class AuditOut(BaseModel):
    rows: list[AuditRowOut]
    next: int | None


class VerifiedOut(BaseModel):
    rows_checked: int


class TokenOut(BaseModel):
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class TokensOut(BaseModel):
    tokens: list[TokenOut]


class NewTokenOut(BaseModel):
    name: str
    role: str
    token: str = Field(description="shown this once")


class ProblemOut(BaseModel):
    """Every error: RFC 9457, with our own members after the standard ones."""

    type: str = Field(description="urn:provisioner:error:request, device, trust, …")
    title: str
    status: int
    detail: str
    code: str
    host: str | None = None
    expected: Any = None
    found: Any = None
    hint: str | None = None
