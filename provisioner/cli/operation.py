"""`provisioner operation`: show, watch and cancel operations."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .follow_up import way_out, what_follows
from .lazy import SuggestingGroup
from .output import output_option, show, show_one

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["id", "host", "kind", "phase", "release_name", "requested_at", "error.message"]
WIDE = ["waits", "requested_by", "ended_at", "generation", "rung", "phase_seconds", "next"]


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
    if output == "wide":
        found = [{**one, "next": what_follows(one)} for one in found]
    show(found, COLUMNS, output, wide_columns=WIDE)


@operation.command("show")
@click.argument("operation_id", metavar="ID")
@output_option
@connected
def show_(client: "Client", operation_id: str, output: str) -> None:
    """Show one operation with its phases, progress, error, evidence, and what follows it."""
    found = client.operation(operation_id)
    if output in ("table", "wide"):
        # Last, where a person looks first.
        found = {**found, "next": what_follows(found), "way_out": way_out(found)}
    show_one(found, output, name="id", hidden=["pins", "follow_up", "follow_up_at"])


@operation.command("cancel")
@click.argument("operation_id", metavar="ID")
@connected
def cancel(client: "Client", operation_id: str) -> None:
    """Cancel an operation that has not begun to write, or what is to follow a failed one.

    A host whose disk was written before, and not proven since, is quarantined then: it is not
    left to start what stands there.
    """
    cancelled = client.cancel(operation_id)
    click.echo(f"{cancelled['id']} on {cancelled['host']} is {cancelled['phase']}")
    if (follows := what_follows(cancelled)) is not None:
        click.echo(f"next: {follows}")
    if (way := way_out(cancelled)) is not None:
        click.echo(f"way out: {way}")


@operation.command("watch")
@click.argument("operation_ids", nargs=-1, required=True, metavar="ID...")
@output_option
@connected
def watch_(client: "Client", operation_ids: tuple[str, ...], output: str) -> int:
    """Watch operations, and those that follow them, until all have ended; the exit code tells
    the worst outcome."""
    from .watch import watch

    return watch(client, client.operations_by_id(operation_ids), output=output)
