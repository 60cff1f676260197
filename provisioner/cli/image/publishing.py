"""What the commands that publish share: bounds of a release's life, and how the result looks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from provisioner.core.manifest import check_version
from provisioner.core.releases import check_own_minimum
from provisioner.errors import Conflict, NotFound, RequestError

from ..output import show_one

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.archive import ReleaseFacts

    from ..site import OpenSite

F = TypeVar("F", bound=Callable[..., Any])
_SPAN: Final = re.compile(r"(\d{1,5})([hdw])")
_UNITS: Final = {"h": "hours", "d": "days", "w": "weeks"}
_MOMENT: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Bounds:
    """What bounds a release's life, as its manifest holds it.

    `is_from_now` says that the expiry was given as a span, and so is another one each time.
    """

    expires_at: str | None = None
    minimum_version: str | None = None
    is_from_now: bool = False

    def added_to(self, facts: ReleaseFacts) -> ReleaseFacts:
        return replace(facts, expires_at=self.expires_at, minimum_version=self.minimum_version)

    def __str__(self) -> str:
        options = {"--expires-at": self.expires_at, "--minimum-version": self.minimum_version}
        given = [f"{option} {value}" for option, value in options.items() if value]
        return " ".join(given) or "neither --expires-at nor --minimum-version"


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
            help="From its publication on nothing of its image that is older than VERSION is "
            "deployed or promoted any more; VERSION may be its own.",
        ),
    ]
    wrapped: Any = command
    for option in reversed(options):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def bounds_of(
    name: str, at: str | None, span: str | None, minimum: str | None, *, now: datetime
) -> Bounds:
    """Return what the options ask for, for the release `name` (image@version).

    Raises RequestError for what contradicts itself, or could never be deployed.
    """
    image, _, version = name.partition("@")
    if minimum is not None:
        check_version(minimum)
        check_own_minimum(image, version, minimum)
    return Bounds(expiry(at, span, now=now), minimum, is_from_now=span is not None)


def settled(site: OpenSite, name: str, asked: Bounds) -> Bounds:
    """Return the bounds to publish with, before any work: those of a version that is
    published already stay as they are.

    A span from now then means the moment that it meant the first time. Raises Conflict when
    the options ask for anything else.
    """
    known = _published_bounds(site, name)
    if known is None:
        return asked
    same = Bounds(
        known.expires_at if asked.is_from_now and known.expires_at else asked.expires_at,
        asked.minimum_version,
    )
    if same != known:
        raise Conflict(
            f"{name} is published already, with other bounds",
            expected=str(known),
            found=str(same),
            hint="give the options as they were then, or choose a new version",
        )
    return known


def _published_bounds(site: OpenSite, name: str) -> Bounds | None:
    """Return the bounds of a release, also of one that was removed; None when there is none."""
    image, _, version = name.partition("@")
    # The archive first: a publisher that was killed may not have told the database.
    if (manifest := site.archive.find(image, version)) is not None:
        return Bounds(manifest.expires_at, manifest.minimum_version)
    try:
        row = site.service.releases.show(name)
    except NotFound:
        return None
    until = row.expires_at.strftime(_MOMENT) if row.expires_at else None
    return Bounds(until, row.minimum_version)


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
    return moment.astimezone(UTC).strftime(_MOMENT)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        # In UTC a date at either end of the calendar may be beyond it.
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise RequestError(
            "--expires-at is not a date", expected="2027-03-01 or 2027-03-01T12:00:00Z", found=text
        ) from error


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
