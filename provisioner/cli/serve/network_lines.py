"""Where the DHCP and TFTP parts put what they see of known hosts: into their timelines."""

from collections.abc import Iterator
from contextlib import contextmanager

from provisioner import wiring
from provisioner.in_force import dhcp_leases
from provisioner.netboot.leases import leases_in
from provisioner.netboot.neighbours import neighbour_at
from provisioner.service.network_lines import NetworkLines
from provisioner.settings import Settings


@contextmanager
def network_lines(settings: Settings, service: wiring.Service) -> Iterator[NetworkLines]:
    """Yield what takes lines, and save at the end what waits."""

    def mac_at(address: str) -> str | None:
        """Our own leases know best; elsewhere our kernel has just spoken with the address."""
        if settings.dhcp.mode == "full":
            for mac, addresses in (leases_in(dhcp_leases(settings)) or {}).items():
                if address in addresses:
                    return mac
        return neighbour_at(address)

    lines = NetworkLines(service.store, mac_at)
    try:
        yield lines
    finally:
        lines.close()
