"""`provisioner reconcile`: the way out after a database was restored."""

from typing import TYPE_CHECKING, Any

import click

from provisioner.errors import RequestError

from .connection import connected
from .output import output_option, show, show_one

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["host", "state", "state_then", "generation", "generation_seen", "generation_then"]
WIDE = ["operation", "phase"]
SEEN = ["kind", "at", "source", "operation_id", "generation"]


@click.command()
@click.option("--plan", "is_plan", is_flag=True, help="Show what is not known, and the way.")
@click.option("--apply", "digest", metavar="DIGEST", help="Carry out the plan that was shown.")
@output_option
@connected
def reconcile(client: "Client", is_plan: bool, digest: str | None, output: str) -> None:
    """Go on after a database was restored.

    A service whose database is older than its hosts only observes: it starts, permits and
    performs nothing. The plan shows what proved it and what becomes of each host; an admin
    applies exactly that plan.
    """
    if is_plan == (digest is not None):
        raise RequestError("say what to do", expected="either --plan or --apply DIGEST")
    plan = client.reconciliation() if digest is None else client.reconcile(digest)
    if output == "name":
        show(plan["hosts"], ["host"], output)
    elif output in ("json", "yaml"):
        show_one(plan, output)
    elif digest is None:
        _tell(plan, output)
    else:
        hosts = len(plan["hosts"])
        click.echo(f"reconciled; {hosts} hosts were changed, and the service works again")


def _tell(plan: dict[str, Any], output: str) -> None:
    if not plan["is_observing"]:
        click.echo("nothing is to be reconciled: the service works")
        return
    click.echo("Seen ahead of this database:")
    show(plan["sightings"], SEEN, output, wide_columns=["detail"])
    click.echo("\nWhat becomes of hosts; every other one stays as it is:")
    show(plan["hosts"], COLUMNS, output, wide_columns=WIDE)
    click.echo(
        "\nUnfinished operations end as failed (database_restored). What happened to hosts since"
        "\nthe backup is not known: compare their disks with `reimage --verify-only`."
        f"\n\nTo do exactly this: provisioner reconcile --apply {plan['digest']}"
    )
