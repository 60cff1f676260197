"""One batch of reimages, and what it has to have seen. Eight of them are two thousand; four
files of tests share them, so that they run side by side."""

from collections import Counter
from typing import Any, Final

from provisioner.core.lifecycle import DEPLOYMENT

from .report import story_of
from .world import simulate

REIMAGES_PER_BATCH: Final = 250
SEEDS_PER_BATCH: Final = 1000
FAULTS_PER_REIMAGE: Final = 6.0
# How much of the table of a deployment each batch has to walk. The rest are rows of events
# that need two rare things at once.
ROWS_SHARE_MIN: Final = 0.4


def check_batch(batch: int) -> None:
    """Run seeds until there were enough reimages; none may break an invariant.

    The seeds are fixed, so that a change that breaks something fails for everybody alike;
    `script/sim` goes on where these end.
    """
    reimages, seed = 0, batch * SEEDS_PER_BATCH
    faults: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    rows: set[Any] = set()
    while reimages < REIMAGES_PER_BATCH:
        seed += 1
        outcome = simulate(seed)
        assert outcome.broken is None, story_of(outcome)
        reimages += outcome.reimages
        faults += outcome.faults
        ended += outcome.ended
        rows |= {(phase, event) for _, phase, event in outcome.rows}
    assert seed < (batch + 1) * SEEDS_PER_BATCH, "the batches overlap"
    assert sum(faults.values()) / reimages >= FAULTS_PER_REIMAGE, faults
    # Faults that kept everything from going on would prove nothing.
    assert ended["deployment succeeded"] > reimages / 4, ended
    assert ended["deployment failed"], ended
    assert ended["deployment cancelled"], ended
    missing = [f"{phase} {event}" for phase, event in DEPLOYMENT if (phase, event) not in rows]
    assert len(missing) < len(DEPLOYMENT) * (1 - ROWS_SHARE_MIN), missing
