"""The operator API: routes under /api/v1, OpenAPI at /openapi.json, /healthz, /metrics.

Puts the parts together; every use case is a service's.
"""

import threading
from typing import Any, Final

from apiflask import APIFlask
from apiflask.exceptions import HTTPError
from flask import Response, jsonify, request

from provisioner.errors import ProvisionerError, RequestError
from provisioner.service.observing import HINT, WHY, ObserveOnly

from ..problems import install_problems, problem_response, refusal
from .access import access_routes
from .auth import Verb, install_auth, needs
from .breaker import breaker_routes
from .hosts import host_routes
from .idempotency import install_idempotency
from .metrics import install_metrics
from .operations import operation_routes
from .peers import peer_routes
from .profiles import profile_routes
from .reconciliation import install_notice, reconciliation_routes
from .releases import release_routes
from .schemas import ProblemOut
from .services import ApiServices

PREFIX: Final = "/api/v1"
API_VERSION: Final = "1"
BODY_BYTES_MAX: Final = 8 * 1024 * 1024  # an import of ten thousand hosts is about 4 MB
NAME_CHARACTERS_SHOWN: Final = 63
ABOUT: Final = (
    "This is a provisioner: it rebuilds servers from signed golden images.\n"
    "The API is described at /openapi.json; the command line is `provisioner`.\n"
)


def create_app(services: ApiServices, *, stopping: threading.Event | None = None) -> APIFlask:
    """Return the WSGI application. Streams end when `stopping` is set."""
    app = APIFlask(
        "provisioner.api",
        title="provisioner",
        version=API_VERSION,
        static_folder=None,  # type: ignore[arg-type]  # as Flask, which takes None
        json_errors=False,
        docs_path=None,
    )
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    _describe(app)
    install_problems(app)
    app.error_processor(_problem)
    install_metrics(app, services.store)
    install_auth(app, services.tokens)
    install_idempotency(app, services.store)
    install_notice(app, services.store)
    for routes in (
        host_routes(services),
        operation_routes(services, stopping or threading.Event()),
        release_routes(services),
        profile_routes(services),
        access_routes(services),
        breaker_routes(services),
        peer_routes(services),
        reconciliation_routes(services),
    ):
        app.register_blueprint(routes, url_prefix=PREFIX)
    _add_health(app, services)
    return app


def _describe(app: APIFlask) -> None:
    app.info = {"description": ABOUT}
    app.security_schemes = {"token": {"type": "http", "scheme": "bearer"}}
    app.config["VALIDATION_ERROR_STATUS_CODE"] = RequestError.status
    problem = ProblemOut.model_json_schema()
    app.config["VALIDATION_ERROR_SCHEMA"] = problem
    app.config["HTTP_ERROR_SCHEMA"] = problem
    app.config["AUTO_404_RESPONSE"] = True

    @app.spec_processor
    def everything_needs_a_token(spec: dict[Any, Any] | str) -> dict[Any, Any] | str:
        assert isinstance(spec, dict)  # the format is JSON
        spec["security"] = [{"token": []}]
        return spec

    app.view_functions["openapi.spec"] = needs(Verb.PUBLIC)(app.view_functions["openapi.spec"])


def _problem(error: HTTPError) -> Response:
    """Turn the framework's own refusal, a body or query that does not fit, into a problem."""
    detail = error.detail if isinstance(error.detail, dict) else {}
    if not detail:
        return refusal(error.status_code, error.message)
    wrong = dict.fromkeys(
        f"{_place(place)}: {' '.join(texts) if isinstance(texts, list) else texts}"
        for fields in detail.values()
        if isinstance(fields, dict)
        for place, texts in fields.items()
    )
    misfit = RequestError(
        "the request does not fit: " + "; ".join(wrong),
        hint="see /openapi.json for what each route takes",
    )
    return problem_response(misfit)


def _place(place: str) -> str:
    """Return where in the request something is wrong: of many hosts, which one by its name."""
    # Behind the path of a value that may be of several types stands how each was tried.
    path = place.partition(".lax-or-strict")[0]
    first, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    if first != "hosts" or not number.isdecimal():
        return path
    body = request.get_json(silent=True)
    hosts = body.get("hosts") if isinstance(body, dict) else None
    one = hosts[int(number)] if isinstance(hosts, list) and int(number) < len(hosts) else None
    name = one.get("name") if isinstance(one, dict) else None
    return f"{path} (host {name[:NAME_CHARACTERS_SHOWN]})" if isinstance(name, str) else path


def _add_health(app: APIFlask, services: ApiServices) -> None:
    @app.get("/")
    @app.doc(hide=True)
    @needs(Verb.PUBLIC)
    def about() -> Response:
        return Response(ABOUT, content_type="text/plain; charset=utf-8")

    @app.get("/healthz")
    @app.doc(summary="Whether the API and its database answer", security=[])
    @needs(Verb.PUBLIC)
    def healthz() -> Response:
        try:
            with services.store.read() as tx:
                tx.count_operations([])
                is_observing = tx.is_observing()
        except ProvisionerError as error:
            return problem_response(error)
        if is_observing:
            # It answers, so it is not to be taken out of service: a person has to ask it.
            return jsonify(status=ObserveOnly.code, detail=WHY, hint=HINT)
        return jsonify(status="ok")
