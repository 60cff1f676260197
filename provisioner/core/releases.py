"""What may become of a published release: deployed, promoted, or given up.

Decides over rows of the database. No I/O, no clock; signatures are `trust`'s to judge.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Final

from ..errors import Conflict, RequestError, TrustError
from .model import Json, ReleaseRow, ReleaseTest
from .versions import is_older

CHANNELS_PER_IMAGE_MAX: Final = 32


class ReleaseRevoked(TrustError):
    """The release was revoked: nothing deploys it, and what deployed it has ended."""

    code = "release_revoked"


class ReleaseUntested(TrustError):
    """The channel asks for a passed test that this release does not have."""

    code = "release_untested"


def check_standing(row: ReleaseRow) -> None:
    """Raise unless this release may be deployed: ReleaseRevoked, or Conflict for a removed one."""
    if row.revoked_at is not None:
        raise ReleaseRevoked(
            f"{row.name} was revoked",
            expected="a release in good standing",
            found=f"revoked on {row.revoked_at:%F}: {row.revoked_reason}",
            hint="choose another one: provisioner image list",
        )
    check_present(row)


def check_present(row: ReleaseRow) -> None:
    """Raise Conflict for a release that was removed."""
    if row.removed_at is not None:
        raise Conflict(
            f"{row.name} was removed, and its bytes are gone",
            expected="a release of the archive",
            found=f"removed on {row.removed_at:%F}",
            hint="publish the very same content again to bring it back",
        )


def revoked_error(row: ReleaseRow) -> Json:
    """Return why a deployment of a release ends that was revoked, as an error in JSON."""
    return {
        "code": ReleaseRevoked.code,
        "message": f"{row.name} was revoked while it was being deployed",
        "expected": "a release in good standing",
        "found": f"revoked: {row.revoked_reason}",
        "hint": "deploy another one: provisioner image list",
    }


def check_tested(row: ReleaseRow, tests: Sequence[ReleaseTest], channel: str) -> None:
    """Raise ReleaseUntested unless the newest test on each firmware that the release lists
    was passed. `tests` come newest first."""
    newest: dict[str, ReleaseTest] = {}
    for test in tests:
        for firmware in test.firmware:
            newest.setdefault(firmware, test)
    untested = [name for name in row.firmware if name not in newest]
    unhealthy = [name for name in row.firmware if name in newest and not newest[name].is_healthy]
    if untested or unhealthy:
        raise ReleaseUntested(
            f"the channel {channel} asks for a passed test, and {row.name} has none on "
            + ", ".join(untested or unhealthy),
            expected=f"passed on {', '.join(row.firmware)}",
            found={"untested": untested, "failed": unhealthy},
            hint=f"provisioner image test {row.name}",
        )


def check_own_minimum(image: str, version: str, minimum: str | None) -> None:
    """Raise RequestError for a minimum version above that of the release which declares it.

    Such a release would refuse itself, and every other one of its image.
    """
    if minimum is not None and is_older(version, minimum):
        raise RequestError(
            f"{image}@{version} cannot ask for the minimum version {minimum}, above its own",
            expected=f"{version} or older",
            found=minimum,
        )


def minimum_versions(rows: Iterable[ReleaseRow]) -> dict[str, str]:
    """Return by image the highest minimum version that a release of it declares.

    It counts from the moment when the release is published, whether anybody has deployed it
    or not: no host may be tricked back below it. A revoked release declares nothing any
    more; a removed one still does.
    """
    found: dict[str, str] = {}
    for row in rows:
        asked = row.minimum_version
        if asked is None or row.revoked_at is not None:
            continue
        known = found.get(row.image)
        if known is None or is_older(known, asked):
            found[row.image] = asked
    return found


def unused(
    rows: Iterable[ReleaseRow],
    used: Collection[str],
    *,
    keep_newest: int,
    published_before: datetime,
) -> list[ReleaseRow]:
    """Return the releases that may be given up.

    Kept are those in `used` (digests that a host, channel or unfinished operation refers
    to), the `keep_newest` newest of each image that are not revoked, and all that were
    published later than `published_before`.
    """
    by_image: dict[str, list[ReleaseRow]] = {}
    for row in rows:
        if row.removed_at is None:
            by_image.setdefault(row.image, []).append(row)
    found = []
    for releases in by_image.values():
        good = [row for row in releases if row.revoked_at is None]
        good.sort(key=lambda row: (row.published_at, row.digest), reverse=True)
        kept = {row.digest for row in good[:keep_newest]} | set(used)
        found += [
            row
            for row in releases
            if row.digest not in kept and row.published_at <= published_before
        ]
    return found
