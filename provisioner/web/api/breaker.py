"""Routes of the breaker: whether anything may start, and closing it."""

from dataclasses import asdict
from typing import Any

from apiflask import APIBlueprint

from provisioner.core.fleet import Breaker

from .auth import Verb, actor, needs
from .schemas import BreakerCloseIn, BreakerOut
from .services import ApiServices

Shown = dict[str, Any]


def breaker_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /breaker."""
    api = APIBlueprint("breaker", __name__, tag="breaker")
    breakers = services.breakers

    @api.get("/breaker")
    @api.output(BreakerOut)
    @needs(Verb.READ)
    def show_breaker() -> Shown:
        """Show whether the breaker is open: then nothing starts until a person closes it."""
        return _shown(breakers.show())

    @api.post("/breaker/close")
    @api.input(BreakerCloseIn)
    @api.output(BreakerOut)
    @needs(Verb.OPERATE)
    def close_breaker(json_data: BreakerCloseIn) -> Shown:
        """Let queued operations start again."""
        return _shown(breakers.close(json_data.reason, actor=actor()))

    return api


def _shown(breaker: Breaker) -> Shown:
    return {**asdict(breaker), "is_open": breaker.is_open}
