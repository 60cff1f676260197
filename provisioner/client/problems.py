"""Turns problem+json back into the error that the service raised, exit code and all."""

from collections.abc import Iterator
from typing import Any, Final

import httpx

from provisioner.errors import (
    ConfigError,
    DeviceError,
    ProvisionerError,
    RequestError,
    TrustError,
    Unavailable,
)

CONTENT_TYPE: Final = "application/problem+json"
_FAMILY: Final[dict[str, type[ProvisionerError]]] = {
    "urn:provisioner:error:request": RequestError,
    "urn:provisioner:error:device": DeviceError,
    "urn:provisioner:error:trust": TrustError,
    "urn:provisioner:error:configuration": ConfigError,
}
_UNAVAILABLE: Final = 503


class RemoteError(ProvisionerError):
    """The service failed in a way that it has no words for: a bug, in its log."""

    code = "bug"


def error_from(status: int, body: dict[str, Any]) -> ProvisionerError:
    """Return the error for a problem: its own class where we know the code, else the class
    of who must act."""
    code = str(body.get("code", ""))
    known = {kind.code: kind for kind in _all_kinds(ProvisionerError)}
    kind = known.get(code) or _FAMILY.get(str(body.get("type")), RemoteError)
    if status == _UNAVAILABLE and kind.exit_code != Unavailable.exit_code:
        kind = Unavailable
    error = kind(
        str(body.get("detail") or body.get("title") or f"HTTP status {status}"),
        host=body.get("host"),
        expected=body.get("expected"),
        found=body.get("found"),
        hint=body.get("hint"),
    )
    # A code that only the service knows is still shown as it came.
    error.code = code or kind.code  # type: ignore[misc]  # shadows the class's, for this one
    error.status = status  # type: ignore[misc]  # likewise shadows
    return error


def error_of(response: httpx.Response) -> ProvisionerError:
    """Return the error that the service answered with, or what else it is that answers."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and "code" in body:
        return error_from(response.status_code, body)
    # A gateway's own page may go away; a page of something else will not.
    kind = Unavailable if response.is_server_error else RequestError
    return kind(
        "what answers there is not the provisioner's API",
        expected="a problem in JSON",
        found=f"HTTP status {response.status_code} from {response.url}",
        hint="is this the URL of the service's API (api.listen)?",
    )


def no_answer(url: str, error: httpx.TransportError) -> Unavailable:
    """Return the error for a service that does not answer."""
    return Unavailable(
        f"the service at {url} does not answer",
        found=str(error) or type(error).__name__,
        hint="is it running (`provisioner serve`), and is this its URL?",
    )


def checked_token(token: str) -> str:
    """Return a token that fits into a header. Raises RequestError, which does not show it:
    the library's own error would."""
    if not token or not all("!" <= one <= "~" for one in token):
        raise RequestError(
            "the API token is not one",
            expected="one line of printable ASCII characters, without spaces",
            found="something else" if token else "nothing",
        )
    return token


def _all_kinds(kind: type[ProvisionerError]) -> Iterator[type[ProvisionerError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _all_kinds(child)
