"""The second half of two thousand reimages: a file of its own, to run beside the first."""

import pytest

from tests.sim.batches import BATCHES, check_batch

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("batch", range(1, BATCHES, 2))
def test_no_invariant_is_broken_by_six_faults_for_each_reimage(batch: int) -> None:
    check_batch(batch)
