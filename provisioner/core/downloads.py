"""What became of kernel and ramdisk on their way to a host, as its timeline tells.

Pure. By HTTP a download is seen from its first request on; by TFTP, where GRUB fetches, only
once it has ended.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final

from .model import Event

KERNEL: Final = "kernel"
RAMDISK: Final = "ramdisk"

# Put to an answer with a ramdisk where downloads from that address are seen as this host's. Only
# there is a line that is missing a sign of anything.
SEEN: Final = "downloads_seen"

# As GRUB asks TFTP for them.
_BY_TFTP: Final = re.compile(r"/ramdisks/[0-9a-f]{64}/(vmlinuz|initrd)")
_FILES: Final = {"vmlinuz": KERNEL, "initrd": RAMDISK}


class Download(StrEnum):
    """What a line says of a download."""

    ASKED = "asked"
    GOES_ON = "goes on"
    STALLED = "stalled"
    CUT = "cut"
    WHOLE = "whole"
    UNCONFIRMED = "unconfirmed"  # all was sent; only the last acknowledgement is missing
    MISSING = "missing"


# A loader that has the last byte may start what it has before it acknowledges that.
CAME: Final = (Download.WHOLE, Download.UNCONFIRMED)

_ENDS_OF_TFTP: Final = {
    "served": Download.WHOLE,
    "unconfirmed": Download.UNCONFIRMED,
    "not found": Download.MISSING,
}


@dataclass(frozen=True)
class Fetched:
    """The last that was seen: `state` of `file`, which the host took `taken_bytes` of. None when
    it was not asked for, though it would be seen here. `cuts` is how often a download broke off.
    """

    file: str
    state: Download | None
    at: datetime
    taken_bytes: int = 0
    size_bytes: int = 0
    cuts: int = 0

    @property
    def came(self) -> str:
        """How much of it came, in words."""
        of = f" of {self.size_bytes}" if self.size_bytes else ""
        return f"{self.taken_bytes}{of} bytes"


def fetched(events: Sequence[Event], scripts: Sequence[Event]) -> Fetched | None:
    """Return how far kernel and ramdisk came since the first of the scripts that named them; None
    where nothing can be said. A ramdisk that came whole once stands, whatever came later."""
    if not scripts:
        return None
    seen = [one for event in events if event.at >= scripts[0].at and (one := _seen(event))]
    whole = [one for one in seen if one.state in CAME]
    ramdisks = [one for one in whole if one.file == RAMDISK]
    if ramdisks:
        return ramdisks[-1]
    # That a kernel came whole may be told only once its ramdisk was asked for, so all that was
    # told of kernels before that is settled, and nothing of ramdisks is.
    left = [one for one in seen if one.file == RAMDISK or not whole or one.at > whole[-1].at]
    if left:
        return replace(left[-1], cuts=sum(one.state is Download.CUT for one in left))
    if not scripts[-1].detail.get(SEEN):
        return None
    return Fetched(RAMDISK if whole else KERNEL, None, scripts[-1].at)


def _seen(event: Event) -> Fetched | None:
    """Return what one line says of a download; None when it is of something else."""
    told = event.detail
    if event.source == "http" and "download" in told:
        taken, size = told.get("taken_bytes", 0), told.get("size_bytes", 0)
        return Fetched(told["file"], Download(told["download"]), event.at, taken, size)
    asked = _BY_TFTP.fullmatch(str(told.get("file"))) if event.source == "tftp" else None
    if asked is None:
        return None
    state = _ENDS_OF_TFTP.get(str(told.get("outcome")), Download.CUT)
    return Fetched(_FILES[asked[1]], state, event.at, told.get("sent_bytes", 0))
