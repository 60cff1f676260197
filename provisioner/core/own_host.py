"""Which enrolled hosts this service, and the others on its database, run on: those are never
targets. Pure: what a machine is was read by the service that runs on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
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
    """The service would rebuild or restart a host that it, or another one, runs on."""

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

    @property
    def is_unknown(self) -> bool:
        """Say whether there is nothing by which a host could be known to be this one."""
        return not (known_uuid(self.uuid) or known_serial(self.serial) or self.macs or self.names)

    def why(self, host: Host, whose: str = "this machine's") -> str | None:
        """Return by what `host` is known to be this service's own; None when it is not.

        Serials are less unique than UUIDs, so one counts only where no UUID contradicts it.
        """
        if host.name in self.names or host.id in self.names:
            return "service.own_hosts names it"
        if shared := sorted(self.macs & set(host.macs)):
            return f"it has {whose} MAC {shared[0]}"
        mine, theirs = known_uuid(self.uuid), known_uuid(host.uuid)
        if mine is not None and mine == theirs:
            return f"it has {whose} UUID {mine}"
        serial = known_serial(self.serial)
        if serial is None or serial != known_serial(host.serial):
            return None
        return None if mine and theirs else f"it has {whose} serial {host.serial}"


@dataclass(frozen=True)
class ServiceHost:
    """What a service on this database has found of the host that it runs on, when it started
    last. `name` is the service's among all that have ever started, `key_id` tells its master
    key from others and nothing about it."""

    name: str
    found: OwnHost
    version: str
    key_id: str
    started_at: datetime


@dataclass(frozen=True)
class ServiceHosts:
    """The hosts below this service and below all others on its database."""

    own: OwnHost = OwnHost()
    known: tuple[ServiceHost, ...] = ()

    def why(self, host: Host) -> str | None:
        """Return by what `host` is known to be a service's; None when it is not."""
        return next((why for why, _ in self._reasons(host)), None)

    def check(self, host: Host) -> None:
        """Raise OwnHostRefused for a host that a service runs on."""
        for why, hint in self._reasons(host):
            raise OwnHostRefused(
                f"host {host.name} runs the service, and is never a target: {why}",
                host=host.name,
                expected="a host that no service runs on",
                found=why,
                hint=hint,
            )

    def _reasons(self, host: Host) -> Iterator[tuple[str, str]]:
        if (why := self.own.why(host)) is not None:
            yield why, "move the service to another host first; it would end itself halfway"
        for one in self.known:
            if (why := one.found.why(host, "its")) is not None:
                yield (
                    f"the service {one.name} was started there: {why}",
                    "when that service has moved to another host: "
                    f"provisioner service forget {one.name}",
                )
