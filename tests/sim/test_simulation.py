"""Two thousand reimages with six faults each, and no invariant is ever broken: the first quarter.

`test_simulation_second.py` and so on are the others: files of their own, to run side by side.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.sim.batches import check_batch
from tests.sim.world import simulate

PROJECT: Final = Path(__file__).parents[2]
WAIT_LIMIT_S: Final = 300


@pytest.mark.parametrize("batch", [0, 1])
def test_no_invariant_is_broken_by_six_faults_for_each_reimage(batch: int) -> None:
    check_batch(batch)


@pytest.mark.parametrize("seed", [7, 1234])
def test_two_processes_see_the_same_happen_for_the_same_seed(seed: int) -> None:
    first, second = (last_line(seed, hash_seed) for hash_seed in ("1", "2"))
    assert first.startswith("trace ")
    assert first == second


def test_another_seed_is_another_run() -> None:
    assert simulate(7).trace != simulate(8).trace


def last_line(seed: int, hash_seed: str) -> str:
    """Return what `script/sim` says last, in a process that orders sets in its own way."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--quiet"],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=WAIT_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]
