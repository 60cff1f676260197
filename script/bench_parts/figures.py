"""Figures of a bench: rows of a table (median, spread, ratio) and the values for JSON."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What every bench is told: an empty folder to work in, and how many rounds."""

    folder: Path
    runs: int
    say: Say


@dataclass(frozen=True)
class Row:
    """One line: ours, and the reference's where there is one. Values of all rounds."""

    what: str
    unit: str
    ours: Sequence[float]
    reference: Sequence[float] = ()

    def cells(self) -> list[str]:
        ratio = ""
        if self.ours and self.reference and (base := statistics.median(self.reference)):
            ratio = f"{statistics.median(self.ours) / base:.2f}"
        return [self.what, self.unit, *_shown(self.ours), *_shown(self.reference), ratio]


@dataclass
class Result:
    """What a bench found. `reference` names what ours is compared with. `tables` are more
    tables, ready to be shown."""

    reference: str
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return the rows as a Markdown table, followed by the notes."""
        head = ["", "unit", "ours", "spread", self.reference, "spread", "ratio"]
        shown = [_table([head, *(row.cells() for row in self.rows)], texts=2), *self.tables]
        return "\n\n".join([*shown, "\n".join(f"- {note}" for note in self.notes)])


def plain_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are figures."""
    return _table([head, *lines], texts=1)


def _table(lines: Sequence[Sequence[str]], *, texts: int) -> str:
    """Return lines as a Markdown table, the first as its head; `texts` columns are no figures."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = [
        "-" * width if column < texts else "-" * max(width - 1, 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join(_line(line, widths, texts) for line in (lines[0], rule, *lines[1:]))


def _line(cells: Sequence[str], widths: Sequence[int], texts: int) -> str:
    padded = [
        cell.ljust(width) if column < texts else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _shown(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", ""
    spread = f"{number(min(values))}–{number(max(values))}" if len(values) > 1 else ""
    return number(statistics.median(values)), spread


def number(value: float) -> str:
    """Return a figure with three digits that mean something."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def median_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key over all rounds that have it."""
    keys = list(dict.fromkeys(key for one in rounds for key in one))
    return {key: median([one[key] for one in rounds if key in one]) for key in keys}


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)
