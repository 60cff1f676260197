"""What is said of a run that broke an invariant."""

from .world import Outcome


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
