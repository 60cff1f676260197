"""Whether a ramdisk runs on the host that its ticket is for, and what is learnt of the host.

Identity is written once: what is enrolled already is never overwritten.
"""

from dataclasses import replace

from provisioner.core.contracts import Tx
from provisioner.core.model import Firmware, Host, Json, Ticket
from provisioner.core.own_host import EMPTY_UUIDS, known_serial, known_uuid
from provisioner.errors import TrustError

from .agent_bodies import TEXT_MAX


class TicketRefused(TrustError):
    code = "ticket_refused"


class TicketContested(TicketRefused):
    """Two came with one ticket: neither goes on, since nobody can tell which is the host."""

    code = "ticket_contested"


class IdentityDoubtful(TicketRefused):
    """Who came with the ticket may be another host as well: the operation ends."""

    code = "identity_doubtful"


class TokenRefused(TrustError):
    code = "token_refused"


def with_inventory(host: Host, inventory: Json) -> Host:
    """Return the host with its inventory and what was not known of it before."""
    serial = str(inventory.get("serial") or "")
    return replace(
        host,
        inventory=inventory,
        uuid=host.uuid or known_uuid(_text(inventory, "uuid")),
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


def check_identity(ticket: Ticket, host: Host, inventory: Json) -> None:
    """Raise TicketRefused unless the inventory is that of the host whose ticket it is.

    It must have one of the MACs, the UUID and the serial that were enrolled when the ticket
    was issued, as far as they were known then.
    """
    macs, known = macs_in(inventory), ticket.macs or host.macs
    if not macs & set(known):
        raise TicketRefused(
            "this boot ticket belongs to another host",
            host=host.name,
            expected=list(known),
            found=sorted(macs),
        )
    uuid, serial = _text(inventory, "uuid"), _text(inventory, "serial")
    for what, enrolled, found in (
        ("UUID", known_uuid(ticket.uuid or host.uuid), known_uuid(uuid)),
        ("serial", known_serial(ticket.serial or host.serial), known_serial(serial)),
    ):
        if enrolled is not None and found != enrolled:
            raise TicketRefused(
                f"this boot ticket belongs to a host with another {what}",
                host=host.name,
                expected=enrolled,
                found=found or "none",
                hint="after a new mainboard, delete the host and add it again",
            )


def check_unique(tx: Tx, host: Host, inventory: Json) -> None:
    """Raise IdentityDoubtful when what came could be another host as well.

    Its UUID identifies nobody, or it has a UUID or a MAC that another host was enrolled with.
    """
    told = _text(inventory, "uuid").lower()
    if told in EMPTY_UUIDS:
        raise IdentityDoubtful(
            f"host {host.name} reports a UUID that identifies nobody",
            host=host.name,
            expected="a UUID of its own",
            found=told,
            hint="set it with the board maker's tool",
        )
    twins = [other.name for other in tx.hosts_with_uuid(told) if other.id != host.id]
    owners = {mac: tx.hosts_with_mac(mac) for mac in sorted(macs_in(inventory))}
    shared = {
        mac: sorted(owner.name for owner in found)
        for mac, found in owners.items()
        if any(owner.id != host.id for owner in found)
    }
    if twins or shared:
        raise IdentityDoubtful(
            f"host {host.name} has the UUID or a MAC of another host",
            host=host.name,
            expected="an identity of its own",
            found={"uuid": {told: twins}, "macs": shared} if twins else {"macs": shared},
            hint="correct what is enrolled; if two boards have one UUID, set another one",
        )


def macs_in(inventory: Json) -> set[str]:
    return {str(nic.get("mac", "")).lower() for nic in inventory["nics"] if isinstance(nic, dict)}


def _text(inventory: Json, key: str) -> str:
    return str(inventory.get(key) or "").strip()
