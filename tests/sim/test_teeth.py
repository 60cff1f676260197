"""The simulation finds what is there: for every invariant something broken, and it is seen."""

from dataclasses import replace
from typing import Final

import pytest

from provisioner.core.fleet import NO_LIMIT, Floor
from tests.sim.judging import names
from tests.sim.report import replay_command, story_of
from tests.sim.service_process import Parts
from tests.sim.sizes import Size
from tests.sim.weaknesses import BREAKS, RACES
from tests.sim.world import Outcome, simulate

SEEDS_MAX: Final = 12
# From quiet to rough, and as few hosts as it takes for one to come into another's way.
ROUGH: Final = Size(hosts_max=3, intensities=(1.0, 6.0, 15.0))
# One host, and little else than disks that fail: for what follows a failure by itself.
FAILING: Final = Size(
    hosts_max=1,
    intensities=(8.0,),
    cancelled_share=0.0,
    automatic_share=1.0,
    released_share=0.0,
    faults=("disk",),
)
# Four hosts of one group, and little that goes wrong.
GROUP: Final = Size(
    hosts_min=4,
    intensities=(1.0,),
    cancelled_share=0.0,
    groups=("web",),
    group_in_flight=(NO_LIMIT,),
    group_starts=(NO_LIMIT,),
    group_floors=(Floor(),),
)
# Two services from the beginning, each of which often waits for the other one's lock.
TWO: Final = replace(GROUP, rounds=1, two_services_share=1.0, lock_share=0.2, faults=("disk",))
# A backup is put back in each, in the middle of what is going on.
RESTORED: Final = Size(hosts_max=2, intensities=(1.0,), cancelled_share=0.0, restored_share=1.0)
# What is seen only when two things meet that seldom do: runs in which they often do.
SIZES: Final = {
    "a_chain_has_its_attempts_and_one_way_back": FAILING,
    "a_disk_that_was_written_is_proven_or_quarantined": FAILING,
    "a_quarantined_host_is_left_alone": FAILING,
    "a_quarantined_host_is_switched_off": replace(FAILING, rounds=1),
    "nothing_starts_while_the_breaker_is_open": replace(FAILING, hosts_min=4, hosts_max=4),
    "what_is_due_follows": FAILING,
    "nothing_is_done_until_a_person_reconciles": RESTORED,
    "a_restored_database_is_noticed_and_no_other_one": RESTORED,
    "reconciling_ends_what_was_of_then": RESTORED,
    "one_agent_writes_for_each_generation": RESTORED,
    "no_group_has_more_in_flight_than_it_may": replace(GROUP, group_in_flight=(1,)),
    "no_group_starts_faster_than_it_may": replace(GROUP, group_starts=(1,)),
    "a_group_keeps_its_healthy_hosts": replace(GROUP, group_floors=(Floor(percent=50),)),
    "nothing_is_refused_without_a_reason": TWO,
    "a_flagged_host_gets_no_permission": Size(
        hosts_max=1, intensities=(1.0,), flagged_share=1.0, chunks_s=(90.0,)
    ),
    "an_untouched_host_is_given_back": Size(rounds=1, intensities=(1.0,), cancelled_share=1.0),
    "each_seed_leaves_once": Size(
        hosts_max=1, intensities=(14.0,), faults=("message unanswered", "message doubled")
    ),
    "nobody_cuts_the_power_of_a_disk_being_written": Size(
        hosts_max=1,
        intensities=(1.0,),
        restarted_share=1.0,
        network_first_share=1.0,
        chunks_s=(20.0,),
    ),
    "nothing_is_written_without_a_live_permission": Size(
        hosts_max=1, rounds=1, intensities=(1.0,), chunks_s=(20.0,)
    ),
    "what_has_ended_opens_nothing": Size(
        hosts_max=1, intensities=(16.0,), chunks_s=(20.0,), faults=("message doubled", "disk")
    ),
}


@pytest.mark.parametrize("invariant", names())
def test_what_breaks_an_invariant_is_found(invariant: str) -> None:
    check_is_found(invariant, BREAKS[invariant], SIZES.get(invariant, ROUGH))


@pytest.mark.parametrize("invariant", RACES)
def test_a_race_of_two_services_is_found(invariant: str) -> None:
    check_is_found(invariant, RACES[invariant], TWO)


def check_is_found(invariant: str, weakness: Parts, size: Size) -> None:
    found = first_broken(invariant, weakness, size)
    assert found is not None, f"not in {SEEDS_MAX} seeds"
    assert found.broken is not None
    assert found.broken[0] == invariant
    story = story_of(found)
    assert f"BROKEN {invariant}" in story, "the last events lead up to it"
    assert story.endswith(replay_command(found.seed))
    # It is the weakness that was found: without it, the same seed breaks nothing.
    whole = simulate(found.seed, size=size)
    assert whole.broken is None, story_of(whole)


def first_broken(invariant: str, weakness: Parts, size: Size) -> Outcome | None:
    """Return the first run in which the weakness made for this invariant is seen."""
    for seed in range(1, SEEDS_MAX + 1):
        outcome = simulate(seed, weakness, size, judges=[invariant])
        if outcome.broken is not None:
            return outcome
    return None
