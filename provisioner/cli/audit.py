"""`provisioner audit`: show the audit log and check its chain."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show, tell_of_more

if TYPE_CHECKING:
    from provisioner.client import Client


@click.group(cls=SuggestingGroup)
def audit() -> None:
    """Show and verify the audit log."""


@audit.command("list")
@click.option("--after", type=click.IntRange(0), help="Rows after this number, not the newest.")
@click.option("--limit", type=click.IntRange(1, 1000), default=200, help="At most so many.")
@output_option
@connected
def list_(client: "Client", after: int | None, limit: int, output: str) -> None:
    """Show the newest rows of the audit log, in their order."""
    rows = client.audit(after=after, limit=limit)
    columns = ["number", "at", "actor", "action", "subject"]
    show(rows, columns, output, wide_columns=["detail", "row_hash"])
    tell_of_more(rows, after, limit)


@audit.command("verify")
@connected
def verify(client: "Client") -> None:
    """Check that no row was edited, removed or added."""
    click.echo(f"{client.verify_audit()} rows hold together")
