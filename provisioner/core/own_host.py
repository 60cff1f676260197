"""Which enrolled host this service runs on: that one is never a target. Pure: what this
machine is was read by whoever builds the service."""

from dataclasses import dataclass
from typing import Final

from ..errors import Conflict
from .model import Host

# Firmware that was never given an identity reports one of these; they identify nobody.
EMPTY_UUIDS: Final = frozenset(
    {"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"}
)
# "Not specified" and the like, as board makers leave it.
EMPTY_SERIALS: Final = frozenset(
    {"", "none", "not specified", "to be filled by o.e.m.", "default string", "0123456789"}
)


class OwnHostRefused(Conflict):
    """The service would rebuild or restart the host that it runs on."""

    code = "own_host"


def known_uuid(text: str | None) -> str | None:
    """Return a UUID in one spelling, or None for one that identifies nobody."""
    uuid = (text or "").strip().lower()
    return uuid if uuid and uuid not in EMPTY_UUIDS else None


def known_serial(text: str | None) -> str | None:
    """Return a serial in one spelling, or None for one that identifies nobody."""
    serial = (text or "").strip().lower()
    return serial if serial not in EMPTY_SERIALS else None


@dataclass(frozen=True)
class OwnHost:
    """What is known of the host below this service. `names` are the names or ids that the
    settings add: hosts that a person says are needed, whatever this machine finds of itself."""

    uuid: str | None = None
    serial: str | None = None
    macs: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def why(self, host: Host) -> str | None:
        """Return by what `host` is known to be this service's own; None when it is not.

        Serials are less unique than UUIDs, so one counts only where no UUID contradicts it.
        """
        if host.name in self.names or host.id in self.names:
            return "service.own_hosts names it"
        if shared := sorted(self.macs & set(host.macs)):
            return f"it has this machine's MAC {shared[0]}"
        mine, theirs = known_uuid(self.uuid), known_uuid(host.uuid)
        if mine is not None and mine == theirs:
            return f"it has this machine's UUID {mine}"
        serial = known_serial(self.serial)
        if serial is None or serial != known_serial(host.serial):
            return None
        return None if mine and theirs else f"it has this machine's serial {host.serial}"

    def check(self, host: Host) -> None:
        """Raise OwnHostRefused for this service's own host."""
        if (why := self.why(host)) is not None:
            raise OwnHostRefused(
                f"host {host.name} runs this service, and is never a target: {why}",
                host=host.name,
                expected="another host than the service's own",
                found=why,
                hint="move the service to another host first; it would end itself halfway",
            )
