"""Decides what a host that asks the network how to boot is told. Pure: no I/O, no clock.

The rule: it boots its own disk, unless one live boot ticket exists for exactly this host.
Unknown hosts boot their own disk too, or an inspection where discovery is switched on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from provisioner.core.model import Firmware, HostId, LocalBoot, Secret, Ticket
from provisioner.errors import RequestError

# What a firmware says about itself is only ever shown to people; longer is noise.
REPORTED_CHARACTERS_MAX: Final = 128

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PLATFORMS: Final = {"pcbios": Firmware.BIOS, "efi": Firmware.UEFI}


class Loader(StrEnum):
    """Which boot loader asks for the host, and in whose language the answer is written."""

    IPXE = "iPXE"
    GRUB = "GRUB"  # after shim, where Secure Boot is on


@dataclass(frozen=True)
class BootRequest:
    """What a host says of itself when it asks. Only `mac` decides anything: boards are
    shipped with equal UUIDs and with serials such as `To be filled by O.E.M.`"""

    mac: str
    uuid: str | None = None
    serial: str | None = None
    firmware: Firmware | None = None
    loader: Loader = Loader.IPXE


@dataclass(frozen=True)
class KnownHost:
    """The part of a managed host that the rule needs."""

    id: HostId
    name: str
    macs: tuple[str, ...]
    local_boot: LocalBoot = LocalBoot.AUTO


@dataclass(frozen=True)
class TicketOffer:
    """A stored boot ticket with what only its issuer knows: its `value`, which the host is
    to hand back, and the digest of the ramdisk that was pinned when it was issued."""

    ticket: Ticket
    value: Secret
    ramdisk: str


@dataclass(frozen=True)
class LocalDisk:
    """Boot your own disk. `reason` is for the timeline, never for the script."""

    method: LocalBoot
    reason: str


@dataclass(frozen=True)
class Ramdisk:
    """Boot the deploy ramdisk with this digest, and hand the ticket back.

    `local_boot` is what the host does when the ramdisk cannot be fetched. `console` are
    kernel console names, the last one being /dev/console; `arguments` are added to the
    kernel command line as they are.
    """

    digest: str
    ticket: Secret
    local_boot: LocalBoot = LocalBoot.AUTO
    console: tuple[str, ...] = ("ttyS0,115200",)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspect:
    """Nobody knows this host and discovery is on: whoever carries the plan out issues an
    inspection ticket for `mac`, and renders `with_ticket`."""

    mac: str

    def with_ticket(self, offer: TicketOffer) -> Ramdisk:
        return Ramdisk(digest=offer.ramdisk, ticket=offer.value)


BootPlan = LocalDisk | Ramdisk | Inspect


def plan_boot(
    asking: BootRequest,
    known: KnownHost | None,
    ticket: TicketOffer | None,
    *,
    now: datetime,
    discovery: bool,
) -> BootPlan:
    """Return what the asking host is told. Every doubt ends at its own disk.

    `known` is the host found by the request's MAC, `ticket` the newest ticket of that host;
    both are checked again here, so a mistaken lookup cannot netboot a wrong host.
    """
    if known is None:
        if discovery:
            return Inspect(asking.mac)
        return LocalDisk(LocalBoot.AUTO, "no host with this MAC is managed here")
    if asking.mac not in known.macs:
        return LocalDisk(known.local_boot, f"{asking.mac} is not a MAC of {known.name}")
    refusal = _why_ticket_refused(known, ticket, now)
    if ticket is None or refusal is not None:
        return LocalDisk(known.local_boot, refusal or "no boot ticket")
    return Ramdisk(digest=ticket.ramdisk, ticket=ticket.value, local_boot=known.local_boot)


def _why_ticket_refused(known: KnownHost, offer: TicketOffer | None, now: datetime) -> str | None:
    if offer is None:
        return "no boot ticket"
    if offer.ticket.host_id != known.id:
        return "the boot ticket is another host's"
    if offer.ticket.consumed_at is not None:
        return "the boot ticket is consumed"
    if not offer.ticket.is_live(now):
        return "the boot ticket has expired"
    return None


def boot_request(query: Mapping[str, str], loader: Loader = Loader.IPXE) -> BootRequest:
    """Return the request that a boot loader put into the query of its script's URL.

    `mac` may be written with colons or hyphens. Raises RequestError when it is not a MAC;
    everything else that makes no sense is dropped, since it decides nothing.
    """
    mac = query.get("mac", "").lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise RequestError(
            "a boot request names no MAC", expected="mac=52:54:00:…", found=query.get("mac")
        )
    return BootRequest(
        mac=mac,
        uuid=_reported(query.get("uuid")),
        serial=_reported(query.get("serial")),
        # This GRUB is a program for UEFI.
        firmware=Firmware.UEFI
        if loader is Loader.GRUB
        else _PLATFORMS.get(query.get("platform", "")),
        loader=loader,
    )


def _reported(text: str | None) -> str | None:
    if not text or not text.isprintable():
        return None
    return text[:REPORTED_CHARACTERS_MAX]
