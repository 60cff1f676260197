"""What every read prints: `-o table|wide|json|yaml|name`. Knows no command."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import click

from .messages import clean

FORMATS: Final = ("table", "wide", "json", "yaml", "name")
Row = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

# Between columns, and below which a column is not worth folding, both in characters.
GAP: Final = 2
READABLE: Final = 10

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP: Final = 1024


def output_option(command: F) -> F:
    """Add `-o`, as the argument `output`."""
    option = click.option(
        "-o", "--output", type=click.Choice(FORMATS), default="table", help="How to print it."
    )
    return option(command)


def show(
    rows: Sequence[Row], columns: Sequence[str], fmt: str, *, wide_columns: Sequence[str] = ()
) -> None:
    """Print rows. `columns` are keys, or paths such as `operation.phase`; `wide_columns`
    come after them in format wide. json and yaml print every key; name prints the first
    column alone."""
    if fmt == "json":
        click.echo(json.dumps(list(rows), indent=2, ensure_ascii=False, default=str))
    elif fmt == "yaml":
        _echo_yaml(list(rows))
    elif fmt == "name":
        for row in rows:
            click.echo(clean(_cell(row, columns[0])))
    else:
        shown = [*columns, *wide_columns] if fmt == "wide" else list(columns)
        _echo_table([_title(name) for name in shown], [[_cell(r, c) for c in shown] for r in rows])


def show_row(
    row: Row, columns: Sequence[str], fmt: str, *, wide_columns: Sequence[str] = ()
) -> None:
    """Print one thing as a row of `show`; as json and yaml by itself, not in a list."""
    if fmt in ("json", "yaml"):
        show_one(row, fmt)
    else:
        show([row], columns, fmt, wide_columns=wide_columns)


def tell_of_more(rows: Sequence[Row], after: int | None, limit: int) -> None:
    """Say on standard error that numbered rows ended at the limit, and how to see others."""
    if len(rows) < limit:
        return
    if after is None:
        click.echo(f"these are the newest {limit}; from the first one on: --after 0", err=True)
    else:
        last = rows[-1]["number"]
        click.echo(f"for newer ones, if there are any: --after {last}", err=True)


def show_one(item: Row, fmt: str, *, name: str = "name", hidden: Sequence[str] = ()) -> None:
    """Print one thing: as `key: value` lines, or as json, yaml or its name. `hidden` keys
    are left out of the lines unless they are asked for with wide."""
    if fmt == "json":
        click.echo(json.dumps(item, indent=2, ensure_ascii=False, default=str))
    elif fmt == "yaml":
        _echo_yaml(item)
    elif fmt == "name":
        click.echo(clean(str(item[name])))
    else:
        keys = [key for key in item if fmt == "wide" or key not in hidden]
        width = max(len(key) for key in keys) + 1
        for key in keys:
            label = click.style(f"{key.replace('_', ' ') + ':':<{width}} ", bold=True)
            click.echo(label + clean(_cell(item, key)))


def _cell(row: Row, path: str) -> str:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return text_of(path, value)


def text_of(name: str, value: Any) -> str:
    """Return a value as a person reads it; its unit is in its name."""
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    if name == "at" or (name.endswith("_at") and isinstance(value, str)):
        return _moment(str(value))
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def size(count: int) -> str:
    """Return bytes in the unit that leaves one to four digits."""
    amount, unit = float(count), 0
    while amount >= _STEP and unit < len(_UNITS) - 1:
        amount, unit = amount / _STEP, unit + 1
    return f"{amount:.0f} {_UNITS[unit]}" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"


def _moment(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text


def _title(column: str) -> str:
    return column.split(".")[-1].replace("_", " ").upper()


def _echo_yaml(value: Any) -> None:
    import yaml

    plain = json.loads(json.dumps(value, default=str))
    click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)


def _echo_table(titles: list[str], rows: list[list[str]]) -> None:
    """Print columns: in colour and folded to the width on a terminal where that can be read,
    plain elsewhere. A folded first column could not be copied."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *cells, strict=True)]
    folded = widths[0] + sum(GAP + min(width, READABLE) for width in widths[1:])
    if not sys.stdout.isatty() or folded > shutil.get_terminal_size().columns:
        for line in [titles, *cells]:
            padded = (" " * GAP).join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True))
            click.echo(padded.rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", no_wrap=number == 0)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)
