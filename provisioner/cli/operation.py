"""`provisioner operation`: show, watch and cancel operations."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show, show_one

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["id", "host", "kind", "phase", "release_name", "requested_at", "error.message"]
WIDE = ["waits", "requested_by", "ended_at", "generation", "rung", "phase_seconds"]


@click.group(cls=SuggestingGroup)
def operation() -> None:
    """Show, watch and cancel operations."""


@operation.command("list")
@click.option("--host", help="Of this host only.")
@click.option("--open", "only_open", is_flag=True, help="Only those that have not ended.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, help="At most so many.")
@output_option
@connected
def list_(client: "Client", host: str | None, only_open: bool, limit: int, output: str) -> None:
    """List operations, newest first."""
    found = client.operations(host=host, only_open=only_open, limit=limit)
    show(found, COLUMNS, output, wide_columns=WIDE)


@operation.command("show")
@click.argument("operation_id", metavar="ID")
@output_option
@connected
def show_(client: "Client", operation_id: str, output: str) -> None:
    """Show one operation with its phases, progress, error and evidence."""
    show_one(client.operation(operation_id), output, name="id", hidden=["pins"])


@operation.command("cancel")
@click.argument("operation_id", metavar="ID")
@connected
def cancel(client: "Client", operation_id: str) -> None:
    """Cancel an operation whose disk was not yet written."""
    cancelled = client.cancel(operation_id)
    click.echo(f"{cancelled['id']} on {cancelled['host']} is {cancelled['phase']}")


@operation.command("watch")
@click.argument("operation_ids", nargs=-1, required=True, metavar="ID...")
@output_option
@connected
def watch_(client: "Client", operation_ids: tuple[str, ...], output: str) -> int:
    """Watch operations until all have ended; the exit code tells the worst outcome."""
    from .watch import watch

    return watch(client, client.operations_by_id(operation_ids), output=output)
