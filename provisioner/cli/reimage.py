"""`provisioner reimage`: rebuild the named hosts. There is no default and no "all"."""

from typing import TYPE_CHECKING, Any

import click

from provisioner.errors import RequestError

from .connection import connected
from .messages import clean
from .output import output_option, show

if TYPE_CHECKING:
    from provisioner.client import Client


@click.command()
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option(
    "--release", metavar="RELEASE", help="IMAGE@VERSION, IMAGE:CHANNEL, or a digest's start."
)
@click.option("--full", is_flag=True, help="Write everything, also what is on the disk already.")
@click.option(
    "--verify-only",
    is_flag=True,
    help="Compare the disks with RELEASE, by default what each host runs; write nothing.",
)
@click.option("--wait", is_flag=True, help="Watch until all have ended.")
@click.option("--hard", is_flag=True, help="Cut the power without asking the system first.")
@click.option(
    "--attempts",
    type=click.IntRange(1, 10),
    help="Try it so often at most, 1 for once; default: as the service's settings say.",
)
@output_option
@connected
def reimage(
    client: "Client",
    hosts: tuple[str, ...],
    release: str | None,
    full: bool,
    verify_only: bool,
    wait: bool,
    hard: bool,
    attempts: int | None,
    output: str,
) -> int:
    """Rebuild the named hosts from a release: all of them, or none.

    Their disks are made equal to it; only what differs is fetched and written. What fails is
    tried again, and at last taken back to the release that ran before; --wait watches all of
    that, and its exit code tells the worst outcome. --verify-only netboots the hosts, counts what a
    reimage would fetch, and starts them from their disk again as they were.

    \b
      provisioner reimage r1n7 r1n8 --release web@2026.11.2 --wait
      provisioner reimage r1n7 --release web:stable --full
      provisioner reimage r1n7 --verify-only --wait
    """
    if verify_only:
        given = {"--full": full, "--hard": hard, "--attempts": attempts is not None}
        _refuse("--verify-only", **given)
        queued = client.verify(hosts, release)
    elif release is None:
        raise RequestError(
            "no release is named",
            expected="--release IMAGE@VERSION or IMAGE:CHANNEL",
            hint="provisioner image list; only --verify-only does without one",
        )
    else:
        queued = client.deploy(hosts, release, soft_shutdown=not hard, full=full, attempts=attempts)
        _warn_of_failures(queued)
    if not wait:
        show(queued, ["id", "host", "release_name", "phase"], output)
        return 0
    from .watch import watch

    return watch(client, queued, output=output)


def _warn_of_failures(queued: list[dict[str, Any]]) -> None:
    """Say which hosts this very release has failed on before."""
    for one in queued:
        before = one["pins"].get("failed_before")
        if before:
            click.echo(
                clean(
                    f"warning: {one['release_name']} has failed on {one['host']} before, "
                    f"at {before['at'][:19]} ({before['code']}, {before['operation']}): "
                    f"{before['message']}"
                ),
                err=True,
            )


def _refuse(beside: str, **options: bool) -> None:
    """Raise RequestError for an option that means nothing beside another."""
    for name, is_given in options.items():
        if is_given:
            raise RequestError(f"{name} means nothing beside {beside}")
