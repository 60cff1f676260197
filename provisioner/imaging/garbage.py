"""Remove what nothing refers to: releases that were given up, what killed publishers left,
and chunks of no release.

Who decides which releases are kept is the service; this only does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from provisioner.errors import Conflict, NotFound, TrustError
from provisioner.imaging.archive import MANIFEST, Archive, folder_of

# So many missing releases are named at once.
TOLD_MAX: Final = 20
_CHUNKS: Final = "chunks/"
_RELEASES: Final = "releases/"
_NAMES: Final = "names/"


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be: digests of releases, a count of chunks, their bytes."""

    releases: tuple[str, ...]
    chunks: int
    freed_bytes: int


def collect(
    archive: Archive,
    keep: Callable[[], Collection[str]],
    *,
    dry_run: bool = False,
) -> Collected:
    """Remove all releases but those to keep, and then every chunk that none of these needs.

    keep is asked for the digests under the archive's lock, so that a release that is being
    published is either seen whole or not begun. A removed release loses its manifest first:
    a kill in the middle leaves files, names and chunks of no release, which the next run removes.
    By whom a kept release is signed does not matter here.

    Raises Unavailable while somebody publishes, and Conflict when a release to keep is not in
    the archive or cannot be read: what it needs is then not known, so nothing goes.
    """
    with archive.locked():
        kept = set(keep())
        found = archive.digests()
        # Without its manifest a release looks like what a killed publisher left.
        if missing := sorted(kept - set(found)):
            raise _missing(archive, missing)
        gone = [digest for digest in found if digest not in kept]
        needed: set[str] = set()
        for digest in kept:
            needed |= _needed(archive, digest)
        removed = [
            *_files_of(archive, gone),
            *_leftovers(archive, found),
            *_names_of_none(archive, kept),
        ]
        chunks = [
            (name, size)
            for name, size in archive.blobs.sizes(_CHUNKS)
            if name.rpartition("/")[2] not in needed
        ]
        if not dry_run:
            for name, _ in (*removed, *chunks):
                archive.blobs.delete(name)
    return Collected(tuple(gone), len(chunks), sum(size for _, size in (*removed, *chunks)))


def _missing(archive: Archive, digests: list[str]) -> Conflict:
    """Return the refusal for releases to keep whose manifests the archive does not hold."""
    names = {archive.digest_under(name): name for name, _ in archive.blobs.sizes(_NAMES)}
    told = [
        f"{'@'.join(names[one].split('/')[1:])} ({one})" if one in names else one for one in digests
    ]
    more = len(told) - TOLD_MAX
    return Conflict(
        "releases that are to be kept are not in the archive, so nothing was removed",
        expected=f"a {MANIFEST} of each in {archive.blobs.place}",
        found="none of " + ", ".join(told[:TOLD_MAX]) + (f" and {more} more" if more > 0 else ""),
        hint=f"restore {MANIFEST} from a backup, or import the release from a bundle again; "
        "or give it up: let nothing refer to it, and keep fewer with --keep",
    )


def _needed(archive: Archive, digest: str) -> frozenset[str]:
    try:
        return archive.by_digest(digest).distinct_chunks
    except (TrustError, NotFound) as error:
        raise Conflict(
            f"release {digest} is to be kept and cannot be read, so nothing was removed",
            found=error.message,
            hint="provisioner image verify --all",
        ) from error


def _files_of(archive: Archive, gone: list[str]) -> list[tuple[str, int]]:
    """Return the files of these releases, each one's manifest first."""
    found = []
    for digest in gone:
        files = archive.blobs.sizes(f"{folder_of(digest)}/")
        found += sorted(files, key=lambda file: not file[0].endswith(f"/{MANIFEST}"))
    return found


def _leftovers(archive: Archive, digests: list[str]) -> list[tuple[str, int]]:
    """Return the files of releases without a manifest, which nobody publishes now."""
    whole = set(digests)
    return [one for one in archive.blobs.sizes(_RELEASES) if one[0].split("/")[1] not in whole]


def _names_of_none(archive: Archive, kept: set[str]) -> list[tuple[str, int]]:
    """Return the names that stand for no release any more."""
    found = archive.blobs.sizes(_NAMES)
    return [one for one in found if archive.digest_under(one[0]) not in kept]
