"""Whether a ramdisk runs on the host that its ticket is for, and what is learnt of the host.

Identity is written once: what is enrolled already is never overwritten.
"""

from dataclasses import replace
from typing import Final

from provisioner.core.model import Firmware, Host, Json
from provisioner.errors import TrustError

from .agent_bodies import TEXT_MAX

# Firmware that was never given an identity reports one of these; they identify nobody.
EMPTY_UUIDS: Final = frozenset(
    {"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"}
)


class TicketRefused(TrustError):
    code = "ticket_refused"


class TokenRefused(TrustError):
    code = "token_refused"


def with_inventory(host: Host, inventory: Json) -> Host:
    """Return the host with its inventory and what was not known of it before."""
    uuid = str(inventory.get("uuid") or "").lower()
    serial = str(inventory.get("serial") or "")
    return replace(
        host,
        inventory=inventory,
        uuid=host.uuid or (uuid if uuid and uuid not in EMPTY_UUIDS else None),
        serial=host.serial or serial[:TEXT_MAX] or None,
        firmware=_firmware(host, inventory.get("firmware")),
    )


def _firmware(host: Host, reported: object) -> Firmware | None:
    """Return what is reported: not identity, somebody may have switched the mode since.

    But a host once known for Secure Boot stays so until a person says otherwise: its way to
    netboot also works with Secure Boot off, and the other way fails with it on.
    """
    if not isinstance(reported, str) or reported not in set(Firmware):
        return host.firmware
    found = Firmware(reported)
    is_switched_off = host.firmware is Firmware.SECURE_BOOT and found is Firmware.UEFI
    return host.firmware if is_switched_off else found


def check_identity(host: Host, inventory: Json) -> None:
    """Raise TicketRefused when the inventory has no MAC of the host, or another UUID."""
    macs = {str(nic.get("mac", "")).lower() for nic in inventory["nics"] if isinstance(nic, dict)}
    if not macs & set(host.macs):
        raise TicketRefused(
            "this boot ticket belongs to another host",
            host=host.name,
            expected=list(host.macs),
            found=sorted(macs),
        )
    uuid = str(inventory.get("uuid") or "").lower()
    if host.uuid and uuid != host.uuid:
        raise TicketRefused(
            "this boot ticket belongs to a host with another UUID",
            host=host.name,
            expected=host.uuid,
            found=uuid or "none",
            hint="after a new mainboard, delete the host and add it again",
        )
