"""What follows a deployment that failed: another attempt, the way back, or quarantine.

An operation is one attempt. When it fails, `follow_up` says what comes next, and whoever saves
the failure saves the answer with it. No chain is longer than the attempts that its request was
given, one rollback, and quarantine. Pure: it is told the time, and what the database says.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from ..errors import ProvisionerError
from .lifecycle import BMC_LOGIN_REFUSED_AT
from .manifest import boots_on
from .model import Host, Json, Kind, Operation, OperationId, Phase, ReleaseRow
from .releases import check_standing
from .versions import is_older

# No setting and no request can ask for more.
ATTEMPTS_LIMIT: Final = 10
# Where an operation's pins say which part of a chain it is.
ATTEMPT: Final = "attempt"
ATTEMPTS_MAX: Final = "attempts_max"
CAUSE: Final = "cause"
AFTER: Final = "after"


class OnQuarantine(StrEnum):
    """What becomes of the power of a host that is quarantined."""

    POWER_OFF = "power_off"
    RAMDISK = "ramdisk"  # an agent that reports its failure stays; any other host is left
    LEAVE = "leave"


class Cause(StrEnum):
    """Why there is an operation: somebody asked for it, or it follows one that failed."""

    REQUEST = "request"
    RETRY = "retry"
    ROLLBACK = "rollback"


class Next(StrEnum):
    """What follows a failure. A decision that is looked at again moves down this list only."""

    RETRY = "retry"
    ROLLBACK = "rollback"
    QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Policy:
    """How failures are dealt with. Not `is_automatic`: they are left to a person."""

    is_automatic: bool = True
    attempts_max: int = 3
    backoff: timedelta = timedelta(minutes=1)
    backoff_max: timedelta = timedelta(minutes=15)
    may_roll_back: bool = True
    on_quarantine: OnQuarantine = OnQuarantine.POWER_OFF

    def pause_after(self, attempt: int) -> timedelta:
        """Return how long to wait after attempt number `attempt`: doubled each time."""
        doublings = min(attempt, ATTEMPTS_LIMIT) - 1
        return min(self.backoff * (1 << doublings), self.backoff_max)


@dataclass(frozen=True)
class Chain:
    """Which attempt of how many an operation is, why there is one, and after which other."""

    attempt: int
    attempts_max: int
    cause: Cause = Cause.REQUEST
    after: OperationId | None = None

    def pins(self) -> Json:
        pins: Json = {ATTEMPT: self.attempt, ATTEMPTS_MAX: self.attempts_max, CAUSE: self.cause}
        return pins if self.after is None else {**pins, AFTER: self.after}


def chain_of(operation: Operation, policy: Policy) -> Chain:
    """Return where an operation stands; one without pins for it is a first attempt."""
    pins = operation.pins
    return Chain(
        attempt=int(pins.get(ATTEMPT, 1)),
        attempts_max=min(int(pins.get(ATTEMPTS_MAX, policy.attempts_max)), ATTEMPTS_LIMIT),
        cause=Cause(pins.get(CAUSE, Cause.REQUEST)),
        after=pins.get(AFTER),
    )


@dataclass(frozen=True)
class Failure:
    """What a failure allows to be done by itself.

    `blames_release`: the release is remembered as failed on that host, if it was begun there.
    `is_of_release`: it speaks of the release on this host, so that it is remembered also when
    nothing was written. `may_use_bmc` is False when a BMC refused the login: a second try could
    lock the account.
    """

    may_retry: bool = True
    may_roll_back: bool = True
    blames_release: bool = True
    is_of_release: bool = False
    may_use_bmc: bool = True


# It would be the same again, whatever the time: a person must change something first.
_SAME_AGAIN: Final = Failure(may_retry=False)
# What must be proven was not. Never tried again by itself; the last good release may be.
_UNTRUSTED: Final = Failure(may_retry=False)
# It is the release, whatever the time: its bytes are not what was signed, or not for this host.
_UNFIT: Final = Failure(may_retry=False, is_of_release=True)
# Somebody else speaks for this host, or it is not the host that we think: hands off its disks.
_DOUBTFUL: Final = Failure(may_retry=False, may_roll_back=False, blames_release=False)
_LOCKED_OUT: Final = replace(_DOUBTFUL, may_use_bmc=False)

# What is not listed here passes, or is worth another try: a BMC, a network, a service or an
# agent that failed, a phase that lasted too long, a disk's error, a system that proved unfit.
FAILURES: Final[Mapping[str, Failure]] = {
    "bmc_auth_failed": _LOCKED_OUT,
    "ticket_contested": _DOUBTFUL,
    "identity_doubtful": _DOUBTFUL,
    "own_host": _DOUBTFUL,
    "host_refused": _DOUBTFUL,
    # It runs from another disk, and that one claims to hold what we wrote. Which of them the
    # next write would really reach is for a person to find out.
    "wrong_disk": replace(_DOUBTFUL, blames_release=True),
    # Perhaps the release does not boot, and the firmware went on to an older disk: then the
    # last good release boots again. If the boot order is wrong, that fails too, once.
    "wrong_system": _UNTRUSTED,
    "trust": _UNTRUSTED,
    "chunk_corrupt": _UNFIT,
    "manifest_digest": _UNFIT,
    "manifest_malformed": _UNFIT,
    "manifest_signature": _UNFIT,
    # By the host's own clock, which may be wrong, or by what holds for every host: the release's
    # row and the image's minimum version are asked before anybody goes back to it.
    "release_expired": _UNTRUSTED,
    "release_too_old": _UNTRUSTED,
    "release_untested": _UNTRUSTED,
    # The release's own row says it for every host.
    "release_revoked": replace(_UNTRUSTED, blames_release=False),
    "host_unfit": _UNFIT,
    "disk_too_small": _UNFIT,
    "image_unfit": _UNFIT,
    # The profile's: its seed, its rule for disks.
    "seed_unfit": _SAME_AGAIN,
    "no_disk_matches": _SAME_AGAIN,
    "several_disks_match": _SAME_AGAIN,
    # The release was not even begun.
    "queued_timed_out": Failure(blames_release=False),
    "profile_unreadable": replace(_SAME_AGAIN, blames_release=False),
}  # fmt: skip
# A person reconciled a restored database: what follows is theirs.
A_PERSONS: Final = ("database_restored",)
# What the service alone can know. Some of it decides what becomes of a host and its disk, so no
# agent may say it.
NOT_AN_AGENTS: Final = frozenset({
    *A_PERSONS,
    *("bmc_auth_failed", "bmc_unreachable", "bmc_busy", "bmc_rejected", "bmc_disobeyed"),
    *("ticket_contested", "identity_doubtful", "own_host", "host_refused"),
    *("wrong_disk", "wrong_system", "release_untested", "release_revoked", "profile_unreadable"),
    *(f"{phase}_timed_out" for phase in Phase),
})  # fmt: skip
_ANY: Final = Failure()


def failure_of(operation: Operation) -> Failure:
    """Return what the failure of an operation allows."""
    if BMC_LOGIN_REFUSED_AT in operation.evidence:
        return _LOCKED_OUT
    return FAILURES.get(_code_of(operation), _ANY)


def _code_of(operation: Operation) -> str:
    return str((operation.error or {}).get("code", ""))


@dataclass(frozen=True)
class Facts:
    """What the database says besides the operation and its host.

    `is_disk_written`: the disk holds what a deployment began and none has proven since.
    `floors` are the minimum versions by image, `failed_before` the releases that failed on
    this host, `refused` those that turned out not to be deployable, with the reason.
    `is_retry_over`: it was decided before that there is no further attempt. `has_superseded`:
    the operation's request took the place of what was to follow another one.
    """

    is_disk_written: bool
    release: ReleaseRow | None = None
    last_good: ReleaseRow | None = None
    floors: Mapping[str, str] = field(default_factory=dict)
    failed_before: Collection[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    is_retry_over: bool = False
    has_superseded: bool = False


@dataclass(frozen=True)
class FollowUp:
    """What comes after a failed operation. `at` is None for what is done at once."""

    what: Next
    why: str
    at: datetime | None = None
    release: ReleaseRow | None = None
    attempt: int = 1
    attempts_max: int = 1

    def to_json(self) -> Json:
        """Return it as it is kept beside the operation, but for the moment."""
        shown: Json = {"what": self.what, "why": self.why}
        if self.release is not None:
            shown |= {"release": self.release.digest, "release_name": self.release.name}
            shown |= {ATTEMPT: self.attempt, ATTEMPTS_MAX: self.attempts_max}
        return shown


def follow_up(
    operation: Operation, host: Host, policy: Policy, facts: Facts, now: datetime
) -> FollowUp | None:
    """Return what follows a deployment that has failed or was cancelled; None for nothing.

    A host whose disk was not touched keeps its system: attempts, and then nothing. One whose
    disk was written is never left half: attempts, the way back once, and then quarantine.
    """
    case = _Case(operation, host, policy, facts, now)
    if not policy.is_automatic or operation.kind is not Kind.DEPLOYMENT or case.is_a_persons:
        return None
    if operation.phase is Phase.CANCELLED:
        return called_off(operation, facts)
    if operation.phase is not Phase.FAILED:
        return None
    if case.may_retry:
        return case.retry()
    if not facts.is_disk_written:
        return None
    no_way_back = case.why_no_way_back()
    if no_way_back is None:
        return FollowUp(Next.ROLLBACK, case.tale(), at=now, release=facts.last_good)
    return FollowUp(Next.QUARANTINE, f"{case.tale()}; {no_way_back}")


def called_off(operation: Operation, facts: Facts) -> FollowUp | None:
    """Return what follows when a person stops a deployment, or what was to come after it."""
    is_request = operation.pins.get(CAUSE, Cause.REQUEST) == Cause.REQUEST
    if is_request and operation.started_at is None and not facts.has_superseded:
        return None  # nothing was done, so the host is what it was before somebody asked
    if not facts.is_disk_written:
        return None
    why = f"{operation.id} was called off, and what its disk holds was never proven"
    return FollowUp(Next.QUARANTINE, why)


def is_release_blamed(
    operation: Operation, host: Host, decided: FollowUp | None, *, was_begun: bool
) -> bool:
    """Say whether the release is remembered as failed on this host: it was tried as often as
    it may be, and no person and no BMC that knows us no more is the reason.

    `was_begun`: one of its attempts was permitted to write. A release that was not begun has
    shown nothing, and the host may run it still.
    """
    failure = failure_of(operation)
    return (
        operation.phase is Phase.FAILED
        and operation.kind is Kind.DEPLOYMENT
        and not _is_a_persons(operation, host)
        and failure.blames_release
        and (was_begun or failure.is_of_release)
        and (decided is None or decided.what is not Next.RETRY)
    )


def why_not_deployable(
    row: ReleaseRow | None, host: Host, facts: Facts, now: datetime
) -> str | None:
    """Why nothing deploys this release by itself on this host; None when something may."""
    if row is None:
        return "it is not known any more"
    try:
        check_standing(row)
    except ProvisionerError as error:
        return error.message
    floor = facts.floors.get(row.image)
    if row.expires_at is not None and row.expires_at <= now:
        return f"{row.name} has expired"
    if floor is not None and is_older(row.version, floor):
        return f"{row.name} is below the minimum version {floor}"
    if host.firmware and row.firmware and not boots_on(row.firmware, host.firmware):
        return f"{row.name} does not boot on {host.firmware}"
    return facts.refused.get(row.digest)


@dataclass(frozen=True)
class _Case:
    """A deployment that has ended, with all that it is judged by."""

    operation: Operation
    host: Host
    policy: Policy
    facts: Facts
    now: datetime

    @property
    def chain(self) -> Chain:
        return chain_of(self.operation, self.policy)

    @property
    def is_a_persons(self) -> bool:
        return _is_a_persons(self.operation, self.host)

    @property
    def may_retry(self) -> bool:
        return (
            failure_of(self.operation).may_retry
            and self.chain.cause is not Cause.ROLLBACK
            and self.chain.attempt < self.chain.attempts_max
            and not self.facts.is_retry_over
            and why_not_deployable(self.facts.release, self.host, self.facts, self.now) is None
        )

    def retry(self) -> FollowUp:
        return FollowUp(
            Next.RETRY,
            self.tale(),
            at=self.now + self.policy.pause_after(self.chain.attempt),
            release=self.facts.release,
            attempt=self.chain.attempt + 1,
            attempts_max=self.chain.attempts_max,
        )

    def why_no_way_back(self) -> str | None:
        good = self.facts.last_good
        if self.chain.cause is Cause.ROLLBACK:
            return "that was the way back already"
        if not failure_of(self.operation).may_roll_back:
            return "nothing is tried by itself after that"
        if not self.policy.may_roll_back:
            return "going back is switched off"
        if self.host.last_good is None:
            return "no release was proven on this host before"
        if self.host.last_good == self.operation.release:
            return "it is the last good release itself"
        if self.host.last_good in self.facts.failed_before:
            return "the last good release has failed on this host since"
        why = why_not_deployable(good, self.host, self.facts, self.now)
        return f"there is no way back: {why}" if why is not None else None

    def tale(self) -> str:
        """Return in a few words what failed and how; the whole error is the operation's."""
        chain, operation = self.chain, self.operation
        name = operation.pins.get("release_name", operation.release)
        code = _code_of(operation) or "no reason was given"
        if chain.cause is Cause.ROLLBACK:
            return f"going back to {name} failed in {operation.id} ({code})"
        tried = f"attempt {chain.attempt} of {chain.attempts_max}"
        told = f"{name} failed in {operation.id}, {tried} ({code})"
        refused = self.facts.refused.get(operation.release or "")
        return f"{told}, and is not tried again: {refused}" if refused else told


def _is_a_persons(operation: Operation, host: Host) -> bool:
    # Whoever flags a host takes it over, in whatever state it is.
    return host.why_not_rebuilt is not None or _code_of(operation) in A_PERSONS
