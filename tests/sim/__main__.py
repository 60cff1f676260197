"""Runs the simulation by hand: many seeds on all cores, or one of them with all it does.

`script/sim` calls it. Ends with 1 when an invariant was broken, and says how to see it again.
"""

import argparse
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from typing import Final

from .logs import be_quiet
from .report import story_of
from .world import Outcome, simulate

RUNS_DEFAULT: Final = 400
TOLD_EVERY: Final = 200
SEED_MAX: Final = 1_000_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/sim", description=__doc__)
    parser.add_argument("--runs", type=int, help=f"how many seeds to run (default {RUNS_DEFAULT})")
    parser.add_argument("--seed", type=int, help="the first seed; alone, run it and show it all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quiet", action="store_true", help="with --seed: only the last lines")
    asked = parser.parse_args()
    be_quiet()
    if asked.seed is not None and asked.runs is None:
        return show(asked.seed, is_quiet=asked.quiet)
    first = asked.seed if asked.seed is not None else secrets.randbelow(SEED_MAX)
    return run_many(first, asked.runs or RUNS_DEFAULT, asked.workers)


def show(seed: int, *, is_quiet: bool) -> int:
    """Run one seed, with every line of its trace."""
    outcome = simulate(seed, echo=None if is_quiet else _say)
    if outcome.broken is not None:
        _say(story_of(outcome))
    _say(f"seed {seed}: {outcome.reimages} reimages, {sum(outcome.faults.values())} faults")
    _say(f"trace {outcome.trace}")
    return 0 if outcome.broken is None else 1


def run_many(first: int, runs: int, workers: int) -> int:
    """Run seeds from `first` on, until one fails, and say how it went."""
    _say(f"seeds {first} to {first + runs - 1} on {workers} processes")
    began = time.monotonic()
    reimages, done = 0, 0
    ended: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for outcome in _outcomes(range(first, first + runs), workers):
        done += 1
        reimages += outcome.reimages
        ended += outcome.ended
        faults += outcome.faults
        if outcome.broken is not None:
            _say(story_of(outcome))
            return 1
        if done % TOLD_EVERY == 0:
            _say(f"{done} runs, {reimages} reimages, and nothing was broken")
    seconds = time.monotonic() - began
    _say(f"{done} runs, {reimages} reimages, {sum(faults.values())} faults in {seconds:.1f} s")
    _say(f"faults per reimage: {sum(faults.values()) / max(reimages, 1):.1f}")
    for name, count in sorted(ended.items()):
        _say(f"  {name}: {count}")
    rate = reimages / seconds / workers
    _say(f"sim_reimages_per_s_core {rate:.2f}")
    return 0


def _outcomes(seeds: Iterable[int], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        yield from map(simulate, seeds)
        return
    with get_context("spawn").Pool(workers, be_quiet) as pool:
        # Leaving the block ends what still runs.
        yield from pool.imap_unordered(simulate, seeds, chunksize=4)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
