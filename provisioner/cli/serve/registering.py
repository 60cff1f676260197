"""Tells the database which host a service is starting on, for all others there to know."""

import socket

from provisioner import wiring
from provisioner.failpoints import Reach
from provisioner.own_identity import own_host, own_version
from provisioner.service.chance import Derived
from provisioner.settings import Settings


def register(settings: Settings, reach: Reach | None = None) -> None:
    """Save what this service finds of the host below it. Raises Unavailable, and ConfigError
    beside services that have another master key."""
    service = wiring.build(settings, reach)
    try:
        found = own_host(settings.service.own_hosts)
        key_id = Derived(bytes.fromhex(settings.keys.master.reveal())).key_id
        service.services.register(_name_of(settings), found, own_version(), key_id)
    finally:
        service.close()


def _name_of(settings: Settings) -> str:
    """Return the name by which people know this service: its parts may be on several hosts."""
    here = socket.gethostname()
    named = settings.service.name
    return here if named in ("", here) else f"{named}@{here}"
