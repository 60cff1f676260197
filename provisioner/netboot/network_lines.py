"""Puts what our DHCP and TFTP servers saw into words, as lines of a host's timeline.

Names that came from the network are cut and made printable; whose line it is, others find out.
"""

from datetime import datetime
from typing import Final

from provisioner.core.model import Event, Json

from .dnsmasq import DhcpEvent
from .tftp import TftpEvent

NAME_CHARACTERS_MAX: Final = 128

# What each packet says to a person. Those not listed tell nothing of a boot.
_PACKETS: Final = {
    "DISCOVER": "{client} asks for an address",
    "OFFER": "{address} offered to {client}",
    "REQUEST": "{client} asks for {address}",
    "ACK": "{address} given to {client}",
    "NAK": "{client} was refused the address it asked for",
    "PXE": "{client} told where to boot from; another server gives the address",
}

# What dnsmasq says when a client takes the offer of another server.
_ANOTHERS: Final = "server-ID"


def dhcp_line(event: DhcpEvent, at: datetime) -> Event | None:
    """Return a DHCP packet as a line, or None for one that tells nothing of a boot."""
    words = _PACKETS.get(event.kind)
    if words is None:
        return None
    text = words.format(client=f"the {event.client}", address=event.address or "an address")
    detail: Json = {"packet": event.kind, "client": str(event.client), "address": event.address}
    if event.kind in ("DISCOVER", "NAK") and event.text:
        # Why nothing is offered, such as `no address available`; never what the client said.
        detail["trouble"] = printable(event.text)
        text += f": {detail['trouble']}"
        if _ANOTHERS in event.text:
            detail["other_server"] = True
    return Event(at, "dhcp", f"{text} (DHCP {event.kind})", mac=event.mac, detail=detail)


def tftp_line(event: TftpEvent, at: datetime) -> Event:
    """Return what became of a request for a file as a line. Its MAC is for others to find."""
    name = printable(event.file)
    text = f"{name}: {event.outcome}"
    if event.sent_bytes:
        text += f", {event.sent_bytes} bytes in {event.seconds:.1f} s"
    if event.detail:
        text += f" ({printable(event.detail)})"
    detail: Json = {
        "file": name,
        "outcome": str(event.outcome),
        "sent_bytes": event.sent_bytes,
        "address": event.client,
    }
    return Event(at, "tftp", text, detail=detail)


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:NAME_CHARACTERS_MAX])
