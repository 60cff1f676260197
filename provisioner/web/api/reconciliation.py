"""Routes of the way out of observing, and how every answer tells that we only observe."""

from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

from apiflask import APIBlueprint, APIFlask
from flask import Response, request
from pydantic import BaseModel, Field

from provisioner.core.contracts import Store
from provisioner.errors import Unavailable
from provisioner.service.reconciliation import Plan

from .auth import Verb, actor, needs
from .services import ApiServices

OBSERVES: Final = "Provisioner-Observe-Only"


class SightingOut(BaseModel):
    """What proved that the database is older: `kind` is mark, ticket, token or nonce."""

    kind: str
    at: datetime
    source: str
    operation_id: str | None
    generation: int | None
    host_id: str | None
    detail: dict[str, Any]


class HostPlanOut(BaseModel):
    """What is known of a host here, what was seen ahead of it, and what becomes of it."""

    host: str
    state: str
    state_then: str
    generation: int
    generation_seen: int | None
    generation_then: int
    operation: str | None
    phase: str | None


class ReconciliationOut(BaseModel):
    is_observing: bool
    digest: str
    sightings: list[SightingOut]
    hosts: list[HostPlanOut]


class ReconciliationIn(BaseModel):
    digest: str = Field(min_length=64, max_length=64, description="of the plan that was shown")


def reconciliation_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /reconciliation."""
    api = APIBlueprint("reconciliation", __name__, tag="reconciliation")
    reconciliation = services.reconciliation

    @api.get("/reconciliation")
    @api.output(ReconciliationOut)
    @needs(Verb.READ)
    def show_plan() -> dict[str, Any]:
        """Show what a restored database does not know, and what applying the plan would do."""
        return _shown(reconciliation.plan())

    @api.post("/reconciliation")
    @api.input(ReconciliationIn)
    @api.output(ReconciliationOut)
    @needs(Verb.ADMINISTER)
    def apply_plan(json_data: ReconciliationIn) -> dict[str, Any]:
        """Carry out exactly the plan of that digest, and go on working."""
        return _shown(reconciliation.apply(json_data.digest, actor=actor()))

    return api


def _shown(plan: Plan) -> dict[str, Any]:
    return {
        "is_observing": plan.is_observing,
        "digest": plan.digest,
        "sightings": [asdict(one) for one in plan.sightings],
        "hosts": [asdict(one) for one in plan.hosts],
    }


def install_notice(app: APIFlask, store: Store) -> None:
    """Say with every answer below /api, when it is so, that this service only observes."""

    @app.after_request
    def notice(response: Response) -> Response:
        if request.path.startswith("/api/") and response.status_code < 500:
            try:
                with store.read() as tx:
                    is_observing = tx.is_observing()
            except Unavailable:
                return response  # the next answer says it
            if is_observing:
                response.headers[OBSERVES] = "the database was restored; see /reconciliation"
        return response
