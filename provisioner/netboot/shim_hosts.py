"""Keeps the file by which our dnsmasq knows the hosts with Secure Boot on.

DHCP tells nobody whether Secure Boot is on, and such a host refuses iPXE. So whoever is
enrolled as `secure-boot` gets shim, by MAC.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from provisioner.errors import ProvisionerError
from provisioner.netboot.dhcp import SHIM_TAG
from provisioner.netboot.quoting import mac
from provisioner.whole_files import replace_whole

# A host that is enrolled and reimaged at once asks for its address after some seconds.
LOOK_S: Final = 2.0

log = structlog.get_logger(__name__)


def hosts_file_text(macs: Sequence[str]) -> str:
    """Return what dnsmasq is configured with for these MACs, one line each, in order.

    A configuration file, since dnsmasq reads a dhcp-hostsfile only when it has given up root,
    and may not reach it any more. As for all hosts, leases go by the MAC alone.

    Raises ConfigError for a text that is no MAC.
    """
    return "".join(
        f"dhcp-host={one},id:*,set:{SHIM_TAG}\n" for one in sorted({mac(text) for text in macs})
    )


class ShimHosts:
    """Writes the file when the list has changed, and then calls `on_change`.

    `read_macs` may fail with a ProvisionerError, such as of a database that is away: the
    list then stays as it is, or empty. So may the disk (OSError): `look` raises it, and
    `run` looks again.
    """

    def __init__(
        self,
        file: Path,
        read_macs: Callable[[], Sequence[str]],
        *,
        on_change: Callable[[], None],
        look_s: float = LOOK_S,
    ) -> None:
        self._file = file
        self._read_macs = read_macs
        self._on_change = on_change
        self._look_s = look_s
        self._failed = False

    def look(self) -> bool:
        """Bring the file up to date once; return whether it changed."""
        try:
            text = hosts_file_text(self._read_macs())
        except ProvisionerError as error:
            if not self._failed:
                log.warning("hosts with Secure Boot on are not looked up", why=error.message)
            self._failed = True
            if self._file.exists():
                return False
            text = ""  # dnsmasq does not start without the file
        else:
            self._failed = False
        if self._file.exists() and self._file.read_text() == text:
            return False
        replace_whole(self._file, text)
        log.info("hosts with Secure Boot on", count=text.count("\n"))
        return True

    def run(self, stop: threading.Event) -> None:
        """Look until told to stop, whatever the disk or a signal to dnsmasq comes to."""
        changed = has_failed = False
        while not stop.wait(self._look_s):
            try:
                changed = self.look() or changed
                if changed:
                    self._on_change()
            except OSError as error:
                if not has_failed:
                    log.warning("list of hosts with Secure Boot on is not kept", why=str(error))
                has_failed = True
            else:
                changed = has_failed = False
