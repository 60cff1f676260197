"""Routes of the services on one database, whose hosts are never targets."""

from datetime import datetime
from typing import Any

from apiflask import APIBlueprint
from pydantic import BaseModel

from provisioner.core.own_host import ServiceHost

from .auth import Verb, needs
from .services import ApiServices

Shown = dict[str, Any]


class ServiceHostOut(BaseModel):
    """A service, and what it found of the host that it runs on when it started last. `key_id`
    tells its master key from others."""

    name: str
    uuid: str | None
    serial: str | None
    macs: list[str]
    own_hosts: list[str]
    version: str
    key_id: str
    started_at: datetime


class ServicesOut(BaseModel):
    services: list[ServiceHostOut]


def peer_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /services."""
    api = APIBlueprint("services", __name__, tag="services")
    peers = services.services

    @api.get("/services")
    @api.output(ServicesOut)
    @needs(Verb.READ)
    def list_services() -> Shown:
        """List the services that have started on this database, with the hosts they run on."""
        return {"services": [_shown(one) for one in peers.list()]}

    return api


def _shown(service: ServiceHost) -> Shown:
    found = service.found
    return {
        "name": service.name,
        "uuid": found.uuid,
        "serial": found.serial,
        "macs": sorted(found.macs),
        "own_hosts": sorted(found.names),
        "version": service.version,
        "key_id": service.key_id,
        "started_at": service.started_at,
    }
