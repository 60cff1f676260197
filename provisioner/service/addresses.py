"""Whether a host asks from the address that our own DHCP gave it, where ours does that.

Elsewhere firmware, iPXE and Linux may get different leases, and nothing can be said.
"""

from collections.abc import Callable, Collection, Mapping


def _no_leases() -> Mapping[str, frozenset[str]]:
    return {}


class Addresses:
    """`leases` returns addresses by MAC; `own` are this service's own addresses, from which
    its TFTP relay, a proxy in front of it, or whoever may read its database anyhow asks."""

    def __init__(
        self,
        leases: Callable[[], Mapping[str, frozenset[str]]] = _no_leases,
        own: Collection[str] = (),
    ) -> None:
        self._leases = leases
        self._own = frozenset(own)

    def is_own(self, source: str) -> bool:
        return source in self._own

    def doubt(self, macs: Collection[str], source: str) -> str | None:
        """Return why a host with these MACs cannot be the one at `source`; None when it can.

        Without a lease for any of the MACs nobody can tell: it may have been set by hand.
        """
        if self.is_own(source):
            return None
        leases = self._leases()
        given = sorted(address for mac in macs for address in leases.get(mac, ()))
        if not given or source in given:
            return None
        return f"it asks from {source}, and our DHCP gave it {' or '.join(given)}"
