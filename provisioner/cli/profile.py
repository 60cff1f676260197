"""`provisioner profile`: save and show profiles, which are files in git."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from provisioner.errors import RequestError

from .connection import connected
from .given_files import documents_in
from .lazy import SuggestingGroup
from .messages import clean
from .output import output_option, show, show_one, show_row

if TYPE_CHECKING:
    from provisioner.client import Client
    from provisioner.core.model import Json


@click.group(cls=SuggestingGroup)
def profile() -> None:
    """Save and show profiles."""


@profile.command("save")
@click.argument("file", metavar="FILE")
@click.option("--name", help="Its name; default: the file's name without its ending.")
@click.option(
    "--no-schema",
    is_flag=True,
    help="Do not ask the service's cloud-init, e.g. since that of the images is newer.",
)
@output_option
@connected
def save(client: "Client", file: str, name: str | None, no_schema: bool, output: str) -> None:
    """Save a YAML file as a revision of a profile; - is standard input.

    Where the service has a cloud-init, a cloud_config that its schema refuses is not saved.
    """
    document = documents_in(file)
    if not isinstance(document, dict):
        raise RequestError(
            "the file holds no profile", expected="a mapping", found=type(document).__name__
        )
    if name is None and file == "-":
        raise RequestError("a profile from standard input needs a name", expected="--name NAME")
    saved = client.save_profile(name or Path(file).stem, document, check_schema=not no_schema)
    show_row(saved, ["name", "digest", "created_at"], output)
    if not no_schema:
        _tell_of_check(saved["schema_check"])


def _tell_of_check(check: "Json") -> None:
    if check["checked_by"] is None:
        told = f"cloud_config was not checked: {check['note']}"
    elif check["note"] is None:
        told = f"cloud_config was checked by {check['checked_by']}"
    else:
        told = f"{check['checked_by']} takes this cloud_config, and warns: {check['note']}"
    click.echo(clean(told), err=True)


@profile.command("list")
@output_option
@connected
def list_(client: "Client", output: str) -> None:
    """List all profiles."""
    show(client.profiles(), ["name", "digest", "created_at"], output)


@profile.command("show")
@click.argument("name")
@output_option
@connected
def show_(client: "Client", name: str, output: str) -> None:
    """Show the newest revision of a profile, as YAML unless told otherwise."""
    found = client.profile(name)
    if output in ("table", "wide"):
        show_one({key: found[key] for key in ("name", "digest", "created_at")}, output)
        show_one(found["document"], "yaml")
    else:
        show_one(found, output)


@profile.command("delete")
@click.argument("name")
@connected
def delete(client: "Client", name: str) -> None:
    """Delete a profile that no host uses."""
    client.delete_profile(name)
    click.echo(f"profile {name} is deleted")
