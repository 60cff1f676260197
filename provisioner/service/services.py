"""Which services have started on this database, and on which hosts they run.

Each makes itself known when it starts, so that no other one rebuilds or restarts its host. It
is not forgotten when it stops: a host that is down for repair is no less the service's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from provisioner.core.contracts import Clock, Store
from provisioner.core.own_host import OwnHost, ServiceHost
from provisioner.errors import ConfigError, NotFound


class Services:
    """The use cases around the services on one database."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def register(self, name: str, found: OwnHost, version: str, key_id: str) -> None:
        """Save what a service that starts has found of its host, in place of what it said
        before. Nothing is saved where there is nothing to know the host by.

        Raises ConfigError for another master key than that of the other services: what these
        have sealed would not open, and their operations would be ended for that.
        """
        now = self._clock()
        service = ServiceHost(name, found, version, key_id, now)
        with self._store.begin() as tx:
            known = {one.name: one for one in tx.services()}
            before = known.pop(name, None)
            _check_key(service, known.values())
            if found.is_unknown:
                return
            tx.save_service(service)
            if before is None or replace(before, started_at=now) != service:
                detail = {
                    "uuid": found.uuid,
                    "serial": found.serial,
                    "macs": sorted(found.macs),
                    "names": sorted(found.names),
                    "version": version,
                }
                tx.audit(now, "service", "service.registered", name, detail)

    def list(self) -> Sequence[ServiceHost]:
        with self._store.read() as tx:
            return tx.services()

    def forget(self, name: str, *, actor: str) -> None:
        """Forget a service, so that its host is one like any other. One that still runs there
        goes on, and is known again when it is started the next time."""
        with self._store.begin() as tx:
            if not tx.delete_service(name):
                known = [one.name for one in tx.services()]
                raise NotFound(f"there is no service {name}", expected=known, found=name)
            tx.audit(self._clock(), actor, "service.forgotten", name, {})


def _check_key(service: ServiceHost, others: Iterable[ServiceHost]) -> None:
    strangers = sorted(one.name for one in others if one.key_id != service.key_id)
    if strangers:
        raise ConfigError(
            "another service on this database has another master key",
            expected="the keys folder of the first service, copied to every other one",
            found=strangers,
            hint="copy it; or, when that service is gone for good: "
            f"provisioner service forget {strangers[0]}",
        )
