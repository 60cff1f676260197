"""Where a host's boot stands, why, and what to do: from facts, by a table of causes.

Pure: it is told the time and what the database says. `causes.py` holds the table, the most
specific cause first; the first that fits is the answer, and the last one always fits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Final

from .downloads import Download
from .lifecycle import AGENT_HEARD_AT, RUNG_LAST
from .model import Event, Host, Json, Operation, Phase
from .netboot_trace import Trace, trace

EVIDENCE_MAX: Final = 6
TEXT_MAX: Final = 300

# How long nothing may be heard before that is worth a word. Servers take minutes in POST.
POST_PATIENCE: Final = timedelta(minutes=4)
# Switching off and on; a system that shuts down softly may take longer.
BMC_PATIENCE: Final = timedelta(minutes=1)
# From one sign of a netboot to the next.
NETBOOT_PATIENCE: Final = timedelta(minutes=1)
# Agents report every few seconds.
AGENT_PATIENCE: Final = timedelta(minutes=1)
# POST once more, and the first start of a system.
BOOT_PATIENCE: Final = timedelta(minutes=6)
# The worker looks at the queue every second.
QUEUE_PATIENCE: Final = timedelta(seconds=30)


class Dhcp(StrEnum):
    """Whose DHCP answers on the provisioning network: how much of it our timeline holds."""

    FULL = "full"
    PROXY = "proxy"
    OFF = "off"


@dataclass(frozen=True)
class Facts:
    """What is known of one host. `operation` is the open one, or else the newest; `events` are
    those of its host since it was requested, oldest first; `waits` is why it does not start,
    `breaker` why the breaker is open; `follows` says in words what comes after its failure,
    and `before` what it follows itself.
    """

    now: datetime
    host: Host
    operation: Operation | None = None
    events: Sequence[Event] = ()
    waits: str | None = None
    breaker: str | None = None
    is_observing: bool = False
    follows: str | None = None
    before: str | None = None
    release_name: str | None = None
    dhcp: Dhcp = Dhcp.FULL


@dataclass(frozen=True)
class Diagnosis:
    """`cause` is stable, for programs; `stands` and `why` are one line each, for people.
    `next` are commands of ours and things to look at, the first one first."""

    cause: str
    stands: str
    why: str
    evidence: tuple[Event, ...]
    next: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """The facts, with what the causes ask of them."""

    facts: Facts

    @property
    def host(self) -> Host:
        return self.facts.host

    @property
    def operation(self) -> Operation | None:
        return self.facts.operation

    @property
    def phase(self) -> Phase | None:
        """The phase it is in; for one that failed, the phase it failed in."""
        operation = self.operation
        if operation is None:
            return None
        left = [one for one in Phase if one in operation.phase_seconds]
        return left[-1] if operation.phase is Phase.FAILED and left else operation.phase

    @property
    def is_failed(self) -> bool:
        return self.operation is not None and self.operation.phase is Phase.FAILED

    @property
    def is_open(self) -> bool:
        return self.operation is not None and not self.operation.is_final

    @property
    def code(self) -> str:
        """The code of the error that a failed operation ended with."""
        return str(self.error.get("code", "")) if self.is_failed else ""

    @property
    def error(self) -> Json:
        return (self.operation.error if self.operation else None) or {}

    @property
    def evidence(self) -> Json:
        return self.operation.evidence if self.operation else {}

    @property
    def in_phase(self) -> Sequence[Event]:
        """What was seen in its phase, or in the one that it failed in."""
        operation = self.operation
        assert operation is not None
        began_at, ended_at = operation.phase_at, self.facts.now
        if operation.is_final:
            ended_at = operation.phase_at
            began_at = ended_at - timedelta(seconds=operation.phase_seconds.get(str(self.phase), 0))
        return [one for one in self.facts.events if began_at <= one.at <= ended_at]

    @cached_property
    def trace(self) -> Trace:
        """How far its netboot came, while it had the time to."""
        operation = self.operation
        if operation is None or operation.started_at is None:
            return trace(())
        begin, end = operation.started_at, operation.ended_at
        seen = [one for one in self.facts.events if one.at >= begin]
        return trace([one for one in seen if end is None or one.at <= end])

    @property
    def is_unheard(self) -> bool:
        """No ticket came back: in the end, or for longer than that takes by now."""
        if self.code == "netbooting_timed_out":
            return True
        operation, seen, now = self.operation, self.trace, self.facts.now
        if operation is None or operation.phase is not Phase.NETBOOTING:
            return False
        # A host that was discovered has no BMC yet, and was on when its operation began.
        on_at = seen.powered_on_at if self.host.bmc else operation.phase_at
        if on_at is None or on_at < operation.phase_at:
            return False  # the BMC is still at it
        if seen.heard_at is not None and seen.heard_at > on_at:
            return now - seen.heard_at > NETBOOT_PATIENCE
        return now - on_at > POST_PATIENCE

    @property
    def is_fetching(self) -> bool:
        """In this start, and a moment ago, it was fetching its kernel or ramdisk."""
        operation, fetched = self.operation, self.trace.fetched
        if operation is None or operation.phase is not Phase.NETBOOTING or fetched is None:
            return False
        is_under_way = fetched.state in (Download.ASKED, Download.GOES_ON)
        return is_under_way and fetched.at >= operation.phase_at

    @property
    def is_bmc_slow(self) -> bool:
        """Its BMC has not switched it on in this start, and should have by now."""
        operation, on_at = self.operation, self.trace.powered_on_at
        if operation is None or operation.phase is not Phase.NETBOOTING or self.host.bmc is None:
            return False
        is_on = on_at is not None and on_at >= operation.phase_at
        return not is_on and self.lasts > BMC_PATIENCE

    @property
    def is_agent_silent(self) -> bool:
        if self.code in ("preparing_timed_out", "writing_timed_out", "verifying_timed_out"):
            return True
        is_its_turn = self.phase in (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING)
        heard_at = self._moment(AGENT_HEARD_AT)
        return (
            self.is_open
            and is_its_turn
            and heard_at is not None
            and self.facts.now - heard_at > AGENT_PATIENCE
        )

    @property
    def is_system_unheard(self) -> bool:
        is_late = self.is_open and self.phase is Phase.BOOTING and self.lasts > BOOT_PATIENCE
        return self.code == "booting_timed_out" or is_late

    @property
    def unhealthy(self) -> Mapping[str, str]:
        """The checks that did not hold at the last look, with what was found."""
        checks: Json = self.evidence.get("checks", {})
        return {
            name: str(check.get("found")) for name, check in checks.items() if not check["healthy"]
        }

    @property
    def lasts(self) -> timedelta:
        """How long the operation has been in its phase."""
        assert self.operation is not None
        return self.facts.now - self.operation.phase_at

    def _moment(self, key: str) -> datetime | None:
        text = self.evidence.get(key)
        return datetime.fromisoformat(text) if text else None

    @property
    def words(self) -> Mapping[str, str]:
        """What the sentences of the table may name."""
        operation, host, seen = self.operation, self.host, self.trace
        missed = seen.missed_file.detail if seen.missed_file else {}
        fetched = seen.fetched
        return {
            "host": host.name,
            "operation": operation.id if operation else "",
            "kind": operation.kind if operation else "operation",
            "phase": self.phase or "",
            "release": self.facts.release_name or "its release",
            "message": _short(self.error.get("message", "no reason was given")),
            "expected": _short(self.error.get("expected", "")),
            "found": _short(self.error.get("found", "")),
            "hint": _short(self.error.get("hint", "")),
            "bmc": f"{host.bmc.address} port {host.bmc.port}" if host.bmc else "none",
            "waits": self.facts.waits or "",
            "breaker": self.facts.breaker or "",
            "quarantine": host.quarantine_reason or "",
            "profile": host.profile or "PROFILE",
            "unhealthy": "; ".join(f"{name}: {found}" for name, found in self.unhealthy.items()),
            "progress": _progress(operation),
            "asked": str(seen.asked),
            "nothing_offered": seen.why_nothing_offered or "",
            "refusal": _short(seen.refused.text if seen.refused else ""),
            "answer": _short(seen.turned_away.text if seen.turned_away else ""),
            "file": str(missed.get("file", "")),
            "outcome": str(missed.get("outcome", "")),
            "kernel_or_ramdisk": fetched.file if fetched else "",
            "came": fetched.came if fetched else "",
            "cuts": _times(fetched.cuts if fetched else 0),
            "disk": _short(self.evidence.get("disk_name", "")),
            **_before_a_reimage(host),
        }


@dataclass(frozen=True)
class Cause:
    """One row: a name, when it fits, what it says, which lines show it, and what to do."""

    name: str
    fits: Callable[[Case], bool]
    why: str
    next: tuple[str, ...] = ()
    shown_by: frozenset[str] = field(default_factory=frozenset)


def diagnose(facts: Facts, causes: Sequence[Cause]) -> Diagnosis:
    """Return the first of the causes that fits; the last one always has to."""
    case = Case(facts)
    cause = next(one for one in causes if one.fits(case))
    words = case.words
    return Diagnosis(
        cause=cause.name,
        stands=_stands(case),
        why=cause.why.format_map(words),
        evidence=_evidence(facts.events, cause.shown_by),
        next=tuple(filter(None, [step.format_map(words) for step in cause.next])) + _ways_out(case),
    )


def _stands(case: Case) -> str:
    host, operation, facts = case.host, case.operation, case.facts
    flags = [
        *([f"quarantined ({host.quarantine_reason})"] if host.quarantine_reason else []),
        *(["protected"] if host.is_protected else []),
        *(["in maintenance"] if host.in_maintenance else []),
        *([] if host.is_confirmed else ["not confirmed"]),
    ]
    if operation is None:
        return ", ".join([f"nothing was ever done to it; it is {host.state}", *flags])
    name = f"{operation.kind} of {case.words['release']}" if operation.release else operation.kind
    state = f"{name} is {operation.phase}"
    if operation.phase is Phase.FAILED:
        state = f"{name} failed in {case.phase}"
    elif operation.is_final:
        state = f"{name} {operation.phase}"
    elif operation.phase is Phase.NETBOOTING:
        state += f", start {operation.rung + 1} of {RUNG_LAST + 1}"
    around = [text for text in (facts.before, facts.follows) if text]
    return "; ".join([", ".join([state, *flags]), *around])


def _before_a_reimage(host: Host) -> Mapping[str, str]:
    """Return the commands without which a reimage would be refused; empty where not needed."""
    name = host.name
    off = f"provisioner host maintenance {name} --off, when whoever works on it has finished"
    bmc = f"provisioner host change {name} --bmc ADDRESS --bmc-user USER: it has no BMC"
    profile = f"provisioner host change {name} --profile PROFILE: it has no profile"
    return {
        "unprotect_it": f"provisioner host unprotect {name}" if host.is_protected else "",
        "free_it": off if host.in_maintenance else "",
        "give_it_a_bmc": "" if host.bmc else bmc,
        "give_it_a_profile": "" if host.profile else profile,
    }


def _ways_out(case: Case) -> tuple[str, ...]:
    """Return what ends this state by a person's word, whatever its cause is."""
    host, operation = case.host, case.operation
    if host.quarantine_reason is not None:
        return (f"provisioner host release {host.name}: ends its quarantine",)
    is_before_write = case.phase in (Phase.QUEUED, Phase.NETBOOTING, Phase.PREPARING)
    if operation is not None and (operation.follow_up_at or (case.is_open and is_before_write)):
        return (f"provisioner operation cancel {operation.id}: calls it off",)
    return ()


def _evidence(events: Sequence[Event], sources: frozenset[str]) -> tuple[Event, ...]:
    """Return the newest lines of these sources. Of several alike in a row, the last."""
    kept: list[Event] = []
    for one in events:
        if one.source not in sources:
            continue
        if kept and (kept[-1].source, kept[-1].text) == (one.source, one.text):
            kept.pop()
        kept.append(replace(one, text=_short(one.text)))
    return tuple(kept[-EVIDENCE_MAX:])


def _progress(operation: Operation | None) -> str:
    report = operation.progress if operation else {}
    done, total = report.get("done_bytes", 0), report.get("total_bytes", 0)
    if not total:
        return "its last report had no figures"
    return f"its last report was at {100 * done // total} % of {total} bytes"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _short(value: object) -> str:
    text = _disk_in(value) or str(value)
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX - 1]}…"


def _disk_in(value: object) -> str | None:
    """Return what a disk is called; None for what is no disk, or one without a mark."""
    if not isinstance(value, dict):
        return None
    mark: str | None = value.get("serial") or value.get("wwn")
    return f"{value['name']} ({mark})" if mark and value.get("name") else mark
