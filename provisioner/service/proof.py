"""Judges a round of proof: what was found at the host, and when its new system spoke last.

Checks from outside ask whoever answers at the address. Only reports with the nonce tie what
they find to the system that was deployed. Decides over plain values: no I/O, no clock.
"""

from datetime import datetime, timedelta
from typing import Final

from provisioner.core.lifecycle import E
from provisioner.core.model import Json, Operation
from provisioner.core.profile import Health

from .health import Finding

# The longest pause of a reporter whose system is being proven, as reporter.py has it.
REPORT_EVERY: Final = timedelta(seconds=10)
REPORT_AGE_MAX: Final = 3 * REPORT_EVERY
# For so long nobody may have looked at a host within its soak: ten rounds, since a pool of
# checkers that waits for dead hosts may be late with the others.
UNSEEN_MAX: Final = timedelta(seconds=20)

HEARD_AT: Final = "heard_at"
HEALTHY_SINCE: Final = "healthy_since"
BOOT_ID: Final = "boot_id"
# How the reports stand among the checks.
REPORT: Final = "report"
_LOOKED_AT: Final = "looked_at"
# What a look rests on, of what the system said of itself.
_SAID: Final = (BOOT_ID, "failed_units", "address")


def is_overtaken(looked_at: Operation, now: Operation) -> bool:
    """Return whether the system has said something new since it was looked at."""
    return any(looked_at.evidence.get(key) != now.evidence.get(key) for key in _SAID)


def judge(
    operation: Operation,
    findings: list[Finding],
    health: Health,
    *,
    began_at: datetime,
    now: datetime,
) -> tuple[E, Json]:
    """Return the event and the evidence of one round: healthy since when, and enough?

    `began_at` is when the round began. The soak begins anew after a round that was not
    healthy, and when nobody looked for too long; a restart of the system has taken
    `healthy_since` from the evidence already.
    """
    heard_at = _moment(operation, HEARD_AT)
    checks: Json = {
        str(finding.check): {"healthy": finding.is_healthy, "found": finding.found}
        for finding in findings
    }
    checks[REPORT] = _report(heard_at, now)
    evidence: Json = {"checks": checks, _LOOKED_AT: now.isoformat(), HEALTHY_SINCE: None}
    if heard_at is None or not all(check["healthy"] for check in checks.values()):
        return E.CHECKED, evidence
    since, looked_at = _moment(operation, HEALTHY_SINCE), _moment(operation, _LOOKED_AT)
    if since is None or looked_at is None or began_at - looked_at > UNSEEN_MAX:
        since = now
    soak = timedelta(seconds=health.soak_s)
    # The host may have been healthy by what another system answered. So the new one must
    # have spoken within the soak, and near its end if that is long.
    is_witnessed = not soak or heard_at > since + max(soak - REPORT_EVERY, timedelta())
    is_enough = now - since >= soak and is_witnessed
    return (E.SOAKED if is_enough else E.CHECKED), {**evidence, HEALTHY_SINCE: since.isoformat()}


def _report(heard_at: datetime | None, now: datetime) -> Json:
    if heard_at is None:
        return {"healthy": False, "found": "the new system was not heard yet"}
    # The time and not the age: it is read long after the round.
    when = heard_at.isoformat(timespec="seconds")
    return {
        "healthy": now - heard_at <= REPORT_AGE_MAX,
        "found": f"the new system was last heard at {when}",
    }


def _moment(operation: Operation, key: str) -> datetime | None:
    text = operation.evidence.get(key)
    return datetime.fromisoformat(text) if text else None
