"""How an error looks on standard error: what happened, to which host, what was expected,
what was found, and what to do."""

import json
import os
import traceback

import click

from provisioner.errors import ProvisionerError

VALUE_CHARACTERS_MAX = 2000


def colour() -> bool | None:
    """Return False where NO_COLOR asks for plain text (https://no-color.org), else None: as
    the stream is a terminal or not."""
    return False if os.environ.get("NO_COLOR") else None


def show_error(error: ProvisionerError) -> None:
    """Print the error, one line for each thing that is known."""
    click.echo(
        click.style("Error: ", fg="red", bold=True) + clean(error.message), err=True, color=colour()
    )
    for name in ("host", "expected", "found", "hint"):
        value = getattr(error, name)
        if value is not None:
            label = click.style(f"  {name + ':':<10}", bold=True)
            click.echo(label + clean(_text(value)), err=True, color=colour())


def show_bug(error: Exception) -> None:
    """Print the trace of an error that nobody expected."""
    traceback.print_exception(error)
    click.echo("Error: this is a bug of provisioner; please report the lines above", err=True)


def clean(text: str) -> str:
    """Return text without control characters, which a terminal would obey."""
    return "".join(one if one.isprintable() or one == "\n" else "�" for one in text)


def _text(value: object) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        text = ", ".join(str(item) for item in value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_CHARACTERS_MAX else text[:VALUE_CHARACTERS_MAX] + " …"
