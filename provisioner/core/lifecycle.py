"""How operations and hosts change state: tables, and one function that reads them.

Three axes stay apart: what we know of a host's disk (`HOST_MOVES`), one operation on it
(`DEPLOYMENT`, `INSPECTION`, `VERIFICATION`), and, elsewhere, the rollout it belongs to. Only
this module changes a state. No I/O, no clock: the caller says what happened and when.

A row reads (phase, event) -> (next phase, effects to perform after saving, host event).
Anything absent is refused and changes nothing. The saved phase is always the pessimistic
one: a host is `dirty` before the agent hears that it may write, so a crash anywhere
leaves the truth behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from ..errors import Conflict
from .effects import Effect, PowerOff, PowerOn, ReturnToDisk, SetNextBoot
from .model import FINAL, BootDevice, Host, HostState, Json, Kind, Operation, Phase


class HostEvent(StrEnum):
    """Facts about a host's disk."""

    INSPECTED = "inspected"
    WRITE_STARTED = "write_started"
    PROVEN = "proven"
    RETIRED = "retired"


class E(StrEnum):
    """Events of an operation. Requests are imperative, facts are past."""

    START = "start"
    CANCEL = "cancel"
    REFUSED = "refused"
    HELD = "held"
    POWERED_OFF = "powered_off"
    NEXT_BOOT_SET = "next_boot_set"
    POWERED_ON = "powered_on"
    BMC_FAILED = "bmc_failed"
    BMC_LOGIN_REFUSED = "bmc_login_refused"
    AGENT_SEEN = "agent_seen"
    REPORTED = "reported"
    WRITE_PERMITTED = "write_permitted"
    WRITTEN = "written"
    VERIFIED = "verified"
    COMPARED = "compared"
    AGENT_FAILED = "agent_failed"
    PHONED_HOME = "phoned_home"
    EVIDENCE_REFUSED = "evidence_refused"
    CHECKED = "checked"
    SOAKED = "soaked"
    REVOKED = "revoked"
    CONTESTED = "contested"
    RUNG_TIMED_OUT = "rung_timed_out"
    TIMED_OUT = "timed_out"


# What an agent says itself, from its ramdisk. When it said so last is kept as evidence.
_AGENT_EVENTS: Final = frozenset(
    {
        E.AGENT_SEEN,
        E.REPORTED,
        E.WRITE_PERMITTED,
        E.WRITTEN,
        E.VERIFIED,
        E.COMPARED,
        E.AGENT_FAILED,
    }
)
AGENT_HEARD_AT: Final = "agent_heard_at"
# A BMC that refused the login is told nothing more by itself, so that is kept as well.
BMC_LOGIN_REFUSED_AT: Final = "bmc_login_refused_at"


class NotAllowed(Conflict):
    """The tables have no such move; nothing was changed."""

    code = "not_allowed"


_S, _H = HostState, HostEvent
HOST_MOVES: Final[dict[tuple[HostState, HostEvent], HostState]] = {
    (_S.ENROLLED,  _H.INSPECTED):     _S.DIRTY,      # nobody we trust has erased it yet
    (_S.DIRTY,     _H.INSPECTED):     _S.DIRTY,
    (_S.AVAILABLE, _H.INSPECTED):     _S.AVAILABLE,
    (_S.ACTIVE,    _H.INSPECTED):     _S.ACTIVE,
    (_S.DIRTY,     _H.WRITE_STARTED): _S.DIRTY,
    (_S.AVAILABLE, _H.WRITE_STARTED): _S.DIRTY,
    (_S.ACTIVE,    _H.WRITE_STARTED): _S.DIRTY,      # the old release is gone from here on
    (_S.DIRTY,     _H.PROVEN):        _S.ACTIVE,
    (_S.ENROLLED,  _H.RETIRED):       _S.RETIRED,
    (_S.DIRTY,     _H.RETIRED):       _S.RETIRED,
    (_S.AVAILABLE, _H.RETIRED):       _S.RETIRED,
    (_S.ACTIVE,    _H.RETIRED):       _S.RETIRED,
}  # fmt: skip

Row = tuple[Phase, tuple[Effect, ...], HostEvent | None]
Table = dict[tuple[Phase, E], Row]
_P = Phase
_NETWORK: Final = SetNextBoot(BootDevice.NETWORK)
_DISK: Final = SetNextBoot(BootDevice.DISK)

# From the request to the ramdisk: the same for every operation that netboots a host.
_NETBOOT: Final[Table] = {
    (_P.QUEUED,     E.START):          (_P.NETBOOTING, (PowerOff(soft=True),),  None),
    (_P.QUEUED,     E.CANCEL):         (_P.CANCELLED,  (),                      None),
    (_P.QUEUED,     E.HELD):           (_P.QUEUED,     (),                      None),
    # Protected or taken into maintenance since it was requested: hands off.
    (_P.QUEUED,     E.REFUSED):        (_P.FAILED,     (),                      None),
    (_P.QUEUED,     E.TIMED_OUT):      (_P.FAILED,     (),                      None),
    (_P.NETBOOTING, E.POWERED_OFF):    (_P.NETBOOTING, (_NETWORK,),             None),
    (_P.NETBOOTING, E.NEXT_BOOT_SET):  (_P.NETBOOTING, (PowerOn(),),            None),
    (_P.NETBOOTING, E.POWERED_ON):     (_P.NETBOOTING, (),                      None),
    (_P.NETBOOTING, E.RUNG_TIMED_OUT): (_P.NETBOOTING, (PowerOff(soft=False),), None),
    (_P.NETBOOTING, E.BMC_FAILED):     (_P.FAILED,     (ReturnToDisk(),),       None),
    # No effect: another exchange would be a second try with a wrong password, and BMCs
    # lock accounts.
    (_P.NETBOOTING, E.BMC_LOGIN_REFUSED): (_P.FAILED,  (),                      None),
    (_P.NETBOOTING, E.TIMED_OUT):      (_P.FAILED,     (ReturnToDisk(),),       None),
    (_P.NETBOOTING, E.REFUSED):        (_P.FAILED,     (ReturnToDisk(),),       None),
    (_P.NETBOOTING, E.CANCEL):         (_P.CANCELLED,  (ReturnToDisk(),),       None),
    # Two came with its ticket, or whoever came may be another host: neither goes on.
    (_P.NETBOOTING, E.CONTESTED):      (_P.FAILED,     (ReturnToDisk(),),       None),
}  # fmt: skip

# After WRITE_PERMITTED nothing can be cancelled: the old system is gone, and the way out
# is forward (the deadline, then what `recovery` says follows). A revoked release is the
# exception: better no system than one that must not run.
#
# Nor is the host restarted then. Its disk holds half a system, one that must not run, or a
# whole one whose agent was not heard; the next deployment switches it off, ramdisk or not.
DEPLOYMENT: Final[Table] = {
    **_NETBOOT,
    (_P.QUEUED,     E.REVOKED):          (_P.FAILED,    (),                None),
    (_P.NETBOOTING, E.REVOKED):          (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.NETBOOTING, E.AGENT_SEEN):       (_P.PREPARING, (),                _H.INSPECTED),
    (_P.PREPARING,  E.REPORTED):         (_P.PREPARING, (),                None),
    (_P.PREPARING,  E.WRITE_PERMITTED):  (_P.WRITING,   (),                _H.WRITE_STARTED),
    (_P.PREPARING,  E.AGENT_FAILED):     (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.PREPARING,  E.TIMED_OUT):        (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.PREPARING,  E.CANCEL):           (_P.CANCELLED, (ReturnToDisk(),), None),
    (_P.PREPARING,  E.REVOKED):          (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.PREPARING,  E.CONTESTED):        (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.WRITING,    E.REPORTED):         (_P.WRITING,   (),                None),
    (_P.WRITING,    E.WRITTEN):          (_P.VERIFYING, (),                None),
    (_P.WRITING,    E.VERIFIED):         (_P.BOOTING,   (_DISK,),          None),
    (_P.WRITING,    E.AGENT_FAILED):     (_P.FAILED,    (_DISK,),          None),
    (_P.WRITING,    E.TIMED_OUT):        (_P.FAILED,    (_DISK,),          None),
    (_P.WRITING,    E.REVOKED):          (_P.FAILED,    (_DISK,),          None),
    (_P.WRITING,    E.CONTESTED):        (_P.FAILED,    (_DISK,),          None),
    (_P.VERIFYING,  E.REPORTED):         (_P.VERIFYING, (),                None),
    (_P.VERIFYING,  E.VERIFIED):         (_P.BOOTING,   (_DISK,),          None),
    # The agent's last word was lost, and the host restarted all the same. The nonce goes
    # onto the disk after the read-back: the system itself proves more than its agent.
    (_P.VERIFYING,  E.PHONED_HOME):      (_P.PROVING,   (_DISK,),          None),
    (_P.VERIFYING,  E.AGENT_FAILED):     (_P.FAILED,    (_DISK,),          None),
    (_P.VERIFYING,  E.TIMED_OUT):        (_P.FAILED,    (_DISK,),          None),
    (_P.VERIFYING,  E.REVOKED):          (_P.FAILED,    (_DISK,),          None),
    (_P.VERIFYING,  E.CONTESTED):        (_P.FAILED,    (_DISK,),          None),
    (_P.BOOTING,    E.VERIFIED):         (_P.BOOTING,   (),                None),
    (_P.BOOTING,    E.NEXT_BOOT_SET):    (_P.BOOTING,   (),                None),
    # The boot rule sends the host to its disk whatever the BMC remembers, so a BMC that
    # fails now is noted and does not stop the deployment.
    (_P.BOOTING,    E.BMC_FAILED):       (_P.BOOTING,   (),                None),
    (_P.BOOTING,    E.BMC_LOGIN_REFUSED): (_P.BOOTING,  (),                None),
    (_P.BOOTING,    E.PHONED_HOME):      (_P.PROVING,   (),                None),
    (_P.BOOTING,    E.EVIDENCE_REFUSED): (_P.FAILED,    (),                None),
    (_P.BOOTING,    E.TIMED_OUT):        (_P.FAILED,    (),                None),
    (_P.BOOTING,    E.REVOKED):          (_P.FAILED,    (),                None),
    (_P.BOOTING,    E.CONTESTED):        (_P.FAILED,    (),                None),
    (_P.PROVING,    E.PHONED_HOME):      (_P.PROVING,   (),                None),
    (_P.PROVING,    E.VERIFIED):         (_P.PROVING,   (),                None),
    (_P.PROVING,    E.NEXT_BOOT_SET):    (_P.PROVING,   (),                None),
    (_P.PROVING,    E.BMC_FAILED):       (_P.PROVING,   (),                None),
    (_P.PROVING,    E.BMC_LOGIN_REFUSED): (_P.PROVING,  (),                None),
    (_P.PROVING,    E.CHECKED):          (_P.PROVING,   (),                None),
    (_P.PROVING,    E.SOAKED):           (_P.SUCCEEDED, (),                _H.PROVEN),
    (_P.PROVING,    E.EVIDENCE_REFUSED): (_P.FAILED,    (),                None),
    (_P.PROVING,    E.TIMED_OUT):        (_P.FAILED,    (),                None),
    (_P.PROVING,    E.REVOKED):          (_P.FAILED,    (),                None),
    (_P.PROVING,    E.CONTESTED):        (_P.FAILED,    (),                None),
}  # fmt: skip

INSPECTION: Final[Table] = {
    **_NETBOOT,
    (_P.NETBOOTING, E.AGENT_SEEN): (_P.SUCCEEDED, (_DISK,), _H.INSPECTED),
}

# The disk is read and compared, and never written: it can be cancelled at any time.
VERIFICATION: Final[Table] = {
    **_NETBOOT,
    (_P.NETBOOTING, E.AGENT_SEEN):   (_P.VERIFYING, (),                _H.INSPECTED),
    (_P.VERIFYING,  E.REPORTED):     (_P.VERIFYING, (),                None),
    (_P.VERIFYING,  E.COMPARED):     (_P.SUCCEEDED, (_DISK,),          None),
    (_P.VERIFYING,  E.AGENT_FAILED): (_P.FAILED,    (ReturnToDisk(),), None),
    (_P.VERIFYING,  E.TIMED_OUT):    (_P.FAILED,    (_DISK,),          None),
    (_P.VERIFYING,  E.CANCEL):       (_P.CANCELLED, (ReturnToDisk(),), None),
    (_P.VERIFYING,  E.CONTESTED):    (_P.FAILED,    (ReturnToDisk(),), None),
}  # fmt: skip

TABLES: Final[Mapping[Kind, Table]] = {
    Kind.DEPLOYMENT: DEPLOYMENT,
    Kind.INSPECTION: INSPECTION,
    Kind.VERIFICATION: VERIFICATION,
}

# The boot-override ladder: one-time network boot; the same with the 60-second flag timer
# held off; persistent network boot. Each rung gets the whole NETBOOTING limit.
RUNG_LAST: Final = 2

# How long a phase may last. A phase without a limit would be a place to be stuck in; the
# tests refuse one.
LIMIT: Final[Mapping[Phase, timedelta]] = {
    Phase.QUEUED: timedelta(hours=4),
    Phase.NETBOOTING: timedelta(minutes=10),
    Phase.PREPARING: timedelta(minutes=10),
    Phase.WRITING: timedelta(hours=2),
    Phase.VERIFYING: timedelta(hours=1),
    Phase.BOOTING: timedelta(minutes=20),
    Phase.PROVING: timedelta(minutes=30),
}

# The agent reports every few seconds while it works. This long without a word, and it is
# taken for dead although its phase could last longer.
AGENT_SILENCE_LIMIT: Final = timedelta(minutes=3)
# How long after its agent's last word a host is taken to be in the ramdisk still. Later it
# may have restarted by itself, and run its own system.
IN_RAMDISK_FOR: Final = timedelta(minutes=1)
_AGENT_PHASES: Final = frozenset({Phase.PREPARING, Phase.WRITING, Phase.VERIFYING})


# An operation whose turn has not come is not ended by the limit of `queued`, but by this one.
WAITING_LIMIT: Final = timedelta(days=1)


@dataclass(frozen=True)
class Limits:
    """The time limits in force: a site may change them, but not remove one."""

    phase: Mapping[Phase, timedelta] = field(default_factory=lambda: LIMIT)
    agent_silence: timedelta = AGENT_SILENCE_LIMIT
    waiting: timedelta = WAITING_LIMIT

    def is_in_ramdisk(self, operation: Operation, now: datetime) -> bool:
        """Return whether the agent was heard so lately that its host cannot have restarted.

        False for every agent that was ended for its silence, whatever limit that has.
        """
        heard_at = operation.evidence.get(AGENT_HEARD_AT)
        if heard_at is None:
            return False
        silent = now - datetime.fromisoformat(heard_at)
        return silent <= min(IN_RAMDISK_FOR, self.agent_silence / 2)

    def may_wait(self, operation: Operation, now: datetime) -> bool:
        """Return whether a queued operation that others keep waiting may wait for longer."""
        return now < operation.requested_at + self.waiting

    def deadline(self, phase: Phase, phase_at: datetime, now: datetime) -> datetime | None:
        """Return when `phase`, entered at `phase_at` and heard of `now`, is over."""
        if phase in FINAL:
            return None
        end = phase_at + self.phase[phase]
        return min(end, now + self.agent_silence) if phase in _AGENT_PHASES else end


@dataclass(frozen=True)
class Step:
    """What one event makes of an operation and its host, and what to do after saving."""

    operation: Operation
    host: Host
    effects: tuple[Effect, ...]
    event: E


def host_after(host: Host, event: HostEvent, operation: Operation | None = None) -> Host:
    """Return the host after a fact about its disk. Raises NotAllowed when the table has no row."""
    state = HOST_MOVES.get((host.state, event))
    if state is None:
        raise NotAllowed(
            f"a host that is {host.state} cannot become {event}", host=host.name, found=host.state
        )
    if event is HostEvent.WRITE_STARTED:
        return replace(host, state=state, release=None)
    if event is HostEvent.PROVEN and operation is not None:
        return replace(host, state=state, release=operation.release, last_good=operation.release)
    return replace(host, state=state)


def is_allowed(operation: Operation, event: E) -> bool:
    """Return whether the tables have a move for this event now."""
    return (operation.phase, event) in TABLES[operation.kind]


def deadline_event(operation: Operation) -> E:
    """Return what a passed deadline means: the next rung of the ladder, or the end."""
    if operation.phase is Phase.NETBOOTING and operation.rung < RUNG_LAST:
        return E.RUNG_TIMED_OUT
    return E.TIMED_OUT


def advance(
    operation: Operation,
    host: Host,
    event: E,
    *,
    now: datetime,
    generation: int,
    limits: Limits,
    error: Json | None = None,
    evidence: Json | None = None,
    progress: Json | None = None,
) -> Step:
    """Return what `event` makes of the operation and its host.

    `generation` is the one that the reporter acted for: an older one is refused. `error`
    is kept when the operation fails, `evidence` is added to what is known, `progress`
    replaces the last report.

    Raises NotAllowed when the generation is old or the tables have no such move.
    """
    if generation != operation.generation:
        raise NotAllowed(
            f"{event} was reported for generation {generation}",
            host=host.name,
            expected=operation.generation,
            found=generation,
        )
    row = TABLES[operation.kind].get((operation.phase, event))
    if row is None:
        raise NotAllowed(
            f"{event} is not possible while the {operation.kind} is {operation.phase}",
            host=host.name,
            found=str(operation.phase),
            hint=_way_out(operation, event),
        )
    phase, effects, host_event = row
    rung = operation.rung + (event is E.RUNG_TIMED_OUT)
    moved = _enter(operation, phase, rung=rung, now=now, limits=limits)
    seen = {AGENT_HEARD_AT: now.isoformat()} if event in _AGENT_EVENTS else {}
    if event is E.BMC_LOGIN_REFUSED:
        seen[BMC_LOGIN_REFUSED_AT] = now.isoformat()
    if event is E.HELD:
        # It waited for its turn, so it has the whole limit of its phase before it again.
        end = min(now + limits.phase[phase], operation.requested_at + limits.waiting)
        moved = replace(moved, deadline_at=end)
    moved = replace(
        moved,
        error=error if phase is Phase.FAILED else operation.error,
        evidence={**operation.evidence, **seen, **(evidence or {})},
        progress=progress if progress is not None else operation.progress,
    )
    changed = host_after(host, host_event, operation) if host_event is not None else host
    return Step(moved, changed, tuple(_on_rung(effect, rung) for effect in effects), event)


def _enter(
    operation: Operation, phase: Phase, *, rung: int, now: datetime, limits: Limits
) -> Operation:
    """Return the operation in `phase`, with the clock of that phase (or rung) started anew."""
    if phase is operation.phase and rung == operation.rung:
        deadline = limits.deadline(phase, operation.phase_at, now)
        return replace(operation, deadline_at=deadline)
    seconds = dict(operation.phase_seconds)
    spent = (now - operation.phase_at).total_seconds()
    seconds[operation.phase] = round(seconds.get(operation.phase, 0.0) + spent, 3)
    return replace(
        operation,
        phase=phase,
        rung=rung,
        phase_at=now,
        deadline_at=limits.deadline(phase, now, now),
        started_at=now if phase is Phase.NETBOOTING and rung == 0 else operation.started_at,
        ended_at=now if phase in FINAL else None,
        phase_seconds=seconds,
    )


def _on_rung(effect: Effect, rung: int) -> Effect:
    return replace(effect, rung=rung) if isinstance(effect, SetNextBoot) else effect


def _way_out(operation: Operation, event: E) -> str | None:
    if event is not E.CANCEL or operation.is_final:
        return None
    return (
        "the disk is being rewritten, so the old system is gone: let it finish. What follows "
        f"when it fails is said by: provisioner operation show {operation.id}"
    )
