"""What the commands that publish share: bounds of a release's life, and how the result looks."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from provisioner.errors import RequestError

from ..output import show_one

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest

F = TypeVar("F", bound=Callable[..., Any])
_SPAN: Final = re.compile(r"(\d{1,5})([hdw])")
_UNITS: Final = {"h": "hours", "d": "days", "w": "weeks"}


def bound_options(command: F) -> F:
    """Add the options that bound a release's life: --expires-at, -in, --minimum-version."""
    options = [
        click.option(
            "--expires-at",
            metavar="DATE",
            help="From then on it is not deployed any more: 2027-03-01, or with a time in UTC.",
        ),
        click.option("--expires-in", metavar="SPAN", help="The same, from now on: 90d, 12w, 36h."),
        click.option(
            "--minimum-version",
            metavar="VERSION",
            help="Once it is deployed, nothing older than VERSION is, on its image.",
        ),
    ]
    wrapped: Any = command
    for option in reversed(options):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def expiry(at: str | None, span: str | None, *, now: datetime) -> str | None:
    """Return the moment that the options ask for, as a manifest holds it, or None.

    Raises RequestError for both at once, for what is no date or span, and for the past.
    """
    if at and span:
        raise RequestError("--expires-at and --expires-in say the same", expected="one of them")
    moment = _moment(at) if at else now + _span(span) if span else None
    if moment is None:
        return None
    if moment <= now:
        raise RequestError("the release would have expired already", found=at or span)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise RequestError(
            "--expires-at is not a date", expected="2027-03-01 or 2027-03-01T12:00:00Z", found=text
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _span(text: str) -> timedelta:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise RequestError("--expires-in is not a span", expected="90d, 12w or 36h", found=text)
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def show_published(manifest: Manifest, output: str) -> None:
    """Print what a person wants to know of a release that was just published."""
    row = {
        "name": manifest.name,
        "digest": manifest.digest,
        "size_bytes": manifest.size_bytes,
        "used_bytes": manifest.used_bytes,
        "firmware": list(manifest.firmware),
        "parent": manifest.parent,
        "packages": len(manifest.packages),
        "expires_at": manifest.expires_at,
        "release_id": manifest.release_id,
    }
    show_one(row, output)
