"""The table of cases that the guard is judged by: what it is asked, and what it must answer.

Each refusal stands by its words, with every way to earn it and no other one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from provisioner.core.disks import Disk
from provisioner.core.fleet import (
    NO_GROUP,
    NOTHING_SELECTED,
    Failure,
    Fleet,
    Floor,
    Group,
    Load,
    Rules,
    Selection,
)
from provisioner.core.guard import Facts, WriteRequest, identity
from provisioner.core.model import (
    FINAL,
    Host,
    HostId,
    HostState,
    Kind,
    Operation,
    OperationId,
    Phase,
)
from provisioner.core.own_host import OwnHost, ServiceHosts
from tests.unit.examples import DISK, GENERATION, HOST, NOW, OPERATION, RELEASE, operation_in

Outcome = tuple[str, str]
PERMIT: Final = ("permit", "")

SELECTION: Final = Selection("rq_1", (HOST.id, HostId("host_2")), OPERATION.requested_by, NOW)
PINS: Final = {**OPERATION.pins, "request": SELECTION.request_id, "selection": SELECTION.digest}
FACTS: Final = Facts(selection=SELECTION, own=ServiceHosts(), release_is_revoked=False)
RULES: Final = Rules(
    in_flight_max=10,
    starts_per_minute_max=8,
    group_in_flight_max=4,
    group_starts_per_minute_max=3,
    group_floor=Floor(hosts=2),
    breaker_hosts_max=2,
)
WEB: Final = Group("web", 6, 3, Load())
FLEET: Final = Fleet(Load(in_flight=9, started=7), WEB)


@dataclass(frozen=True)
class Writing:
    """A request to write, with everything it is judged by. The guard's module is handed in:
    it may be one that lacks a check."""

    request: WriteRequest
    operation: Operation
    host: Host
    chosen: Disk
    facts: Facts = FACTS
    now: datetime = NOW

    def outcome(self, guard: Any) -> Outcome:
        try:
            permit = guard.authorise_write(
                self.request, self.operation, self.host, self.chosen, self.facts, now=self.now
            )
        except guard.WriteRefused as refused:
            return "refused", refused.message.partition(": ")[2]
        assert (permit.operation_id, permit.generation) == (self.operation.id, GENERATION)
        return PERMIT


@dataclass(frozen=True)
class Starting:
    """An operation whose turn may have come."""

    operation: Operation
    host: Host
    facts: Facts = FACTS
    fleet: Fleet = FLEET
    rules: Rules = RULES

    def outcome(self, guard: Any) -> Outcome:
        try:
            answer = guard.authorise_ticket(
                self.operation, self.host, self.facts, self.fleet, self.rules
            )
        except guard.HostRefused as refused:
            return "refused", refused.message.partition(": ")[2]
        if isinstance(answer, guard.Wait):
            return "waits", answer.reason
        assert (answer.operation_id, answer.generation) == (self.operation.id, GENERATION)
        return PERMIT


@dataclass(frozen=True)
class Breaking:
    """What failed lately, and whether that opens the breaker."""

    failures: tuple[Failure, ...] = field(default_factory=tuple)

    def outcome(self, guard: Any) -> Outcome:
        reason = guard.why_breaker_opens(self.failures, RULES)
        return ("opens", reason) if reason else PERMIT


@dataclass(frozen=True)
class Permitted:
    """What somebody brings as a permit. `made` names it in the guard's module."""

    made: str
    operation_id: str = OPERATION.id
    generation: int = GENERATION
    wanted: str = "TicketPermit"

    def outcome(self, guard: Any) -> Outcome:
        name = OperationId(self.operation_id)
        permit = getattr(guard, self.made)(name, self.generation) if self.made else None
        try:
            guard.check_permit(permit, getattr(guard, self.wanted), OPERATION)
        except TypeError as error:
            return "refused", str(error)
        return PERMIT


Case = Writing | Starting | Breaking | Permitted

GOOD: Final = Writing(
    request=WriteRequest(HOST.id, GENERATION, RELEASE, DISK),
    operation=operation_in(Phase.PREPARING, pins=PINS),
    host=HOST,
    chosen=DISK,
)
BEGUN: Final = replace(
    GOOD,
    operation=operation_in(Phase.WRITING, pins=PINS, evidence={"disk": identity(DISK)}),
)
READY: Final = Starting(operation_in(Phase.QUEUED, pins=PINS), HOST)
ACTIVE: Final = replace(HOST, state=HostState.ACTIVE)
OTHER_DISK: Final = replace(DISK, serial="LAB-r1n7-1")
ITS_TWIN: Final = replace(DISK, name="vdb")
NAMELESS: Final = replace(DISK, serial=None, wwn=None)


def asking(case: Writing = GOOD, **changes: object) -> Writing:
    return replace(case, request=replace(case.request, **changes))  # type: ignore[arg-type] # fields by name


def writing(**changes: object) -> Writing:
    return replace(GOOD, operation=replace(GOOD.operation, **changes))  # type: ignore[arg-type] # fields by name


def starting(**changes: object) -> Starting:
    return replace(READY, operation=replace(READY.operation, **changes))  # type: ignore[arg-type] # fields by name


def in_fleet(group: Group = WEB, host: Host = HOST, **load: int) -> Starting:
    total = replace(FLEET.load, **load)
    return replace(READY, host=host, fleet=Fleet(total, group))


def having(*disks: Disk) -> Host:
    return replace(HOST, inventory={"disks": [disk.as_dict() for disk in disks]})


def _both(name: str, *, facts: Facts = FACTS, **changes: object) -> Mapping[str, Case]:
    """A case that must fail for a ticket and for a write."""
    host = replace(HOST, **changes)  # type: ignore[arg-type] # fields by name
    return {
        f"{name}, before a ticket": replace(READY, host=host, facts=facts),
        f"{name}, before a write": replace(GOOD, host=host, facts=facts),
    }


def _operations(name: str, facts: Facts = FACTS, **changes: object) -> Mapping[str, Case]:
    return {
        f"{name}, before a ticket": replace(starting(**changes), facts=facts),
        f"{name}, before a write": replace(writing(**changes), facts=facts),
    }


def _selected(**changes: object) -> Facts:
    return replace(FACTS, selection=replace(SELECTION, **changes))  # type: ignore[arg-type] # fields by name


OTHERS: Final = Selection("rq_1", (HostId("host_2"),), SELECTION.requested_by, NOW)
MORE: Final = (*SELECTION.hosts, HostId("host_3"))

NEVER: Final[Mapping[str, Mapping[str, Case]]] = {
    "the operation is for another host": _operations("another's", host_id=HostId("host_2")),
    "a newer operation owns the host": _both("overtaken", generation=GENERATION + 1),
    "nobody requested the operation": {
        **_operations("no request", replace(FACTS, selection=NOTHING_SELECTED)),
        **_operations("another request", pins={**PINS, "request": "rq_2"}),
    },
    "its request did not select the host": _operations(
        "not selected",
        replace(FACTS, selection=OTHERS),
        pins={**PINS, "selection": OTHERS.digest},
    ),
    "the selection is not the one requested": _operations("one more host", _selected(hosts=MORE)),
    "somebody else requested it": _operations("another actor", requested_by="token:mallory"),
    "the release was revoked": _operations(
        "revoked in between", replace(FACTS, release_is_revoked=True)
    ),
    "the service runs on it": _both(
        "its own host", facts=replace(FACTS, own=ServiceHosts(OwnHost(macs=frozenset(HOST.macs))))
    ),
    "another host has the same UUID": _both("a twin", facts=replace(FACTS, twins=("r1n8",))),
    "it is retired": _both("retired", state=HostState.RETIRED),
    "it is protected": _both("protected in between", is_protected=True),
    "it is in maintenance": {
        **_both("maintenance in between", in_maintenance=True),
        "an inspection in maintenance": replace(
            starting(kind=Kind.INSPECTION, release=None), host=replace(HOST, in_maintenance=True)
        ),
    },
    "it is quarantined: smoke": _both("quarantined", quarantine_reason="smoke"),
    "it was discovered and nobody has confirmed it": _both("new", is_confirmed=False),
}

NO_TICKET: Final[Mapping[str, Mapping[str, Case]]] = {
    "the operation has started already": {
        str(phase): starting(phase=phase) for phase in Phase if phase is not Phase.QUEUED
    },
    "no release was requested": {
        "a deployment of nothing": starting(release=None),
        "a verification with nothing": starting(kind=Kind.VERIFICATION, release=""),
    },
}

NO_WRITE: Final[Mapping[str, Mapping[str, Case]]] = {
    "the operation is not a deployment": {
        "inspection": writing(kind=Kind.INSPECTION),
        "verification": writing(kind=Kind.VERIFICATION),
    },
    "the operation is in no phase that writes": {
        str(phase): writing(phase=phase)
        for phase in (
            *(Phase.QUEUED, Phase.NETBOOTING, Phase.BOOTING, Phase.PROVING),
            *sorted(FINAL),
        )
    },
    "the operation's deadline has passed": {
        "at the deadline": writing(deadline_at=NOW),
        "long after": writing(deadline_at=NOW - timedelta(days=1)),
        "no deadline": writing(deadline_at=None),
    },
    "the request is for another host": {"another token": asking(host_id=HostId("host_2"))},
    "the generation is not the present one": {
        "older": asking(generation=GENERATION - 1),
        "newer": asking(generation=GENERATION + 1),
    },
    "the release is not the one requested": {
        "another": asking(release="00" * 32),
        "none": asking(release=""),
    },
    "the host is not in a state to be written": {
        "enrolled": replace(GOOD, host=replace(HOST, state=HostState.ENROLLED)),
    },
    "the breaker is open": {"open": replace(GOOD, facts=replace(FACTS, breaker="3 hosts"))},
    "the service only observes": {
        "before the first": replace(GOOD, facts=replace(FACTS, is_observing=True)),
        "in the middle": replace(BEGUN, facts=replace(FACTS, is_observing=True)),
    },
    "the disk cannot be told from others": {
        "no serial, no WWN": replace(asking(disk=NAMELESS), chosen=NAMELESS),
    },
    "several disks have the same identity": {
        "two behind one kind of bridge": replace(GOOD, host=having(DISK, ITS_TWIN)),
    },
    "the disk is not the one that the profile's rule picks": {
        "another serial": asking(disk=OTHER_DISK),
        "another WWN": asking(disk=replace(DISK, wwn="0x5000c500a1b2c3d4")),
        "another size": asking(disk=replace(DISK, size_bytes=DISK.size_bytes + 1)),
    },
    "the disk is not the one that was permitted first": {
        "the rule picks another one now": replace(
            asking(BEGUN, disk=OTHER_DISK), chosen=OTHER_DISK
        ),
    },
}
REFUSED: Final = {**NEVER, **NO_TICKET, **NO_WRITE}

# By the start of the reason.
DELAYED: Final[Mapping[str, Mapping[str, Case]]] = {
    "the service only observes": {
        "observing": replace(READY, facts=replace(FACTS, is_observing=True))
    },
    "the breaker is open, since 3 hosts": {
        "open": replace(READY, facts=replace(FACTS, breaker="3 hosts"))
    },
    "as many as may be are in flight": {"full": in_fleet(in_flight=10)},
    "as many of group web as may be": {"full": in_fleet(replace(WEB, load=Load(in_flight=4)))},
    "group web must not have fewer healthy hosts": {
        "two are left": in_fleet(replace(WEB, active=2), ACTIVE),
        "three, of which one is being rebuilt": in_fleet(
            replace(WEB, load=Load(in_flight=1, active_in_flight=1)), ACTIVE
        ),
        "half of six": replace(
            in_fleet(WEB, ACTIVE), rules=replace(RULES, group_floor=Floor(percent=50))
        ),
    },
    "enough have started within a minute": {"full": in_fleet(started=8)},
    "enough of group web have started": {"full": in_fleet(replace(WEB, load=Load(started=3)))},
}

BAD: Final = Failure(HOST.id, "booting_timed_out")
WORSE: Final = Failure(HostId("host_2"), "wrong_system")
STOPPED: Final = Failure(HostId("host_3"), "release_revoked")
OPENED: Final[Mapping[str, Mapping[str, Case]]] = {
    "deployments failed within 10 minutes, on so many hosts: 2": {
        "two hosts": Breaking((BAD, WORSE)),
        "two hosts, and one that was stopped": Breaking((BAD, STOPPED, WORSE)),
    }
}
NOT_ITS_OWN: Final[Mapping[str, Mapping[str, Case]]] = {
    "op_1 goes on without a TicketPermit": {
        "none": Permitted(""),
        "one to write": Permitted("WritePermit"),
        "another operation's": Permitted("TicketPermit", operation_id="op_2"),
        "an older one": Permitted("TicketPermit", generation=GENERATION - 1),
    },
    "op_1 goes on without a WritePermit": {
        "a ticket's": Permitted("TicketPermit", wanted="WritePermit"),
    },
}

ALLOWED: Final[Mapping[str, Case]] = {
    "write one disk of two that differ": replace(GOOD, host=having(DISK, OTHER_DISK)),
    **{
        f"write in {phase} of a host that is {state}": replace(
            writing(phase=phase), host=replace(HOST, state=state)
        )
        for phase in (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING)
        for state in (HostState.DIRTY, HostState.AVAILABLE, HostState.ACTIVE)
    },
    "a disk known by its WWN alone": replace(
        asking(disk=replace(NAMELESS, wwn="eui.0025385b21400001")),
        chosen=replace(NAMELESS, wwn="eui.0025385b21400001"),
    ),
    "the last moment of the deadline": writing(deadline_at=NOW + timedelta(microseconds=1)),
    "a write goes on although the breaker opened": replace(
        BEGUN, facts=replace(FACTS, breaker="3 hosts")
    ),
    "a start with room everywhere": READY,
    "an inspection of a protected host": replace(
        starting(kind=Kind.INSPECTION, release=None), host=replace(HOST, is_protected=True)
    ),
    "an active host above the floor": in_fleet(WEB, ACTIVE),
    "a host that is not healthy anyhow": in_fleet(replace(WEB, active=0)),
    "a host without a group": in_fleet(NO_GROUP, ACTIVE),
    "no limit of any kind": replace(
        in_fleet(replace(WEB, load=Load(99, 99, 0)), started=99),
        rules=Rules(in_flight_max=10, starts_per_minute_max=0),
    ),
    "one host that failed often": Breaking((BAD, BAD, BAD)),
    "nothing failed": Breaking(),
    "a person revoked what was being deployed": Breaking((BAD, STOPPED)),
    "a ticket's own permit": Permitted("TicketPermit"),
    "a write's own permit": Permitted("WritePermit", wanted="WritePermit"),
}

TABLE: Final[list[tuple[str, Outcome, Case]]] = [
    (f"{why}: {name}", (verdict, why), case)
    for verdict, table in (
        ("refused", REFUSED),
        ("waits", DELAYED),
        ("opens", OPENED),
        ("refused", NOT_ITS_OWN),
    )
    for why, cases in table.items()
    for name, case in cases.items()
] + [(name, PERMIT, case) for name, case in ALLOWED.items()]
