"""`provisioner service`: the services on one database, whose hosts are never targets."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["name", "version", "started_at", "uuid"]
WIDE = ["serial", "macs", "own_hosts"]


@click.group(cls=SuggestingGroup)
def service() -> None:
    """Show and forget services: the hosts that they run on are never targets."""


@service.command("list")
@output_option
@connected
def list_(client: "Client", output: str) -> None:
    """List the services that have started on this database, with what each found of its host."""
    show(client.services(), COLUMNS, output, wide_columns=WIDE)


@service.command("forget")
@click.argument("name")
@connected
def forget(client: "Client", name: str) -> None:
    """Forget a service that has moved to another host, so that its old one may be rebuilt."""
    client.forget_service(name)
    click.echo(f"service {name} is forgotten; while it runs, it is known again when it restarts")
