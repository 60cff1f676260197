"""`provisioner reimage`: rebuild the named hosts. There is no default and no "all"."""

from typing import TYPE_CHECKING

import click

from .connection import connected
from .output import output_option, show

if TYPE_CHECKING:
    from provisioner.client import Client


@click.command()
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option(
    "--release", required=True, metavar="RELEASE", help="image@version, or a digest's start."
)
@click.option("--wait", is_flag=True, help="Watch until all have ended.")
@click.option("--hard", is_flag=True, help="Cut the power without asking the system first.")
@output_option
@connected
def reimage(
    client: "Client", hosts: tuple[str, ...], release: str, wait: bool, hard: bool, output: str
) -> int:
    """Rebuild the named hosts from a release: all of them, or none.

    Their disks are rewritten. With --wait the exit code tells the worst outcome.
    """
    queued = client.deploy(hosts, release, soft_shutdown=not hard)
    if not wait:
        show(queued, ["id", "host", "release_name", "phase"], output)
        return 0
    from .watch import watch

    return watch(client, queued, output=output)
