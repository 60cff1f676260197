"""Generates DHCP configurations: dnsmasq for ourselves, snippets for a site's own server.

Runs nothing (see `dnsmasq.py`). All of them say the same: a BIOS gets `undionly.kpxe`, a
UEFI `snponly.efi` or, where Secure Boot is on, `shimx64.efi`, and iPXE itself the address of
its boot script.
"""

import ipaddress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.netboot.quoting import (
    Quoted,
    Render,
    address,
    base_url,
    constant,
    interface,
    path,
    renderer,
    seconds,
)

BIOS_FILE: Final = "undionly.kpxe"
# Drives the NIC through the firmware. Measured in QEMU: a fifth of ipxe.efi, and 4.6 s faster.
UEFI_FILE: Final = "snponly.efi"
# A UEFI with Secure Boot on refuses iPXE, which nobody signed. DHCP cannot see which does.
SHIM_FILE: Final = "shimx64.efi"

# iPXE expands these itself. hexhyp and uristring are its encodings for a URL; a serial
# often holds blanks. netX is the interface it is booting from.
SCRIPT_QUERY: Final = (
    "mac=${netX/mac:hexhyp}&uuid=${uuid}&serial=${serial:uristring}&platform=${platform}"
)

# How dnsmasq knows a host that must be given shim.
SHIM_TAG: Final = "secure-boot"

# The `file` field of a DHCP packet holds 128 bytes with the final NUL (RFC 2131 §2).
# Longer names go only as option 67, which some boot ROMs do not read.
BOOT_FILE_CHARACTERS_MAX: Final = 127


class DhcpMode(StrEnum):
    """full: we give out addresses. proxy: another server does, we add how to boot. off."""

    FULL = "full"
    PROXY = "proxy"
    OFF = "off"


class UefiLoader(StrEnum):
    """What every UEFI host is given, but those that are known to have Secure Boot on."""

    IPXE = "ipxe"
    SHIM = "shim"


class DhcpServer(StrEnum):
    """The DHCP servers that we can print a snippet for."""

    DNSMASQ = "dnsmasq"
    KEA = "kea"
    ISC = "isc"


@dataclass(frozen=True)
class NetbootConfig:
    """The provisioning network as DHCP describes it.

    `boot_url` is the boot listener, `tftp_address` the IPv4 address of our TFTP server on
    this network, `subnet` such as 10.77.0.0/24. `lease` must outlast a deployment: the
    ramdisk keeps its address without renewing it. `hosts_file` is where our own dnsmasq
    reads which hosts get shim whatever `uefi_loader` says (see `shim_hosts.py`).
    """

    boot_url: str
    tftp_address: str
    interface: str
    subnet: str
    range_start: str
    range_end: str
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    lease: timedelta = timedelta(hours=12)
    lease_file: Path = Path("/var/lib/provisioner/dnsmasq.leases")
    hosts_file: Path = Path("/var/lib/provisioner/dnsmasq.hosts")
    uefi_loader: UefiLoader = UefiLoader.IPXE


def boot_script_url(boot_url: str) -> Quoted:
    """Return the boot file name for iPXE, with `${…}` for iPXE to expand.

    Raises ConfigError when it does not fit into a DHCP packet.
    """
    url = f"{base_url(boot_url, scheme='http')}/boot/ipxe?{SCRIPT_QUERY}"
    if len(url) > BOOT_FILE_CHARACTERS_MAX:
        raise ConfigError(
            "the boot listener's URL is too long for a DHCP packet",
            expected=f"at most {BOOT_FILE_CHARACTERS_MAX} characters with the query",
            found=f"{len(url)} characters",
            hint="use the listener's IPv4 address in its URL",
        )
    # The query is this module's own constant and the base URL is checked, so the `${`
    # in it did not come from data.
    return constant(url)


def dnsmasq_config(config: NetbootConfig, mode: DhcpMode) -> str:
    """Return a whole configuration for a dnsmasq of our own: no DNS, one interface.

    Raises ConfigError for a value that does not fit, and for mode `off`, which runs none.
    """
    if mode is DhcpMode.OFF:
        raise ConfigError("DHCP is off, so there is no dnsmasq to configure")
    return _render()("server.conf.j2", {**_values(config), "mode": mode.value})


def dhcp_snippet(config: NetbootConfig, server: DhcpServer) -> str:
    """Return what the site's own DHCP server needs so that its hosts netboot from here."""
    return _render()(f"snippet.{server.value}.j2", _values(config))


def _values(config: NetbootConfig) -> dict[str, object]:
    subnet = _subnet(config)
    return {
        "interface": interface(config.interface),
        "subnet": constant(str(subnet)),
        "network": constant(str(subnet.network_address)),
        "netmask": constant(str(subnet.netmask)),
        "range_start": _inside(config.range_start, subnet),
        "range_end": _inside(config.range_end, subnet),
        "gateway": _inside(config.gateway, subnet) if config.gateway else None,
        "dns": [address(server) for server in config.dns],
        "dns_list": constant(", ".join(address(server) for server in config.dns)),
        "lease_s": seconds(config.lease),
        "lease_file": path(config.lease_file),
        "pid_file": path(config.lease_file.parent / "dnsmasq.pid"),
        "hosts_file": path(config.hosts_file),
        "tftp_address": address(config.tftp_address),
        "bios_file": constant(BIOS_FILE),
        "uefi_file": constant(SHIM_FILE if config.uefi_loader is UefiLoader.SHIM else UEFI_FILE),
        "shim_file": constant(SHIM_FILE),
        "shim_tag": constant(SHIM_TAG),
        "script_url": boot_script_url(config.boot_url),
    }


def _subnet(config: NetbootConfig) -> ipaddress.IPv4Network:
    try:
        subnet = ipaddress.IPv4Network(config.subnet)
    except ValueError as error:
        raise ConfigError(
            "the provisioning subnet is not one", expected="10.77.0.0/24", found=config.subnet
        ) from error
    if ipaddress.IPv4Address(_inside(config.range_start, subnet)) > ipaddress.IPv4Address(
        _inside(config.range_end, subnet)
    ):
        raise ConfigError(
            "the DHCP range ends before it starts",
            found=f"{config.range_start} to {config.range_end}",
        )
    return subnet


def _inside(text: str, subnet: ipaddress.IPv4Network) -> Quoted:
    quoted = address(text)
    if ipaddress.IPv4Address(quoted) not in subnet:
        raise ConfigError(
            "an address is outside the provisioning subnet", expected=str(subnet), found=text
        )
    return quoted


@cache
def _render() -> Render:
    return renderer("dnsmasq")
