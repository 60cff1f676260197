"""The command line of `provisioner serve`."""

from pathlib import Path

import click

from ..site import config_option


@click.command("serve")
@config_option
@click.option(
    "--only",
    multiple=True,
    metavar="PARTS",
    help="Run these parts only: api,boot,tftp,dhcp,worker. boot has the agent listener too. "
    "May be repeated.",
)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Written when all parts answer, with their addresses; removed at the end.",
)
def serve_command(config: Path | None, only: tuple[str, ...], ready_file: Path | None) -> None:
    """Run the service.

    The configuration is checked whole before anything listens. SIGTERM stops it cleanly.
    """
    from .command import serve

    parts = tuple(part.strip() for part in ",".join(only).split(",") if part.strip())
    serve(config, parts, ready_file)
