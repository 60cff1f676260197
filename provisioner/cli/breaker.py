"""`provisioner breaker`: show whether anything may start, and let it start again."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show_one

if TYPE_CHECKING:
    from provisioner.client import Client


@click.group(cls=SuggestingGroup)
def breaker() -> None:
    """Show and close the breaker, which opens when too many hosts have failed."""


@breaker.command("show")
@output_option
@connected
def show_(client: "Client", output: str) -> None:
    """Show whether the breaker is open: then nothing starts until a person closes it."""
    found = client.breaker()
    if output == "name":
        click.echo("open" if found["is_open"] else "closed")
    else:
        show_one(found, output)


@breaker.command("close")
@click.option("--reason", required=True, help="Why it is safe to go on; kept in the audit log.")
@connected
def close(client: "Client", reason: str) -> None:
    """Let queued operations start again."""
    closed = client.close_breaker(reason)
    click.echo(f"the breaker is closed; it had opened because {closed['reason']}")
