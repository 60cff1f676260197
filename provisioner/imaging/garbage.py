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

    Raises Conflict while somebody publishes, and when a release to keep cannot be read:
    what it needs is then not known, so nothing goes.
    """
    with archive.locked():
        kept = set(keep())
        found = archive.digests()
        gone = [digest for digest in found if digest not in kept]
        needed: set[str] = set()
        for digest in kept & set(found):
            needed |= _needed(archive, digest)
        removed = [
            *_files_of(archive, gone),
            *_leftovers(archive, found),
            *_names_of_none(archive, kept & set(found)),
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
