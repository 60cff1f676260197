"""`provisioner dhcp-config`: what the site's own DHCP server needs so that hosts netboot."""

from pathlib import Path

import click

from .site import config_option

_SERVERS = ("dnsmasq", "kea", "isc")


@click.command("dhcp-config")
@click.argument("server", type=click.Choice(_SERVERS))
@config_option
def dhcp_config(server: str, config: Path | None) -> None:
    """Print the configuration that makes SERVER netboot hosts from here.

    With `dhcp.mode = "off"` nothing of ours answers DHCP, and the site's own server does it.
    `dhcp.interface` and `dhcp.subnet` describe the network to it; kea and isc also need
    `dhcp.range_start` and `dhcp.range_end`.
    """
    from provisioner.errors import ConfigError
    from provisioner.netboot.dhcp import DhcpServer, dhcp_snippet
    from provisioner.settings import find_settings

    from .serve.network import netboot_config

    settings = find_settings(config)
    needed = ["interface", "subnet"]
    if server != "dnsmasq":  # its snippet goes beside a range that is there already
        needed += ["range_start", "range_end"]
    missing = [name for name in needed if not getattr(settings.dhcp, name)]
    if missing:
        raise ConfigError(
            "the provisioning network is not described",
            expected=", ".join(f"dhcp.{name}" for name in missing),
            found="not set",
            hint=f'set them in {settings.path}; dhcp.mode may stay "off"',
        )
    click.echo(dhcp_snippet(netboot_config(settings), DhcpServer(server)), nl=False)
