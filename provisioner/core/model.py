"""The nouns: hosts, operations, tickets and what they are made of.

Plain frozen values. No I/O, no clock, no chance; `lifecycle.py` alone changes a state.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NewType

HostId = NewType("HostId", str)
OperationId = NewType("OperationId", str)
Json = dict[str, Any]


class Secret:
    """A string that does not show itself: not in logs, not in a traceback, not in repr."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class PowerState(StrEnum):
    ON = "on"
    OFF = "off"


class BootDevice(StrEnum):
    NETWORK = "network"
    DISK = "disk"


class LocalBoot(StrEnum):
    """How a host is told to boot its own disk; firmwares differ in what they survive.

    AUTO is EXIT under BIOS and SANBOOT under UEFI, as iPXE finds itself: a UEFI firmware
    that is left by `exit` tries every other network entry first, for minutes.
    """

    AUTO = "auto"
    EXIT = "exit"
    SANBOOT = "sanboot"
    NOT_FOUND = "404"


class Firmware(StrEnum):
    """SECURE_BOOT is UEFI that starts only what is signed."""

    BIOS = "bios"
    UEFI = "uefi"
    SECURE_BOOT = "secure-boot"

    @property
    def is_uefi(self) -> bool:
        return self is not Firmware.BIOS


class HostState(StrEnum):
    """What we know of the host's disk."""

    ENROLLED = "enrolled"  # nothing yet
    DIRTY = "dirty"  # something we do not vouch for
    AVAILABLE = "available"  # erased by us
    ACTIVE = "active"  # a release, proven
    RETIRED = "retired"  # no longer ours


class Kind(StrEnum):
    DEPLOYMENT = "deployment"
    INSPECTION = "inspection"
    VERIFICATION = "verification"  # compares the disk with a release, and writes nothing


class Phase(StrEnum):
    QUEUED = "queued"
    NETBOOTING = "netbooting"
    PREPARING = "preparing"
    WRITING = "writing"
    VERIFYING = "verifying"
    BOOTING = "booting"
    PROVING = "proving"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})


@dataclass(frozen=True)
class BmcAddress:
    """Where a BMC answers and how to log in. `address` is an IP address, `port` a UDP port."""

    address: str
    port: int
    user: str
    password: Secret


class WeakLogin(StrEnum):
    """How a BMC lets somebody in who knows no password."""

    CIPHER_ZERO = "cipher_zero"
    ANONYMOUS = "anonymous_login"


@dataclass(frozen=True)
class Host:
    """A physical server that we manage.

    `generation` rises with every operation: whoever acts for an older one is refused.
    `release` is the digest that was proven to run, and None again from the next write on;
    `last_good` is the one that was proven last, and stays while another is written.
    `root_disk` identifies the disk that was written last ({"serial", "wwn", "size_bytes"}).
    """

    id: HostId
    name: str
    state: HostState
    macs: tuple[str, ...]
    firmware: Firmware | None
    local_boot: LocalBoot
    uuid: str | None
    serial: str | None
    profile: str | None
    bmc: BmcAddress | None
    generation: int
    release: str | None
    last_good: str | None
    is_confirmed: bool
    is_protected: bool
    in_maintenance: bool
    quarantine_reason: str | None
    labels: Mapping[str, str]
    inventory: Json | None
    root_disk: Json | None
    created_at: datetime

    @property
    def why_not_disturbed(self) -> str | None:
        """Why no operation at all may begin on this host now; None when one may."""
        if self.state is HostState.RETIRED:
            return "it is retired"
        if self.in_maintenance:
            return "it is in maintenance"
        return None

    @property
    def why_not_rebuilt(self) -> str | None:
        """Why no deployment may begin on this host now; None when one may."""
        if (reason := self.why_not_disturbed) is not None:
            return reason
        if not self.is_confirmed:
            return "it was discovered and nobody has confirmed it"
        if self.is_protected:
            return "it is protected"
        if self.quarantine_reason is not None:
            return f"it is quarantined: {self.quarantine_reason}"
        return None


def new_host(
    host_id: HostId,
    name: str,
    macs: tuple[str, ...],
    created_at: datetime,
    *,
    is_confirmed: bool = True,
    local_boot: LocalBoot = LocalBoot.AUTO,
    firmware: Firmware | None = None,
    uuid: str | None = None,
    serial: str | None = None,
    profile: str | None = None,
    bmc: BmcAddress | None = None,
    labels: Mapping[str, str] | None = None,
) -> Host:
    """Return a host that nothing has happened to yet."""
    return Host(
        id=host_id,
        name=name,
        state=HostState.ENROLLED,
        macs=macs,
        firmware=firmware,
        local_boot=local_boot,
        uuid=uuid,
        serial=serial,
        profile=profile,
        bmc=bmc,
        generation=0,
        release=None,
        last_good=None,
        is_confirmed=is_confirmed,
        is_protected=False,
        in_maintenance=False,
        quarantine_reason=None,
        labels=dict(labels or {}),
        inventory=None,
        root_disk=None,
        created_at=created_at,
    )


@dataclass(frozen=True)
class Operation:
    """One attempt at one thing on one host.

    `rung` counts the boot-override ladder from 0. `deadline_at` is when the present phase
    has lasted too long. `phase_seconds` holds the seconds that each finished phase took,
    `progress` the last report of the agent, `error` an error as JSON (see errors.py),
    `evidence` what proved the outcome, `pins` what was fixed when the operation was
    requested: the request and the digest of what it selected, the digests of ramdisk and
    profile, the release's name, the channel that it was found by, if any, and its place in
    a chain of attempts (see recovery.py). `started_at` is when it left the queue.

    `follow_up` is what comes after a failure, decided with it; while `follow_up_at` is set,
    that is still to come.
    """

    id: OperationId
    host_id: HostId
    kind: Kind
    phase: Phase
    generation: int
    rung: int
    release: str | None
    pins: Json
    options: Json
    requested_by: str
    requested_at: datetime
    phase_at: datetime
    deadline_at: datetime | None
    ended_at: datetime | None
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    progress: Json = field(default_factory=dict)
    error: Json | None = None
    evidence: Json = field(default_factory=dict)
    follow_up: Json | None = None
    follow_up_at: datetime | None = None
    started_at: datetime | None = None

    @property
    def is_final(self) -> bool:
        return self.phase in FINAL


@dataclass(frozen=True)
class ReleaseFailure:
    """A release that failed on a host, for as often as it was tried. Nothing but a person
    picks it for that host again, until it is proven there."""

    host_id: HostId
    release: str
    operation_id: OperationId
    at: datetime
    code: str
    message: str


@dataclass(frozen=True)
class Ticket:
    """The one-time permission to netboot for one operation. Kept only as a hash.

    It is for the host with these MACs, this UUID and this serial, as they were enrolled when
    it was issued; None is one that was not known then.
    """

    digest: str
    operation_id: OperationId
    host_id: HostId
    generation: int
    expires_at: datetime
    consumed_at: datetime | None = None
    macs: tuple[str, ...] = ()
    uuid: str | None = None
    serial: str | None = None

    def is_live(self, now: datetime) -> bool:
        return self.consumed_at is None and now < self.expires_at


@dataclass(frozen=True)
class Profile:
    """One revision of a profile; `digest` names it. `text` is its validated content as JSON, a
    secret since nobody knows which of its variables are."""

    name: str
    digest: str
    text: Secret
    created_at: datetime

    @property
    def document(self) -> Json:
        """Its content, opened now. Raises ProfileUnreadable when what is kept does not open."""
        document: Json = json.loads(self.text.reveal())
        return document


@dataclass(frozen=True)
class ReleaseRow:
    """What the database knows of a published release; the bytes are in the archive.

    A revoked release is never deployed again. A removed one was given up: its bytes are
    gone, or about to be, and its row stays, so that no other content takes its version.
    """

    digest: str
    image: str
    version: str
    size_bytes: int
    used_bytes: int
    stored_bytes: int
    firmware: tuple[str, ...]
    release_id: str
    published_at: datetime
    minimum_version: str | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_reason: str | None = None
    removed_at: datetime | None = None

    @property
    def name(self) -> str:
        return f"{self.image}@{self.version}"


@dataclass(frozen=True)
class Channel:
    """A movable pointer to a release of one image. `release_name` is for people."""

    image: str
    name: str
    digest: str
    release_name: str
    moved_at: datetime
    moved_by: str

    def __str__(self) -> str:
        return f"{self.image}:{self.name}"


@dataclass(frozen=True)
class ReleaseTest:
    """What came of booting a release in the lab, on each of `firmware`, with the checks of
    `profile`. `detail` holds what was found."""

    digest: str
    at: datetime
    profile: str
    firmware: tuple[str, ...]
    is_healthy: bool
    detail: Json
    tested_by: str


@dataclass(frozen=True)
class Event:
    """One line of a host's timeline. `source` is dhcp, tftp, http, bmc, agent, cloud-init
    or service."""

    at: datetime
    source: str
    text: str
    host_id: HostId | None = None
    operation_id: OperationId | None = None
    mac: str | None = None
    detail: Json = field(default_factory=dict)
