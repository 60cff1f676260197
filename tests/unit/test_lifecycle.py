"""The tables, walked: every pair, every path, every limit. What they lack is refused."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest

from provisioner.core.effects import (
    Effect,
    PowerOff,
    PowerOffQuarantined,
    PowerOn,
    ReturnToDisk,
    SetNextBoot,
    from_json,
    to_json,
)
from provisioner.core.lifecycle import (
    AGENT_HEARD_AT,
    AGENT_SILENCE_LIMIT,
    HOST_MOVES,
    LIMIT,
    RUNG_LAST,
    TABLES,
    E,
    HostEvent,
    Limits,
    NotAllowed,
    Step,
    advance,
    deadline_event,
    host_after,
    is_allowed,
)
from provisioner.core.model import (
    FINAL,
    BootDevice,
    Host,
    HostState,
    Kind,
    Operation,
    Phase,
)
from tests.unit.examples import GENERATION, HOST, LIMITS, NOW, RELEASE, operation_in

OPEN = [phase for phase in Phase if phase not in FINAL]
BEFORE_THE_WRITE = (Phase.QUEUED, Phase.NETBOOTING, Phase.PREPARING)
AGENT_WORKS = (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING)
A_MINUTE = timedelta(minutes=1)


def step(operation: Operation, event: E, host: Host = HOST, **more: object) -> Step:
    """Carry out one event one minute after the operation entered its phase."""
    return advance(
        operation,
        host,
        event,
        now=operation.phase_at + A_MINUTE,
        generation=GENERATION,
        limits=LIMITS,
        **more,  # type: ignore[arg-type] # the tests hand on error, evidence and progress
    )


def phases_of(kind: Kind) -> set[Phase]:
    """Return every phase that an operation of this kind can be in."""
    reached, waiting = {Phase.QUEUED}, deque([Phase.QUEUED])
    while waiting:
        here = waiting.popleft()
        for (phase, _), (after, _, _) in TABLES[kind].items():
            if phase is here and after not in reached:
                reached.add(after)
                waiting.append(after)
    return reached


def reachable(kind: Kind, start: Phase, **without: E) -> set[Phase]:
    """Return the phases that can follow `start`, not using the events in `without`."""
    reached: set[Phase] = set()
    waiting = deque([start])
    while waiting:
        here = waiting.popleft()
        for (phase, event), (after, _, _) in TABLES[kind].items():
            if phase is here and event not in without.values() and after not in reached:
                reached.add(after)
                waiting.append(after)
    return reached


def rows() -> Iterator[tuple[Kind, Phase, E]]:
    for kind, table in TABLES.items():
        for phase, event in table:
            yield kind, phase, event


# --- every pair ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "phase", "event"), list(product(Kind, Phase, E)))
def test_every_pair_moves_by_the_table_or_is_refused(kind: Kind, phase: Phase, event: E) -> None:
    """An operation either moves as its row says or raises; the values handed in never change."""
    operation = operation_in(phase, kind)
    row = TABLES[kind].get((phase, event))
    assert is_allowed(operation, event) == (row is not None)
    if row is None:
        with pytest.raises(NotAllowed) as caught:
            step(operation, event)
        assert caught.value.host == HOST.name
        assert caught.value.found == phase
    else:
        after = step(operation, event)
        assert after.operation.phase is row[0]
        assert [type(effect) for effect in after.effects] == [type(effect) for effect in row[1]]
        assert after.event is event
        expected = HOST_MOVES[HOST.state, row[2]] if row[2] else HOST.state
        assert after.host.state is expected
    assert operation == operation_in(phase, kind)


@pytest.mark.parametrize(("state", "event"), list(product(HostState, HostEvent)))
def test_every_host_pair_moves_by_the_table_or_is_refused(
    state: HostState, event: HostEvent
) -> None:
    host = replace(HOST, state=state)
    if (state, event) in HOST_MOVES:
        assert host_after(host, event).state is HOST_MOVES[state, event]
    else:
        with pytest.raises(NotAllowed) as caught:
            host_after(host, event)
        assert caught.value.host == HOST.name
    assert host == replace(HOST, state=state)


@pytest.mark.parametrize("phase", sorted(FINAL))
def test_nothing_moves_an_operation_that_has_ended(phase: Phase) -> None:
    assert not [row for row in rows() if row[1] is phase]


def test_every_event_and_every_host_event_is_used() -> None:
    """A word without a row would be a promise that nobody keeps."""
    assert {event for _, _, event in rows()} == set(E)
    used = {row[2] for table in TABLES.values() for row in table.values() if row[2]}
    assert used | {HostEvent.RETIRED} == set(HostEvent)


def test_a_host_that_is_retired_never_comes_back() -> None:
    assert not [move for move in HOST_MOVES if move[0] is HostState.RETIRED]


def test_only_a_proven_deployment_makes_a_host_active() -> None:
    into_active = {
        event
        for (state, event), after in HOST_MOVES.items()
        if after is HostState.ACTIVE and state is not HostState.ACTIVE
    }
    assert into_active == {HostEvent.PROVEN}
    proving = [(k, key) for k, t in TABLES.items() for key, r in t.items() if r[2] == "proven"]
    assert proving == [(Kind.DEPLOYMENT, (Phase.PROVING, E.SOAKED))]


# --- every path ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_every_phase_of_an_operation_can_end(kind: Kind) -> None:
    for phase in phases_of(kind) - FINAL:
        assert reachable(kind, phase) & FINAL, f"{kind} is stuck in {phase}"


@pytest.mark.parametrize("kind", Kind)
def test_a_deployment_can_be_in_every_phase_and_the_others_in_few(kind: Kind) -> None:
    inspection = {Phase.QUEUED, Phase.NETBOOTING, *FINAL}
    expected = {
        Kind.DEPLOYMENT: set(Phase),
        Kind.INSPECTION: inspection,
        Kind.VERIFICATION: inspection | {Phase.VERIFYING},
    }
    assert phases_of(kind) == expected[kind]


def forward_paths(kind: Kind, start: Phase = Phase.QUEUED) -> Iterator[tuple[E, ...]]:
    """Yield every path from `start` to an end that enters no phase twice."""
    for (phase, event), (after, _, _) in TABLES[kind].items():
        if phase is not start or after is start:
            continue
        if after in FINAL:
            yield (event,)
        else:
            for rest in forward_paths(kind, after):
                yield (event, *rest)


@pytest.mark.parametrize("kind", Kind)
def test_every_path_from_queued_ends_and_tells_the_truth_about_the_disk(kind: Kind) -> None:
    paths = list(forward_paths(kind))
    assert len(paths) > 4
    active = replace(HOST, state=HostState.ACTIVE, release="old", last_good="old")
    for path in paths:
        host, operation = active, operation_in(Phase.QUEUED, kind)
        for event in path:
            after = step(operation, event, host)
            operation, host = after.operation, after.host
        assert operation.is_final
        assert operation.ended_at == operation.phase_at
        assert operation.deadline_at is None
        if operation.phase is Phase.SUCCEEDED and kind is Kind.DEPLOYMENT:
            assert (host.state, host.release, host.last_good) == ("active", RELEASE, RELEASE)
        elif E.WRITE_PERMITTED in path:
            assert (host.state, host.release, host.last_good) == ("dirty", None, "old")
        else:
            assert host == active


def test_the_way_of_one_deployment_with_its_effects() -> None:
    """The main path, spelt out: a change to it must be meant."""
    told: list[Effect] = []
    host, operation = replace(HOST, state=HostState.ENROLLED), operation_in(Phase.QUEUED)
    for event in (
        E.START,
        E.POWERED_OFF,
        E.NEXT_BOOT_SET,
        E.POWERED_ON,
        E.AGENT_SEEN,
        E.WRITE_PERMITTED,
        E.REPORTED,
        E.WRITTEN,
        E.VERIFIED,
        E.NEXT_BOOT_SET,
        E.PHONED_HOME,
        E.CHECKED,
        E.SOAKED,
    ):
        after = step(operation, event, host)
        told += after.effects
        host, operation = after.host, after.operation
    assert told == [
        PowerOff(soft=True),
        SetNextBoot(BootDevice.NETWORK, 0),
        PowerOn(),
        SetNextBoot(BootDevice.DISK, 0),
    ]
    assert list(operation.phase_seconds) == [phase for phase in Phase if phase not in FINAL]
    # POWERED_OFF, NEXT_BOOT_SET and the like do not restart the clock of their phase.
    assert set(operation.phase_seconds.values()) == {60.0}
    assert (operation.phase, host.state) == (Phase.SUCCEEDED, HostState.ACTIVE)


@pytest.mark.parametrize(
    "effect", [PowerOff(soft=True), SetNextBoot(BootDevice.DISK, 2), PowerOffQuarantined()]
)
def test_effects_survive_the_outbox(effect: Effect) -> None:
    assert from_json(to_json(effect)) == effect


@pytest.mark.parametrize("kind", Kind)
def test_every_effect_of_the_tables_survives_the_outbox(kind: Kind) -> None:
    for _, effects, _ in TABLES[kind].values():
        assert tuple(from_json(to_json(effect)) for effect in effects) == effects


# --- no phase to be stuck in --------------------------------------------------------------


@pytest.mark.parametrize("phase", OPEN)
def test_every_open_phase_has_a_limit(phase: Phase) -> None:
    assert timedelta() < LIMIT[phase] <= timedelta(hours=4)
    assert Limits().deadline(phase, NOW, NOW) is not None


@pytest.mark.parametrize(
    ("kind", "phase"), [(k, p) for k in Kind for p in OPEN if p in phases_of(k)]
)
def test_every_open_phase_ends_when_its_time_is_over(kind: Kind, phase: Phase) -> None:
    operation = operation_in(phase, kind, rung=RUNG_LAST)
    assert deadline_event(operation) is E.TIMED_OUT
    assert step(operation, E.TIMED_OUT, error={"code": "late"}).operation.phase is Phase.FAILED


@pytest.mark.parametrize(
    ("kind", "phase"), [(k, p) for k in Kind for p in OPEN if p in phases_of(k)]
)
def test_an_operator_can_cancel_until_the_first_write_and_never_after(
    kind: Kind, phase: Phase
) -> None:
    operation = operation_in(phase, kind)
    if phase in BEFORE_THE_WRITE or kind is Kind.VERIFICATION:
        assert step(operation, E.CANCEL).operation.phase is Phase.CANCELLED
        return
    with pytest.raises(NotAllowed) as caught:
        step(operation, E.CANCEL)
    assert f"provisioner operation show {operation.id}" in (caught.value.hint or "")


def test_no_path_after_the_write_permission_cancels() -> None:
    after_the_write = reachable(Kind.DEPLOYMENT, Phase.WRITING)
    assert Phase.CANCELLED not in after_the_write
    assert not after_the_write & set(BEFORE_THE_WRITE)


def test_cancelling_what_has_ended_gives_no_false_hope() -> None:
    with pytest.raises(NotAllowed) as caught:
        step(operation_in(Phase.SUCCEEDED), E.CANCEL)
    assert caught.value.hint is None


# --- generations --------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [GENERATION - 1, GENERATION + 1, 0])
@pytest.mark.parametrize(("kind", "phase", "event"), list(rows()))
def test_another_generation_is_refused_by_every_row(
    kind: Kind, phase: Phase, event: E, generation: int
) -> None:
    with pytest.raises(NotAllowed) as caught:
        advance(
            operation_in(phase, kind),
            HOST,
            event,
            now=NOW,
            generation=generation,
            limits=LIMITS,
        )
    assert (caught.value.expected, caught.value.found) == (GENERATION, generation)


# --- the disk -----------------------------------------------------------------------------


def test_a_write_permission_makes_the_host_dirty_and_forgets_its_release() -> None:
    host = replace(HOST, state=HostState.ACTIVE, release="old", last_good="old")
    after = step(operation_in(Phase.PREPARING), E.WRITE_PERMITTED, host)
    assert (after.host.state, after.host.release) == (HostState.DIRTY, None)
    assert after.host.last_good == "old"


def test_only_one_row_lets_a_write_begin() -> None:
    writes = [key for t in TABLES.values() for key, row in t.items() if row[2] == "write_started"]
    assert writes == [(Phase.PREPARING, E.WRITE_PERMITTED)]


def test_an_enrolled_host_is_not_written_before_it_was_inspected() -> None:
    with pytest.raises(NotAllowed):
        step(
            operation_in(Phase.PREPARING),
            E.WRITE_PERMITTED,
            replace(HOST, state=HostState.ENROLLED),
        )


def test_an_inspection_never_touches_the_disk_and_leaves_an_active_host_active() -> None:
    assert {row[2] for row in TABLES[Kind.INSPECTION].values()} <= {None, HostEvent.INSPECTED}
    host = replace(HOST, state=HostState.ACTIVE, release="old", last_good="old")
    after = step(operation_in(Phase.NETBOOTING, Kind.INSPECTION), E.AGENT_SEEN, host)
    assert after.host == host
    assert after.operation.phase is Phase.SUCCEEDED


def test_a_verification_never_touches_the_disk_and_leaves_an_active_host_active() -> None:
    assert {row[2] for row in TABLES[Kind.VERIFICATION].values()} <= {None, HostEvent.INSPECTED}
    host = replace(HOST, state=HostState.ACTIVE, release="old", last_good="old")
    seen = step(operation_in(Phase.NETBOOTING, Kind.VERIFICATION), E.AGENT_SEEN, host)
    done = step(seen.operation, E.COMPARED, seen.host, evidence={"differing_chunks": 0})
    assert done.host == host
    assert done.operation.phase is Phase.SUCCEEDED
    assert done.effects == (SetNextBoot(BootDevice.DISK),)


@pytest.mark.parametrize("phase", OPEN)
def test_a_revoked_release_ends_its_deployment_in_every_phase(phase: Phase) -> None:
    """Also where nothing can be cancelled any more; the host stays what it is."""
    error = {"code": "release_revoked"}
    after = step(operation_in(phase), E.REVOKED, error=error)
    assert after.operation.phase is Phase.FAILED
    assert after.operation.error == error
    assert after.host == HOST


@pytest.mark.parametrize("kind", [Kind.INSPECTION, Kind.VERIFICATION])
def test_what_deploys_nothing_is_not_ended_by_a_revocation(kind: Kind) -> None:
    assert not [key for key in TABLES[kind] if key[1] is E.REVOKED]


@pytest.mark.parametrize("kind", Kind)
def test_every_end_before_the_write_gives_a_host_back_to_its_disk(kind: Kind) -> None:
    """From NETBOOTING on the host may be off or set to netboot; it is never left like that.

    A refused login is the exception: telling the BMC anything more would be a second try.
    """
    for (phase, event), (after, effects, _) in TABLES[kind].items():
        if phase in (Phase.NETBOOTING, Phase.PREPARING) and after in (
            Phase.FAILED,
            Phase.CANCELLED,
        ):
            expected = () if event is E.BMC_LOGIN_REFUSED else (ReturnToDisk(),)
            assert effects == expected, (phase, event)


# --- the boot-override ladder -------------------------------------------------------------


def test_each_rung_gets_the_whole_limit_and_then_the_operation_ends() -> None:
    operation, now = operation_in(Phase.NETBOOTING), NOW
    rungs = []
    for rung in range(RUNG_LAST + 1):
        assert operation.rung == rung
        assert operation.deadline_at == now + LIMIT[Phase.NETBOOTING]
        now = operation.deadline_at
        event = deadline_event(operation)
        rungs.append(event)
        operation = advance(
            operation, HOST, event, now=now, generation=GENERATION, limits=LIMITS
        ).operation
    assert rungs == [E.RUNG_TIMED_OUT, E.RUNG_TIMED_OUT, E.TIMED_OUT]
    assert operation.phase is Phase.FAILED
    assert operation.phase_seconds[Phase.NETBOOTING] == 3 * LIMIT[Phase.NETBOOTING].total_seconds()


@pytest.mark.parametrize("rung", range(RUNG_LAST + 1))
def test_the_rung_reaches_the_bmc(rung: int) -> None:
    operation = operation_in(Phase.NETBOOTING, rung=rung)
    assert step(operation, E.POWERED_OFF).effects == (SetNextBoot(BootDevice.NETWORK, rung),)
    written = operation_in(Phase.VERIFYING, rung=rung)
    assert step(written, E.VERIFIED).effects == (SetNextBoot(BootDevice.DISK, rung),)


def test_a_higher_rung_switches_the_host_off_without_asking_its_system() -> None:
    after = step(operation_in(Phase.NETBOOTING), E.RUNG_TIMED_OUT)
    assert after.effects == (PowerOff(soft=False),)
    assert after.operation.rung == 1


@pytest.mark.parametrize("phase", [phase for phase in OPEN if phase is not Phase.NETBOOTING])
def test_only_netbooting_has_a_ladder(phase: Phase) -> None:
    assert deadline_event(operation_in(phase)) is E.TIMED_OUT
    with pytest.raises(NotAllowed):
        step(operation_in(phase), E.RUNG_TIMED_OUT)


# --- deadlines and what is kept -----------------------------------------------------------


@pytest.mark.parametrize("phase", [p for p in OPEN if p not in AGENT_WORKS])
def test_hearing_something_does_not_move_a_phase_deadline(phase: Phase) -> None:
    later = NOW + A_MINUTE
    assert LIMITS.deadline(phase, NOW, later) == NOW + LIMIT[phase]


@pytest.mark.parametrize("phase", AGENT_WORKS)
def test_a_silent_agent_is_given_up_and_a_talking_one_only_gets_its_phase(phase: Phase) -> None:
    assert LIMITS.deadline(phase, NOW, NOW) == NOW + AGENT_SILENCE_LIMIT
    operation = operation_in(phase)
    heard = step(operation, E.REPORTED, progress={"done_bytes": 1})
    assert heard.operation.deadline_at == NOW + A_MINUTE + AGENT_SILENCE_LIMIT
    assert heard.operation.phase_at == NOW
    nearly_over = NOW + LIMIT[phase] - timedelta(seconds=1)
    assert LIMITS.deadline(phase, NOW, nearly_over) == NOW + LIMIT[phase]


@pytest.mark.parametrize("phase", sorted(FINAL))
def test_what_has_ended_has_no_deadline(phase: Phase) -> None:
    assert LIMITS.deadline(phase, NOW, NOW) is None


def test_a_site_may_change_limits_and_advance_uses_them() -> None:
    limits = Limits(phase={**LIMIT, Phase.NETBOOTING: timedelta(seconds=42)})
    after = advance(
        operation_in(Phase.QUEUED), HOST, E.START, now=NOW, generation=GENERATION, limits=limits
    )
    assert after.operation.deadline_at == NOW + timedelta(seconds=42)


def test_an_error_is_kept_only_by_what_failed() -> None:
    error = {"code": "bmc_rejected", "message": "no"}
    failed = step(operation_in(Phase.NETBOOTING), E.BMC_FAILED, error=error)
    assert failed.operation.error == error
    noted = step(operation_in(Phase.BOOTING), E.BMC_FAILED, error=error)
    assert noted.operation.error is None


def test_evidence_adds_up_and_progress_is_the_last_word() -> None:
    operation = operation_in(Phase.WRITING, evidence={"disk": 1}, progress={"done_bytes": 1})
    after = step(operation, E.REPORTED, evidence={"seen": 2}, progress={"done_bytes": 5})
    heard_at = {AGENT_HEARD_AT: (NOW + timedelta(minutes=1)).isoformat()}
    assert after.operation.evidence == {"disk": 1, "seen": 2, **heard_at}
    assert after.operation.progress == {"done_bytes": 5}
    silent = step(after.operation, E.REPORTED)
    assert silent.operation.progress == {"done_bytes": 5}


@pytest.mark.parametrize("event", [E.PHONED_HOME, E.CHECKED])
def test_a_repeated_report_while_proving_restarts_no_clock(event: E) -> None:
    operation = operation_in(Phase.PROVING)
    assert step(operation, event).operation == operation
