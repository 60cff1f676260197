"""Whether a host asks from the address that our own DHCP gave it, where ours does that.

Elsewhere firmware, iPXE and Linux may get different leases, and nothing can be said.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

# dnsmasq empties its file of leases and writes it anew, for every answer to anybody. Whoever is
# missing there is looked for again before it is believed.
LOOKS: Final = 4
PAUSE_S: Final = 0.05

# By MAC; None where nobody can tell who has which address.
Leases = Mapping[str, frozenset[str]] | None


def _nobody_can_tell() -> Leases:
    return None


class Addresses:
    """`leases` returns addresses by MAC; `own` are this service's own addresses, from which
    its TFTP relay, a proxy in front of it, or whoever may read its database anyhow asks."""

    def __init__(
        self,
        leases: Callable[[], Leases] = _nobody_can_tell,
        own: Collection[str] = (),
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._leases = leases
        self._pause = pause
        self._own = frozenset(own)

    def is_own(self, source: str) -> bool:
        return source in self._own

    def has_moved(self, before: str, source: str) -> bool:
        """Say whether what came from `before` comes from elsewhere now, where our own DHCP
        fixes addresses."""
        if source == before or self.is_own(source):
            return False
        return self._leases() is not None

    def doubt(self, macs: Collection[str], source: str) -> str | None:
        """Return why a host with these MACs cannot be the one at `source`; None when it can.

        Who netboots where our DHCP answers has a lease from it: the same answer told it where
        to boot from. Whoever has none got there by somebody else's.
        """
        if self.is_own(source):
            return None
        doubt = self._look(macs, source)
        for _ in range(LOOKS - 1):
            if doubt is None:
                return None
            self._pause(PAUSE_S)
            doubt = self._look(macs, source)
        return doubt

    def _look(self, macs: Collection[str], source: str) -> str | None:
        leases = self._leases()
        if leases is None:
            return None
        given = sorted(address for mac in macs for address in leases.get(mac, ()))
        if source in given:
            return None
        gave = f"gave it {' or '.join(given)}" if given else "gave it no address"
        return f"it asks from {source}, and our DHCP {gave}"
