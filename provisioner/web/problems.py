"""Errors as problem+json (RFC 9457), for every listener alike. Decides no status: the
error classes carry theirs."""

import json
from http import HTTPStatus
from typing import Any, Final

import structlog
from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException

from provisioner.errors import (
    ConfigError,
    DeviceError,
    ProvisionerError,
    RequestError,
    TrustError,
)

CONTENT_TYPE: Final = "application/problem+json"
# Who must act, as the type of the problem: a client that does not know a code knows this.
_FAMILIES: Final = (RequestError, DeviceError, TrustError, ConfigError)
_TYPE: Final = "urn:provisioner:error:"
BUG: Final = "bug"
# What is unavailable is so for as long as a restart or a lock takes, most of the time.
RETRY_AFTER_S: Final = 5

log = structlog.get_logger(__name__)


def problem_body(error: ProvisionerError) -> dict[str, Any]:
    """Return the members of the problem; those that are not known are left out."""
    family = next((kind.code for kind in _FAMILIES if isinstance(error, kind)), BUG)
    parts = error.as_dict()
    detail = parts.pop("message")
    return {
        "type": _TYPE + family,
        "title": _phrase(error.status),
        "status": error.status,
        "detail": detail,
        **parts,
    }


def problem_response(error: ProvisionerError) -> Response:
    return _response(error.status, problem_body(error))


class _Json(DefaultJSONProvider):
    """JSON as Flask reads and writes it, but a body that is nested too deeply is the
    sender's mistake, and keys stay in the order in which we wrote them."""

    sort_keys = False

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        try:
            return super().loads(s, **kwargs)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def install_problems(app: Flask) -> None:
    """Make every error of `app` a problem, and every unexpected one a logged 500."""
    app.json = _Json(app)
    app.register_error_handler(ProvisionerError, _expected)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def _expected(error: ProvisionerError) -> Response:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("request failed", path=_rule(), code=error.code, error=error.message)
    return problem_response(error)


def _http(error: HTTPException) -> Response:
    return refusal(error.code or HTTPStatus.INTERNAL_SERVER_ERROR, error.description)


def refusal(status: int, detail: str | None) -> Response:
    """Return the problem for a framework's own refusal: no such path, method not allowed,
    body too large."""
    if status == HTTPStatus.NOT_FOUND:
        # The framework's own sentence speaks to somebody who types URLs into a browser.
        detail = "this listener has nothing at that path"
    codes: dict[int, str] = {
        HTTPStatus.NOT_FOUND: "not_found",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    }
    body = {
        "type": _TYPE + "request",
        "title": _phrase(status),
        "status": status,
        "detail": detail or _phrase(status),
        "code": codes.get(status, "request"),
    }
    if status == HTTPStatus.NOT_FOUND:
        body["hint"] = "is this the right URL? the API is at api.listen, under /api/v1"
    return _response(status, body)


def _unexpected(error: Exception) -> Response:
    # The top of the server: our own bug. The trace goes to the log, never to the caller.
    log.error("bug in a request", path=_rule(), method=request.method, exc_info=error)
    body = {
        "type": _TYPE + BUG,
        "title": _phrase(HTTPStatus.INTERNAL_SERVER_ERROR),
        "status": int(HTTPStatus.INTERNAL_SERVER_ERROR),
        "detail": "this is a bug of the service; its log holds the trace",
        "code": BUG,
    }
    return _response(HTTPStatus.INTERNAL_SERVER_ERROR, body)


def _rule() -> str:
    """The route's pattern, never the path itself: some paths hold tokens."""
    return request.url_rule.rule if request.url_rule is not None else "(no route)"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _response(status: int, body: dict[str, Any]) -> Response:
    response = Response(json.dumps(body, default=str), int(status), content_type=CONTENT_TYPE)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="provisioner"'
    return response
