"""Where the DHCP and TFTP parts put what they see of known hosts: into their timelines."""

from collections.abc import Iterator
from contextlib import contextmanager

from provisioner import wiring
from provisioner.in_force import mac_at
from provisioner.service.network_lines import NetworkLines
from provisioner.settings import Settings


@contextmanager
def network_lines(settings: Settings, service: wiring.Service) -> Iterator[NetworkLines]:
    """Yield what takes lines, and save at the end what waits."""
    lines = NetworkLines(service.store, mac_at(settings))
    try:
        yield lines
    finally:
        lines.close()
