"""What is said of a run that broke an invariant, and the quiet that all runs need."""

import logging

import structlog

from .world import Outcome


def be_quiet() -> None:
    """Have the service log nothing: a fault is no news here, and the trace tells what happens."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def replay_command(seed: int) -> str:
    """Return the one command that shows a run again, with all it does."""
    return f"script/sim --seed {seed}"


def story_of(outcome: Outcome) -> str:
    """Return the seed, the last events, the invariant, and how to see it again."""
    assert outcome.broken is not None
    name, wrong = outcome.broken
    last = "\n".join(outcome.last)
    return (
        f"{last}\n\nseed {outcome.seed} broke {name}:\n  {wrong}\n"
        f"see it again: {replay_command(outcome.seed)}"
    )
