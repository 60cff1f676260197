"""How an invariant is written down, and asked.

An invariant is one function with one sentence. It is told what was just seen, and returns what
is wrong with it, or None. It reads the world's own truth, and the rows of the last commit; it
trusts nothing the service says. To add one, write it in one of the modules `invariants*.py`
with its decorator; `test_teeth.py` then asks for something broken that it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .observations import Observation

if TYPE_CHECKING:
    from .world import World

Judge = Callable[[Any, "World"], str | None]

JUDGES: Final[dict[type, list[Judge]]] = {}


def about(*kinds: type) -> Callable[[Judge], Judge]:
    """Have a function asked about observations of these kinds."""

    def register(judge: Judge) -> Judge:
        for kind in kinds:
            JUDGES.setdefault(kind, []).append(judge)
        return judge

    return register


def names() -> list[str]:
    """Return the names of all invariants."""
    return sorted({judge.__name__ for judges in JUDGES.values() for judge in judges})


def broken_by(saw: Observation, world: World) -> tuple[str, str] | None:
    """Return the first invariant that does not hold, and what is wrong."""
    for judge in JUDGES.get(type(saw), ()):
        wrong = judge(saw, world) if judge.__name__ in world.judges else None
        if wrong is not None:
            return judge.__name__, wrong
    return None
