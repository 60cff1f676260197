"""`provisioner why`: where a host's boot stands, why, and what to do. Decides nothing."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from .connection import connected
from .messages import clean
from .output import output_option, show_one

if TYPE_CHECKING:
    from provisioner.client import Client

_LABEL: Final = 6
_SOURCE: Final = 11
_STEPS: Final = ((86_400, "days"), (3600, "h"), (60, "min"))


@click.command("why")
@click.argument("name")
@output_option
@connected
def why(client: "Client", name: str, output: str) -> None:
    """Say where a host's boot stands, why, and what to do."""
    answer = client.why(name)
    if output not in ("table", "wide"):
        show_one(answer, output, name="cause")
        return
    now = datetime.now(UTC)
    for line in lines_of(answer, now):
        click.echo(line)


def lines_of(answer: dict[str, Any], now: datetime) -> list[str]:
    """Return the answer as a person reads it: where, why, what was seen, what to do."""
    told = [_line(answer["host"], _where(answer, now), width=len(answer["host"]))]
    told += [_line("why", f"{answer['why']}  [{answer['cause']}]")]
    seen = [
        f"{_moment(one['at'], now)}  {one['source']:<{_SOURCE}}{one['text']}"
        for one in answer["evidence"]
    ]
    return told + _block("seen", seen) + _block("do", answer["next"])


def _where(answer: dict[str, Any], now: datetime) -> str:
    said, since, until = answer["stands"], answer["since"], answer["deadline_at"]
    if since is not None:
        lasted = _span((now - datetime.fromisoformat(since)).total_seconds())
        said += f"; since {_moment(since, now)} ({lasted})"
    if until is not None:
        said += f", at most until {_moment(until, now)}"
    return str(said)


def _block(label: str, lines: list[str]) -> list[str]:
    return [_line(label if number == 0 else "", text) for number, text in enumerate(lines)]


def _line(label: str, text: str, width: int = _LABEL) -> str:
    return click.style(f"{clean(label):<{width}}", bold=True) + "  " + clean(text)


def _moment(text: str, now: datetime) -> str:
    moment = datetime.fromisoformat(text).astimezone()
    is_today = moment.date() == now.astimezone().date()
    return moment.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    """Return a duration as a person says it, in its largest unit."""
    for size, unit in _STEPS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
