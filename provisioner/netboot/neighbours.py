"""Which MAC this machine's kernel last heard at an address: who asks TFTP where another server
gives out the addresses. Good enough for a line in a timeline, and for nothing else.
"""

import re
from pathlib import Path
from typing import Final

ARP_FILE: Final = Path("/proc/self/net/arp")
FILE_BYTES_MAX: Final = 1024 * 1024
_EMPTY: Final = "00:00:00:00:00:00"

# 10.77.0.101      0x1         0x2         52:54:00:77:00:01     *        br0
_ENTRY = re.compile(r"(\d+\.\d+\.\d+\.\d+) +\S+ +\S+ +([0-9a-f]{2}(?::[0-9a-f]{2}){5}) ")


def neighbour_at(address: str, file: Path = ARP_FILE) -> str | None:
    """Return the MAC at an IPv4 address; None when the kernel knows none."""
    try:
        with file.open(encoding="ascii", errors="replace") as opened:
            text = opened.read(FILE_BYTES_MAX)
    except OSError:
        return None
    for line in text.splitlines():
        if (found := _ENTRY.match(line)) and found[1] == address and found[2] != _EMPTY:
            return found[2]
    return None
