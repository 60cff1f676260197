"""`authorise_write`: a case for each check, and for each check proof that its case is needed.

The last test removes every check in turn from the source and sees its own cases permit.
"""

import ast
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from provisioner.core import guard
from provisioner.core.disks import Disk
from provisioner.core.guard import WriteRefused, WriteRequest, authorise_write, identity
from provisioner.core.lifecycle import TABLES, E, NotAllowed, advance
from provisioner.core.model import FINAL, Host, HostId, HostState, Kind, Operation, Phase
from tests.unit.examples import DISK, GENERATION, HOST, LIMITS, NOW, RELEASE, operation_in


@dataclass(frozen=True)
class Case:
    """One request with everything it is judged by."""

    request: WriteRequest
    operation: Operation
    host: Host
    chosen: Disk
    now: datetime
    is_revoked: bool = False

    def judge(self, authorise: Callable[..., None] = authorise_write) -> None:
        authorise(
            self.request,
            self.operation,
            self.host,
            self.chosen,
            now=self.now,
            release_is_revoked=self.is_revoked,
        )


GOOD = Case(
    request=WriteRequest(HOST.id, GENERATION, RELEASE, DISK),
    operation=operation_in(Phase.PREPARING),
    host=HOST,
    chosen=DISK,
    now=NOW,
)
WRITING = replace(GOOD, operation=operation_in(Phase.WRITING, evidence={"disk": identity(DISK)}))
OTHER_DISK = replace(DISK, serial="LAB-r1n7-1")
NAMELESS = replace(DISK, serial=None, wwn=None)


def asking(case: Case = GOOD, **changes: object) -> Case:
    return replace(case, request=replace(case.request, **changes))  # type: ignore[arg-type] # fields by name


def on_host(**changes: object) -> Case:
    return replace(GOOD, host=replace(HOST, **changes))  # type: ignore[arg-type] # fields by name


def in_operation(**changes: object) -> Case:
    return replace(GOOD, operation=replace(GOOD.operation, **changes))  # type: ignore[arg-type] # fields by name


# Each check by its words, with every way to fail it and no other check.
REFUSED: Mapping[str, Mapping[str, Case]] = {
    "the operation is not a deployment": {
        "inspection": in_operation(kind=Kind.INSPECTION),
        "verification": in_operation(kind=Kind.VERIFICATION),
    },
    "the operation is in no phase that writes": {
        "queued": in_operation(phase=Phase.QUEUED),
        "netbooting": in_operation(phase=Phase.NETBOOTING),
        "booting": in_operation(phase=Phase.BOOTING),
        "proving": in_operation(phase=Phase.PROVING),
        **{str(phase): in_operation(phase=phase) for phase in sorted(FINAL)},
    },
    "the operation's deadline has passed": {
        "at the deadline": in_operation(deadline_at=NOW),
        "long after": in_operation(deadline_at=NOW - timedelta(days=1)),
        "no deadline": in_operation(deadline_at=None),
    },
    "the request is for another host": {
        "token of another host": asking(host_id=HostId("host_2")),
        "operation of another host": in_operation(host_id=HostId("host_2")),
    },
    "the generation is not the present one": {
        "older": asking(generation=GENERATION - 1),
        "newer": asking(generation=GENERATION + 1),
    },
    "a newer operation owns the host": {"newer": on_host(generation=GENERATION + 1)},
    "the release is not the one requested": {
        "another": asking(release="00" * 32),
        "none": asking(release=""),
    },
    "the release was revoked": {"revoked in between": replace(GOOD, is_revoked=True)},
    "the host is not in a state to be written": {
        "enrolled": on_host(state=HostState.ENROLLED),
    },
    "it is retired": {"retired": on_host(state=HostState.RETIRED)},
    "it is protected": {"protected in between": on_host(is_protected=True)},
    "it is in maintenance": {"maintenance in between": on_host(in_maintenance=True)},
    "it is quarantined: smoke": {"quarantined": on_host(quarantine_reason="smoke")},
    "it was discovered and nobody has confirmed it": {"new": on_host(is_confirmed=False)},
    "the disk cannot be told from others": {
        "no serial, no WWN": replace(asking(disk=NAMELESS), chosen=NAMELESS),
    },
    "the disk is not the one that the profile's rule picks": {
        "another serial": asking(disk=OTHER_DISK),
        "another WWN": asking(disk=replace(DISK, wwn="0x5000c500a1b2c3d4")),
        "another size": asking(disk=replace(DISK, size_bytes=DISK.size_bytes + 1)),
    },
    "the disk is not the one that was permitted first": {
        "the rule picks another one now": replace(
            asking(WRITING, disk=OTHER_DISK), chosen=OTHER_DISK
        ),
    },
}
EACH = [(why, name, case) for why, cases in REFUSED.items() for name, case in cases.items()]


@pytest.mark.parametrize(("why", "name", "case"), EACH, ids=[f"{w}: {n}" for w, n, _ in EACH])
def test_a_check_refuses_and_says_what_was_expected(why: str, name: str, case: Case) -> None:
    with pytest.raises(WriteRefused) as caught:
        case.judge()
    # A retired host fails two checks; each of them is enough.
    reasons = {reason for _, _, reason in all_refusals(case)}
    assert why in reasons, name
    assert caught.value.host == HOST.name
    assert caught.value.found is not None
    assert caught.value.hint


def all_refusals(case: Case) -> list[tuple[object, object, str]]:
    return list(
        guard._refusals(
            case.request, case.operation, case.host, case.chosen, case.now, case.is_revoked
        ),
    )


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.WRITING, Phase.VERIFYING])
@pytest.mark.parametrize("state", [HostState.DIRTY, HostState.AVAILABLE, HostState.ACTIVE])
def test_what_was_asked_for_is_permitted(phase: Phase, state: HostState) -> None:
    replace(on_host(state=state), operation=operation_in(phase)).judge()


@pytest.mark.parametrize("name", ["sda", "nvme3n1"])
def test_field_23_a_disk_may_change_its_name_but_not_its_identity(name: str) -> None:
    asking(WRITING, disk=replace(DISK, name=name)).judge()


def test_a_wwn_alone_is_enough_to_know_a_disk() -> None:
    disk = replace(DISK, serial=None, wwn="eui.0025385b21400001")
    replace(asking(disk=disk), chosen=disk).judge()


def test_a_permission_holds_to_the_last_moment_of_the_deadline() -> None:
    assert GOOD.operation.deadline_at is not None
    replace(GOOD, now=GOOD.operation.deadline_at - timedelta(microseconds=1)).judge()


def test_a_permitted_write_cannot_begin_in_a_phase_without_a_row_for_it() -> None:
    """The guard and the table agree on where the first write may begin."""
    for phase in Phase:
        case = replace(GOOD, operation=operation_in(phase))
        begins = (phase, E.WRITE_PERMITTED) in TABLES[Kind.DEPLOYMENT]
        goes_on = (phase, E.REPORTED) in TABLES[Kind.DEPLOYMENT]
        if not (begins or goes_on):
            with pytest.raises(WriteRefused):
                case.judge()
        if phase is not Phase.PREPARING:
            with pytest.raises(NotAllowed):
                advance(
                    case.operation,
                    HOST,
                    E.WRITE_PERMITTED,
                    now=NOW,
                    generation=GENERATION,
                    limits=LIMITS,
                )


# --- the proof that no check is decoration ------------------------------------------------

# Two checks refuse a retired host, so removing either alone still refuses it.
DOUBLY_REFUSED = {"retired"}
SOURCE = Path(guard.__file__).read_text()


def checks() -> list[ast.If]:
    """Return the `if … : yield …` statements of `_refusals`, in order."""
    tree = ast.parse(SOURCE)
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_refusals"
    )
    return [node for node in function.body if isinstance(node, ast.If)]


class Without(ast.NodeTransformer):
    """Replaces the check at one line by nothing."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.removed = 0

    def visit_If(self, node: ast.If) -> ast.stmt:
        if node.lineno == self.line:
            self.removed += 1
            return ast.copy_location(ast.Pass(), node)
        self.generic_visit(node)
        return node


def guard_without(line: int) -> types.ModuleType:
    """Return the guard's module, compiled from its source without the check at `line`."""
    without = Without(line)
    tree = ast.fix_missing_locations(without.visit(ast.parse(SOURCE)))
    assert without.removed == 1
    module = types.ModuleType("provisioner.core.guard_without_a_check")
    module.__package__ = "provisioner.core"
    # Dataclasses look their module up by name while they are made; ours is the original's.
    module.__dict__["__name__"] = guard.__name__
    exec(compile(tree, guard.__file__, "exec"), module.__dict__)
    return module


def permits(module: types.ModuleType, case: Case) -> bool:
    try:
        case.judge(module.authorise_write)
    except module.WriteRefused:
        return False
    return True


@pytest.mark.parametrize("check", checks(), ids=lambda check: f"line {check.lineno}")
def test_removing_a_check_permits_what_its_cases_forbid(check: ast.If) -> None:
    mutant = guard_without(check.lineno)
    wrongly = {(why, name) for why, name, case in EACH if permits(mutant, case)}
    assert wrongly, f"no case needs the check at line {check.lineno} of core/guard.py"
    named = {node.value for node in ast.walk(check) if isinstance(node, ast.Constant)}
    for why, _ in wrongly:
        assert why in named or why.startswith("it "), (why, named)


def test_every_case_depends_on_exactly_one_check() -> None:
    """No case is refused by accident: each is let through by exactly one missing check."""
    mutants = [guard_without(check.lineno) for check in checks()]
    for _, name, case in EACH:
        let_through = sum(permits(mutant, case) for mutant in mutants)
        assert let_through == (0 if name in DOUBLY_REFUSED else 1), name


def test_the_guard_is_nothing_but_checks() -> None:
    """Anything else in there would escape the proof above."""
    assert len(checks()) == SOURCE.count("        yield ")
    assert all(len(check.body) == 1 and not check.orelse for check in checks())
