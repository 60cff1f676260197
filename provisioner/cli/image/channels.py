"""`image promote`, `channels` and `revoke`: which releases are for whom, and which for nobody."""

from typing import TYPE_CHECKING, Final

import click

from ..connection import connected
from ..output import output_option, show, show_one

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS: Final = ("name", "release_name", "moved_at", "moved_by")


@click.command()
@click.argument("release")
@click.argument("channel")
@output_option
@connected
def promote(client: "Client", release: str, channel: str, output: str) -> None:
    """Move CHANNEL of RELEASE's image to RELEASE: candidate, canary, stable, or your own.

    Refused when the channel asks for more signatures than it has, or for a test that it has
    not passed. No host changes by this.

    \b
      provisioner image promote web@2026.11.2 canary
      provisioner image promote web:canary stable
    """
    show_one(client.promote(release, channel), output)


@click.command()
@click.option("--image", "name", metavar="NAME", help="Those of this image only.")
@output_option
@connected
def channels(client: "Client", name: str | None, output: str) -> None:
    """List channels and the releases that they point to.

    \b
      provisioner image channels
      provisioner image channels --image web -o json
    """
    found = [one for one in client.channels() if name in (None, one["image"])]
    show(found, COLUMNS, output, wide_columns=["digest"])


@click.command()
@click.argument("release")
@click.option("--reason", required=True, metavar="TEXT", help="Why; it is shown to whoever asks.")
@output_option
@connected
def revoke(client: "Client", release: str, reason: str, output: str) -> None:
    """Stop every deployment of RELEASE, for good: those that run, and all to come.

    Hosts that run it go on running it; `provisioner host list` shows which.

    \b
      provisioner image revoke web@2026.11.2 --reason "CVE-2026-1234 in libfoo"
    """
    shown = client.revoke_release(release, reason)
    show_one(
        {key: shown[key] for key in ("name", "digest", "revoked_at", "revoked_reason")}, output
    )
