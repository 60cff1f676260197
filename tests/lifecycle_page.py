"""Draws docs/lifecycle.md from the tables: `python -m tests.lifecycle_page` writes it anew.

A test compares the page with the tables, so the picture cannot tell another story.
"""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.core.effects import Effect, PowerOff, SetNextBoot
from provisioner.core.lifecycle import (
    AGENT_SILENCE_LIMIT,
    HOST_MOVES,
    IN_RAMDISK_FOR,
    LIMIT,
    RUNG_LAST,
    TABLES,
    Table,
)
from provisioner.core.model import FINAL, Kind, Phase

PAGE: Final = Path(__file__).parent.parent / "docs" / "lifecycle.md"


def _spoken(limit: timedelta) -> str:
    minutes = int(limit.total_seconds() // 60)
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"


INTRODUCTION: Final = f"""\
# Lifecycle

Drawn from the tables in `provisioner/core/lifecycle.py` by `python -m tests.lifecycle_page`;
a test compares them. A row reads: in this phase, on this event, go to that phase, and wish
for these effects once that is saved. What has no row is refused and changes nothing. An event
names the generation it was observed for; another one is refused.

Three axes stay apart: what we know of a host's disk, one operation on the host, and the
rollout it belongs to.

Until `write_permitted` an operation can be cancelled, and the host is given back to its own
disk. From then on the old system is gone: the host is `dirty`, and the way out is forward, by
the deadline and what [recovery](recovery.md) says follows: another attempt, the way back to the
last good release, or quarantine.

A host gets {RUNG_LAST + 1} attempts to netboot, each with the whole limit of `netbooting`:
one-time network boot, the same with the 60-second flag timer held off, and persistent network
boot, which is cleared afterwards.

`return to its disk` clears a network boot and switches on a host that is off. It restarts one
whose agent was heard within {_spoken(IN_RAMDISK_FOR)}: that one is in the ramdisk, and may hang.
A host whose agent has been silent for longer is not restarted. Its agent's last word may have
been lost, and its own system be at work.
"""


def page() -> str:
    parts = [INTRODUCTION, "## Host: what we know of its disk\n", _fenced(_host_lines())]
    for kind in Kind:
        parts += [f"## {kind.capitalize()}\n", _fenced(_lines(TABLES[kind]))]
        parts.append(_rows(TABLES[kind]))
    parts += ["## How long a phase may last\n", _limits()]
    return "\n".join(parts)


def _fenced(lines: Iterator[str]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"```mermaid\nstateDiagram-v2\n{body}\n```\n"


def _host_lines() -> Iterator[str]:
    yield "[*] --> enrolled"
    for (state, event), after in HOST_MOVES.items():
        yield f"{state} --> {after}: {event}"
    yield "retired --> [*]"


def _lines(table: Table) -> Iterator[str]:
    """Yield one arrow for each pair of phases; events that share it share its label."""
    yield f"[*] --> {Phase.QUEUED}"
    arrows: dict[tuple[Phase, Phase], list[str]] = {}
    for (phase, event), (after, _, _) in table.items():
        arrows.setdefault((phase, after), []).append(event)
    for (phase, after), events in arrows.items():
        yield f"{phase} --> {after}: {', '.join(events)}"
    for phase in Phase:
        if phase in FINAL and any(after is phase for after, _, _ in table.values()):
            yield f"{phase} --> [*]"


def _rows(table: Table) -> str:
    lines = ["| phase | event | next phase | effects | host |", "|---|---|---|---|---|"]
    for (phase, event), (after, effects, host_event) in table.items():
        told = ", ".join(_effect(effect) for effect in effects)
        cells = (f"`{phase}`", f"`{event}`", f"`{after}`", told, f"`{host_event}`")
        text = " | ".join(cells if host_event else (*cells[:-1], ""))
        lines.append(f"| {text} |")
    return "\n".join(lines) + "\n"


def _effect(effect: Effect) -> str:
    if isinstance(effect, PowerOff):
        return "power off, softly first" if effect.soft else "power off"
    if isinstance(effect, SetNextBoot):
        return f"next boot = {effect.device}"
    return {"PowerOn": "power on", "ReturnToDisk": "return to its disk"}[type(effect).__name__]


def _limits() -> str:
    lines = ["| phase | limit |", "|---|---|"]
    lines += [f"| `{phase}` | {_spoken(limit)} |" for phase, limit in LIMIT.items()]
    lines += [
        "",
        "While the agent works (`preparing`, `writing`, `verifying`),",
        f"{_spoken(AGENT_SILENCE_LIMIT)} without a word of it end the phase, too.",
        "`[limits]` in [settings](settings.md) changes all of these.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
