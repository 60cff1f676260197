"""BMCs that lie, on the real path: what we expect of each, held against what really happened."""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from provisioner.core.model import HostState, Operation, Phase
from tests.faulty_bmc.faults import POWER, Command, Faults, Traits
from tests.faulty_bmc.lies import LIES, Ends, Lie, table
from tests.faulty_bmc.simulated_host import Source
from tests.parts.bmc_trial import HALF, NEW, OLD, Trial, running_trial
from tests.parts.service_site import Site


def judge(trial: Trial, ended: Operation) -> Ends:
    """Return what it came to, and hold what must always be true."""
    host = trial.site.hosts.show(trial.host_name)
    if ended.phase is Phase.SUCCEEDED:
        assert (trial.disk, trial.running) == (NEW, NEW), "a false healthy"
        assert host.state is HostState.ACTIVE
        return Ends.REBUILT
    assert host.state is not HostState.ACTIVE
    assert host.release is None
    if trial.disk == OLD:
        # It was netbooted with its ticket or not at all, and it runs what it ran before.
        assert trial.running in (OLD, "")
        return Ends.UNTOUCHED
    assert trial.disk in (HALF, NEW)
    assert host.state is HostState.DIRTY
    return Ends.DIRTY


# What `why` makes of each end. A host that started its disk says nothing on the network here.
WHY: Final = {
    None: "healthy",
    "netbooting_timed_out": "nothing_heard",
    "writing_timed_out": "agent_silent",
    "bmc_disobeyed": "bmc_disobeyed",
    "bmc_unreachable": "bmc_unreachable",
    "bmc_busy": "bmc_busy",
    "bmc_auth_failed": "bmc_wrong_password",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name.replace(" ", "_"))
def test_field_13_a_lie_is_found_out_by_evidence(site: Site, tmp_path: Path, lie: Lie) -> None:
    with running_trial(site, tmp_path, lie.faults, lie.traits) as trial:
        ended = trial.deploy(soft_shutdown=lie.is_shut_down_softly)
        found = (judge(trial, ended), ended.rung, (ended.error or {}).get("code"))
        assert found == (lie.ends, lie.rung, lie.code), ended.error
        assert trial.site.why.ask(trial.host_name).diagnosis.cause == WHY[lie.code]
        assert trial.bmc.host.is_on == lie.is_on_after
        assert not trial.bmc.is_overlapped
        if lie.ends is Ends.REBUILT:
            assert Source.NETWORK in trial.bmc.host.boots()


# What may come together. None of them is silent for long: those cost real time.
COMPOSED: Final[tuple[Mapping[str, Any], ...]] = (
    {"forgets_flags": True},
    {"obeys_hold": False},
    {"refused": {Command.HOLD_TIMER: 0x80}},
    {"keeps_once": True},
    {"is_one_start_late": True},
    {"needs_efi_bit": True},
    {"reading": "always off", "lies_until": 200.0},
    {"reading": "always on", "lies_until": 200.0},
    {"reading": "as told"},
    {"reading": "off, then on"},
    {"reading": "two and two"},
    {"not_done": frozenset({Command.SOFT_OFF})},
    {"not_done": frozenset({Command.OFF})},
    {"again_after": dict.fromkeys(POWER, 3.0)},
    {"again_after": {Command.OFF: 60.0, Command.SOFT_OFF: 60.0}},
    {"not_answered": dict.fromkeys(Command, 1)},
    {"mangling": "after random bytes"},
    {"mangling": "twice"},
    {"slots": 5, "ignores_logout": True},
    {"slots": 4, "taken_slots": 4},
    {"password_changes_after": Command.RESET},
    {"password_changes_after": Command.OFF},
)
HOSTS: Final = (
    Traits(),
    Traits(post_seconds=90),
    Traits(post_seconds=0, shutdown_seconds=0),
    Traits(shutdown_seconds=120),
    Traits(ignores_button=True),
    Traits(is_on=False),
)
COMPOSITIONS: Final = 12


@pytest.mark.parametrize("seed", range(COMPOSITIONS))
def test_four_faults_together_never_make_a_false_healthy(
    site: Site, tmp_path: Path, seed: int
) -> None:
    chance = Random(seed)
    chosen: dict[str, Any] = {}
    for fault in chance.sample(COMPOSED, 4):
        chosen.update(fault)
    traits = chance.choice(HOSTS)
    with running_trial(site, tmp_path, Faults(**chosen), traits) as trial:
        ended = trial.deploy(soft_shutdown=chance.random() < 0.7)
        assert ended.is_final
        ends = judge(trial, ended)
        if ends is Ends.UNTOUCHED and ended.error and ended.error["code"] != "bmc_auth_failed":
            assert trial.bmc.host.is_on, (chosen, traits)
        assert not trial.bmc.is_overlapped
        assert trial.bmc.sessions.counts.refused_logins == 0


def test_the_page_on_bmcs_lists_every_lie() -> None:
    page = Path(__file__).parents[2] / "docs" / "bmc.md"
    assert table() in page.read_text()
