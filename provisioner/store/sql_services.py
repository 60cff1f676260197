"""The hosts that services on this database run on, and the clock they share, in SQL."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import func, select

from ..core.own_host import OwnHost, ServiceHost
from .rows import Row
from .sql import Queries
from .tables import services

_CLOCK: Final = select(func.clock_timestamp())  # now() is when the transaction began
_ALL: Final = select(services).order_by(services.c.name)


class ServiceQueries(Queries):
    def clock(self) -> datetime | None:
        if self._is_sqlite:
            return None
        now: datetime = self._connection.execute(_CLOCK).scalar_one()
        return now.astimezone(UTC)

    def save_service(self, service: ServiceHost) -> None:
        found = service.found
        row = {
            "name": service.name,
            "uuid": found.uuid,
            "serial": found.serial,
            "macs": sorted(found.macs),
            "names": sorted(found.names),
            "version": service.version,
            "key_id": service.key_id,
            "started_at": service.started_at,
        }
        self._put(services, row)

    def services(self) -> Sequence[ServiceHost]:
        return [_service_of(row) for row in self._all(_ALL)]

    def delete_service(self, name: str) -> bool:
        return self._change(services.delete().where(services.c.name == name)) > 0


def _service_of(row: Row) -> ServiceHost:
    found = OwnHost(row["uuid"], row["serial"], frozenset(row["macs"]), frozenset(row["names"]))
    return ServiceHost(row["name"], found, row["version"], row["key_id"], row["started_at"])
