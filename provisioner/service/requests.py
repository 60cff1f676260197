"""What must hold before an operation is queued, in the caller's transaction. Queues nothing."""

from collections.abc import Sequence
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.lifecycle import Limits
from provisioner.core.manifest import boots_on
from provisioner.core.model import Host, Json, Phase, Profile, ReleaseRow
from provisioner.core.own_host import ServiceHosts
from provisioner.core.profile import health_of
from provisioner.core.recovery import ATTEMPTS_LIMIT
from provisioner.errors import Conflict, RequestError

HOSTS_PER_REQUEST_MAX: Final = 1000
_OPTIONS: Final = {"soft_shutdown": bool, "full": bool, "attempts": int}


def check_selection(hosts: Sequence[str]) -> None:
    """Raise RequestError for an empty, doubled or too large selection."""
    if not hosts:
        raise RequestError(
            "no host was named, and an empty selection selects nothing",
            expected="one or more host names",
            found="none",
        )
    if len(hosts) > HOSTS_PER_REQUEST_MAX:
        raise RequestError(
            "too many hosts in one request", expected=HOSTS_PER_REQUEST_MAX, found=len(hosts)
        )
    doubled = sorted({name for name in hosts if hosts.count(name) > 1})
    if doubled:
        raise RequestError("a host was named twice", expected="each host once", found=doubled)


def check_options(options: Json) -> None:
    """Raise RequestError for an option of a deployment that we do not know."""
    for key, value in options.items():
        kind = _OPTIONS.get(key)
        # True is an int, too.
        if kind is None or type(value) is not kind:
            raise RequestError(
                f"option {key} is not known or of the wrong type",
                expected={name: wanted.__name__ for name, wanted in _OPTIONS.items()},
                found={key: value},
            )
    attempts = options.get("attempts", 1)
    if not 1 <= attempts <= ATTEMPTS_LIMIT:
        raise RequestError(
            "there is no such number of attempts",
            expected=f"1 to {ATTEMPTS_LIMIT}",
            found=attempts,
        )


def check_may_deploy(tx: Tx, host: Host, release: ReleaseRow, own: ServiceHosts) -> None:
    """Raise Conflict for a host that is flagged, busy, a service's own, or that the release
    does not boot on."""
    own.check(host)
    if (reason := host.why_not_rebuilt) is not None:
        raise Conflict(
            f"host {host.name} is not rebuilt: {reason}",
            host=host.name,
            expected="a confirmed host without flags",
            found=reason,
            hint=f"provisioner host show {host.name}",
        )
    _check_idle(tx, host)
    if host.firmware and release.firmware and not boots_on(release.firmware, host.firmware):
        raise Conflict(
            f"release {release.name} does not boot on {host.firmware}",
            host=host.name,
            expected=list(release.firmware),
            found=str(host.firmware),
        )


def check_may_disturb(tx: Tx, host: Host, done: str, own: ServiceHosts) -> None:
    """Raise Conflict for a host that is busy, a service's own, or that nothing may be
    `done` to now."""
    own.check(host)
    _check_idle(tx, host)
    if (reason := host.why_not_disturbed) is not None:
        raise Conflict(f"host {host.name} is not {done}: {reason}", host=host.name, found=reason)


def check_can_be_proven(host: Host, profile: Profile, limits: Limits) -> None:
    """Raise Conflict for a soak that must fail, before the old system is gone."""
    soak_s = health_of(profile.document).soak_s
    limit_s = limits.phase[Phase.PROVING].total_seconds()
    if soak_s >= limit_s:
        raise Conflict(
            f"profile {profile.name} soaks for {soak_s:g} s, and proving ends before that",
            host=host.name,
            expected=f"less than {limit_s:g} s",
            found=soak_s,
            hint="shorten its health.soak_s, or raise limits.proving_s",
        )


def profile_of(tx: Tx, host: Host) -> Profile:
    """Return the host's profile, whose rule picks the disk. Raises Conflict without one, and
    ProfileUnreadable for one that does not open: its host could only be started in vain."""
    profile = tx.profile(host.profile) if host.profile else None
    if profile is None:
        raise Conflict(
            f"host {host.name} has no profile, so its disk and user data are unknown",
            host=host.name,
            expected="a saved profile",
            found=host.profile,
            hint=f"provisioner host change {host.name} --profile NAME",
        )
    profile.text.reveal()
    return profile


def _check_idle(tx: Tx, host: Host) -> None:
    if host.bmc is None:
        raise Conflict(
            f"host {host.name} has no BMC, so it cannot be started into the network",
            host=host.name,
            expected="a BMC address",
            found=None,
            hint=f"provisioner host change {host.name} --bmc ADDRESS --bmc-user USER",
        )
    busy = tx.open_operation(host.id)
    if busy is not None:
        raise Conflict(
            f"host {host.name} is busy with {busy.id}",
            host=host.name,
            expected="no open operation",
            found=f"{busy.kind} in {busy.phase}",
            hint=f"wait for it (provisioner operation watch {busy.id}), or cancel it",
        )
