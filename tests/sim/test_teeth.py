"""The simulation finds what is there: for every invariant something broken, and it is seen."""

from typing import Final

import pytest

from tests.sim.invariants import names
from tests.sim.report import replay_command, story_of
from tests.sim.weaknesses import BREAKS
from tests.sim.world import Outcome, Size, simulate

pytestmark = pytest.mark.soak

SEEDS_MAX: Final = 40
# From quiet to rough, and as few hosts as it takes for one to come into another's way.
ROUGH: Final = Size(hosts_max=3, intensities=(1.0, 6.0, 15.0))
# What has to be found where little else goes wrong.
SIZES: Final = {
    "an_untouched_host_is_given_back": Size(rounds=1, intensities=(1.0,), cancelled_share=1.0)
}


@pytest.mark.parametrize("invariant", names())
def test_what_breaks_an_invariant_is_found(invariant: str) -> None:
    found = first_broken(invariant)
    assert found is not None, f"not in {SEEDS_MAX} seeds"
    assert found.broken is not None
    assert found.broken[0] == invariant
    story = story_of(found)
    assert f"BROKEN {invariant}" in story, "the last events lead up to it"
    assert story.endswith(replay_command(found.seed))


def first_broken(invariant: str) -> Outcome | None:
    """Return the first run in which the weakness made for this invariant is seen."""
    size = SIZES.get(invariant, ROUGH)
    for seed in range(1, SEEDS_MAX + 1):
        outcome = simulate(seed, BREAKS[invariant], size, judges=[invariant])
        if outcome.broken is not None:
            return outcome
    return None


def test_nothing_is_found_where_nothing_is_broken() -> None:
    """The same seeds, without a weakness: it is the weakness that was found."""
    for seed in range(1, 11):
        outcome = simulate(seed, size=ROUGH)
        assert outcome.broken is None, story_of(outcome)
