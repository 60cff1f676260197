"""The agent listener: HTTPS for the ramdisk's agent and the reporter. JSON in and out.

Only carries calls to `AgentSessions`, which checks every token. Logs neither bodies nor
headers: they hold tickets, tokens and nonces.
"""

from http import HTTPStatus
from typing import Any, Final, Protocol

import structlog
from flask import Flask, Response, jsonify, request

from provisioner.errors import Unavailable
from provisioner.service.agents import AgentSessions
from provisioner.service.sightings import Sightings

from .bodies import bearer, json_object, peer
from .problems import install_problems

BODY_BYTES_MAX: Final = 1024 * 1024
MACS_MAX: Final = 64
# What may have been refused because the database does not know of it any more.
REFUSED: Final = frozenset({HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT})

log = structlog.get_logger(__name__)


class AgentListener(Protocol):
    """What this listener needs; `wiring` builds it."""

    @property
    def agents(self) -> AgentSessions: ...
    @property
    def sightings(self) -> Sightings: ...


def create_app(service: AgentListener) -> Flask:
    """Return the WSGI application."""
    agents = service.agents
    app = Flask("provisioner.agent_listener", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    install_problems(app)

    @app.post("/agent/v1/hello")
    def hello() -> Response:
        return jsonify(agents.hello(json_object(), peer()))

    @app.post("/agent/v1/authorise")
    def authorise() -> Response:
        return jsonify(agents.authorise(bearer(), json_object(), peer()))

    @app.post("/agent/v1/progress")
    def progress() -> Response:
        return jsonify(agents.progress(bearer(), json_object(), peer()))

    @app.post("/agent/v1/seed")
    def seed() -> Response:
        return jsonify(agents.seed(bearer(), json_object(), peer()))

    @app.post("/agent/v1/failed")
    def failed() -> Response:
        return jsonify(agents.failed(bearer(), json_object(), peer()))

    @app.post("/agent/v1/done")
    def done() -> Response:
        return jsonify(agents.done(bearer(), json_object(), peer()))

    @app.post("/agent/v1/compared")
    def compared() -> Response:
        return jsonify(agents.compared(bearer(), json_object(), peer()))

    @app.post("/report/v1/phone-home")
    def phone_home() -> Response:
        told = agents.phone_home(json_object(), peer())
        answer = jsonify(told)
        if told["ask_again"]:
            answer.status_code = HTTPStatus.ACCEPTED
        return answer

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    @app.before_request
    def keep_body() -> None:
        request.get_data(cache=True)  # to be looked at again when it was refused

    @app.after_request
    def look_at_refused(response: Response) -> Response:
        if response.status_code in REFUSED:
            try:
                service.sightings.look(*_presented(), peer())
            except Unavailable as error:
                log.warning("a refused request was not looked at", why=error.message)
        return response

    @app.after_request
    def not_kept(response: Response) -> Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def _presented() -> tuple[list[str], list[str]]:
    """Return the secrets that the request came with, and the MACs it names."""
    body: Any = request.get_json(force=True, silent=True)
    body = body if isinstance(body, dict) else {}
    texts = [body.get("ticket"), body.get("nonce")]
    texts.append(request.headers.get("Authorization", "").partition(" ")[2].strip())
    inventory = body.get("inventory")
    nics = inventory.get("nics") if isinstance(inventory, dict) else None
    listed = nics if isinstance(nics, list) else []
    macs = [nic.get("mac") for nic in listed if isinstance(nic, dict)]
    return _texts(texts), [mac.lower() for mac in _texts(macs)[:MACS_MAX]]


def _texts(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]
