"""The provisioning network of the settings, as the DHCP generators take it."""

from datetime import timedelta

from provisioner.in_force import dhcp_leases
from provisioner.netboot.dhcp import DhcpMode, NetbootConfig, UefiLoader
from provisioner.settings import Settings


def netboot_config(settings: Settings) -> NetbootConfig:
    """Return how DHCP describes the network. Settings have checked every value.

    Without a range (mode proxy or off) both ends are our own address; nothing uses them.
    """
    dhcp, tftp = settings.dhcp, settings.tftp.listen
    return NetbootConfig(
        boot_url=settings.boot.url,
        tftp_address=tftp.host,
        interface=dhcp.interface,
        subnet=dhcp.subnet,
        range_start=dhcp.range_start or tftp.host,
        range_end=dhcp.range_end or tftp.host,
        gateway=dhcp.gateway or None,
        dns=dhcp.dns,
        lease=timedelta(seconds=dhcp.lease_s),
        lease_file=dhcp_leases(settings),
        hosts_file=settings.data_dir / "dhcp" / "dnsmasq.hosts",
        uefi_loader=UefiLoader(dhcp.uefi_loader),
    )


def dhcp_mode(settings: Settings) -> DhcpMode:
    return DhcpMode(settings.dhcp.mode)
