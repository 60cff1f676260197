"""The guard answers every case of its table, and agrees with the tables of the lifecycle."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

import provisioner
from provisioner.core import guard
from provisioner.core.fleet import Floor
from provisioner.core.guard import HostRefused, WriteRefused, authorise_ticket, authorise_write
from provisioner.core.lifecycle import TABLES, E, NotAllowed, advance
from provisioner.core.model import Kind, Phase
from tests.unit.examples import DISK, GENERATION, HOST, LIMITS, NOW, operation_in
from tests.unit.guard_cases import (
    ACTIVE,
    BEGUN,
    FACTS,
    FLEET,
    GOOD,
    PERMIT,
    READY,
    RULES,
    TABLE,
    WEB,
    Case,
    Outcome,
    asking,
    in_fleet,
    writing,
)

SOURCES = Path(provisioner.__file__).parent


@pytest.mark.parametrize(("name", "expected", "case"), TABLE, ids=[name for name, _, _ in TABLE])
def test_the_guard_answers_as_the_table_says(name: str, expected: Outcome, case: Case) -> None:
    verdict, reason = case.outcome(guard)
    assert verdict == expected[0], name
    assert reason.startswith(expected[1])


def test_a_refusal_says_who_what_was_expected_and_what_was_found() -> None:
    with pytest.raises(WriteRefused) as write:
        authorise_write(
            asking(release="00" * 32).request, GOOD.operation, HOST, DISK, FACTS, now=NOW
        )
    own = replace(HOST, is_protected=True)
    with pytest.raises(HostRefused) as start:
        authorise_ticket(READY.operation, own, FACTS, FLEET, RULES)
    for caught in (write.value, start.value):
        assert caught.host == HOST.name
        assert caught.expected is not None
        assert caught.found is not None
        assert caught.hint


@pytest.mark.parametrize("name", ["sda", "nvme3n1"])
def test_field_23_a_disk_may_change_its_name_but_not_its_identity(name: str) -> None:
    assert asking(BEGUN, disk=replace(DISK, name=name)).outcome(guard) == PERMIT


def test_field_22_no_more_hosts_at_once_than_the_limit_says() -> None:
    """And who waits for that is not refused: its turn comes when one has ended."""
    assert in_fleet(in_flight=RULES.in_flight_max).outcome(guard)[0] == "waits"
    assert in_fleet(in_flight=RULES.in_flight_max - 1).outcome(guard) == PERMIT


def test_what_a_person_must_end_is_told_before_what_ends_by_itself() -> None:
    full = in_fleet(in_flight=RULES.in_flight_max)
    assert "breaker" in replace(full, facts=replace(FACTS, breaker="x")).outcome(guard)[1]


@pytest.mark.parametrize(
    ("floor", "hosts", "kept"),
    [
        (Floor(), 9, 0),
        (Floor(hosts=4), 9, 4),
        (Floor(percent=50), 9, 5),
        (Floor(percent=100), 3, 3),
    ],
    ids=str,
)
def test_a_floor_is_a_number_or_a_share_rounded_up(floor: Floor, hosts: int, kept: int) -> None:
    assert floor.of(hosts) == kept
    group = replace(WEB, hosts=hosts, active=kept)
    rules = replace(RULES, group_floor=floor)
    verdict = replace(in_fleet(group, ACTIVE), rules=rules).outcome(guard)[0]
    assert verdict == "waits"  # there is none to spare
    group = replace(group, active=kept + 1)
    assert replace(in_fleet(group, ACTIVE), rules=rules).outcome(guard) == PERMIT


def test_a_permitted_write_cannot_begin_in_a_phase_without_a_row_for_it() -> None:
    """The guard and the table agree on where the first write may begin."""
    for phase in Phase:
        case = replace(GOOD, operation=replace(operation_in(phase), pins=GOOD.operation.pins))
        begins = (phase, E.WRITE_PERMITTED) in TABLES[Kind.DEPLOYMENT]
        goes_on = (phase, E.REPORTED) in TABLES[Kind.DEPLOYMENT]
        if not (begins or goes_on):
            assert case.outcome(guard)[0] == "refused"
        if phase is not Phase.PREPARING:
            with pytest.raises(NotAllowed):
                advance(
                    writing(phase=phase).operation,
                    HOST,
                    E.WRITE_PERMITTED,
                    now=NOW,
                    generation=GENERATION,
                    limits=LIMITS,
                )


# --- the only way -------------------------------------------------------------------------


def makers_of(*names: str) -> set[str]:
    """Return the modules that call one of these names, as `room/module.py`."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        called = {ast.unparse(node.func).rpartition(".")[2] for node in calls}
        if called & set(names):
            found.add(str(path.relative_to(SOURCES)))
    return found


def test_nobody_but_the_guard_makes_a_permit() -> None:
    assert makers_of("TicketPermit", "WritePermit", "wanted") == {"core/guard.py"}


def test_a_ticket_is_made_in_one_place_which_asks_for_the_permit() -> None:
    assert makers_of("add_ticket") == {"service/transitions.py"}
    assert makers_of("issue_ticket") == {"service/transitions.py", "service/boot.py"}
