"""What every listener reads the same way: the bearer token, a JSON body, the peer."""

from typing import Any, Final

from flask import request

from provisioner.errors import RequestError, TrustError

BEARER_CHARACTERS_MAX: Final = 512


class NoToken(TrustError):
    """The request carries no bearer token."""

    code = "not_authenticated"
    status = 401


def bearer() -> str:
    """Return the bearer token of the request. Raises NoToken, a 401, when there is none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip() or len(token) > BEARER_CHARACTERS_MAX:
        raise NoToken("the request carries no bearer token", expected="Authorization: Bearer TOKEN")
    return token.strip()


def json_object() -> dict[str, Any]:
    """Return the body, which must be a JSON object, whatever its content type says."""
    # `force`, because busybox and iPXE send whatever content type they like.
    body = request.get_json(force=True, cache=False)
    if not isinstance(body, dict):
        raise RequestError(
            "the body is not a JSON object", expected="{…}", found=type(body).__name__
        )
    return body


def peer() -> str:
    """Return the address of the socket's other end. Forwarding headers are anyone's to
    write, so they are not looked at."""
    return request.environ.get("REMOTE_ADDR") or "unknown"
