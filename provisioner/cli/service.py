"""`provisioner service`: the services on one database, whose hosts are never targets."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show
from .site import ACTOR, config_option, opened

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["name", "version", "started_at", "uuid"]
WIDE = ["serial", "macs", "own_hosts", "key_id"]


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
@config_option
def forget(name: str, config: Path | None) -> None:
    """Forget a service that is gone or has moved: its old host may be rebuilt then.

    It works on the database itself, so that it helps where no service starts any more. One that
    still runs is known again when it is started the next time.
    """
    with opened(config) as site:
        site.service.services.forget(name, actor=ACTOR)
    click.echo(f"service {name} is forgotten")
