"""The agent listener: HTTPS for the ramdisk's agent and the reporter. JSON in and out.

Only carries calls to `AgentSessions`, which checks every token. Logs neither bodies nor
headers: they hold tickets, tokens and nonces.
"""

from typing import Final, Protocol

from flask import Flask, Response, jsonify

from provisioner.service.agents import AgentSessions

from .bodies import bearer, json_object, peer
from .problems import install_problems

BODY_BYTES_MAX: Final = 1024 * 1024


class AgentListener(Protocol):
    """What this listener needs; `wiring` builds it."""

    @property
    def agents(self) -> AgentSessions: ...


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
        return jsonify(agents.authorise(bearer(), json_object()))

    @app.post("/agent/v1/progress")
    def progress() -> Response:
        return jsonify(agents.progress(bearer(), json_object()))

    @app.post("/agent/v1/seed")
    def seed() -> Response:
        return jsonify(agents.seed(bearer(), json_object()))

    @app.post("/agent/v1/failed")
    def failed() -> Response:
        return jsonify(agents.failed(bearer(), json_object()))

    @app.post("/agent/v1/done")
    def done() -> Response:
        return jsonify(agents.done(bearer(), json_object()))

    @app.post("/agent/v1/compared")
    def compared() -> Response:
        return jsonify(agents.compared(bearer(), json_object()))

    @app.post("/report/v1/phone-home")
    def phone_home() -> Response:
        return jsonify(agents.phone_home(json_object(), peer()))

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    @app.after_request
    def not_kept(response: Response) -> Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    return app
