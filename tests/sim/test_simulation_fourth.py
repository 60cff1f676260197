"""The last quarter of two thousand reimages: see `test_simulation.py`."""

import pytest

from tests.sim.batches import check_batch


@pytest.mark.parametrize("batch", [6, 7])
def test_no_invariant_is_broken_by_six_faults_for_each_reimage(batch: int) -> None:
    check_batch(batch)
