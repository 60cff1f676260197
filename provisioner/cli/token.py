"""`provisioner token`: API tokens of people and programs."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show

if TYPE_CHECKING:
    from provisioner.client import Client

DAY_S = 24 * 3600


@click.group(cls=SuggestingGroup)
def token() -> None:
    """Create, list and revoke API tokens."""


@token.command("create")
@click.argument("name")
@click.option(
    "--role",
    required=True,
    type=click.Choice(("viewer", "operator", "publisher", "admin")),
    help="What it may do.",
)
@click.option("--expires-in-days", type=click.IntRange(1, 3650), help="Default: never.")
@connected
def create(client: "Client", name: str, role: str, expires_in_days: int | None) -> None:
    """Create a token and print it, for the only time."""
    seconds = expires_in_days * DAY_S if expires_in_days is not None else None
    click.echo(client.create_token(name, role, expires_in_s=seconds).reveal())
    click.echo("this is shown only once; nobody can look it up", err=True)


@token.command("list")
@output_option
@connected
def list_(client: "Client", output: str) -> None:
    """List tokens, without their values, which nobody has."""
    columns = ["name", "role", "created_at", "expires_at", "revoked_at"]
    show(client.tokens(), columns, output)


@token.command("revoke")
@click.argument("name")
@connected
def revoke(client: "Client", name: str) -> None:
    """Revoke a token at once."""
    client.revoke_token(name)
    click.echo(f"token {name} is revoked")
