"""Reads what this machine is, as far as it may be read, so that it is never a target; and which
version of this program runs on it."""

import importlib.metadata
from pathlib import Path
from typing import Final

from .core.own_host import OwnHost

TEXT_BYTES_MAX: Final = 256


def own_version() -> str:
    """Return this program's version, also when it runs from a clone that is not installed."""
    try:
        return importlib.metadata.version("provisioner")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def own_host(names: tuple[str, ...], root: Path = Path("/")) -> OwnHost:
    """Return this machine's SMBIOS identity and the MACs of its NICs, with the names of hosts
    that the settings add. What cannot be read is left out: SMBIOS is root's to read, and a
    virtual machine has none of the host below it.
    """
    identity = root / "sys/class/dmi/id"
    return OwnHost(
        uuid=_text(identity / "product_uuid"),
        serial=_text(identity / "product_serial"),
        macs=frozenset(_macs(root / "sys/class/net")),
        names=frozenset(names),
    )


def _macs(folder: Path) -> list[str]:
    found = []
    for nic in sorted(folder.glob("*")):
        # Only what has hardware behind it: a bridge or a tap may carry the MAC of a guest.
        if not (nic / "device").exists():
            continue
        # A NIC that is part of a bond shows the bond's MAC, and keeps its own here.
        for file in (nic / "address", nic / "bonding_slave/perm_hwaddr"):
            if mac := _text(file):
                found.append(mac.lower())
    return found


def _text(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(TEXT_BYTES_MAX).decode("ascii", "replace").strip() or None
    except OSError:
        return None
