"""How far a host's netboot came, as its timeline tells: power, DHCP, TFTP, boot script, downloads.

Pure. Reads the details of events, never their words. Not seen is not the same as not
happened: where another server gives out the addresses, our DHCP sees little of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Final

from .downloads import Fetched, fetched
from .model import Event

# Who on a host asks DHCP, as an event's detail says.
FIRMWARE: Final = "firmware"
IPXE: Final = "iPXE"
SYSTEM: Final = "system"
_NETBOOTERS: Final = (FIRMWARE, IPXE)

_FILE_CAME: Final = ("served", "unconfirmed")
_ASKS: Final = ("DISCOVER", "REQUEST", "PXE")


class Reach(IntEnum):
    """The furthest that a netboot was seen to come."""

    NOTHING = 0
    ASKED = 1  # for an address, and nothing was offered
    OFFERED = 2  # and not taken
    ADDRESSED = 3
    FILE_MISSED = 4  # asked for a file, and did not get it whole
    LOADED = 5  # iPXE, or shim and GRUB, run
    SCRIPT = 6  # it was told to boot the ramdisk
    RAMDISK = 7  # a system asked for an address after that


@dataclass(frozen=True)
class Trace:
    """What was seen since the operation began. `turned_away` is the last answer that sent the
    host to its own disk, `own_system` the first word of a system that nobody netbooted,
    `missed_file` the last file that did not come through, `refused` the last address that our
    DHCP refused, `fetched` how far kernel and ramdisk came, where that is seen."""

    reach: Reach
    powered_on_at: datetime | None = None
    heard_at: datetime | None = None
    turned_away: Event | None = None
    own_system: Event | None = None
    missed_file: Event | None = None
    asked: int = 0
    why_nothing_offered: str | None = None
    refused: Event | None = None
    fetched: Fetched | None = None


def trace(events: Sequence[Event]) -> Trace:
    """Return how far it came. `events` are those since the operation left the queue, in order;
    a later start that came less far does not undo what an earlier one showed."""
    scripts = [one for one in events if _is_script(one, "ramdisk")]
    booted = [one for one in events if _told(one) == "powered_on"]
    heard = [one for one in events if _is_of_the_host(one)]
    files = [one for one in events if one.source == "tftp"]
    missed = [one for one in files if one.detail.get("outcome") not in _FILE_CAME]
    asked = list(_packets(events, "DISCOVER", _NETBOOTERS))
    return Trace(
        reach=_reach(events, scripts),
        powered_on_at=booted[-1].at if booted else None,
        heard_at=heard[-1].at if heard else None,
        turned_away=_last(one for one in events if _is_script(one, "disk")),
        own_system=_own_system(events, booted, scripts),
        missed_file=missed[-1] if missed else None,
        asked=len(asked),
        why_nothing_offered=asked[-1].detail.get("trouble") if asked else None,
        refused=_last(_packets(events, "NAK", _NETBOOTERS)),
        fetched=fetched(events, scripts),
    )


def _reach(events: Sequence[Event], scripts: Sequence[Event]) -> Reach:
    if scripts:
        came_up = any(_is_system(one) and one.at > scripts[0].at for one in events)
        return Reach.RAMDISK if came_up else Reach.SCRIPT
    files = {str(one.detail.get("outcome")) for one in events if one.source == "tftp"}
    if files & set(_FILE_CAME) or any(_packets(events, "ACK", (IPXE,))):
        return Reach.LOADED
    if files:
        return Reach.FILE_MISSED
    for packet, reach in (
        ("ACK", Reach.ADDRESSED),
        ("PXE", Reach.ADDRESSED),
        ("OFFER", Reach.OFFERED),
        ("DISCOVER", Reach.ASKED),
        ("REQUEST", Reach.ASKED),
    ):
        if any(_packets(events, packet, _NETBOOTERS)):
            return reach
    return Reach.NOTHING


def _own_system(
    events: Sequence[Event], booted: Sequence[Event], scripts: Sequence[Event]
) -> Event | None:
    """Return the first word of a system after the host was switched on, unless a ramdisk may
    have said it."""
    if not booted:
        return None
    ends_at = scripts[0].at if scripts else None
    for one in events:
        in_time = one.at >= booted[0].at and (ends_at is None or one.at < ends_at)
        if in_time and (_is_system(one) or one.source == "cloud-init"):
            return one
    return None


def _packets(events: Iterable[Event], packet: str, clients: Sequence[str]) -> Iterable[Event]:
    for one in events:
        is_it = one.source == "dhcp" and one.detail.get("packet") == packet
        if is_it and one.detail.get("client") in clients:
            yield one


def _is_system(event: Event) -> bool:
    is_dhcp = event.source == "dhcp" and event.detail.get("client") == SYSTEM
    return is_dhcp and event.detail.get("packet") in _ASKS


def _is_of_the_host(event: Event) -> bool:
    return event.source in ("dhcp", "tftp", "http")


def _is_script(event: Event, answer: str) -> bool:
    return event.source == "http" and event.detail.get("answer") == answer


def _told(event: Event) -> str | None:
    return event.detail.get("event") if event.source == "bmc" else None


def _last(events: Iterable[Event]) -> Event | None:
    found = list(events)
    return found[-1] if found else None
