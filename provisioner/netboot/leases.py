"""Reads which addresses our own dnsmasq has given to whom."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

FILE_BYTES_MAX: Final = 4 * 1024 * 1024  # some 60,000 leases

# 1764075600 52:54:00:77:00:01 10.77.0.101 r1n1 ff:56:50:4d:98:00:02: expiry, MAC, address,
# name, client id. A number before the MAC is a kind of hardware that is not Ethernet.
_LEASE = re.compile(r"\d+ ([0-9a-f]{2}(?::[0-9a-f]{2}){5}) (\d+\.\d+\.\d+\.\d+) ")


def leases_in(file: Path) -> Mapping[str, frozenset[str]] | None:
    """Return by MAC the addresses it has a lease for; None when the file cannot be read, as
    where the DHCP runs on another machine.

    dnsmasq writes the file anew before it answers, so whoever uses an address stands in it;
    but for a moment, while it writes, part of the file or all of it is missing.
    """
    try:
        with file.open(encoding="ascii", errors="replace") as opened:
            text = opened.read(FILE_BYTES_MAX)
    except OSError:
        return None
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if lease := _LEASE.match(line):
            found.setdefault(lease[1], set()).add(lease[2])
    return {mac: frozenset(addresses) for mac, addresses in found.items()}
