"""`provisioner init`: a new installation in a folder."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _port_option(name: str, default: int, text: str) -> Callable[[F], F]:
    ports = click.IntRange(1, 65535)
    return click.option(name, type=ports, default=default, show_default=True, help=text)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--listen-address",
    default="127.0.0.1",
    metavar="ADDRESS",
    show_default=True,
    help="This machine's address on the provisioning network.",
)
@click.option("--interface", default="", help="Network interface for DHCP, such as br0.")
@click.option(
    "--dhcp",
    type=click.Choice(("full", "proxy", "off")),
    default="off",
    show_default=True,
    help="Give out addresses, add to another server's answers, or stay out of DHCP.",
)
@click.option("--subnet", default="", help="Provisioning network; default: a /24.")
@click.option("--range-start", default="", help="First address to give out; default: .100.")
@click.option("--range-end", default="", help="Last address to give out; default: .199.")
@click.option("--gateway", default="", help="Router that hosts are told; default: none.")
@click.option("--dns", multiple=True, help="Name server that hosts are told; repeatable.")
@click.option(
    "--api-listen",
    default="127.0.0.1:8080",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Where the API listens.",
)
@_port_option("--boot-port", 8081, "Port of the boot listener.")
@_port_option("--agent-port", 8443, "Port of the agent listener.")
@_port_option("--tftp-port", 69, "Port of TFTP.")
@click.option(
    "--database",
    default="sqlite:///state.db",
    show_default=True,
    help="SQLite file in DIR, or postgresql+psycopg://user@host/database.",
)
@click.option("--discovery/--no-discovery", default=False, help="Inspect unknown machines.")
def init(
    folder: Path,
    listen_address: str,
    interface: str,
    dhcp: str,
    subnet: str,
    range_start: str,
    range_end: str,
    gateway: str,
    dns: tuple[str, ...],
    api_listen: str,
    boot_port: int,
    agent_port: int,
    tftp_port: int,
    database: str,
    discovery: bool,
) -> None:
    """Write a configuration with strong keys into a folder.

    Never overwrites: a folder that holds an installation is left as it is.
    """
    from provisioner.errors import RequestError
    from provisioner.setting_types import Wrong, listen
    from provisioner.setup import Plan, initialise

    try:
        api = listen(api_listen)
    except Wrong as wrong:
        raise RequestError(
            "--api-listen is not usable", expected=str(wrong), found=api_listen
        ) from wrong
    plan = Plan(
        listen_address=listen_address,
        interface=interface,
        dhcp=dhcp,
        subnet=subnet,
        range_start=range_start,
        range_end=range_end,
        gateway=gateway,
        dns=dns,
        api=api,
        boot_port=boot_port,
        agent_port=agent_port,
        tftp_port=tftp_port,
        database=database,
        discovery=discovery,
    )
    settings = initialise(folder, plan)
    click.echo(f"wrote {settings.path}")
    click.echo(f"wrote keys into {settings.keys.folder}; keep a copy in a safe place")
    named = shlex.quote(str(settings.path))
    click.echo(f"next: provisioner doctor --config {named}")
    click.echo(f"      provisioner serve --config {named}")
