"""Turns problem+json back into the error that the service raised, exit code and all."""

from collections.abc import Iterator
from typing import Any, Final

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


def _all_kinds(kind: type[ProvisionerError]) -> Iterator[type[ProvisionerError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _all_kinds(child)
